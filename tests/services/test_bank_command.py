"""`tutorloop bank`, as a person types it: what it prints, what it writes, how it ends."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import serving
from typer.testing import CliRunner

from tutorloop import lab
from tutorloop.cli.main import app
from tutorloop.contracts.skills import BankEntry
from tutorloop.verifier_service.skills.store import SkillBank

DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
HOSTILE = "[red]x[/] \x1b[31m\x07 \u202e {0} ${HOME} \ud83d\ude00 [link=file:///etc]y"
PUBLISHED = {
    "general_skills": [
        {
            "skill_id": "gen_001",
            "title": "Carry the ten",
            "principle": "It moves.",
            "when_to_apply": "In sums.",
            "x": 1,
        },
    ],
    "task_specific_skills": {
        "legs": [
            {"skill_id": "leg_001", "title": "Count the legs", "principle": "Of each.", "when_to_apply": "Animals."}
        ]
    },
    "common_mistakes": [
        {"mistake_id": "err_001", "description": "Drop it", "why_it_happens": "Haste.", "how_to_avoid": "Care."}
    ],
    "metadata": {"source": "a test", "deep": [{"a": None}]},
}
RIGHT = {"problem": "Compute 37 + 58.", "response": "37 + 58 = 95\n\\boxed{95}", "answer": "95", "id": "right"}
WRONG = {"prompt": "Compute 37 + 58.", "prediction": "37 + 58 = 85\n\\boxed{85}", "gold": "95", "id": "wrong"}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["bank", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output if code == 0 else result.stderr


def rolls(folder, *rows):
    path = folder / "rolls.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def bank(tmp_path):
    file = tmp_path / "published.json"
    file.write_text(json.dumps(PUBLISHED))
    assert "2 skills and 1 mistake added" in run("import", file, tmp_path / "bank")
    return tmp_path / "bank"


# ---- files in the published layout ----------------------------------------------------------------------------------


def test_what_was_imported_is_exported_again(tmp_path, bank):
    run("export", bank, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == PUBLISHED


@pytest.mark.parametrize("name", ["sgsd_qwen3_1b_claude_style_skills", "skillrl_search_claude_style_skills_search"])
def test_real_banks_survive_a_round_trip(tmp_path, name):
    file = DATA / "skills" / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here; TUTORLOOP_SHARED_DATA names the folder")
    run("import", file, tmp_path / "bank")
    run("export", tmp_path / "bank", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(file.read_text())


def test_the_labs_bank_is_imported_by_its_name(tmp_path):
    run("import", "lab:bank", tmp_path / "bank")
    run("export", tmp_path / "bank", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(lab.bank_path().read_text())


def test_metadata_outlives_what_is_added_and_a_file_without_any_stays_without(tmp_path, bank):
    run("build", rolls(tmp_path, RIGHT, WRONG), "--to", bank)
    run("export", bank, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["metadata"] == PUBLISHED["metadata"]
    bare = {key: value for key, value in PUBLISHED.items() if key != "metadata"}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    run("import", tmp_path / "bare.json", tmp_path / "other")
    run("export", tmp_path / "other", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == bare


def test_an_older_version_is_exported(tmp_path, bank):
    SkillBank.open(str(bank)).add([BankEntry(entry_id="gen_9", kind="skill", texts=("a", "b", "c"))])
    run("export", bank, tmp_path / "old.json", "--version", 1)
    run("export", bank, tmp_path / "new.json")
    old, new = (json.loads((tmp_path / name).read_text()) for name in ("old.json", "new.json"))
    assert old == PUBLISHED and len(new["general_skills"]) == 2


# ---- building -------------------------------------------------------------------------------------------------------


def test_rollouts_are_judged_and_become_entries_with_their_evidence(tmp_path):
    lost = {**RIGHT, "answer": " ", "id": "no gold"}
    out = run("build", rolls(tmp_path, RIGHT, WRONG, lost), "--to", tmp_path / "bank")
    assert "2 rollouts, 1 of them right; not judged: 1 (no_gold)" in out
    assert "new: 1 skill and 1 mistake; known ones with new evidence: 0\n" in out
    shown = json.loads(run("show", tmp_path / "bank", "--json"))
    found = {e["entry_id"]: (e["rollout_ids"], e["outcomes"]) for e in shown["entries"]}
    assert found == {"gen_001": (["right", "wrong"], [True, False]), "err_001": (["wrong"], [False])}


def test_the_same_rollouts_again_change_nothing_and_others_add_evidence(tmp_path):
    file = rolls(tmp_path, RIGHT, WRONG)
    run("build", file, "--to", tmp_path / "bank")
    before = SkillBank.open(str(tmp_path / "bank")).version
    assert "new: 0 skills and 0 mistakes; known ones with new evidence: 0\n" in run(
        "build", file, "--to", tmp_path / "bank"
    )
    assert SkillBank.open(str(tmp_path / "bank")).version == before
    out = run("build", rolls(tmp_path, {**WRONG, "id": "other"}), "--to", tmp_path / "bank")
    assert "new: 0 skills and 0 mistakes; known ones with new evidence: 2\n" in out


def test_a_server_extracts_and_merges(tmp_path, monkeypatch):
    monkeypatch.setenv("BANK_KEY", "secret")

    def answer(instruction, data):
        if isinstance(data, list):
            return '{"merged": []}'
        texts = f'"title": "T {data["right"]}", "principle": "p", "when_to_apply": "w"'
        return f'{{"general_skills": [{{{texts}}}]}}' if data["right"] else "nonsense"

    with serving(answer) as server:
        options = ("--extractor", server.url, "--model", "m", "--api-key-env", "BANK_KEY", "--to", tmp_path / "bank")
        out = run("build", rolls(tmp_path, RIGHT, WRONG), *options)
    assert "new: 1 skill and 0 mistakes" in out and "no candidates from: 1 (bad_json)" in out
    assert {headers["Authorization"] for headers, _ in server.asked} == {"Bearer secret"}
    assert "secret" not in run("show", tmp_path / "bank", "--json")


# ---- showing --------------------------------------------------------------------------------------------------------


def test_a_table_has_entries_versions_and_counts(bank):
    SkillBank.open(str(bank)).record({"gen_001": (12, 7, 4, 1)})
    out = run("show", bank)
    assert "imported from published.json" in out and "a test" not in out
    row = next(line for line in out.split("\n") if "gen_001" in line)
    assert [cell.strip() for cell in row.split("│")][2:-1] == ["Carry the ten", "0", "0", "12", "7", "4", "1"]
    assert "leg_001" in out and "err_001" in out
    only = run("show", bank, "--kind", "mistake")
    assert "err_001" in only and "gen_001" not in only


def test_changes_between_versions(bank):
    opened = SkillBank.open(str(bank))
    entries = opened.entries()
    added = BankEntry(entry_id="gen_002", kind="skill", texts=("New", "b", "c"))
    opened.replace([entry for entry in entries if entry.entry_id != "err_001"] + [added])
    opened.record({"gen_001": (2, 1, 1, 0)})
    out = run("show", bank, "--changes", 1, opened.version)
    assert f"version 1 -> {opened.version}: 1 added, 1 removed, 1 changed" in out
    assert "uses: 0 -> 2" in out and "harmful: 0 -> 1" in out
    found = json.loads(run("show", bank, "--changes", 1, opened.version, "--json"))
    assert [e["entry_id"] for e in found["added"]] == ["gen_002"]
    assert [e["entry_id"] for e in found["removed"]] == ["err_001"]
    assert [c["fields"] for c in found["changed"]] == [["uses", "helpful", "harmful"]]
    assert "0 added, 0 removed, 0 changed" in run("show", bank, "--changes", 1, 1)
    assert len(json.loads(run("show", bank, "--version", 1, "--json"))["entries"]) == 3


def test_a_search_shows_the_nearest_pairs_first(tmp_path):
    run("import", "lab:bank", tmp_path / "bank")
    problem = "How many legs are there in total if you have 3 ducks, 2 cats?"
    found = json.loads(run("search", tmp_path / "bank", problem, "-k", 4, "--json"))
    assert len(found) == 4 and sum(row["weight"] for row in found) == pytest.approx(1)
    assert "legs" in json.dumps(found[0])
    table = run("search", tmp_path / "bank", problem, "-k", 4)
    assert all(row["skill"]["texts"][0] in table and row["mistake"]["id"] in table for row in found)


@pytest.mark.parametrize("command", [("show",), ("show", "--changes", "1", "2"), ("search",)])
def test_hostile_text_is_shown_as_text(tmp_path, command):
    text = HOSTILE.encode("utf-16", "surrogatepass").decode("utf-16")
    entries = [
        BankEntry(entry_id=f"{kind}[bold]\x1b[2J", kind=kind, group=text, texts=(text, text, text), extra="")
        for kind in ("skill", "mistake")
    ]
    SkillBank.open(str(tmp_path / "bank"), create=True).add(entries, note=text)
    name, *options = command
    out = run(name, tmp_path / "bank", *options, *(["red {0}"] if name == "search" else []))
    assert "[red]x[/] \\x1b[31m\\x07 \\u202e {0} ${HOME}" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    as_json = run(name, tmp_path / "bank", *options, *(["red {0}"] if name == "search" else []), "--json")
    assert as_json.isascii() and json.loads(as_json)


# ---- merging --------------------------------------------------------------------------------------------------------


def test_banks_are_merged_into_a_new_one_and_into_one_of_them(tmp_path):
    for name, rows in {"one": [RIGHT], "two": [WRONG, RIGHT]}.items():
        run("build", rolls(tmp_path, *rows), "--to", tmp_path / name)
    SkillBank.open(str(tmp_path / "one")).record({"gen_001": (3, 1, 1, 1)})
    SkillBank.open(str(tmp_path / "two")).record({"gen_001": (4, 2, 2, 0)})
    out = run("merge", tmp_path / "one", tmp_path / "two", "--to", tmp_path / "both")
    assert "2 skills and 1 mistake -> 1 skill and 1 mistake" in out
    (skill,) = SkillBank.open(str(tmp_path / "both")).entries("skill")
    assert (skill.uses, skill.helpful, skill.rollout_ids) == (7, 3, ("right", "wrong"))
    run("merge", tmp_path / "one", tmp_path / "two", "--to", tmp_path / "one")
    assert SkillBank.open(str(tmp_path / "one")).entries("skill") == [skill]
    version = SkillBank.open(str(tmp_path / "one")).version
    run("merge", f"{tmp_path}/two/../one", f"{tmp_path}/one/", "--to", tmp_path / "one")
    assert SkillBank.open(str(tmp_path / "one")).version == version


def test_banks_whose_ids_are_alike_keep_all_their_entries(tmp_path, bank):
    other = json.loads(
        json.dumps(PUBLISHED).replace("Carry the ten", "Mind the sign").replace("It moves", "Signs flip")
    )
    (tmp_path / "other.json").write_text(json.dumps(other))
    run("import", tmp_path / "other.json", tmp_path / "second")
    run("merge", bank, tmp_path / "second", "--to", tmp_path / "both")
    found = SkillBank.open(str(tmp_path / "both")).entries()
    assert sorted(e.texts[0] for e in found) == ["Carry the ten", "Count the legs", "Drop it", "Mind the sign"]


# ---- how it ends ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_said_and_nothing_is_written(tmp_path, bank):
    file = rolls(tmp_path, RIGHT)
    new = tmp_path / "new"
    for arguments, words in {
        ("show", new): "none at",
        ("show", bank, "--version", 99): "version 99",
        ("show", bank, "--changes", 1, 99): "version 99",
        ("search", new, "x"): "none at",
        ("export", new, tmp_path / "x.json"): "none at",
        ("import", tmp_path / "absent.json", new): "absent.json",
        ("import", file, new): "rolls.jsonl",
        ("import", tmp_path / "published.json", bank): "gen_001",
        ("build", tmp_path / "absent.jsonl", "--to", new): "absent.jsonl",
        ("build", rolls(tmp_path, {"problem": 1}), "--to", new): "line 1",
        ("merge", new, "--to", tmp_path / "other"): "none at",
    }.items():
        assert words in run(*arguments, code=2), arguments
    file = rolls(tmp_path, RIGHT)
    for arguments, words in {
        ("--extractor", "labb"): "http://HOST",
        ("--extractor", "http://127.0.0.1:9/v1"): "name it",
        ("--extractor", "http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "NO_SUCH_KEY"): "NO_SUCH_KEY",
        ("--verifier", "magic"): "math, exact or numeric",
    }.items():
        assert words in run("build", file, "--to", new, *arguments, code=2), arguments
    with serving(lambda *_: (401, b"")) as server:
        refused = run("build", file, "--to", new, "--extractor", server.url, "--model", "m", code=2)
    assert "http_401" in refused
    assert not new.exists() and not (tmp_path / "other").exists() and not (tmp_path / "x.json").exists()


def test_it_starts_without_torch_and_ray(tmp_path):
    run("import", "lab:bank", tmp_path / "bank")
    script = (
        "import sys; from tutorloop.cli.main import app; "
        f"app(['bank', 'show', {str(tmp_path / 'bank')!r}], standalone_mode=False); "
        "assert not {'torch', 'ray', 'sympy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_has_help():
    for name in ("build", "show", "search", "merge", "export", "import"):
        assert "Example" in run(name, "--help")


def test_random_rollouts_of_the_lab_build_a_bank_that_retrieves_their_own_lessons(tmp_path):
    rows = random.sample(lab.rows("train"), 40)
    solved = [{"id": r["id"], "problem": r["prompt"], "response": r["solution"], "answer": r["answer"]} for r in rows]
    wrong = {**RIGHT, "response": "37 + 58 = 85\n\\boxed{85}", "id": "w"}
    out = run("build", rolls(tmp_path, *solved, wrong), "--to", tmp_path / "bank")
    assert "41 rollouts, 40 of them right" in out
    (pair,) = json.loads(run("search", tmp_path / "bank", rows[0]["prompt"], "-k", 1, "--json"))
    assert pair["skill"]["texts"][2].startswith("As in: ")
