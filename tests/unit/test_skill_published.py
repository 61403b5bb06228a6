"""The published JSON layout of skill banks: real files survive a round trip, wrong ones are refused."""

import json
import os
from pathlib import Path

import pytest

from tutorloop.contracts.errors import SkillError
from tutorloop.verifier_service.skills.published import load_metadata, load_published, save_published
from tutorloop.verifier_service.skills.store import SkillBank, copy_bank

DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "skills"
FILES = sorted(DATA.glob("*skill*.json"))
LAYOUT = [path for path in FILES if "memories" not in path.name]


def skill(entry_id: str, **more) -> dict:
    return {
        "skill_id": entry_id,
        "title": f"Title {entry_id}",
        "principle": "Half.",
        "when_to_apply": "é\u2028",
        **more,
    }


def mistake(entry_id: str, **more) -> dict:
    return {"mistake_id": entry_id, "description": "D", "why_it_happens": "", "how_to_avoid": "{x} %s", **more}


BANKS = {
    "general": {
        "general_skills": [skill("g1")],
        "task_specific_skills": {},
        "common_mistakes": [],
        "metadata": {"n": 1},
    },
    "groups": {
        "general_skills": [skill("g1")],
        "task_specific_skills": {"z": [skill("z1"), skill("z2")], "a": [skill("a1")]},
        "common_mistakes": [mistake("e1")],
    },
    "query types": {"general_skills": [], "query_type_skills": {"q": [skill("q1")]}, "common_mistakes": []},
    "both": {
        "general_skills": [],
        "task_specific_skills": {"t": [skill("t1")]},
        "query_type_skills": {"q": [skill("q1", more={"deep": [None, 1.5]})]},
        "common_mistakes": [mistake("e1", severity="high", title="kept")],
    },
}


def through_a_bank(source: Path, folder: Path) -> Path:
    bank = SkillBank.open(str(folder / "bank"), create=True)
    bank.add(load_published(str(source)))
    bank.describe(load_metadata(str(source)))
    bank = copy_bank(bank.path, str(folder / "copy"))
    out = folder / "out.json"
    save_published(bank.entries(), str(out), bank.metadata)
    return out


def ordered(path: Path) -> tuple:
    """Equal where the JSON is, the order of its groups included."""
    bank = json.loads(path.read_text(encoding="utf-8"))
    return bank, [list(groups) for groups in bank.values() if isinstance(groups, dict)]


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_survives_a_round_trip(tmp_path, name):
    source = tmp_path / "source.json"
    source.write_text(json.dumps(BANKS[name]), encoding="utf-8")
    assert ordered(through_a_bank(source, tmp_path)) == ordered(source)


@pytest.mark.parametrize("path", LAYOUT or [None], ids=lambda path: path.stem if path else "none")
def test_real_banks_survive_a_round_trip(tmp_path, path):
    if path is None:
        pytest.skip(f"{DATA} is not here; TUTORLOOP_SHARED_DATA names the folder above it")
    assert ordered(through_a_bank(path, tmp_path)) == ordered(path)


def test_entries_are_what_the_layout_says(tmp_path):
    (tmp_path / "bank.json").write_text(json.dumps(BANKS["groups"]), encoding="utf-8")
    entries = load_published(str(tmp_path / "bank.json"))
    assert [(e.entry_id, e.kind, e.group) for e in entries] == [
        ("g1", "skill", ""),
        ("z1", "skill", "z"),
        ("z2", "skill", "z"),
        ("a1", "skill", "a"),
        ("e1", "mistake", ""),
    ]
    assert entries[0].texts == ("Title g1", "Half.", "é\u2028") and entries[0].text.startswith("Title g1. Half. é")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "is a JSON file"),
        ("[" * 100_000, "is a JSON file"),
        ("\xff", "is a JSON file"),
        ("[]", "what a bank is built from"),
        ('{"skills": []}', "is an object of general_skills"),
        ('{"general_skills": [], "\\u001b[31m": 1}', r"also \[\"\\u001b"),
        ('{"general_skills": {}}', "are in lists"),
        ('{"general_skills": ["x"]}', "a skill has skill_id, title"),
        ('{"general_skills": [{"skill_id": "", "title": "", "principle": "", "when_to_apply": ""}]}', "a skill has"),
        ('{"common_mistakes": [{"mistake_id": "e", "description": 1}]}', "a mistake has mistake_id"),
        ('{"task_specific_skills": []}', "object of lists"),
        ('{"query_type_skills": {"a": {}}}', "are in lists"),
        ('{"general_skills": [], "metadata": 3}', "metadata is an object"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, rule):
    path = tmp_path / "bank.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SkillError, match=rule) as caught:
        load_published(str(path))
        load_metadata(str(path))
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


def test_memories_are_another_layout():
    path = DATA / "skillrl_search_generated_memories_search.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here; TUTORLOOP_SHARED_DATA names the folder")
    with pytest.raises(SkillError, match="what a bank is built from"):
        load_published(str(path))


def test_missing_files_and_folders_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(SkillError, match="No such file"):
        load_published(str(tmp_path / "none.json"))
    with pytest.raises(SkillError, match="exported to a file"):
        save_published([], str(tmp_path / "none" / "bank.json"), {})
    with pytest.raises(SkillError, match="exported to a file"):
        save_published([], str(tmp_path / "folder"), {})
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"], "nothing half-written stays"
