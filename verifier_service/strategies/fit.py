"""Fit an extractor to the teacher's verified solutions: self-supervised, once, offline.

Beside the extractor and the solutions, its folder has what people look at: `codes.json`, each code with a name and the
steps nearest to it, and `report.json`.

Shapes: S solutions, T steps of all, D = 128, K codes, P problems.
"""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...contracts.errors import StrategyError
from .alignment import FEWEST_STEPS
from .embedding import Embedder, ReadOnce, Whitening
from .extractor import MANIFEST, SIZE, Encoded, Extractor, FrozenEncoder, encode_steps, inputs_of, view_of
from .losses import k_means, nearest_codes
from .segments import StepLimits, segment_text
from .solutions import Problem, save_solutions
from .training import Corpus, Training, some_steps

CODES, REPORT = "codes.json", "report.json"
FEWEST_PROBLEMS = 8
COMPONENTS = 256  # of the whitening, at most
PROBED, PENALTY = 100, 1e-3  # problems of the probe at most, and of its weights' squares
LEAKS = 1 / 3  # accuracy of the probe
EXEMPLARS, NAME_WORDS = 5, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """How well a linear probe tells a problem by its vectors: accuracy on a solution of each of `problems` that it has
    not seen, against `chance`."""

    accuracy: float
    chance: float
    problems: int

    @property
    def leaks(self) -> bool:
        """Whether more than a third are told: vectors then say which problem it is as well as how it is solved."""
        return self.accuracy > LEAKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A strategy as people see it. `name`: the words that set its steps apart; `share`: of all steps."""

    code: int
    name: str
    share: float
    exemplars: tuple[str, ...]  # the steps nearest to it, as they were written


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """What a fit came to. `losses`: means of the first and the last tenth of the updates."""

    version: str
    problems: int
    solutions: int
    steps: int
    short_share: float  # of solutions with fewer than three steps
    effective_codes: float  # e^H of the codes' shares
    leakage: Leakage | None  # None: no problem has two solutions
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    codes: tuple[Code, ...] = ()  # in use, the most used first


def fit(
    problems: Sequence[Problem],
    embedder: Embedder,
    tokenizer: Any,
    folder: Path,
    *,
    limits: StepLimits,
    codes: int = 64,
    width: int = 256,
    frozen: bool = False,
    seed: int = 0,
    note: Callable[[str], object] = lambda _: None,
) -> FitReport:
    """Fit, and write the extractor and the solutions into `folder`, in place of an extractor that is there.

    `tokenizer`: counts the tokens that `limits` are in. `frozen`: the ablation without training. `note`
    is told how far it is. The same arguments give the same folder. Raises StrategyError.
    """
    check_place(folder)
    if len(problems) < FEWEST_PROBLEMS:
        rule = f"an extractor is fitted to the solutions of {FEWEST_PROBLEMS} problems, better of hundreds"
        raise StrategyError(rule, f"right solutions of {len(problems)}", "give more solutions")
    nested = [[steps_of(tokenizer, text, limits) for text in problem.solutions] for problem in problems]
    steps = [texts for own in nested for texts in own]
    owners_S = np.repeat(np.arange(len(problems)), [len(own) for own in nested])
    views = [[view_of(step) for step in texts] for texts in steps]
    embedder = ReadOnce(embedder, note)
    whitening = _whitening(views, embedder)
    corpus = Corpus(owners_S, inputs_of(views, embedder, whitening), inputs_of(steps, embedder, whitening), views)
    generator = torch.Generator().manual_seed(seed)
    if frozen:
        encoder, losses = FrozenEncoder(), {}
        codebook_KD = k_means(some_steps(encode_steps(encoder, corpus.views), seed), codes, generator)
    else:
        encoder, codebook_KD, losses = Training(corpus, codes, width, seed, generator).run()
    vectors = encode_steps(encoder, corpus.views)
    encoded = [Encoded(own, nearest_codes(torch.from_numpy(own), codebook_KD).numpy()) for own in vectors]
    extractor = Extractor(embedder, whitening, encoder, codebook_KD, limits)
    told = _codes(steps, views, encoded, codebook_KD.numpy())
    report = FitReport(
        version="",
        problems=len(problems),
        solutions=len(steps),
        steps=sum(map(len, steps)),
        short_share=float(np.mean([len(texts) < FEWEST_STEPS for texts in steps])),
        effective_codes=math.exp(-sum(code.share * math.log(code.share) for code in told)),
        leakage=probe(vectors, owners_S, seed),
        losses=losses,
        codes=told,
    )
    return _write(folder, extractor, report, problems, nested, encoded)


def steps_of(tokenizer: Any, solution: str, limits: StepLimits) -> list[str]:
    """A solution's steps, as the extractor reads them."""
    return [step.text.strip() for step in segment_text(tokenizer, solution, limits)]


def _whitening(views: Sequence[Sequence[str]], embedder: Embedder) -> Whitening:
    """With the statistics of all steps, each as often as it comes. Raises StrategyError."""
    counts = Counter(view for own in views for view in own)
    if len(counts) < 2:
        found = f"all {counts.total()} steps read alike without their numbers and names: {min(counts)[:60]!a}"
        raise StrategyError("strategies are told apart by steps that differ", found, "lower --least, or give others")
    embeddings_NE = embedder.embed(list(counts))
    return Whitening.of(np.repeat(embeddings_NE, list(counts.values()), axis=0), COMPONENTS)


