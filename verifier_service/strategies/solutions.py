"""The teacher's verified solutions: read from JSON lines to fit an extractor to, and kept with their vectors beside it.

Of each problem at most four are kept, as unlike each other as they come: a problem may be solved in several ways, and a
rollout is compared with the best of them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ...contracts.errors import DataError
from ...contracts.json_files import gold_answer, read_json_lines, written_number
from ...contracts.protocols import Judgement, Response
from .extractor import Encoded, read_manifest

VECTORS, TEXTS = "solutions.safetensors", "solutions.jsonl"
KEPT = 4  # solutions of a problem
LINE = "a line of solutions is a JSON object: prompt, solution (or solutions, response), id, and answer or passed"
FIELDS = {
    "id": ("id", "prompt_id"),
    "problem": ("prompt", "problem", "question"),
    "gold": ("answer", "gold", "golds"),
    "solution": ("solutions", "solution", "response"),
}
WRONG, NONE, REPEATED = "wrong", "no solution", "repeated"


@dataclass(slots=True)
class Problem:
    """One problem and its verified solutions."""

    prompt_id: str
    text: str
    solutions: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    place: str
    number: int  # in its file, from 0
    prompt_id: str
    problem: str
    solutions: list[str]
    golds: list[str]
    passed: bool | None


def read_solutions(
    paths: Sequence[Path], judge: Callable[[Sequence[Response]], Sequence[Judgement]]
) -> tuple[list[Problem], dict[str, int]]:
    """Problems with their right solutions, and how many others were left out, by reason.

    Lines are {id|prompt_id, prompt|problem|question, answer|gold, solution|solutions|response, passed?}; a run's
    rollouts.jsonl has such, and GSM8K's own are read too (answer: "a solution #### 42"). What has no `passed` is
    judged. Without an id a problem is known by its text, and named as a run names it: by its row. Raises DataError.
    """
    left_out: Counter[str] = Counter()
    named = _Named()
    found: list[tuple[_Row, Problem, str]] = []
    for row in (row for path in paths for row in _rows(path)):
        problem = named.problem(row)
        found += [(row, problem, text) for text in row.solutions]
        left_out[NONE] += not row.solutions
    unjudged = [(row, text) for row, _, text in found if row.passed is None]
    judged = iter(judge([_response(row, text) for row, text in unjudged]))
    for row, problem, text in found:
        judgement = next(judged) if row.passed is None else Judgement(row.passed)
        if judgement.passed and text not in problem.solutions:
            problem.solutions.append(text)
        elif judgement.passed:
            left_out[REPEATED] += 1
        else:
            left_out[judgement.error_class or WRONG] += 1
    return [problem for problem in named.problems.values() if problem.solutions], dict(+left_out)


class _Named:
    """Problems by their ids, and by their texts for rows without one."""

    def __init__(self) -> None:
        self.problems: dict[str, Problem] = {}
        self._id_of_text: dict[str, str] = {}

    def problem(self, row: _Row) -> Problem:
        """The row's. Raises DataError where its id is another problem's."""
        prompt_id = row.prompt_id or self._id_of_text.get(row.problem) or f"row-{row.number}"
        self._id_of_text.setdefault(row.problem, prompt_id)
        known = self.problems.setdefault(prompt_id, Problem(prompt_id, row.problem))
        if known.text != row.problem:
            found = f"{row.place}: {prompt_id!a} is {known.text[:60]!a} before, and {row.problem[:60]!a} here"
            raise DataError("an id is one problem's", found, "give each problem an id of its own")
        return known


def _rows(path: Path) -> Iterator[_Row]:
    for count, (number, read) in enumerate(read_json_lines(path, LINE)):
        yield _row(f"{path} line {number}", count, read)


def _row(place: str, number: int, read: dict[str, Any]) -> _Row:
    """Raises DataError."""
    values = {k: next((read[key] for key in keys if read.get(key) is not None), None) for k, keys in FIELDS.items()}
    prompt_id, passed = values["id"], read.get("passed")
    answers = _texts(values["gold"], place)
    golds = [gold for text in answers if (gold := gold_answer(text))]
    worked = [text for text in answers if "####" in text]  # GSM8K's form: the answer is behind its solution
    solutions = [text for text in _texts(values["solution"], place) or worked if text.strip()]
    problem = values["problem"]
    if not isinstance(problem, str) or not problem.strip():
        raise DataError(LINE, f"{place} has {', '.join(map(ascii, read))[:80]}", "give the problem's text as prompt")
    if not isinstance(passed, bool | None):
        raise DataError(LINE, f"{place}: passed is {passed!a}", "passed is true or false")
    if solutions and passed is None and not golds:
        raise DataError("a solution is judged by the problem's answer", f"{place} has none", "give answer, or passed")
    name = "" if prompt_id is None else prompt_id if isinstance(prompt_id, str) else written_number(prompt_id)
    if name is None:
        raise DataError(LINE, f"{place}: id is {prompt_id!a}", "an id is a text or a number")
    return _Row(
        place=place, number=number, prompt_id=name, problem=problem, solutions=solutions, golds=golds, passed=passed
    )


def _texts(value: Any, place: str) -> list[str]:
    """A text, a number, or a list of such. Raises DataError."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    texts = [own if isinstance(own, str) else written_number(own) for own in values]
    if None in texts:
        raise DataError(LINE, f"{place}: {str(value)[:60]!a}", "solutions and answers are texts, or lists of texts")
    return [text for text in texts if text is not None]


