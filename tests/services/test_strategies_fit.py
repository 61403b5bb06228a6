"""`tutorloop strategies fit`: what is read, what is learned of planted strategies, what is written, how it ends."""

import json
import random
import secrets
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.contracts.errors import DataError, StrategyError
from tutorloop.contracts.protocols import Judgement
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.strategies import training
from tutorloop.verifier_service.strategies.embedding import Whitening, make_embedder
from tutorloop.verifier_service.strategies.extractor import (
    Encoded,
    Extractor,
    FrozenEncoder,
    encode_steps,
    inputs_of,
    view_of,
)
from tutorloop.verifier_service.strategies.fit import fit, probe
from tutorloop.verifier_service.strategies.losses import LossWeights
from tutorloop.verifier_service.strategies.segments import StepLimits
from tutorloop.verifier_service.strategies.solutions import Problem, Solutions, read_solutions
from tutorloop.verifier_service.strategies.training import Corpus, Training, partners_of

LAB = "lab:teacher"
PROBLEMS, SEED = 30, 0
LIMITS = StepLimits(least=4, most=80, steps=8)
EQUATION = [
    [
        "Write down an equation for the unknown.",
        "Let the unknown be x: set up an equation.",
        "Put the story as algebra.",
    ],
    ["Move the constant {a} to the right side.", "Subtract {a} from both sides.", "Isolate the term: take {a} away."],
    ["Divide both sides by {b}.", "Now split each side into {b} equal parts.", "Undo the product, dividing by {b}."],
    ["Put the value {c} back in to check.", "Substituting {c} confirms it.", "Check: the equation holds for {c}."],
]
TRIALS = [
    ["Guess a first number, say {a}.", "Start with a trial value like {a}.", "Let us try {a} and see."],
    [
        "With {a} the total is {b}, too small.",
        "This guess gives {b}, which misses.",
        "The result {b} is below the goal.",
    ],
    ["Raise the guess by {c}.", "So try a larger number, {c} more.", "Increase the trial value by {c}."],
    ["The guess {c} fits exactly, so we stop.", "Now the total agrees for {c}.", "This time it works with {c}."],
]


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print("seed", seed)
    return random.Random(seed)


@dataclass
class Planted:
    """Solutions of two strategies, each step in one of three wordings. Of each step which strategy, place, wording."""

    problems: list[Problem]
    kinds: np.ndarray  # [T, 4]: problem, strategy, place, wording


def planted(rng, count, solutions=3):
    """A problem has one strategy, and its numbers, in all its solutions."""
    problems, kinds = [], []
    for number in range(count):
        strategy, (a, b, c) = rng.randrange(2), (rng.randint(10, 999) for _ in range(3))
        texts = []
        for _ in range(solutions):
            wordings = [rng.randrange(3) for _ in range(4)]
            steps = zip((EQUATION, TRIALS)[strategy], wordings, strict=True)
            texts.append("\n\n".join(step[wording].format(a=a, b=b, c=c) for step, wording in steps))
            kinds += [(number, strategy, place, wording) for place, wording in enumerate(wordings)]
        problems.append(Problem(f"p{number}", f"Problem {number}: {a}, {b}, {c}.", texts))
    return Planted(problems, np.array(kinds))


def split(problems):
    return [text.split("\n\n") for problem in problems for text in problem.solutions]


def margin(vectors, kinds):
    """Of steps of different problems in different wordings: how often one of the same strategy and place is nearer
    than one of the other strategy (0.5: by chance)."""
    cosines = vectors @ vectors.T
    problem, strategy, place, wording = kinds.T
    apart = (problem[:, None] != problem) & ((wording[:, None] != wording) | (place[:, None] != place))
    same = (strategy[:, None] == strategy) & (place[:, None] == place) & apart
    other = (strategy[:, None] != strategy) & apart
    ranks = [np.mean(row[s][:, None] > row[o]) for row, s, o in zip(cosines, same, other, strict=True) if s.any()]
    return float(np.mean(ranks))


@pytest.fixture(scope="module")
def embedder():
    return make_embedder(f"hidden:{LAB}")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(LAB)


