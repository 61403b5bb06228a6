"""The strategy worker on a fitted extractor: alignments, codes and token credits against slow readings of the rules."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from run_rows import fresh_rng

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.records import Rollout, TokenCredit
from tutorloop.lab import model_path, rows
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.strategies.embedding import make_embedder
from tutorloop.verifier_service.strategies.fit import fit
from tutorloop.verifier_service.strategies.segments import StepLimits, pieces_of, segment
from tutorloop.verifier_service.strategies.solutions import Problem, Solutions
from tutorloop.verifier_service.strategies.worker import StrategyWorker

TOKENIZER = load_tokenizer(str(model_path("student")))
LIMITS = StepLimits(least=1, most=40)
PROBLEMS = [row for row in rows("train") if len(row["solution"].splitlines()) >= 4][:60]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> StrategyWorker:
    folder = tmp_path_factory.mktemp("strategies") / "made"
    problems = [Problem(row["id"], row["prompt"], [row["solution"]]) for row in PROBLEMS]
    fit(problems, make_embedder("hidden:lab:teacher"), TOKENIZER, folder, limits=LIMITS, codes=8, width=32)
    return StrategyWorker(path=str(folder), tokenizer=str(model_path("student")))


def rollout(text: str, prompt_id: str, group: str = "g", number: int = 0, ids: np.ndarray | None = None) -> Rollout:
    prompt = np.array([5, 6], np.int32)
    response = np.array(TOKENIZER(text)["input_ids"], np.int32) if ids is None else ids
    return Rollout(
        rollout_id=f"{group}-{number}",
        prompt_id=prompt_id,
        group_id=group,
        sample_index=number,
        token_ids=np.concatenate([prompt, response]),
        prompt_length=2,
        text=text,
        logprobs=np.zeros(len(response), np.float32),
        loss_mask=np.ones(len(response), bool),
    )


def aligned(worker: StrategyWorker, rollouts: list[Rollout], **given):
    batch, receipt = worker.align(encode(Rollout, rollouts), **given)
    return decode(TokenCredit, batch), receipt


def test_the_teachers_own_solution_is_followed_best(worker: StrategyWorker) -> None:
    """Against solutions of problems of other operations: with numbers taken out, those of the same ones read alike."""
    others = [next(one for one in PROBLEMS if marks(one) != marks(row)) for row in PROBLEMS[:20]]
    own = [rollout(row["solution"], row["id"], row["id"]) for row in PROBLEMS[:20]]
    strange = [rollout(other["solution"], row["id"], row["id"]) for other, row in zip(others, PROBLEMS, strict=False)]
    (_, mine), (_, theirs) = aligned(worker, own), aligned(worker, strange)
    for best, value in zip(mine.alignments, theirs.alignments, strict=True):
        assert best is not None and value is not None and 0 < value < best <= 1
    assert mine.version == worker.extractor.version and mine.rows == 20


def cost(u: np.ndarray, z: np.ndarray) -> np.ndarray:
    found = np.zeros((len(u), len(z)))
    for i, a in enumerate(u.astype(float)):
        for j, b in enumerate(z.astype(float)):
            place = abs((i + 0.5) / len(u) - (j + 0.5) / len(z))
            found[i, j] = (1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / 2 + 0.1 * place
    return found


def transport(c: np.ndarray, epsilon: float = 0.05) -> np.ndarray:
    """Entropic, by plain Sinkhorn."""
    kernel = np.exp(-c / epsilon)
    a, b = np.full(len(c), 1 / len(c)), np.full(c.shape[1], 1 / c.shape[1])
    v = np.ones_like(b)
    for _ in range(20_000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


def shaped(u: np.ndarray, z: np.ndarray, kappa: float = 0.3) -> list[float]:
    cosines = u.astype(float) @ z.astype(float).T
    covered = [0.0]
    for i in range(len(u)):
        best = cosines[: i + 1].max(0)
        covered.append(float(np.mean(np.maximum(best - kappa, 0) / (1 - kappa))))
    covered[-1] = 0.0  # at the end nothing is left to earn
    return [after - before for before, after in itertools.pairwise(covered)]


def test_credits_are_those_of_the_formulas(worker: StrategyWorker) -> None:
    rng = fresh_rng()
    chosen = [PROBLEMS[i] for i in rng.choice(len(PROBLEMS), 6, replace=False)]
    texts = [PROBLEMS[i]["solution"] for i in rng.choice(len(PROBLEMS), 6)]
    rollouts = [rollout(text, row["id"], row["id"]) for text, row in zip(texts, chosen, strict=True)]
    credits, receipt = aligned(worker, rollouts)
    plain, _ = aligned(worker, rollouts, shaping=False)
    for one, row, credit, unshaped, found, codes in zip(
        rollouts, chosen, credits, plain, receipt.alignments, receipt.codes, strict=True
    ):
        steps = segment(pieces_of(TOKENIZER, one.token_ids[2:]), LIMITS)
        (encoded,) = worker.extractor.encode([[step.text for step in steps]])
        (taught,) = worker.solutions.of(row["id"])
        c = cost(encoded.vectors, taught)
        p = transport(c)
        assert found == pytest.approx(math.exp(-(p * c).sum() / 0.25), rel=1e-6)
        own = len(steps) * (p * (1 - c)).sum(1)
        moved = shaped(encoded.vectors, taught)
        expected = np.zeros(one.response_length)
        for step, value, gain in zip(steps, own, moved, strict=True):
            expected[step.start : step.end] = 0.2 * (value - own.mean()) + gain / (step.end - step.start)
        np.testing.assert_allclose(credit.values, expected, atol=2e-6)
        assert abs(float((credit.values - unshaped.values).sum(dtype=np.float64))) < 1e-5, "shaping sums to 0"
        assert codes == tuple(encoded.codes.tolist()) and credit.service == "strategies"


def test_what_cannot_be_compared_is_neutral(worker: StrategyWorker) -> None:
    known, text = PROBLEMS[0]["id"], PROBLEMS[0]["solution"]
    rollouts = [
        rollout("\\boxed{7}", known, number=0),
        rollout(text, "no such problem", number=1),
        rollout("", known, number=2, ids=np.zeros(0, np.int32)),
        rollout("?", known, number=3, ids=fresh_rng().integers(0, 2**31 - 1, 50).astype(np.int32)),
        rollout(text, known, number=4),
    ]
    credits, receipt = aligned(worker, rollouts)
    assert receipt.alignments[:3] == (None, None, None) and receipt.alignments[4] is not None
    for one, credit in zip(rollouts, credits, strict=True):
        assert len(credit.values) == one.response_length and np.isfinite(credit.values).all()
    assert not any(credit.values.any() for credit in credits[:3]) and credits[4].values.any()
    assert receipt.codes[2] == ()


def test_diversity_is_of_a_group(worker: StrategyWorker) -> None:
    texts = [PROBLEMS[i]["solution"] for i in (0, 1, 2)]
    rollouts = [rollout(text, PROBLEMS[0]["id"], "a", n) for n, text in enumerate(texts)]
    rollouts.append(rollout(texts[0], PROBLEMS[0]["id"], "b"))
    _, receipt = aligned(worker, rollouts)
    means = [
        own.vectors.mean(0).astype(float) for own in worker.extractor.encode([solution_steps(r) for r in rollouts[:3]])
    ]
    for i, own in enumerate(means):
        cosines = [own @ b / np.linalg.norm(own) / np.linalg.norm(b) for j, b in enumerate(means) if j != i]
        assert receipt.diversities[i] == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    assert receipt.diversities[3] == 0


def test_an_answer_does_not_depend_on_its_batch(worker: StrategyWorker) -> None:
    rollouts = [rollout(row["solution"], row["id"], row["id"]) for row in PROBLEMS[:9]]
    together, receipt = aligned(worker, rollouts)
    for n, one in enumerate(rollouts):
        (alone,), own = aligned(worker, [one])
        np.testing.assert_allclose(alone.values, together[n].values, atol=1e-5)
        assert own.alignments[0] == pytest.approx(receipt.alignments[n], abs=1e-5)


def test_several_solutions_are_several_ways(worker: StrategyWorker, tmp_path: Path) -> None:
    row, other = PROBLEMS[0], next(one for one in PROBLEMS if marks(one) != marks(PROBLEMS[0]))
    folder = tmp_path / "several"
    problems = [Problem(one["id"], one["prompt"], [one["solution"]]) for one in PROBLEMS[:20]]
    problems[0].solutions.append(other["solution"])
    fit(problems, make_embedder("hidden:lab:teacher"), TOKENIZER, folder, limits=LIMITS, codes=8, width=32)
    several = StrategyWorker(path=str(folder), tokenizer=str(model_path("student")))
    assert len(Solutions.load(folder).of(row["id"])) == 2
    rollouts = [rollout(text["solution"], row["id"], number=n) for n, text in enumerate([row, other])]
    _, receipt = aligned(several, rollouts)
    pairs = [
        [
            math.exp(-(transport(c) * c).sum() / 0.25)
            for c in (cost(own.vectors, z) for z in several.solutions.of(row["id"]))
        ]
        for own in several.extractor.encode([solution_steps(one) for one in rollouts])
    ]
    assert receipt.alignments == pytest.approx([max(own) for own in pairs], abs=1e-5)
    assert pairs[0][0] > pairs[0][1] and pairs[1][1] > pairs[1][0], "each is best followed by itself"


def marks(row: dict) -> str:
    """What is left of its solution without numbers: of problems of other operations another."""
    return re.sub(r"\d+", "", row["solution"])


def solution_steps(one: Rollout) -> list[str]:
    return [step.text for step in segment(pieces_of(TOKENIZER, one.token_ids[2:]), LIMITS)]
