"""Rows of a JSONL file to judge, `{id?, prediction, gold, expected?}`, read one by one, and what became of them.

Several golds, in a list, are all right. A row's own `as_response`, the prediction in the form that was asked of a
model, stands in for `prediction`, and `answer_marker` says where its answer stands. Its other keys are the dataset's
row, for verifiers that read more than the gold answer.
"""

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..contracts.errors import DataError
from ..contracts.json_files import kind_of, read_json_lines, written_number
from ..contracts.protocols import Response
from .processes import Outcome

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
    for number, row in read_json_lines(path, RULE):
        yield _row(row, number, f"{path} line {number}")


def _row(row: dict[str, Any], number: int, place: str) -> Row:
    """Golds may be numbers, or several; all else is as RULE says."""
    text, row_id = row.get("as_response", row.get("prediction")), row.get("id", number)
    marker, expected = row.get("answer_marker", ""), row.get("expected")
    golds = _golds(row.get("gold"))
    for name, value, kinds, wanted in (
        ("prediction", text, str, "a text"),
        ("gold", golds, list, "a text, a number without an exponent, or a list of these"),
        ("id", row_id, str | int, "a text or an integer"),
        ("answer_marker", marker, str, "a text"),
        ("expected", expected, bool | None, "true, false or null"),
    ):
        if not isinstance(value, kinds):
            found = kind_of(row[name]) if name in row else "nothing"
            raise DataError(RULE, f"{place}: {found} in `{name}`, which is {wanted}", "name the fields so")
    extra = {key: value for key, value in row.items() if key not in OURS}
    prompt = next((extra[key] for key in PROMPTS if isinstance(extra.get(key), str)), "")
    gold, *others = golds or [""]
    kept = _as_json(extra, place) if extra else ""
    response = Response(text=text, gold=gold, prompt=prompt, row=kept, other_golds=tuple(others))  # pyright: ignore
    return Row(row_id, response, marker, expected)


def _golds(value: Any) -> list[str] | None:
    """The golds of a row: of several those that have any text, each once; None where one is neither text nor number."""
    texts = [
        one if isinstance(one, str) else written_number(one) for one in (value if isinstance(value, list) else [value])
    ]
    golds = [text for text in texts if text is not None]
    if len(golds) < len(texts):
        return None
    return list(dict.fromkeys(gold for gold in golds if gold.strip() or len(golds) == 1))


def _as_json(row: dict[str, Any], place: str) -> str:
    try:
        return json.dumps(row)
    except RecursionError:
        raise DataError(RULE, f"{place}: nested too deep", "write one object a line") from None


@dataclass(slots=True)
class Tally:
    """What became of the rows. An abstention agrees with nothing; `most` slowest rows and disagreements are kept.

    `lenient`: a response that cannot be judged by its own fault abstains too.
    """

    most: int
    lenient: bool = False
    rows: int = 0
    passed: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # abstentions by error class
    faults: Counter[str] = field(default_factory=Counter)  # incorrect by a fault of the response, by error class
    against: Counter[tuple[bool, str]] = field(default_factory=Counter)  # expected, and what was decided
    slowest: list[tuple[float, int, str | int]] = field(default_factory=list)  # a heap: seconds, position, id
    disagreements: list[tuple[Row, Outcome]] = field(default_factory=list)

    def add(self, row: Row, outcome: Outcome) -> None:
        decided = decision(outcome, self.lenient)
        self.rows += 1
        self.passed += decided == "passed"
        if decided == "abstained":
            self.errors[outcome.judgement.error_class] += 1
        elif outcome.judgement.error_class:
            self.faults[outcome.judgement.error_class] += 1
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
            "faults": dict(self.faults.most_common()),
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


def decision(outcome: Outcome, lenient: bool = False) -> str:
    """passed, incorrect or abstained."""
    if outcome.judgement.error_class and (lenient or not outcome.judgement.fault):
        return "abstained"
    return "passed" if outcome.judgement.passed else "incorrect"