@pytest.fixture
def short(monkeypatch):
    """Fits of few updates: planted strategies are learned in a moment."""
    monkeypatch.setattr(training, "FEWEST_UPDATES", 60)


def test_planted_strategies_are_nearer_than_wordings(embedder, tokenizer, short, tmp_path):
    """On problems that the fit has not seen, against the ablation without training; and its vectors tell no problem.
    Of one draw: how far apart they are varies with it."""
    rng = random.Random(SEED)
    seen, held_out, margins = planted(rng, PROBLEMS), planted(rng, PROBLEMS), {}
    for frozen in (True, False):
        folder = tmp_path / f"{frozen}"
        report = fit(
            seen.problems, embedder, tokenizer, folder, limits=LIMITS, codes=16, width=32, frozen=frozen, seed=1
        )
        encoded = Extractor.load(folder).encode(split(held_out.problems))
        margins[frozen] = margin(np.concatenate([own.vectors for own in encoded]), held_out.kinds)
        assert report.leakage and not report.leakage.leaks
    assert margins[False] > 0.88 > 0.78 > margins[True], margins
    assert report.losses["info_nce"][1] < report.losses["info_nce"][0]
    assert (report.problems, report.solutions, report.steps) == (PROBLEMS, 3 * PROBLEMS, 12 * PROBLEMS)
    assert report.short_share == 0
    check_folder(folder, report, seen)


