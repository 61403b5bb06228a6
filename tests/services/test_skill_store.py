"""The skill bank's store: versions that restore everything, and writers that run side by side or are killed."""

import random
import shutil
import subprocess
import sys
from dataclasses import replace

import lancedb
import pyarrow as pa
import pytest

from tutorloop.contracts.errors import SkillError
from tutorloop.contracts.skills import BankEntry
from tutorloop.verifier_service.skills.store import COUNTS, SkillBank, bank_exists, copy_bank, create_bank


def skill(entry_id: str, text: str = "count twice", **more) -> BankEntry:
    return BankEntry(entry_id=entry_id, kind="skill", texts=("Title", text, "Always"), **more)


def mistake(entry_id: str, **more) -> BankEntry:
    return BankEntry(entry_id=entry_id, kind="mistake", texts=("Wrong", "In haste", "Read on"), **more)


def test_an_entry_comes_back_as_it_went_in(tmp_path):
    entry = skill("gen_1", group="clean", rollout_ids=("a:1", "b:2"), outcomes=(True, False), extra='{"k": [1]}')
    entry = replace(entry, uses=9, helpful=4, harmful=3, neutral=2)
    bank = SkillBank.open(str(tmp_path / "bank"), create=True)
    bank.add([entry, mistake("err_1")], "first")
    again = SkillBank.open(str(tmp_path / "bank"))
    assert again.entries() == [entry, mistake("err_1")]
    assert again.entries("mistake") == [mistake("err_1")]
    assert SkillBank.open(str(tmp_path / "bank"), create=True).version == again.version  # there already


def test_versions_tell_what_they_hold(tmp_path):
    bank = SkillBank.open(str(tmp_path), create=True)
    first = bank.add([skill("a"), mistake("m"), skill("b")], "three")
    second = bank.record({"a": (2, 1, 1, 0)})
    third = bank.replace([skill("b", "slowly"), skill("a"), skill("c")], "merged")
    assert [(v.version, v.skills, v.mistakes, v.note) for v in bank.versions()] == [
        (1, 0, 0, ""),
        (first, 2, 1, "three"),
        (second, 2, 1, ""),
        (third, 3, 0, "merged"),
    ]
    assert bank.version == third and bank.at(second).version == second
    assert [v.version for v in bank.at(second).versions()] == [1, first, second]
    assert [entry.entry_id for entry in bank.entries()] == ["b", "a", "c"]
    changes = bank.changes(first, third)
    assert changes.added == (skill("c"),) and changes.removed == (mistake("m"),)
    assert [(new.entry_id, names) for _, new, names in changes.changed] == [("b", ("texts",))]
    assert bank.changes(second, third).changed[0][2] == ("uses", "helpful", "harmful")


def test_any_version_restores_the_whole_bank(tmp_path):
    """Against a dictionary that is copied at every write."""
    rng, bank = random.Random(), SkillBank.open(str(tmp_path), create=True)
    kept: dict[int, tuple[dict[str, BankEntry], dict]] = {1: ({}, {})}
    entries: dict[str, BankEntry] = {}
    metadata: dict = {}
    for step in range(25):
        choice = rng.choice(["add", "record", "replace", "describe", "restore"])
        if choice == "add":
            new = [rng.choice([skill, mistake])(f"n{step}.{i}") for i in range(rng.randrange(1, 4))]
            entries |= {entry.entry_id: entry for entry in new}
            version = bank.add(new)
        elif choice == "record":
            counts = {i: tuple(rng.randrange(3) for _ in COUNTS) for i in [*entries, "gone"] if rng.random() < 0.5}
            for entry_id in counts.keys() & entries.keys():
                old = entries[entry_id]
                sums = {c: getattr(old, c) + n for c, n in zip(COUNTS, counts[entry_id], strict=True)}
                entries[entry_id] = replace(old, **sums)
            version = bank.record(counts)
        elif choice == "replace":
            shown = [replace(e, group=f"g{step}") for e in entries.values() if rng.random() < 0.7] + [skill(f"r{step}")]
            rng.shuffle(shown)
            entries = {entry.entry_id: entry for entry in shown}
            version = bank.replace(shown)
        elif choice == "describe":
            metadata = {"step": step, "text": "é \u2028 \"'"}
            version = bank.describe(metadata)
        else:
            old = rng.choice(list(kept))
            entries, metadata = dict(kept[old][0]), kept[old][1]
            version = bank.restore(old)
        kept[version] = dict(entries), metadata
        assert bank.version == version
    for version, (there, described) in kept.items():
        assert bank.at(version).entries() == list(there.values())
        assert bank.at(version).metadata == described


