"""Which of a run's recorded rollouts an audit of strategies reads, and their steps.

Of the student's rollouts, and of evaluations those whose problem has a teacher's solution. Where there are more than
are wanted, they are spread evenly over the file; the file is read twice, since it may be larger than memory.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...verifier_service.strategies.segments import Step, StepLimits, pieces_of, segment

TRAIN, INSIDE, OUTSIDE = SPLITS = ("train", "in_distribution", "out_of_distribution")
MOST_TOKENS = 2**17  # of a response
LONG, UNREADABLE = f"of more than {MOST_TOKENS:,} tokens", "that are no whole lines"
OTHERS, NO_SOLUTION = "of other writers or prompts", "of evaluations, whose problem has no teacher's solution"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One of the student's rollouts, and the steps of its response."""

    rollout_id: str
    prompt_id: str
    split: str  # train, in_distribution or out_of_distribution
    step: int
    passed: bool | None  # None: not judged
    known: bool  # whether its problem is in the extractor's folder
    steps: tuple[Step, ...] = ()


@dataclass(slots=True)
class Chosen:
    """`rollouts`: what was read, in the file's order; `found`: the student's that could have been, by split."""

    rollouts: list[Recorded] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    size: int
    recorded: Recorded


def read_recorded(
    path: Path,
    tokenizer: Any,
    limits: StepLimits,
    knows: Callable[[str, str], bool],
    most: int,
    wanted: str = "",
) -> Chosen:
    """At most `most` rollouts of training and of each split; among them the newest that passed, and the newest with
    the id `wanted`. `knows`: whether a prompt's id and text are those of a problem with solutions."""
    chosen = Chosen()
    with path.open("rb") as file:
        places = _places(file, knows, chosen)
        kept = {
            i for split in SPLITS for i in _spread([i for i, p in enumerate(places) if p.recorded.split == split], most)
        }
        for wants in (lambda own: own.passed and own.known, lambda own: own.rollout_id == wanted):
            kept |= {next((i for i in reversed(range(len(places))) if wants(places[i].recorded)), -1)} - {-1}
        for place in (places[i] for i in sorted(kept)):
            file.seek(place.offset)
            row = json.loads(file.read(place.size))
            steps = segment(pieces_of(tokenizer, row["token_ids"][row["prompt_length"] :]), limits)
            chosen.rollouts.append(_recorded(row, place.recorded.known, tuple(steps)))
    return chosen


def _places(file: BinaryIO, knows: Callable[[str, str], bool], chosen: Chosen) -> list[_Place]:
    places, offset = [], 0
    for line in file:
        try:
            place = _place(offset, line, knows)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            place = UNREADABLE
        offset += len(line)
        if isinstance(place, str):
            chosen.left_out[place] += 1
        else:
            places.append(place)
            chosen.found[place.recorded.split] += 1
    return places


def _place(offset: int, line: bytes, knows: Callable[[str, str], bool]) -> _Place | str:
    """Where a rollout stands, or why it is not read. Raises what a line that is none raises."""
    row = json.loads(line)
    if row["source"] != "student" or row.get("context", "plain") != "plain":
        return OTHERS
    if len(row["token_ids"]) - row["prompt_length"] > MOST_TOKENS:
        return LONG
    recorded = _recorded(row, knows(row["prompt_id"], row["prompt"]))
    if recorded.split not in SPLITS or not line.endswith(b"\n"):
        return UNREADABLE
    if recorded.split != TRAIN and not recorded.known:
        return NO_SOLUTION
    return _Place(offset, len(line), recorded)


def _recorded(row: dict[str, Any], known: bool, steps: tuple[Step, ...] = ()) -> Recorded:
    return Recorded(
        rollout_id=str(row["rollout_id"]),
        prompt_id=str(row["prompt_id"]),
        split=TRAIN if row["kind"] == "train" else str(row["split"]),
        step=int(row["step"]),
        passed=None if row.get("abstained") else row.get("passed"),
        known=known,
        steps=steps,
    )


def _spread(rows: Sequence[int], most: int) -> set[int]:
    """At most `most` of some rows, evenly."""
    if len(rows) <= most:
        return set(rows)
    return {rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)}
