"""What a run reads is known by its content: other content behind a path is refused, the same elsewhere is not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen3
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.cluster import identity
from tutorloop.cluster.identity import Identity, compare, digest_of_code, digest_of_model, identity_of
from tutorloop.cluster.methods import compose_stages
from tutorloop.cluster.preflight import check_inputs
from tutorloop.cluster.recording.run_folder import RunFolder
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import RunFolderError
from tutorloop.contracts.recipe import load_config

REWARDS = """
from near import short

def score(completions):
    return [short(c) for c in completions]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("student", "teacher", "reference")):
        tiny_qwen3(folder / name, seed=seed)
    return folder


@dataclass
class Case:
    """A run's inputs in a folder of their own, and its recipe."""

    folder: Path

    def config(self, **changes: str) -> Config:
        return load_config(self.folder / "recipe.yaml", [f"{key}={value}" for key, value in changes.items()])

    def read(self, **changes: str) -> Identity:
        config = self.config(**changes)
        return identity_of(config, check_inputs(config, compose_stages(config)))

    def rewrite(self, name: str, change: Callable[[list[dict[str, str]]], object]) -> None:
        rows = [json.loads(line) for line in (self.folder / name).open()]
        change(rows)
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def case(made: Path, tmp_path: Path) -> Case:
    folder = tmp_path / "inputs"
    shutil.copytree(made, folder)
    rows = "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8))
    for name in ("data.jsonl", "held.jsonl"):
        (folder / name).write_text(rows)
    (folder / "rewards.py").write_text("def score(completions):\n    return [1.0 for _ in completions]\n")
    (folder / "recipe.yaml").write_text(f"""
method: kdrl
output_dir: {tmp_path}/run
steps: 4
prompts_per_step: 2
student: {{model: {folder}/student}}
teacher: {{model: {folder}/teacher, signal: sampled}}
data: {{path: {folder}/data.jsonl}}
eval: {{path: {folder}/held.jsonl}}
verifier: {{rewards: [{{kind: "{folder}/rewards.py:score", weight: 1}}]}}
rollout: {{samples_per_prompt: 2, max_new_tokens: 8}}
""")
    return Case(folder)


def answer(rows: list[dict[str, str]]) -> None:
    rows[3]["answer"] = "7"


def more(rows: list[dict[str, str]]) -> None:
    rows.append({"prompt": "9+9=", "answer": "18"})


def swapped(rows: list[dict[str, str]]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def same(rows: list[dict[str, str]]) -> None:
    for row in rows:
        row["note"] = "a field that nothing reads"


def one_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_end(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 4]}))


CHANGES: dict[str, tuple[Callable[[Case], object], str]] = {
    "an answer": (lambda case: case.rewrite("data.jsonl", answer), r"data: .*\(8 rows, .*\(8 rows"),
    "one row more": (lambda case: case.rewrite("data.jsonl", more), r"data: .*8 rows.*9 rows"),
    "the order": (lambda case: case.rewrite("data.jsonl", swapped), "data: "),
    "one weight": (lambda case: one_number(case.folder / "student"), r"student\.model: .*/student"),
    "the teacher": (lambda case: one_number(case.folder / "teacher"), r"teacher\.model: .*/teacher"),
    "the end of a turn": (lambda case: other_end(case.folder / "student"), r"student\.model"),
    "a reward": (lambda case: (case.folder / "rewards.py").open("a").write("# other\n"), r"code of .*rewards\.py"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_content_behind_the_same_path_is_refused(changed: str, case: Case) -> None:
    before = json.loads(json.dumps(case.read()))
    change, named = CHANGES[changed]
    assert compare(before, case.read()) == []
    change(case)
    with pytest.raises(RunFolderError, match=named):
        compare(before, case.read())


def test_the_same_content_elsewhere_is_the_same(case: Case, tmp_path: Path) -> None:
    no_reader = {"verifier.rewards": "[]"}  # of whole rows
    before = case.read(**no_reader)
    case.rewrite("data.jsonl", same)
    for path in list(case.folder.iterdir()):
        shutil.move(path, tmp_path / path.name) if path.name not in ("recipe.yaml", "rewards.py") else None
    moved = {"data.path": "data.jsonl", "eval.path": "held.jsonl"}
    moved |= {"student.model": "student", "teacher.model": "teacher"}
    changes = {key: str(tmp_path / name) for key, name in moved.items()} | no_reader
    assert compare(before, case.read(**changes)) == []
    folder = RunFolder(tmp_path / "run", identity=before)
    folder.create(case.config(**no_reader))
    folder.check(case.config(**changes), resume=True)
    (tmp_path / "run" / "identity.json").unlink()
    with pytest.raises(RunFolderError, match=r"student\.model"):
        folder.check(case.config(**changes), resume=True)


def test_evaluation_data_may_differ_and_an_old_run_has_no_identity(case: Case) -> None:
    before = case.read()
    case.rewrite("held.jsonl", answer)
    (said,) = compare(before, case.read())
    assert said.startswith("evaluation data: ") and "other problems" in said
    (said,) = compare(None, before)
    assert "not recorded" in said


def test_a_resume_is_refused_before_ray_starts(case: Case, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", identity=case.read())
    folder.create(case.config())
    case.rewrite("data.jsonl", answer)
    left = {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    result = CliRunner().invoke(app, ["train", str(case.folder / "recipe.yaml"), "--resume"])
    assert result.exit_code == 2 and not ray.is_initialized(), result.output
    assert "a resumed run reads what it began with" in result.stderr and "data.jsonl (8 rows" in result.stderr
    assert left == {path: path.stat().st_mtime_ns for path in folder.path.iterdir()}


def test_a_large_models_digest_finds_any_tensor_that_changed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    folder = tmp_path / "model"
    shutil.copytree(made / "student", folder)
    first = digest_of_model(folder)
    tensors = load_file(folder / "model.safetensors")
    seen = {first}
    for name in tensors:
        changed = {**tensors, name: tensors[name] * 1.001}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        seen.add(digest_of_model(folder))
    assert len(seen) == 1 + len(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert digest_of_model(folder) == first
    save_file({n: t.to(torch.bfloat16) for n, t in tensors.items()}, folder / "model.safetensors")
    assert digest_of_model(folder) != first


def test_code_is_known_with_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "near.py").write_text("from pack.deep import short\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "deep.py").write_text("def short(text):\n    return 1.0\n")
    (tmp_path / "unrelated.py").write_text("")
    place = str(tmp_path / "rewards.py")
    before = digest_of_code(place)
    (tmp_path / "unrelated.py").write_text("1")
    assert digest_of_code(place) == before
    for name in ("near.py", "pack/deep.py", "rewards.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# other\n")
        assert digest_of_code(place) != before
        before = digest_of_code(place)
    assert digest_of_code("json.decoder") != digest_of_code("json.encoder")