def test_what_others_did_since_stays(tmp_path):
    bank, other = SkillBank.open(str(tmp_path), create=True), SkillBank.open(str(tmp_path))
    since = bank.add([skill("a", uses=5, helpful=5), skill("b"), mistake("m")])
    other.add([skill("new")])
    other.record({"a": (3, 1, 2, 0), "b": (1, 0, 0, 1)})
    bank.replace([skill("a", "merged", uses=7, helpful=6, neutral=1), skill("c")], since=since)
    assert {entry.entry_id: entry for entry in bank.entries()} == {
        "a": skill("a", "merged", uses=10, helpful=7, harmful=2, neutral=1),
        "c": skill("c"),
        "new": skill("new"),
    }
    with pytest.raises(SkillError, match="new in the bank"):
        bank.replace([skill("new")], since=since)


def test_what_cannot_be_written_leaves_the_bank_as_it_is(tmp_path):
    bank = SkillBank.open(str(tmp_path), create=True)
    version = bank.add([skill("a")])
    for entries, rule in [
        ([skill("b"), skill("a")], "new in the bank"),
        ([skill("b"), skill("b")], "an id of its own"),
        ([skill("b"), skill("")], "an id of its own"),
        ([replace(skill("b"), kind="recipe")], "a skill or a mistake"),
        ([skill("b", "\ud800")], "Unicode"),
    ]:
        with pytest.raises(SkillError, match=rule):
            bank.add(entries)
    with pytest.raises(SkillError, match="only the bank itself"):
        bank.at(version).record({"a": (1, 1, 0, 0)})
    for missing in (0, version + 1):
        with pytest.raises(SkillError, match="versions that it lists"):
            bank.at(missing)
    assert bank.add([]) == bank.record({}) == bank.record({"a": (0, 0, 0, 0)}) == version
    assert bank.entries() == [skill("a")]


def test_a_bank_is_there_whole_or_not(tmp_path):
    made = create_bank(str(tmp_path / "bank"), [skill("b"), skill("a")], "made", {"n": 1})
    assert (made.version, made.metadata, made.versions()[0].note) == (1, {"n": 1}, "made")
    assert made.entries() == [skill("b"), skill("a")] and bank_exists(made.path)
    with pytest.raises(SkillError, match="an id of its own"):
        create_bank(str(tmp_path / "other"), [skill("a"), skill("a")], "", {})
    assert not bank_exists(str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "bank" / "entries.lance")  # as killed before its one commit
    assert not bank_exists(made.path)
    assert create_bank(made.path, [skill("c")], "", {}).entries() == [skill("c")]


def test_no_bank_is_made_by_looking(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SkillError, match="none at"):
            SkillBank.open(str(path))
    assert not list(tmp_path.iterdir())


def test_a_damaged_bank_says_so(tmp_path):
    for harm in ("manifest", "data", "columns"):
        path = tmp_path / harm
        create_bank(str(path), [skill("a")], "", {})
        if harm == "manifest":
            for file in (path / "entries.lance" / "_versions").iterdir():
                file.write_bytes(b"x")
        elif harm == "data":
            shutil.rmtree(path / "entries.lance" / "data")
        else:
            lancedb.connect(str(path)).create_table("entries", pa.table({"x": [1]}), mode="overwrite")
        with pytest.raises(SkillError, match=r"can be read|bank's columns"):
            SkillBank.open(str(path)).entries()


def test_hostile_text_is_text(tmp_path):
    ids = ["'; DROP TABLE entries; --", "a'', 'b", "{x}", "%s", "\x1b[31m", "日本", "\u2028", "\\'", "a\nb", "\0"]
    bank = SkillBank.open(str(tmp_path), create=True)
    bank.add([skill(i, i) for i in [*ids, "other"]])
    bank.record({i: (k, 0, k, 1) for k, i in enumerate(ids)})
    bank.replace([entry for entry in bank.entries() if entry.entry_id != ids[0]])
    assert bank.entries() == [
        *(skill(i, i, uses=k, harmful=k, neutral=1) for k, i in enumerate(ids) if k),
        skill("other", "other"),
    ]


