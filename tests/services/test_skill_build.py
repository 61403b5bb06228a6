"""A bank that grows: cold start and updates within their limits, from rollouts in a file or a run's."""

import json
import os
from pathlib import Path

import pytest
from skill_entries import entry

from tutorloop.contracts.errors import DataError
from tutorloop.contracts.protocols import Judgement
from tutorloop.verifier_service.skills.build import build, online_update, read_memories, unique_ids
from tutorloop.verifier_service.skills.extract import Extraction, LabExtractor, Memory
from tutorloop.verifier_service.skills.store import SkillBank, create_bank

DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def shared(name):
    path = DATA / "skills" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; TUTORLOOP_SHARED_DATA names the folder")
    return path


# ---- building and updating ------------------------------------------------------------------------------------------


def memories(*responses, passed=False):
    return [
        Memory(problem=f"Compute {i}.", response=text, answer="", passed=passed, rollout_id=f"{text} {i}")
        for i, text in enumerate(responses)
    ]


def saying(*titles, kind="skill", rollout="r"):
    """An extractor that finds one candidate for each title."""
    found = [
        entry(
            f"{'gen' if kind == 'skill' else 'err'}_cand_{i:06}", title, kind=kind, evidence=[(f"{rollout}{i}", True)]
        )
        for i, title in enumerate(titles)
    ]
    return lambda _: Extraction(found, {"bad_json": 1})


def test_a_cold_start_numbers_its_entries_and_a_second_one_adds_to_them():
    worked = memories("37 + 58 = 85", "27 + 48 = 65", "52 - 37 = 25")
    first = build(worked, LabExtractor()).entries
    assert [(e.entry_id, len(e.rollout_ids)) for e in first] == [
        ("err_001", 2),
        ("err_002", 1),
        ("gen_001", 2),
        ("gen_002", 1),
    ]
    assert build(worked, LabExtractor(), known=first).entries == first
    again = build(memories("2 * 3 = 7", "38 + 58 = 86"), LabExtractor(), known=first).entries
    assert [e.entry_id for e in again] == ["err_001", "err_002", "gen_001", "gen_002", "err_003", "gen_003"]
    assert [len(e.rollout_ids) for e in again] == [3, 1, 3, 1, 1, 1]


def test_known_entries_stay_apart_and_keep_their_ids_even_those_of_candidates():
    known = [entry("gen_cand_000000", "same words"), entry("gen_009", "same words"), entry("gen_odd", "x")]
    grown = build([], saying("same words", "new ones"), known=known)
    assert [(e.entry_id, e.rollout_ids) for e in grown.entries] == [
        ("gen_cand_000000", ()),
        ("gen_009", ("r0",)),  # of equally similar ones the first by id
        ("gen_odd", ()),
        ("gen_010", ("r1",)),
    ]
    assert grown.errors == {"bad_json": 1}


def test_entries_of_several_banks_get_ids_of_their_own():
    one = [entry("gen_001", "a"), entry("err_001", "b", kind="mistake")]
    two = [entry("gen_001", "c"), entry("gen_007", "d"), entry("err_001", "e", kind="mistake")]
    together = unique_ids([one, two, two])
    assert [e.entry_id for e in together] == [
        "gen_001", "err_001", "gen_008", "gen_007", "err_002", "gen_009", "gen_010", "err_003",
    ]  # fmt: skip
    assert [e.texts[0] for e in together] == list("abcdecde")


@pytest.fixture
def bank(tmp_path):
    bank = SkillBank.open(str(tmp_path / "bank"), create=True)
    bank.add([entry("gen_001", "static words here"), entry("err_001", "static mistake", kind="mistake")])
    return bank


def test_an_update_adds_the_best_few_and_gives_evidence_to_what_is_there(bank):
    titles = ["static words here", *(f"title{i} word{i}" for i in range(8))]
    update = online_update(bank, memories("x"), saying(*titles), most_new=5)
    assert update.version == bank.version and update.errors == {"bad_json": 1}
    assert (len(update.added), update.merged, update.dropped) == (5, ("gen_001",), ())
    assert all(entry_id.startswith("dyn_") for entry_id in update.added)
    entries = bank.entries()
    assert [e.entry_id for e in entries] == ["gen_001", "err_001", *update.added]
    assert entries[0].rollout_ids == ("r0",)
    assert bank.versions()[-1].note == "update from 1 rollouts"


def test_the_same_update_again_changes_nothing(bank):
    first = online_update(bank, memories("x"), saying("new words", "static words here"))
    again = online_update(bank, memories("x"), saying("new words", "static words here"))
    assert again.version == first.version == bank.version
    assert (again.added, again.merged, again.dropped) == ((), (), ())


