"""Grow a bank: from memories to entries at a cold start, and by a few at a time while a run goes on (SGSD 2605.28791).

Candidates are merged among themselves, by a model where one is given; one that says what an entry of the bank says
adds its evidence to that, and the bank's own entries are left apart as they are. How the worst is found that has to
leave is ours: merge.standing.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from ...contracts.errors import DataError
from ...contracts.json_files import read_json, read_json_lines
from ...contracts.protocols import Judgement, Response
from ...contracts.skills import BankEntry
from .extract import Extraction, Extractor, Memory, clean
from .merge import LlmMerger, best, merge, nearest, united
from .published import KEYS
from .store import SkillBank

DYNAMIC = "dyn_"
PUBLISHED = {"skill": "gen_", "mistake": "err_"}
RULE = "a line of rollouts is a JSON object with the texts problem, response and answer, and passed: true or false"
FIELDS = {"problem": ("problem", "prompt"), "response": ("response", "prediction"), "gold": ("answer", "gold")}


@dataclass(frozen=True, slots=True)
class Update:
    """What an update did to a bank: ids of entries, memories without candidates by error class, and the new version."""

    version: int
    added: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()  # entries that gained evidence
    dropped: tuple[str, ...] = ()
    errors: dict[str, int] = field(default_factory=dict)


def build(
    memories: Sequence[Memory], extractor: Extractor, merger: LlmMerger | None = None, known: Sequence[BankEntry] = ()
) -> Extraction:
    """The entries that memories give, after those known, which keep their order: `gen_001`, `err_001` and so on."""
    found = extractor(memories)
    known, new = _absorb(known, merge(found.entries, merger))
    taken = Counter({kind: _last_number(known, prefix) for kind, prefix in PUBLISHED.items()})
    for entry in new:
        taken[entry.kind] += 1
        known.append(replace(entry, entry_id=f"{PUBLISHED[entry.kind]}{taken[entry.kind]:03}"))
    return Extraction(known, found.errors)


def online_update(
    bank: SkillBank,
    memories: Sequence[Memory],
    extractor: Extractor,
    *,
    merger: LlmMerger | None = None,
    most_new: int = 5,
    capacity: int = 30,
) -> Update:
    """Add what the memories teach: at most `most_new` entries of each kind, with ids `dyn_VERSION_NUMBER`.

    Of each kind a bank keeps at most `capacity` entries of updates, the best. One commit, or none where nothing is
    new; what others record meanwhile stays.
    """
    version = bank.version
    before = bank.at(version).entries()
    found = extractor(memories)
    known, new = _absorb(before, merge(found.entries, merger))
    new = [entry for kind in KEYS for entry in best((e for e in new if e.kind == kind), most_new)]
    old = {entry.entry_id: entry for entry in before}
    names = (f"{DYNAMIC}{version:04}_{i:02}" for i in count(1))
    free = (name for name in names if name not in old)  # a copied bank counts its versions anew
    new = [replace(entry, entry_id=next(free)) for entry in new]
    after = _within([*known, *new], capacity)
    if after == before:
        return Update(version, errors=found.errors)
    kept = {entry.entry_id for entry in after}
    return Update(
        version=bank.replace(after, f"update from {len(memories)} rollouts", since=version),
        added=tuple(entry.entry_id for entry in new if entry.entry_id in kept),
        merged=tuple(entry.entry_id for entry in after if entry.entry_id in old and entry != old[entry.entry_id]),
        dropped=tuple(entry_id for entry_id in old if entry_id not in kept),
        errors=found.errors,
    )


def unique_ids(banks: Iterable[Sequence[BankEntry]]) -> list[BankEntry]:
    """The entries of several banks, one after the other; where an id is taken by then, the next free of its kind."""
    together: list[BankEntry] = []
    for entries in banks:
        taken = {entry.entry_id for entry in together}
        last = {kind: _last_number([*together, *entries], prefix) for kind, prefix in PUBLISHED.items()}
        for entry in entries:
            if entry.entry_id in taken:
                last[entry.kind] += 1
                entry = replace(entry, entry_id=f"{PUBLISHED[entry.kind]}{last[entry.kind]:03}")
            together.append(entry)
    return together


def _absorb(known: Sequence[BankEntry], candidates: Sequence[BankEntry]) -> tuple[list[BankEntry], list[BankEntry]]:
    """The known entries with the evidence of candidates that say the same, and the candidates that are left."""
    twins = nearest(known, candidates)
    gained: dict[str, list[BankEntry]] = {}
    for candidate in candidates:
        if candidate.entry_id in twins:
            gained.setdefault(twins[candidate.entry_id], []).append(candidate)
    grown = [united([entry, *gained[entry.entry_id]]) if entry.entry_id in gained else entry for entry in known]
    return grown, [candidate for candidate in candidates if candidate.entry_id not in twins]


def _within(entries: Sequence[BankEntry], capacity: int) -> list[BankEntry]:
    """The entries without the worst of those that updates added."""
    dynamic = [entry for entry in entries if entry.entry_id.startswith(DYNAMIC)]
    kept = {e.entry_id for kind in KEYS for e in best((e for e in dynamic if e.kind == kind), capacity)}
    return [entry for entry in entries if entry not in dynamic or entry.entry_id in kept]


def _last_number(entries: Iterable[BankEntry], prefix: str) -> int:
    numbers = (entry.entry_id.removeprefix(prefix) for entry in entries if entry.entry_id.startswith(prefix))
    return max((int(number) for number in numbers if number.isascii() and number.isdigit()), default=0)


# ---- rollouts in a file ------------------------------------------------------------------------------------------


def read_memories(
    path: Path, judge: Callable[[Sequence[Response]], Sequence[Judgement]]
) -> tuple[list[Memory], dict[str, int]]:
    """Memories of JSON lines {problem|prompt, response|prediction, answer|gold, passed?, id?}, or SkillRL's (.json).

    A row without `passed` is judged; beside the memories, how many rows the verifier abstained from, by its reason.
    Raises DataError.
    """
    if path.suffix.lower() == ".json":
        return _published_memories(path), {}
    rows = [_row(path, number, line) for number, line in read_json_lines(path, RULE)]
    unjudged = [row for row in rows if "passed" not in row]
    judged = judge([Response(text=row["response"], gold=row["gold"], prompt=row["problem"]) for row in unjudged])
    skipped: Counter[str] = Counter()
    for row, judgement in zip(unjudged, judged, strict=True):
        if judgement.error_class and not judgement.fault:
            skipped[judgement.error_class] += 1
        else:
            row |= {"passed": judgement.passed, "answer": judgement.answer}
    return [Memory(**row) for row in rows if "passed" in row], dict(skipped)


def _row(path: Path, number: int, read: dict[str, Any]) -> dict[str, Any]:
    """A line as a Memory's fields, `passed` left out where the line does not say. Raises DataError."""
    passed = read.get("passed")
    defaults = {"gold": ""} if passed is not None else {}
    row = {k: next((read[key] for key in keys if key in read), defaults.get(k)) for k, keys in FIELDS.items()}
    if not all(isinstance(text, str) for text in row.values()) or not isinstance(passed, bool | None):
        found = f"{path} line {number} has {', '.join(map(ascii, read))[:80]}"
        remedy = "prompt, prediction and gold are names for them too; without passed the answer is judged"
        raise DataError(RULE, found, remedy)
    row |= {"answer": "", "rollout_id": str(read.get("id", f"{path.stem}:{number}"))}
    row = {name: clean(str(text)) for name, text in row.items()}
    return row if passed is None else {**row, "passed": passed}


def _published_memories(path: Path) -> list[Memory]:
    """SkillRL's generated memories: their goal is the problem, and what is told of the attempt the response."""
    memories: list[Memory] = []
    rule = "a .json file of rollouts is a list of memories as SkillRL generates them"
    published = read_json(path, rule)
    try:
        for told in published:
            content, outcome = told["content"], told["tags"]["outcome"]
            attempt = [told["contextual_description"], content["refined_trajectory"], content["strategic_guidelines"]]
            if outcome not in ("Success", "Failure"):
                raise ValueError
            memories.append(
                Memory(
                    problem=clean(content["task_meta"]["original_goal"]),
                    response="\n".join(part if isinstance(part, str) else json.dumps(part) for part in attempt if part),
                    answer="",
                    passed=outcome == "Success",
                    rollout_id=clean(told["memory_id"]),
                )
            )
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise DataError(rule, f"{path}: not so at number {len(memories) + 1}", "give others as JSON lines") from None
    return memories
