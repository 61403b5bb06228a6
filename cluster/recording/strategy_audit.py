"""What strategies came to in a run: its recorded rollouts, encoded again and compared with the teacher's solutions.

Nothing of this is kept by the run itself: `rollouts.jsonl` has the tokens, and the extractor says the same of the same
tokens. So an audit is as complete as what was recorded. It is of the student's answers to plain prompts, as the
strategy service is asked.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...contracts.config import Config
from ...contracts.errors import RunFolderError, StrategyError
from ...contracts.recipe import load_config
from ...models.loading import load_tokenizer
from ...verifier_service.strategies.alignment import FEWEST_STEPS, Best, Order, best_of
from ...verifier_service.strategies.extractor import Extractor
from ...verifier_service.strategies.fit import CODES, REPORT, steps_of
from ...verifier_service.strategies.solutions import Problem, Solutions
from ...verifier_service.strategies.usage import code_assignment, dpp_logdet, usage
from .metrics import METRICS_FILE, read_rows
from .samples import ROLLOUTS_FILE
from .strategy_figures import Measured, auc, mean_over_problems
from .strategy_rollouts import INSIDE, OUTSIDE, TRAIN, Chosen, Recorded, read_recorded

STRANGERS = 4  # other problems that a rollout is compared with
SEED = 0
AT_ONCE = 64  # rollouts that are aligned at once
SHOWN = 80  # characters of an id in a message
THIRD = 1 / 3  # of the steps: early and late


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A rollout as the extractor sees it, float32 [n, 128] and n codes. `best`: of its problem's solutions the one
    that it follows best; None where it is neutral. `others`: mean alignment with other problems' solutions."""

    recorded: Recorded
    vectors: np.ndarray
    codes: tuple[int, ...]
    best: Best | None
    others: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeUse:
    """A code: its share of the teacher's steps, and of the student's in training (all, the first and the last third of
    the steps); the rollouts with it that were judged, and their pass rate."""

    code: int
    name: str
    exemplars: tuple[str, ...]  # the teacher's
    example: str  # the student's step nearest to it
    teacher: float
    student: float
    early: float | None
    late: float | None
    judged: int
    pass_rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How spread out strategies are over the rollouts of some steps. `mutual_information`, nats: high where each step
    has one strategy and the steps have many together. `volume`: the mean over prompt groups of log det(K + 0.001·I) of
    the cosines K of their answers' mean vectors, for each answer: low where answers are alike; None where no two of a
    group were read."""

    mutual_information: float
    volume: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """`own`, `others`: mean alignments with the own problem's solutions and with other problems'; `drop` is what lies
    between. `aucs`: split → of alignment against correctness, and the rollouts it is of. `spreads`: of the first and
    of the last third of training; none where all is of one step."""

    run: str
    record: str
    order: Order
    version: str  # of the extractor
    recorded_version: str | None  # of the one that the run had
    chosen: Chosen
    followed: Sequence[Followed]
    shown: Followed | None  # whose plan is drawn
    codes: Sequence[CodeUse]
    own: Measured | None
    others: Measured | None
    drop: Measured | None
    aucs: Mapping[str, tuple[str, Measured | None]]
    leakage: Mapping[str, float] | None
    spreads: tuple[Spread, Spread] | None
    rows: Sequence[dict[str, Any]]  # of metrics.jsonl
    solutions: Solutions


def audit(
    folder: Path,
    *,
    most: int = 500,
    rollout: str = "",
    strategies: Path | None = None,
    more: Sequence[Problem] = (),
    anyway: bool = False,
    device: str = "cpu",
    threads: int = 1,
) -> Audit:
    """Of the run in `folder`, with at most `most` rollouts of training and of each evaluation's split. `rollout`: whose
    plan is shown (default: the newest that passed); `strategies`: where the extractor is now; `more`: problems that it
    was not fitted to, whose solutions rollouts are compared with too; `anyway`: with another extractor than the run's.

    Raises RunFolderError where the folder holds no recorded rollouts, StrategyError where the run has no strategies or
    they are others by now, where `rollout` cannot be shown, and where an id of `more` is another problem's.
    """
    config, recorded_version = _config(folder), _recorded_version(folder)
    assert config.strategies
    path = (strategies or Path(config.strategies.path)).expanduser()
    extractor, solutions = Extractor.load(path, device, threads), Solutions.load(path)
    if recorded_version not in (None, extractor.version) and not anyway:
        raise _another(path, extractor.version, recorded_version)
    suffix, tokenizer = config.data.prompt_suffix, load_tokenizer(config.student.model)
    if more:
        solutions = _joined(solutions, more, extractor, tokenizer)

    def knows(prompt_id: str, text: str) -> bool:
        return solutions.has(prompt_id, text.removesuffix(suffix))

    chosen = read_recorded(folder / ROLLOUTS_FILE, tokenizer, extractor.limits, knows, most, rollout)
    if not chosen.rollouts:
        found = f"{folder}: {_in_words(chosen.left_out) or 'nothing'}"
        raise RunFolderError("an audit reads the student's recorded rollouts", found, "train with record=some or all")
    order = _order(config)
    followed = _follow(chosen.rollouts, extractor, solutions, order)
    own, others, drop = _control([one for one in followed if one.best is not None and one.others is not None])
    leakage = json.loads((path / REPORT).read_text(encoding="utf-8"))["leakage"]
    return Audit(
        run=folder.resolve().name,
        record=config.record,
        order=order,
        version=extractor.version,
        recorded_version=recorded_version,
        chosen=chosen,
        followed=followed,
        shown=_shown(followed, rollout),
        codes=_uses(json.loads((path / CODES).read_text(encoding="utf-8")), followed, extractor),
        own=own,
        others=others,
        drop=drop,
        aucs=_aucs(followed),
        leakage=leakage,
        spreads=_spreads(followed, extractor.codebook_KD.cpu().numpy()),
        rows=read_rows(folder / METRICS_FILE),
        solutions=solutions,
    )


def _config(folder: Path) -> Config:
    """The run's, which has strategies and rollouts. Raises RunFolderError, StrategyError."""
    if not (folder / "config.yaml").is_file():
        found = f"{folder} {'has no config.yaml' if folder.is_dir() else 'is no folder'}"
        raise RunFolderError("RUN is the folder of a run", found, "give the output_dir of a run")
    config = load_config(folder / "config.yaml")
    if not config.strategies:
        found = f"{folder} is of {config.methods}, without strategies"
        raise StrategyError("an audit is of a run with strategies", found, "give a run with strategies.path")
    if not (folder / ROLLOUTS_FILE).is_file():
        found = f"{folder} has no {ROLLOUTS_FILE} (record: {config.record})"
        raise RunFolderError("an audit reads recorded rollouts", found, "train with record=some or record=all")
    return config


