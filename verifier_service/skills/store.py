"""The skill bank's store: one LanceDB table, a row an entry, and a new version with every write.

A write is one commit of LanceDB: whole or not there, whatever is killed. In a local folder writers take turns at a file
lock, which dies with its holder, so that nothing of concurrent writers is lost. On an object store, where no lock is,
LanceDB's own conflict checks hold for `add` (an entry's id is the table's key) and for `record` (the sums are made
where they are committed); `replace` and `restore` want one writer at a time there.

Notes on versions are a second table. A writer killed between the two loses its note, never its entries.
"""

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa

from ...contracts.errors import SkillError
from ...contracts.skills import STRINGS, BankEntry

ENTRIES, NOTES, LOCK = "entries", "notes", ".lock"
COUNTS = ("uses", "helpful", "harmful", "neutral")
KINDS = ("skill", "mistake")
KEY = {b"lance-schema:unenforced-primary-key": b"true"}
SCHEMA = pa.schema(
    [
        pa.field("entry_id", pa.string(), nullable=False, metadata=KEY),
        pa.field("kind", pa.string()),
        pa.field("group", pa.string()),
        pa.field("texts", STRINGS),
        pa.field("rollout_ids", STRINGS),
        pa.field("outcomes", pa.list_(pa.bool_())),
        *(pa.field(count, pa.int64()) for count in COUNTS),
        pa.field("extra", pa.string()),
        pa.field("position", pa.int64()),  # in the bank; equal ones are ordered by id
    ]
)
METADATA = b"metadata"
NOTES_SCHEMA = pa.schema({"version": pa.int64(), "note": pa.string()})
Table = Any  # LanceDB's own types are abstract where they say least


@dataclass(frozen=True, slots=True)
class BankVersion:
    """A version of the bank: when it was made, what it holds, and the note of who wrote it."""

    version: int
    time: datetime  # UTC
    skills: int
    mistakes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class BankChanges:
    """What became of the entries between two versions; of a changed one the names of the fields that differ."""

    added: tuple[BankEntry, ...]
    removed: tuple[BankEntry, ...]
    changed: tuple[tuple[BankEntry, BankEntry, tuple[str, ...]], ...]  # old, new, fields