def check_folder(folder, report, seen):
    """The solutions' vectors are what the extractor makes of their texts; the codes are told as they are."""
    extractor, kept = Extractor.load(folder), Solutions.load(folder)
    assert extractor.version == report.version and extractor.limits == LIMITS
    assert [kept.problem(own) for own in kept.prompt_ids] == [problem.text for problem in seen.problems]
    steps = [own for prompt_id in kept.prompt_ids for own in kept.texts(prompt_id)]
    assert steps == split(seen.problems)
    vectors = [own for prompt_id in kept.prompt_ids for own in kept.of(prompt_id)]
    codes = [own for prompt_id in kept.prompt_ids for own in kept.codes(prompt_id)]
    for one, own, code in zip(extractor.encode(steps), vectors, codes, strict=True):
        np.testing.assert_allclose(own, one.vectors, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(code, one.codes)
    used, counts = np.unique(np.concatenate(codes), return_counts=True)
    shares = counts / counts.sum()
    assert report.effective_codes == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    told = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    assert {code["code"]: code["share"] for code in told} == pytest.approx(
        dict(zip(used.tolist(), shares, strict=True))
    )
    all_steps, all_codes = list(chain(*steps)), np.concatenate(codes)
    for code in told:
        own = {step for step, number in zip(all_steps, all_codes, strict=True) if number == code["code"]}
        assert code["name"] and set(code["exemplars"]) <= own and len(code["exemplars"]) == min(5, len(own))
    written = json.loads((folder / "report.json").read_text())
    assert written["leakage"]["problems"] == PROBLEMS and written["losses"].keys() == report.losses.keys()


def test_an_extractor_that_leaks_is_told(embedder, monkeypatch):
    """Trained on steps as they are, numbers and all, without what is against it; and not trained at all."""
    rng = random.Random(SEED)
    monkeypatch.setattr(training, "FEWEST_UPDATES", 100)
    monkeypatch.setattr(training, "NOISE", 0.0)
    steps = split(planted(rng, PROBLEMS, solutions=5).problems)
    owners = np.repeat(np.arange(PROBLEMS), 5)
    whitening = Whitening.of(embedder.embed(list(chain(*steps))), 128)
    raw = inputs_of(steps, embedder, whitening)
    leaking = Training(Corpus(owners, raw, raw, steps), 16, 32, 1, torch.Generator().manual_seed(1))
    leaking.weights = LossWeights(adversary=0.0)
    for encoder in (leaking.run()[0], FrozenEncoder()):
        found = probe(encode_steps(encoder, raw), owners, 1)
        assert found and found.leaks, found
        assert (found.problems, found.chance) == (PROBLEMS, 1 / PROBLEMS)
    views = inputs_of([[view_of(step) for step in own] for own in steps], embedder, whitening)
    found = probe(encode_steps(FrozenEncoder(), views), owners, 1)
    assert found and not found.leaks, found
    assert probe(views, np.arange(len(views)), 1) is None


def test_partners_are_the_nearest_solutions(rng):
    """Of one problem's four solutions, two and two alike; of another's two, one like solutions of a third problem and
    the other like none; none for one alone."""
    draw = np.random.default_rng(rng.getrandbits(32))

    def way(steps):
        vectors = draw.normal(size=(steps, 32))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def like(vectors, order=slice(None)):
        return vectors[order] + 0.01 * draw.normal(size=vectors.shape)

    first, second, third = way(4), way(6), way(5)
    vectors = [first, second, like(first, [1, 0, 2, 3]), like(second), third, way(3), *(like(third) for _ in range(20))]
    found = partners_of(np.array([0, 0, 0, 0, 1, 1, *range(2, 22)]), vectors, draw)
    assert [own.row if own else None for own in found[:5]] == [2, 3, 0, 1, None]
    assert found[6:] == [None] * 20
    np.testing.assert_array_equal(found[0].matched, [1, 0, 2, 3])
    np.testing.assert_array_equal(found[1].matched, np.arange(6))
    assert (found[0].steps, found[1].steps) == (4, 6)


def test_the_same_fit_twice(rng, embedder, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "FEWEST_UPDATES", 6)
    problems = planted(rng, 8).problems

    def version(name, seed, frozen=False):
        torch.manual_seed(secrets.randbits(32))  # nothing of the process matters
        report = fit(
            problems, embedder, tokenizer, tmp_path / name, limits=LIMITS, codes=4, width=8, frozen=frozen, seed=seed
        )
        return report.version

    assert version("a", 3) == version("b", 3) == version("a", 3)  # the last in place of the first
    assert version("c", 4) != version("b", 3)
    assert version("d", 3, frozen=True) == version("e", 3, frozen=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "e"]


def test_too_few_problems_and_a_taken_folder(rng, embedder, tokenizer, tmp_path):
    problems = planted(rng, 8).problems
    with pytest.raises(StrategyError, match="right solutions of 7"):
        fit(problems[:7], embedder, tokenizer, tmp_path / "new", limits=LIMITS)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StrategyError, match="holds none"):
        fit(problems, embedder, tokenizer, tmp_path, limits=LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---- solutions in files ------------------------------------------------------------------------------------------


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_gold(responses):
    """Right where the text ends with the gold answer; it abstains from what it cannot read."""
    judged = []
    for one in responses:
        right = any(one.text.endswith(gold) for gold in (one.gold, *one.other_golds))
        judged.append(Judgement(right, error_class="unreadable" if "?" in one.text else ""))
    return judged


def test_rows_of_every_form(tmp_path):
    first = lines(
        tmp_path / "a.jsonl",
        {"id": "one", "prompt": "P1", "answer": "4", "solution": "so 4"},
        {"prompt_id": "one", "problem": "P1", "gold": 4, "solutions": ["hence 4", "hence 5", "so 4", ""]},
        {"prompt": "P2", "golds": ["6", "7"], "response": "thus 7"},
        {"prompt": "P2", "answer": "7", "response": "it is 7"},
        {"id": 12, "prompt": "P3", "answer": "8", "solution": None},
        {"prompt": "P1", "solution": "given: right", "passed": True, "id": None},
        {"prompt": "P4", "solution": "given: wrong", "passed": False},
        {"prompt": "P4", "answer": "1", "solution": "what?"},
        {"question": "P5", "answer": "2 + 7 = <<2+7=9>>9\n#### 9"},  # GSM8K's own form
    )
    second = lines(tmp_path / "b.jsonl", {"id": "two", "prompt": "P1", "answer": "4", "solution": "or 4"})
    problems, left_out = read_solutions([first, second], by_gold)
    found = {problem.prompt_id: (problem.text, problem.solutions) for problem in problems}
    assert found == {
        "one": ("P1", ["so 4", "hence 4", "given: right"]),
        "row-2": ("P2", ["thus 7", "it is 7"]),  # as a run names a row without id
        "row-8": ("P5", ["2 + 7 = <<2+7=9>>9\n#### 9"]),
        "two": ("P1", ["or 4"]),
    }
    assert left_out == {"wrong": 2, "repeated": 1, "no solution": 1, "unreadable": 1}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"query": "P", "solution": "s"}, "'query', 'solution'"),
        ({"prompt": "P", "solution": "s"}, "answer, or passed"),
        ({"prompt": "P", "solution": {"a": 1}, "answer": "1"}, "lists of texts"),
        ({"prompt": "P", "solution": "s", "passed": "yes"}, "true or false"),
        ({"prompt": "P", "solution": "s", "passed": True, "id": [1]}, "an id is a text or a number"),
        ({"prompt": "Q", "solution": "s", "passed": True, "id": "taken"}, "is 'P' before, and 'Q' here"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, row, told):
    path = lines(tmp_path / "a.jsonl", {"id": "taken", "prompt": "P", "solution": "s", "passed": True}, row)
    with pytest.raises(DataError, match=r"a\.jsonl line 2") as caught:
        read_solutions([path], by_gold)
    assert told in str(caught.value)


