"""Rows of a JSONL file to judge, `{id?, prediction, gold, expected?}`, read one by one, and what became of them.

A row's own `as_response`, the prediction in the form that was asked of a model, stands in for `prediction`, and
`answer_marker` says where its answer stands. Its other keys are the dataset's row, for verifiers that read more than
the gold answer.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contracts.errors import DataError
from ..contracts.protocols import Response
from .processes import Outcome

MOST_BYTES = 1 << 26  # of a line
OURS = ("id", "prediction", "as_response", "gold", "expected", "answer_marker")
PROMPTS = ("prompt", "problem", "question")
RULE = "every line to verify is a JSON object with prediction and gold"


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what is judged, and what others decided of it."""

    row_id: str | int
    response: Response
    marker: str = ""
    expected: bool | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order; one without an id gets its line's number. Raises DataError."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError("a file to verify can be read", f"{path}: {error.strerror}", "give a JSONL file") from error
    with file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), 1):
            place = f"{path} line {number}"
            if len(line) == MOST_BYTES and not line.endswith(b"\n"):
                raise DataError(f"a line to verify has less than {MOST_BYTES >> 20} MiB", place, "cut it")
            if line.strip():
                yield _row(_object(line, place), number, place)


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of no UTF-8 too
        raise DataError(RULE, f"{place}: {error}", "write one object a line, in UTF-8") from None
    if not isinstance(row, dict):
        raise DataError(RULE, f"{place}: {type(row).__name__}", "write one object a line")
    return row


def _row(row: dict[str, Any], number: int, place: str) -> Row:
    """Golds may be numbers; all else is as RULE says."""
    text, gold, row_id = row.get("as_response", row.get("prediction")), row.get("gold"), row.get("id", number)
    marker, expected = row.get("answer_marker", ""), row.get("expected")
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        gold = str(gold)
    for name, value, kinds, wanted in (
        ("prediction", text, str, "a text"),
        ("gold", gold, str, "a text or a number"),
        ("id", row_id, str | int, "a text or an integer"),
        ("answer_marker", marker, str, "a text"),
        ("expected", expected, bool | None, "true, false or null"),
    ):
        if not isinstance(value, kinds):
            found = type(value).__name__ if name in row else "nothing"
            raise DataError(RULE, f"{place}: {found} in `{name}`, which is {wanted}", "name the fields so")
    extra = {key: value for key, value in row.items() if key not in OURS}
    prompt = next((extra[key] for key in PROMPTS if isinstance(extra.get(key), str)), "")
    response = Response(text=text, gold=gold, prompt=prompt, row=json.dumps(extra) if extra else "")  # pyright: ignore
    return Row(row_id, response, marker, expected)


@dataclass(slots=True)
class Tally:
    """What became of the rows. An abstention agrees with nothing; `most` slowest rows and disagreements are kept."""

    most: int
    rows: int = 0
    passed: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # abstentions by error class
    against: Counter[tuple[bool, str]] = field(default_factory=Counter)  # expected, and what was decided
    slowest: list[tuple[float, int, str | int]] = field(default_factory=list)  # a heap: seconds, position, id
    disagreements: list[tuple[Row, Outcome]] = field(default_factory=list)

    def add(self, row: Row, outcome: Outcome) -> None:
        decided = decision(outcome)
        self.rows += 1
        self.passed += decided == "passed"
        if decided == "abstained":
            self.errors[outcome.judgement.error_class] += 1
        if row.expected is not None:
            self.against[row.expected, decided] += 1
            agrees = decided == ("passed" if row.expected else "incorrect")
            if not agrees and len(self.disagreements) < self.most:
                self.disagreements.append((row, outcome))
        heapq.heappush(self.slowest, (outcome.seconds, -self.rows, row.row_id))
        if len(self.slowest) > self.most:
            heapq.heappop(self.slowest)

    def summary(self) -> dict[str, Any]:
        """The figures, for JSON. `agreement` is a share of the rows with `expected`, none where there are none."""
        expected, abstained = self.against.total(), self.errors.total()
        agree = self.against[True, "passed"] + self.against[False, "incorrect"]
        return {
            "rows": self.rows,
            "passed": self.passed,
            "incorrect": self.rows - self.passed - abstained,
            "abstained": abstained,
            "errors": dict(self.errors.most_common()),
            "expected": expected,
            "agree": agree,
            "agreement": agree / expected if expected else None,
            "wrong_accepts": self.against[False, "passed"],
            "wrong_rejects": self.against[True, "incorrect"],
            "abstained_expected_true": self.against[True, "abstained"],
            "abstained_expected_false": self.against[False, "abstained"],
            "slowest": [
                {"id": row_id, "seconds": seconds} for seconds, _, row_id in sorted(self.slowest, reverse=True)
            ],
        }


def decision(outcome: Outcome) -> str:
    """passed, incorrect or abstained."""
    if outcome.judgement.error_class:
        return "abstained"
    return "passed" if outcome.judgement.passed else "incorrect"