class SkillBank:
    """A bank in a local folder or at an object store path; `at` gives one that reads an older version."""

    def __init__(self, path: str, pinned: int = 0) -> None:
        self.path, self._pinned = path, pinned
        self._db = lancedb.connect(path, read_consistency_interval=timedelta(0))
        with _readable(path):
            self._table: Table = self._db.open_table(ENTRIES, version=pinned or None)
        if self._table.schema.names != SCHEMA.names:
            raise SkillError(
                "a bank has a bank's columns", f"{path!r}: {self._table.schema.names}", "name another path"
            )

    @classmethod
    def open(cls, path: str, *, create: bool = False) -> "SkillBank":
        """The bank at `path`; `create` makes an empty one where none is. Raises SkillError."""
        if create:
            return create_bank(path, [], "", {}, exist_ok=True)
        if not bank_exists(path):
            rule = "a skill bank is a folder or object store path with a bank in it"
            raise SkillError(rule, f"none at {path!r}", "`tutorloop bank import` and `tutorloop bank build` make one")
        return cls(path)

    @property
    def version(self) -> int:
        """The one that is read: the latest, unless this is an older version's view."""
        return self._table.version

    def versions(self) -> list[BankVersion]:
        """Every version up to this one, oldest first."""
        notes = {row["version"]: row["note"] for row in self._notes().to_arrow().to_pylist()}
        listed = [row for row in self._table.list_versions() if row["version"] <= self.version]
        return [self._described(row, notes.get(row["version"], "")) for row in listed]

    def _described(self, row: dict[str, Any], note: str) -> BankVersion:
        total = int(row["metadata"]["total_rows"])
        skills = self._at(row["version"]).count_rows("kind = 'skill'") if total else 0
        time = row["timestamp"].astimezone(UTC)  # LanceDB gives local time without a zone
        return BankVersion(row["version"], time, skills, total - skills, note)

    def at(self, version: int) -> "SkillBank":
        """A view of `version` that cannot be written to. Raises SkillError."""
        self._at(version)
        return SkillBank(self.path, version)

    def _at(self, version: int) -> Table:
        try:
            return self._db.open_table(ENTRIES, version=version)
        except ValueError as error:
            found = f"version {version}; the bank is at {self.version}"
            raise SkillError("a bank has the versions that it lists", found, "`tutorloop bank show`") from error

    def entries(self, kind: str = "") -> list[BankEntry]:
        """The entries (of one kind) in the order in which they came into the bank."""
        return [entry for _, entry in sorted(self._read(self._table), key=_order) if kind in ("", entry.kind)]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the bank says of itself: the `metadata` of the published file that it was imported from."""
        return json.loads((self._table.schema.field("extra").metadata or {}).get(METADATA, b"{}"))

    def describe(self, metadata: Mapping[str, Any]) -> int:
        """Set the metadata, which must be JSON; the version that has it."""
        with self._writing() as table:
            table.update_field_metadata({"path": "extra", "metadata": {METADATA.decode(): json.dumps(metadata)}})
            return table.version

    def add(self, entries: Sequence[BankEntry], note: str = "") -> int:
        """Append entries whose ids are new; the version that has them.

        Raises SkillError, and then none is added; on an object store, where another writer adds one of them at the same
        time, the others are.
        """
        _check(entries)
        with self._writing() as table:
            there = self._read(table)
            taken = {entry.entry_id for _, entry in there} & {entry.entry_id for entry in entries}
            if taken:
                raise _not_new(sorted(taken))
            first = max((position for position, _ in there), default=-1) + 1
            if not entries:
                return table.version
            result = table.merge_insert("entry_id").when_not_matched_insert_all().execute(_rows(entries, first))
            if result.num_inserted_rows != len(entries):  # without a lock: another writer was faster
                raise _not_new([entry.entry_id for entry in entries])
            return self._noted(result.version, note)

    def replace(self, entries: Sequence[BankEntry], note: str = "", *, since: int = 0) -> int:
        """The entries of version `since` (0: the latest) become these, in this order; the version that has them.

        What others did after `since` stays: entries that they added, and counts, to which only the difference between
        `since` and these entries is added. Raises SkillError.
        """
        _check(entries)
        with self._writing() as table:
            now = {entry.entry_id: entry for _, entry in self._read(table)}
            seen = {entry.entry_id: entry for _, entry in self._read(self._at(since))} if since else now
            taken = [entry.entry_id for entry in entries if entry.entry_id in now and entry.entry_id not in seen]
            if taken:
                raise _not_new(taken)
            rows = [_rebased(entry, seen.get(entry.entry_id), now.get(entry.entry_id)) for entry in entries]
            gone = sorted(seen.keys() - {entry.entry_id for entry in entries})
            write = table.merge_insert("entry_id").when_matched_update_all().when_not_matched_insert_all()
            if gone:
                write = write.when_not_matched_by_source_delete(f"entry_id IN ({_quoted(gone)})")
            return self._noted(write.execute(_rows(rows, 0)).version, note)

    def record(self, counts: Mapping[str, tuple[int, int, int, int]]) -> int:
        """Add to entries' (uses, helpful, harmful, neutral); the version that has them.

        An entry that is no longer in the bank is passed over.
        """
        counted = {entry_id: added for entry_id, added in counts.items() if any(added)}
        with self._writing() as table:
            if not counted:
                return table.version
            sums = {name: _sum(name, {i: added[k] for i, added in counted.items()}) for k, name in enumerate(COUNTS)}
            return table.update(where=f"entry_id IN ({_quoted(counted)})", values_sql=sums).version

    def restore(self, version: int) -> int:
        """A new version with the content of an old one. Raises SkillError."""
        self._at(version)
        with self._writing() as table:
            table.checkout(version)
            table.restore()
            return self._noted(table.version, f"version {version} restored")

    def changes(self, old: int, new: int) -> BankChanges:
        """From version `old` to version `new`. Raises SkillError."""
        before = {entry.entry_id: entry for entry in self.at(old).entries()}
        after = {entry.entry_id: entry for entry in self.at(new).entries()}
        both = [(entry, after[entry_id]) for entry_id, entry in before.items() if entry_id in after]
        return BankChanges(
            tuple(entry for entry_id, entry in after.items() if entry_id not in before),
            tuple(entry for entry_id, entry in before.items() if entry_id not in after),
            tuple((one, other, _differing(one, other)) for one, other in both if one != other),
        )

    def _read(self, table: Table) -> list[tuple[int, BankEntry]]:
        """Position and entry of each row."""
        with _readable(self.path):
            rows = table.to_arrow().to_pylist()
        read = []
        for row in rows:
            position = row.pop("position")
            row |= {name: tuple(row[name]) for name in ("texts", "rollout_ids", "outcomes")}
            read.append((position, BankEntry(**row)))
        return read

    def _notes(self) -> Table:
        return self._db.open_table(NOTES)

    def _noted(self, version: int, note: str) -> int:
        if note:
            self._notes().add(pa.table({"version": [version], "note": [note]}, NOTES_SCHEMA))
        return version

    @contextmanager
    def _writing(self) -> Iterator[Table]:
        if self._pinned:
            found = f"a view of version {self._pinned}"
            raise SkillError("only the bank itself is written to", found, "open the bank, or `restore` that version")
        with _locked(self.path):
            self._table.checkout_latest()
            yield self._table


def create_bank(
    path: str, entries: Sequence[BankEntry], note: str, metadata: Mapping[str, Any], *, exist_ok: bool = False
) -> SkillBank:
    """A bank that starts with these entries, in one commit. Where one is, `exist_ok` opens it. Raises SkillError."""
    _check(entries)
    if not _create(path, entries, note, metadata) and not exist_ok:
        raise SkillError("a new bank is made where none is", f"one at {path!r}", "name another folder")
    return SkillBank(path)


def copy_bank(source: str, target: str, *, exist_ok: bool = False) -> SkillBank:
    """A bank with the entries of another's latest version. Where one is, `exist_ok` opens it. Raises SkillError."""
    bank = SkillBank.open(source)
    view = bank.at(bank.version)
    note = f"copy of version {view.version} of {source}"
    return create_bank(target, view.entries(), note, view.metadata, exist_ok=exist_ok)