def _recorded_version(folder: Path) -> str | None:
    """Of the extractor that the run began with; None where it is not known."""
    file = folder / "identity.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return str(known["strategies"]["digest"]) if "strategies" in known else None
    except (ValueError, TypeError, LookupError) as error:
        remedy = "restore it, or remove it to go on without comparing"
        raise RunFolderError("a run's identity.json is as it was written", f"{file}: {error}", remedy) from error


def _another(path: Path, version: str, recorded_version: str | None) -> StrategyError:
    rule = "a run is audited with the extractor that it was rewarded by"
    found = f"{path} is version {version}, the run had {recorded_version}"
    return StrategyError(rule, found, "give it as --strategies, or see what this one says of it with --anyway")


def _joined(solutions: Solutions, more: Sequence[Problem], extractor: Extractor, tokenizer: Any) -> Solutions:
    """Raises StrategyError where the id of one of `more` is another problem's."""
    new = [problem for problem in more if not solutions.has(problem.prompt_id, problem.text)]
    for problem in new:
        if known := solutions.problem(problem.prompt_id):
            found = f"{problem.prompt_id[:SHOWN]!a} is {known[:SHOWN]!a} in the fit, and {problem.text[:SHOWN]!a} here"
            raise StrategyError("an id is one problem's", found, "give each problem of all data an id of its own")
    nested = [[steps_of(tokenizer, text, extractor.limits) for text in problem.solutions] for problem in new]
    encoded = iter(extractor.encode([texts for own in nested for texts in own]))
    return solutions.joined(new, nested, [[next(encoded) for _ in own] for own in nested])