# ---- the command -------------------------------------------------------------------------------------------------


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["strategies", "fit", *map(str, arguments)], env={"COLUMNS": "160"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output if code == 0 else result.stderr


def sums(rng, count):
    for number in range(count):
        a, b, c = (rng.randint(2, 50) for _ in range(3))
        text = f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}\n\\boxed{{{a + b + c}}}"
        yield {"id": f"s{number}", "prompt": f"{a} + {b} + {c} =", "answer": str(a + b + c), "solution": text}


def test_the_command(rng, tmp_path):
    rows = [*sums(rng, 12), {"prompt": "2 + 2 =", "answer": "4", "solution": "\\boxed{5}"}, {"prompt": "none"}]
    path = lines(tmp_path / "solutions.jsonl", *rows)
    to = tmp_path / "strategies"
    out = run(path, "--to", to, "--frozen", "--least", 5, "--codes", 4)
    assert "12 right solutions of 12 problems; left out: 1 (no solution), 1 (wrong)" in out
    assert "not measured: no problem has two solutions" in out
    extractor = Extractor.load(to)
    assert f"{to} is at version {extractor.version}; a run takes it with strategies.path={to}" in out
    assert extractor.limits == StepLimits(least=5)
    (encoded,) = extractor.encode([["1 + 2 = 3"]])
    assert isinstance(encoded, Encoded)
    long_steps = ("--frozen", "--least", 500, "--most", 1000)
    assert "read alike" in run(path, "--to", to, *long_steps, code=2)
    assert Extractor.load(to).version == extractor.version
    more = {"prompt": "9 - 4 =", "answer": "5", "solution": "9 - 4 = 5\n\\boxed{5}"}
    out = run(lines(tmp_path / "more.jsonl", *rows, more), "--to", to, *long_steps)  # in place of it
    assert "lower --least" in out and Extractor.load(to).version != extractor.version


def test_the_command_refuses(rng, tmp_path):
    path = lines(tmp_path / "solutions.jsonl", *sums(rng, 3))
    to = tmp_path / "strategies"
    assert "right solutions of 3" in run(path, "--to", to, code=2)
    assert "there are none" in run(lines(tmp_path / "no.jsonl", {"prompt": "p"}), "--to", to, code=2)
    assert "--tokenizer MODEL" in run(path, "--to", to, "--embedder", "some/model", code=2)
    assert "twice its least" in run(path, "--to", to, "--least", 100, "--most", 150, code=2)
    assert "multiple of 8" in run(path, "--to", to, "--width", 100, code=2)
    assert "holds none" in run(path, "--to", tmp_path, code=2)
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    assert "broken.jsonl line 1" in run(tmp_path / "broken.jsonl", "--to", to, code=2)
    assert "no such folder" in run(path, "--to", to, "--embedder", "hidden:lab:nobody", code=2)
    assert not to.exists()