def _response(row: _Row, text: str) -> Response:
    return Response(text=text, gold=row.golds[0], prompt=row.problem, other_golds=tuple(row.golds[1:]))


# ---- kept beside the extractor -----------------------------------------------------------------------------------


class Solutions:
    """The solutions in an extractor's folder, by problem."""

    def __init__(self, rows: Sequence[dict[str, Any]], vectors_TD: np.ndarray, codes_T: np.ndarray) -> None:
        self._rows = {row["prompt_id"]: row for row in rows}
        self._spans: dict[str, list[slice]] = {}
        at = 0
        for row in rows:
            spans = self._spans.setdefault(row["prompt_id"], [])
            for steps in row["solutions"]:
                spans.append(slice(at, at := at + len(steps)))
        self._vectors_TD, self._codes_T = vectors_TD, codes_T

    @classmethod
    def load(cls, folder: str | Path) -> "Solutions":
        """Raises StrategyError where the folder is not whole."""
        read_manifest(folder)
        tensors = load_file(Path(folder) / VECTORS)
        with (Path(folder) / TEXTS).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return cls(rows, tensors["vectors"], tensors["codes"])

    def joined(
        self, problems: Sequence[Problem], steps: Sequence[Sequence[list[str]]], encoded: Sequence[Sequence[Encoded]]
    ) -> "Solutions":
        """With those of problems whose ids are not here, given as `save_solutions` takes them."""
        rows, vectors, codes = _kept(problems, steps, encoded)
        vectors_TD, codes_T = np.concatenate([self._vectors_TD, *vectors]), np.concatenate([self._codes_T, *codes])
        return Solutions([*self._rows.values(), *rows], vectors_TD, codes_T)

    @property
    def prompt_ids(self) -> list[str]:
        return list(self._rows)

    def problem(self, prompt_id: str) -> str:
        """A problem's text; "" of one that is not here."""
        return self._rows[prompt_id]["problem"] if prompt_id in self._rows else ""

    def has(self, prompt_id: str, text: str) -> bool:
        """Whether there are solutions of this very problem under its id."""
        there = self.problem(prompt_id).strip()
        return bool(there) and there == text.strip()

    def of(self, prompt_id: str) -> list[np.ndarray]:
        """Step vectors, float32 [M, 128], of each solution; none of a problem that is not here."""
        return [self._vectors_TD[span] for span in self._spans.get(prompt_id, [])]

    def codes(self, prompt_id: str) -> list[np.ndarray]:
        """Codes, int64 [M], of each solution's steps."""
        return [self._codes_T[span] for span in self._spans.get(prompt_id, [])]

    def texts(self, prompt_id: str) -> list[list[str]]:
        """Each solution's steps."""
        return self._rows[prompt_id]["solutions"] if prompt_id in self._rows else []


def save_solutions(
    folder: Path,
    problems: Sequence[Problem],
    steps: Sequence[Sequence[list[str]]],
    encoded: Sequence[Sequence[Encoded]],
) -> tuple[str, ...]:
    """Write problems with the steps of their solutions and what these are to the extractor; the files' names."""
    rows, vectors, codes = _kept(problems, steps, encoded)
    (folder / TEXTS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    save_file({"vectors": np.concatenate(vectors), "codes": np.concatenate(codes)}, folder / VECTORS)
    (folder / VECTORS).chmod(0o644)
    return VECTORS, TEXTS


def _kept(
    problems: Sequence[Problem], steps: Sequence[Sequence[list[str]]], encoded: Sequence[Sequence[Encoded]]
) -> tuple[list[dict[str, Any]], list[np.ndarray], list[np.ndarray]]:
    """A row for each problem, and vectors and codes of its kept solutions in the rows' order."""
    rows, kept_ones = [], []
    for problem, texts, own in zip(problems, steps, encoded, strict=True):
        kept = unlike([one.vectors for one in own], KEPT)
        rows.append({"prompt_id": problem.prompt_id, "problem": problem.text, "solutions": [texts[i] for i in kept]})
        kept_ones += [own[i] for i in kept]
    return rows, [one.vectors for one in kept_ones], [one.codes for one in kept_ones]


def unlike(solutions: Sequence[np.ndarray], most: int) -> list[int]:
    """At most `most` solutions, in order: the first, then always the one farthest from all that are taken, by the
    mean of its step vectors."""
    if len(solutions) <= most:
        return list(range(len(solutions)))
    means = np.stack([vectors.mean(0) for vectors in solutions])
    taken = [0]
    while len(taken) < most:
        taken.append(int(np.linalg.norm(means[:, None] - means[taken], axis=-1).min(1).argmax()))
    return sorted(taken)