def test_a_copy_is_a_bank_of_its_own(tmp_path):
    bank = SkillBank.open(str(tmp_path / "one"), create=True)
    bank.add([skill("b"), skill("a")])
    bank.describe({"source": "here"})
    copy = copy_bank(bank.path, str(tmp_path / "two"))
    assert copy.entries() == bank.entries() and copy.metadata == bank.metadata
    assert [v.note for v in copy.versions()] == [f"copy of version {bank.version} of {bank.path}"]
    copy.add([skill("c")])
    assert len(bank.entries()) == 2
    with pytest.raises(SkillError, match="where none is"):
        copy_bank(bank.path, copy.path)
    assert copy_bank(bank.path, copy.path, exist_ok=True).entries() == copy.entries()  # as it is
    with pytest.raises(SkillError, match="none at"):
        copy_bank(str(tmp_path / "none"), str(tmp_path / "three"))


# A writer says what it wrote after each write. It adds two entries and counts on two others at a time.
WRITER = """
import sys
from tutorloop.contracts.errors import SkillError
from tutorloop.contracts.skills import BankEntry
from tutorloop.verifier_service.skills.store import SkillBank

path, name, writes = sys.argv[1], sys.argv[2], int(sys.argv[3])
bank = SkillBank.open(path)
for i in range(writes):
    ids = [f"{name}.{i}.{half}" for half in "ab"]
    bank.add([BankEntry(entry_id=x, kind="skill", texts=(x, x * 50, x)) for x in ids], name)
    print("added", i, flush=True)
    bank.record({"left": (3, 1, 1, 1), "right": (1, 0, 1, 0)})
    print("counted", i, flush=True)
    try:
        bank.add([BankEntry(entry_id=f"shared.{i}", kind="mistake", texts=("", "", ""))])
        print("won", i, flush=True)
    except SkillError:
        pass
"""


def start(path: str, name: str, writes: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, path, name, str(writes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("scheme", "writers"), [("", 3), ("file://", 2)])  # with the lock, and without
def test_nothing_of_concurrent_writers_is_lost(tmp_path, scheme, writers):
    path, writes = f"{scheme}{tmp_path}", 5
    bank = SkillBank.open(path, create=True)
    bank.add([skill("left"), skill("right")])
    running = [start(path, f"w{k}", writes) for k in range(writers)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * writers
    entries = {entry.entry_id: entry for entry in bank.entries()}
    assert len(entries) == len(bank.entries())
    own = {f"w{k}.{i}.{half}" for k in range(writers) for i in range(writes) for half in "ab"}
    assert entries.keys() == own | {f"shared.{i}" for i in range(writes)} | {"left", "right"}
    assert sum(text.count("won") for text in said) == writes  # one writer each
    n = writers * writes
    assert [getattr(entries["left"], c) for c in COUNTS] == [3 * n, n, n, n]
    assert [getattr(entries["right"], c) for c in COUNTS] == [n, 0, n, 0]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_killed_writer_leaves_whole_writes_alone(tmp_path, scheme):
    path, rng = f"{scheme}{tmp_path}", random.Random()
    bank = SkillBank.open(path, create=True)
    bank.add([skill("left"), skill("right")])
    running = {f"w{k}": start(path, f"w{k}", 10_000) for k in range(2)}
    added, counted = set(), 0
    for name, process in running.items():
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(rng.randrange(1, 12))]
        process.kill()  # SIGKILL, wherever it is by now
        lines += process.stdout.read().split("\n")
        process.wait(timeout=60)
        process.stdout.close()
        added |= {f"{name}.{line.split()[1]}" for line in lines if line.startswith("added")}
        counted += sum(line.startswith("counted") for line in lines)
    entries = {entry.entry_id: entry for entry in SkillBank.open(path).entries()}
    halves = {half: {i[:-2] for i in entries if i.endswith(f".{half}")} for half in "ab"}
    assert halves["a"] == halves["b"] >= added
    assert len(halves["a"] - added) <= len(running)  # written, and killed before it could be said
    left, right = entries["left"], entries["right"]
    assert counted <= right.uses <= counted + len(running)
    assert (left.uses, left.helpful, left.neutral) == (3 * right.uses, right.uses, right.uses)
    assert left.harmful == right.harmful == right.uses
    bank.add([skill("after")])  # no lock was left behind
    assert len(bank.versions()) == bank.version