def test_over_its_capacity_the_worst_of_the_dynamic_entries_leave_and_never_another(bank):
    added = []
    for i in range(4):
        added += online_update(
            bank, [], saying(*(f"w{i}x{j} z{i}y{j}" for j in range(5)), rollout=f"a{i}"), capacity=30
        ).added
    assert len(added) == len(set(added)) == 20
    bank.record({added[0]: (3, 0, 3, 0), added[1]: (3, 0, 2, 0), added[2]: (3, 3, 0, 0)})
    update = online_update(bank, [], saying("new1 one", "new2 two"), capacity=20)
    assert set(update.dropped) == {added[0], added[1]} and len(update.added) == 2
    dynamic = [e for e in bank.entries() if e.entry_id.startswith("dyn_")]
    assert len(dynamic) == 20
    mistakes = online_update(bank, [], saying("m1 one", "m2 two", kind="mistake"), capacity=20)
    assert len(mistakes.added) == 2 and not mistakes.dropped  # of either kind
    update = online_update(bank, [], saying("new3 one"), capacity=3)
    assert added[2] not in update.dropped
    assert {e.entry_id for e in bank.entries()} >= {"gen_001", "err_001"}
    assert sum(e.entry_id.startswith("dyn_") and e.kind == "skill" for e in bank.entries()) == 3


def test_a_copied_bank_goes_on_beside_the_updates_of_the_first(bank, tmp_path):
    first = online_update(bank, [], saying("one idea", "another notion"))
    copy = create_bank(str(tmp_path / "copy"), bank.entries(), "", {})
    copy.record({"gen_001": (1, 0, 0, 1)})
    assert copy.version == first.version - 1  # the version that the first update started from
    second = online_update(copy, [], saying("third thing"))
    assert len(second.added) == 1 and not set(second.added) & set(first.added)


def test_what_others_record_while_an_update_extracts_is_kept(bank):
    def slow(_):
        SkillBank.open(bank.path).record({"gen_001": (5, 1, 2, 2)})
        return saying("static words here", "fresh idea")([])

    online_update(bank, [], slow)
    (static,) = [e for e in bank.entries() if e.entry_id == "gen_001"]
    assert (static.uses, static.helpful, static.harmful, static.neutral) == (5, 1, 2, 2)
    assert static.rollout_ids == ("r0",)


# ---- rollouts in a file ---------------------------------------------------------------------------------------------


def written(tmp_path, *rows):
    path = tmp_path / "rolls.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


AT_FAULT = Judgement(False, "9", error_class="too_large", fault=True)  # which is incorrect


def test_rows_are_memories_by_either_name_and_judged_where_they_are_not(tmp_path):
    path = written(
        tmp_path,
        {"problem": "p1", "response": "a\u2028b", "answer": "1", "passed": True, "id": "x"},
        {"prompt": "p2", "prediction": "r2", "gold": "2"},
        "",
        {"prompt": "p3", "prediction": "r3", "gold": "3", "id": 7},
        {"prompt": "p4", "prediction": "r4", "passed": False},
        {"prompt": "p5\ud800", "prediction": "r5", "gold": "5", "passed": None},
    )
    judged = []

    def judge(responses):
        judged.extend(responses)
        return [Judgement(True, "2"), Judgement(False, error_class="timeout"), AT_FAULT]

    found, skipped = read_memories(path, judge)
    assert [(r.prompt, r.text, r.gold) for r in judged] == [("p2", "r2", "2"), ("p3", "r3", "3"), ("p5?", "r5", "5")]
    assert skipped == {"timeout": 1}
    assert [(m.problem, m.response, m.gold, m.passed, m.answer, m.rollout_id) for m in found] == [
        ("p1", "a\u2028b", "1", True, "", "x"),
        ("p2", "r2", "2", True, "2", "rolls:2"),
        ("p4", "r4", "", False, "", "rolls:5"),
        ("p5?", "r5", "5", False, "9", "rolls:6"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"problem response answer"',
        "[" * 100_000,
        '{"problem": "p", "response": "r"}',
        '{"problem": "p", "response": 3, "answer": "1"}',
        '{"problem": "p", "response": "r", "answer": 1}',
        '{"problem": "p", "response": "r", "answer": "1", "passed": "yes"}',
        '{"\u001b[31m": 1}',
    ],
)
def test_a_wrong_line_is_named_and_shown_escaped(tmp_path, line):
    path = written(tmp_path, {"problem": "p", "response": "r", "answer": "1", "passed": True}, line)
    with pytest.raises(DataError, match="line 2") as error:
        read_memories(path, lambda _: [])
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 600


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rolls.jsonl"
    path.write_bytes(b'{"problem": "\xff"}\n')
    with pytest.raises(DataError, match="UTF-8"):
        read_memories(path, lambda _: [])


def test_skillrls_memories_are_memories(tmp_path):
    path = shared("skillrl_search_generated_memories_search.json")
    found, skipped = read_memories(path, lambda _: [])
    told = json.loads(path.read_text(encoding="utf-8"))
    assert len(found) == len(told) and not skipped
    assert [m.passed for m in found] == [t["tags"]["outcome"] == "Success" for t in told]
    assert all(m.problem and m.response for m in found)
    broken = tmp_path / "memories.json"
    broken.write_text(json.dumps([*told[:3], {"memory_id": "x"}]))
    with pytest.raises(DataError, match="number 4"):
        read_memories(broken, lambda _: [])