def _order(config: Config) -> Order:
    options = [stage.method_options for stage in config.plan]
    return "ordered" if any(given.get("order") == "ordered" for given in options) else "free"


def _in_words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())


# ---- rollouts and solutions --------------------------------------------------------------------------------------


def _follow(rollouts: Sequence[Recorded], extractor: Extractor, solutions: Solutions, order: Order) -> list[Followed]:
    encoded = extractor.encode([[step.text for step in one.steps] for one in rollouts])
    strangers = _Strangers(solutions)
    found: list[Followed] = []
    for at in range(0, len(rollouts), AT_ONCE):
        some = list(zip(rollouts[at : at + AT_ONCE], encoded[at : at + AT_ONCE], strict=True))
        own = best_of([(e.vectors, solutions.of(r.prompt_id) if r.known else []) for r, e in some], order)
        others = [strangers.of(r.prompt_id) if best else [] for (r, _), best in zip(some, own, strict=True)]
        pairs = [(e.vectors, solutions.of(i)) for (_, e), ids in zip(some, others, strict=True) for i in ids]
        values = iter(best_of(pairs, order))
        for (recorded, one), best, ids in zip(some, own, others, strict=True):
            drawn = [next(values) for _ in ids]
            mean = float(np.mean([value.found.alignment for value in drawn if value])) if drawn else None
            codes = tuple(map(int, one.codes))
            found.append(Followed(recorded=recorded, vectors=one.vectors, codes=codes, best=best, others=mean))
    return found


class _Strangers:
    """Other problems to compare with, drawn among those with as many solutions: of more the best is better."""

    def __init__(self, solutions: Solutions) -> None:
        self.solutions, self.drawn = solutions, dict[str, list[str]]()
        self.counts = {i: self._usable(i) for i in solutions.prompt_ids}
        self.rng = np.random.default_rng(SEED)

    def of(self, prompt_id: str) -> list[str]:
        """The same for each of a problem's rollouts. Fewer than STRANGERS where there are no more."""
        if prompt_id not in self.drawn:
            self.drawn[prompt_id] = self._draw(prompt_id)
        return self.drawn[prompt_id]

    def _draw(self, prompt_id: str) -> list[str]:
        count, text = self.counts[prompt_id], self.solutions.problem(prompt_id)
        others = [i for i, own in self.counts.items() if own and self.solutions.problem(i) != text]
        alike = [i for i in others if self.counts[i] == count]
        among = alike if len(alike) >= STRANGERS else others
        return [among[i] for i in self.rng.permutation(len(among))[:STRANGERS]]

    def _usable(self, prompt_id: str) -> int:
        return sum(len(vectors) >= FEWEST_STEPS for vectors in self.solutions.of(prompt_id))


# ---- figures -----------------------------------------------------------------------------------------------------


def _control(followed: Sequence[Followed]) -> tuple[Measured | None, Measured | None, Measured | None]:
    problems = [one.recorded.prompt_id for one in followed]
    own = np.array([one.best.found.alignment for one in followed if one.best])
    others = np.array([one.others for one in followed], float)
    own_mean, others_mean, drop = (mean_over_problems(values, problems) for values in (own, others, own - others))
    return own_mean, others_mean, drop


def _aucs(followed: Sequence[Followed]) -> dict[str, tuple[str, Measured | None]]:
    """In distribution of the evaluations where their problems have solutions, and of training elsewhere."""
    judged = [one for one in followed if one.best and one.recorded.passed is not None]
    splits = {one.recorded.split for one in judged}
    found = {}
    for name, split in ((INSIDE, INSIDE if INSIDE in splits else TRAIN), (OUTSIDE, OUTSIDE)):
        own = [one for one in judged if one.recorded.split == split]
        scores = np.array([one.best.found.alignment for one in own if one.best])
        passed = np.array([one.recorded.passed for one in own], bool)
        found[name] = split, auc(scores, passed, [one.recorded.prompt_id for one in own])
    return found