def bank_exists(path: str) -> bool:
    """Whether a whole bank is there."""
    if _is_local(path) and not Path(path).is_dir():
        return False  # connecting would make the folder
    return {ENTRIES, NOTES} <= set(lancedb.connect(path).list_tables().tables)


def _is_local(path: str) -> bool:
    return "://" not in path


def _create(path: str, entries: Sequence[BankEntry], note: str, metadata: Mapping[str, Any]) -> bool:
    """False where a bank is. The entries come last: a bank is there with all that it starts with, or it is not."""
    extra = SCHEMA.field("extra").with_metadata({METADATA: json.dumps(metadata)})
    schema = SCHEMA.set(SCHEMA.get_field_index("extra"), extra)
    db = lancedb.connect(path)
    with _locked(path):
        if bank_exists(path):
            return False
        db.create_table(NOTES, pa.table({"version": [1], "note": [note]}, NOTES_SCHEMA), exist_ok=True)
        db.create_table(ENTRIES, _rows(entries, 0).cast(schema))
        return True


def _locked(path: str) -> Any:
    return _file_lock(Path(path) / LOCK) if _is_local(path) else nullcontext()


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing lets go of it


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:  # LanceDB has no errors of its own
        raise SkillError("a bank can be read", f"{path!r}: {str(error)[:300]}", "it is damaged: use a copy") from error


def _order(row: tuple[int, BankEntry]) -> tuple[int, str]:
    return row[0], row[1].entry_id


def _rows(entries: Sequence[BankEntry], first: int) -> pa.Table:
    columns = [[getattr(entry, f.name) for entry in entries] for f in fields(BankEntry)]
    return pa.Table.from_arrays(
        [*map(pa.array, columns, SCHEMA.types[:-1]), pa.array(range(first, first + len(entries)), pa.int64())],
        schema=SCHEMA,
    )


def _rebased(entry: BankEntry, seen: BankEntry | None, now: BankEntry | None) -> BankEntry:
    """The entry with the counts that others added since it was seen."""
    if seen is None or now is None:
        return entry
    return replace(entry, **{c: getattr(now, c) + getattr(entry, c) - getattr(seen, c) for c in COUNTS})


def _differing(one: BankEntry, other: BankEntry) -> tuple[str, ...]:
    return tuple(f.name for f in fields(BankEntry) if getattr(one, f.name) != getattr(other, f.name))


def _check(entries: Sequence[BankEntry]) -> None:
    ids = [entry.entry_id for entry in entries]
    twice = sorted(entry_id for entry_id, times in Counter(ids).items() if times > 1)
    if twice or "" in ids:
        raise SkillError("every entry has an id of its own", _listed(twice) or "an empty id", "name them apart")
    wrong = next((entry for entry in entries if entry.kind not in KINDS), None)
    if wrong:
        raise SkillError("an entry is a skill or a mistake", f"{wrong.entry_id}: {wrong.kind!r}", "")
    for entry in entries:
        try:
            "".join((entry.entry_id, entry.group, *entry.texts, *entry.rollout_ids, entry.extra)).encode()
        except UnicodeEncodeError as error:
            remedy = "write the entry's text anew"
            raise SkillError("a bank holds Unicode text", f"{entry.entry_id}: {error.reason}", remedy) from None


def _not_new(ids: Sequence[str]) -> SkillError:
    return SkillError("the ids of added entries are new in the bank", _listed(ids), "name them anew, or replace them")


def _listed(ids: Sequence[str]) -> str:
    return json.dumps(list(ids[:5]))[1:-1] + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def _quoted(ids: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join("'" + entry_id.replace("'", "''") + "'" for entry_id in ids)


def _sum(name: str, added: Mapping[str, int]) -> str:
    """SQL for `name` with each entry's own addend; LanceDB's SQL has no CASE."""
    by_addend: dict[int, list[str]] = {}
    for entry_id, count in added.items():
        by_addend.setdefault(count, []).append(entry_id)
    terms = (f" + {n} * CAST((entry_id IN ({_quoted(ids)})) AS BIGINT)" for n, ids in by_addend.items() if n)
    return name + "".join(terms)
