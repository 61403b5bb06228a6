"""What `tutorloop bank` prints. A bank's texts are hostile: no markup, no character that could steer a terminal."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from ..contracts.skills import BankEntry

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..verifier_service.skills.store import BankChanges, SkillBank

LAST_VERSIONS = 10
SHOWN = 160  # characters of a text in a table
NAMES = {"rollout_ids": "rollouts", "outcomes": "right ones"}


def say(line: str) -> None:
    """Print a line as it is."""
    from ..cluster.recording.progress import plain

    typer.echo(plain(line))


def counted(entries: Iterable[BankEntry]) -> str:
    counts = Counter(entry.kind for entry in entries)
    return " and ".join(_number(counts[kind], kind) for kind in ("skill", "mistake"))


def _number(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def because(what: str, reasons: dict[str, int]) -> str:
    return f"; {what}: " + ", ".join(f"{n} ({reason})" for reason, n in sorted(reasons.items())) if reasons else ""


def growth(known: Sequence[BankEntry], grown: Sequence[BankEntry]) -> str:
    old = {entry.entry_id: entry for entry in known}
    gained = sum(entry.entry_id in old and entry != old[entry.entry_id] for entry in grown)
    new = counted(entry for entry in grown if entry.entry_id not in old)
    return f"new: {new}; known ones with new evidence: {gained}"


def _cell(*texts: str) -> "RenderableType":
    """A first text, and dim beneath it the rest."""
    from rich.text import Text

    from ..cluster.recording.progress import plain

    first, *rest = (plain(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…") for text in texts)
    return Text("\n").join([Text(first), *(Text(text, style="dim") for text in rest if text)])


def _table(*columns: str, numbers: Sequence[str] = ()) -> "Table":
    from rich.table import Table

    table = Table(padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
    return table


def _under(title: str, table: "Table") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    return Group(Text(title), table) if table.row_count else Text(title)


def version_table(view: "SkillBank") -> "RenderableType":
    versions = view.versions()
    numbers = ("version", "skills", "mistakes")
    table = _table(*numbers, "time", "note", numbers=numbers)
    for v in versions[-LAST_VERSIONS:]:
        time = f"{v.time:%Y-%m-%d %H:%M:%S}"
        table.add_row(str(v.version), str(v.skills), str(v.mistakes), time, _cell(v.note))
    shown = f", the last {LAST_VERSIONS}" if len(versions) > LAST_VERSIONS else ""
    return _under(f"{len(versions)} versions{shown}", table)


def entry_tables(entries: Sequence[BankEntry]) -> "list[RenderableType]":
    tables: list[RenderableType] = []
    for kind in ("skill", "mistake"):
        of_kind = [entry for entry in entries if entry.kind == kind]
        if of_kind:
            columns = ("id", kind, "right", "wrong", "uses", "helpful", "harmful", "neutral")
            table = _table(*columns, numbers=columns[2:])
            for e in of_kind:
                right = sum(e.outcomes)
                counts = (right, len(e.outcomes) - right, e.uses, e.helpful, e.harmful, e.neutral)
                table.add_row(_cell(e.entry_id, e.group), _cell(*e.texts[:2]), *map(str, counts))
            tables.append(_under(f"{_number(len(of_kind), kind)}, and the rollouts that they come from", table))
    return tables


def change_table(found: "BankChanges", old: int, new: int) -> "RenderableType":
    counts = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed"
    table = _table("", "id", "entry", "what changed")
    for sign, entries in (("+", found.added), ("-", found.removed)):
        for entry in entries:
            table.add_row(sign, _cell(entry.entry_id), _cell(*entry.texts), _cell(entry.kind))
    for before, after, names in found.changed:
        what = (f"{NAMES.get(name, name)}: {_was(before, name)} -> {_was(after, name)}" for name in names)
        table.add_row("~", _cell(after.entry_id), _cell(*after.texts), _cell(*what))
    return _under(f"version {old} -> {new}: {counts}", table)


def _was(entry: BankEntry, name: str) -> str:
    """A field's value; of evidence how much."""
    value = getattr(entry, name)
    return str(len(value) if name == "rollout_ids" else sum(value) if name == "outcomes" else value)


def change_object(found: "BankChanges") -> dict[str, Any]:
    return {
        "added": [asdict(entry) for entry in found.added],
        "removed": [asdict(entry) for entry in found.removed],
        "changed": [{"fields": names, "old": asdict(old), "new": asdict(new)} for old, new, names in found.changed],
    }


def hit_object(entry: BankEntry, similarity: float) -> dict[str, Any]:
    return {"id": entry.entry_id, "texts": entry.texts, "similarity": round(similarity, 4)}


def hit_table(rows: Sequence[dict[str, Any]]) -> "RenderableType":
    table = _table("rank", "weight", "skill", "", "mistake", " ", numbers=("rank", "weight", "", " "))
    for rank, row in enumerate(rows, start=1):
        cells = [
            cell
            for hit in (row["skill"], row["mistake"])
            for cell in (_cell(hit["texts"][0], hit["id"]), f"{hit['similarity']:.2f}")
        ]
        table.add_row(str(rank), f"{row['weight']:.3f}", *cells)
    return table