def _uses(told: Sequence[Mapping[str, Any]], followed: Sequence[Followed], extractor: Extractor) -> list[CodeUse]:
    """`told`: the teacher's codes, as the fit wrote them. The most used first."""
    train = [one for one in followed if one.recorded.split == TRAIN]
    known, examples = {int(code["code"]): code for code in told}, _examples(train, extractor)
    early, late = thirds(train)
    everything, first, last = (shares_of(own) for own in (train, early, late))
    uses = []
    for code in {*known, *everything}:
        own = known.get(code, {"name": "in no solution of the teacher's", "share": 0.0, "exemplars": ()})
        verdicts = [one.recorded.passed for one in train if code in one.codes and one.recorded.passed is not None]
        uses.append(
            CodeUse(
                code=code,
                name=own["name"],
                exemplars=tuple(own["exemplars"]),
                example=examples.get(code, ""),
                teacher=own["share"],
                student=everything.get(code, 0.0),
                early=first.get(code, 0.0) if early else None,
                late=last.get(code, 0.0) if late else None,
                judged=len(verdicts),
                pass_rate=float(np.mean(verdicts)) if verdicts else None,
            )
        )
    return sorted(uses, key=lambda use: (-use.teacher - use.student, use.code))


def _spreads(followed: Sequence[Followed], codebook_KD: np.ndarray) -> tuple[Spread, Spread] | None:
    early, late = thirds([one for one in followed if one.recorded.split == TRAIN and one.codes])
    return (_spread(early, codebook_KD), _spread(late, codebook_KD)) if early else None


def _spread(followed: Sequence[Followed], codebook_KD: np.ndarray) -> Spread:
    groups: dict[tuple[int, str], list[np.ndarray]] = {}
    for one in followed:
        groups.setdefault((one.recorded.step, one.recorded.prompt_id), []).append(one.vectors.mean(0))
    volumes = [dpp_logdet(np.stack(means)) / len(means) for means in groups.values() if len(means) > 1]
    steps_SD = np.concatenate([one.vectors for one in followed])
    return Spread(
        mutual_information=usage(code_assignment(steps_SD, codebook_KD)).mutual_information,
        volume=float(np.mean(volumes)) if volumes else None,
    )


def thirds(followed: Sequence[Followed]) -> tuple[list[Followed], list[Followed]]:
    """Those of the first and of the last third of the steps; none where all are of one step."""
    steps = [one.recorded.step for one in followed]
    first, last = min(steps, default=0), max(steps, default=0)
    if first == last:
        return [], []
    third = (last - first) * THIRD
    early = [one for one in followed if one.recorded.step <= first + third]
    return early, [one for one in followed if one.recorded.step >= last - third]


def shares_of(followed: Sequence[Followed]) -> dict[int, float]:
    """Each code's share of all steps."""
    counts = Counter(code for one in followed for code in one.codes)
    return {code: count / counts.total() for code, count in counts.items()}


def _examples(followed: Sequence[Followed], extractor: Extractor) -> dict[int, str]:
    """Of each code the student's step nearest to it."""
    codebook_KD = extractor.codebook_KD.cpu().numpy()
    best: dict[int, tuple[float, str]] = {}
    for one in followed:
        distances = np.linalg.norm(one.vectors - codebook_KD[list(one.codes)], axis=1).tolist()
        for code, distance, step in zip(one.codes, distances, one.recorded.steps, strict=True):
            if code not in best or distance < best[code][0]:
                best[code] = distance, step.text
    return {code: text for code, (_, text) in best.items()}


def _shown(followed: Sequence[Followed], rollout: str) -> Followed | None:
    """Whose plan is drawn. Raises StrategyError where the one that was asked for has none."""
    if rollout:
        found = [one for one in followed if one.recorded.rollout_id == rollout]
        if not found:
            rule = "--rollout is the id of a recorded rollout of the student's"
            raise StrategyError(rule, f"{rollout[:SHOWN]!a} is none", f"see {ROLLOUTS_FILE}")
        if not found[-1].best:
            rule = f"a rollout is compared with a solution of its problem, each of {FEWEST_STEPS} steps or more"
            why = f"{len(found[-1].codes)} steps" if found[-1].recorded.known else "no solution of its problem"
            raise StrategyError(rule, f"{rollout[:SHOWN]!a}: {why}", "name another")
        return found[-1]
    aligned = [one for one in followed if one.best]
    return next((one for one in reversed(aligned) if one.recorded.passed), aligned[-1] if aligned else None)