# ---- what came of it ---------------------------------------------------------------------------------------------


def probe(vectors: Sequence[np.ndarray], owners_S: np.ndarray, seed: int) -> Leakage | None:
    """A logistic regression of the problem on step vectors, fitted to all solutions of at most PROBED problems but one
    each, which is then told by the sum of its steps' log-probabilities. None where no two problems have two solutions.
    """
    rng = np.random.default_rng(seed)
    rows_of: dict[int, list[int]] = {}
    for row, owner in enumerate(owners_S.tolist()):
        rows_of.setdefault(owner, []).append(row)
    several = [rng.permutation(rows).tolist() for rows in rows_of.values() if len(rows) > 1]
    if len(several) < 2:
        return None
    chosen = [several[i] for i in rng.permutation(len(several))[:PROBED]]
    train = [(vectors[row], label) for label, rows in enumerate(chosen) for row in rows[1:]]
    x_TD = torch.from_numpy(np.concatenate([own for own, _ in train])).double()
    labels_T = torch.tensor([label for own, label in train for _ in own])
    mean_D, scale_D = x_TD.mean(0), x_TD.std(0).clamp(min=1e-6)
    weight_DP = torch.zeros(SIZE, len(chosen), dtype=torch.float64, requires_grad=True)
    bias_P = torch.zeros(len(chosen), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_DP, bias_P], max_iter=100, line_search_fn="strong_wolfe")

    def logits(values_TD: torch.Tensor) -> torch.Tensor:
        return (values_TD - mean_D) / scale_D @ weight_DP + bias_P

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits(x_TD), labels_T) + PENALTY * weight_DP.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        held = [torch.from_numpy(vectors[rows[0]]).double() for rows in chosen]
        told = [int(logits(own_ND).log_softmax(-1).sum(0).argmax()) == label for label, own_ND in enumerate(held)]
    return Leakage(accuracy=float(np.mean(told)), chance=1 / len(chosen), problems=len(chosen))


def _codes(
    steps: Sequence[Sequence[str]], views: Sequence[Sequence[str]], encoded: Sequence[Encoded], codebook_KD: np.ndarray
) -> tuple[Code, ...]:
    """The codes in use, the most used first."""
    texts = [step for own in steps for step in own]
    abstracted = [view for own in views for view in own]
    codes_T = np.concatenate([own.codes for own in encoded])
    vectors_TD = np.concatenate([own.vectors for own in encoded])
    words = Counter(word for view in abstracted for word in _words(view))
    found = []
    for code, count in Counter(codes_T.tolist()).most_common():
        (rows,) = np.nonzero(codes_T == code)
        nearest = rows[np.argsort(np.linalg.norm(vectors_TD[rows] - codebook_KD[code], axis=1), kind="stable")]
        exemplars = list(dict.fromkeys(texts[row] for row in nearest))[:EXEMPLARS]
        name = _name([abstracted[row] for row in rows], words, len(texts))
        found.append(Code(code=code, name=name, share=count / len(texts), exemplars=tuple(exemplars)))
    return tuple(found)


def _words(view: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[a-z]+|⟨[^⟩]*⟩", " ", view.lower())))


def _name(views: Sequence[str], everywhere: Counter[str], steps: int) -> str:
    """The words that say most of a step being one of these: p(word | code) · log p(word | code) / p(word). Of steps
    without words, the commonest itself."""
    here = Counter(word for view in views for word in _words(view))
    gains = {w: n / len(views) * math.log((n / len(views)) / (everywhere[w] / steps)) for w, n in here.items()}
    best = sorted((word for word in gains if gains[word] > 0), key=lambda word: (-gains[word], word))[:NAME_WORDS]
    return " ".join(best) or Counter(views).most_common(1)[0][0][:40]


# ---- the folder --------------------------------------------------------------------------------------------------


def check_place(folder: Path) -> None:
    """Raises StrategyError where something else is there."""
    if folder.exists() and not (folder / MANIFEST).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        rule = "strategies are written into a new folder, or in place of older ones"
        raise StrategyError(rule, f"{folder} is there and holds none", "name another folder")


def _write(
    folder: Path,
    extractor: Extractor,
    report: FitReport,
    problems: Sequence[Problem],
    nested: Sequence[Sequence[list[str]]],
    encoded: Sequence[Encoded],
) -> FitReport:
    """Everything into a folder beside it, which then takes its place; the report with its version."""
    aside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "old"))
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    ends = np.cumsum([len(own) for own in nested])
    of_problems = [encoded[end - len(own) : end] for own, end in zip(nested, ends.tolist(), strict=True)]
    names = save_solutions(aside, problems, nested, of_problems)
    values = asdict(report)
    values.pop("version")  # of which this is a part
    for name, value in ((CODES, values.pop("codes")), (REPORT, values)):
        (aside / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    extractor.save(aside, (*names, CODES, REPORT))
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return replace(report, version=extractor.version)
