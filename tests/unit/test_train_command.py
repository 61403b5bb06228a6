"""`tutorloop train`: what its arguments mean, what --check says, and when --resume auto leaves a run alone. No Ray."""

import json
import os
import shutil
from pathlib import Path

import pytest
import ray
import typer
import yaml
from tiny import tiny_qwen3
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.cli.train import Resume
from tutorloop.cluster.identity import identity_of
from tutorloop.cluster.methods import compose_stages
from tutorloop.cluster.preflight import check_inputs
from tutorloop.cluster.recording.run_folder import RunFolder
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[2]
COMMAND = typer.main.get_command(app).commands["train"]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    tiny_qwen3(folder / "student")
    tiny_qwen3(folder / "teacher", seed=1)
    rows = "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8))
    (folder / "problems.jsonl").write_text(rows)
    tree = {
        "method": "opd",
        "output_dir": "unset",
        "steps": 4,
        "prompts_per_step": 2,
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher"), "signal": "sampled"},
        "data": {"path": str(folder / "problems.jsonl")},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 8, "replicas": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


def train(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def everything(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "resume", "overrides"),
    [
        (["r.yaml"], Resume.NO, []),
        (["r.yaml", "--resume"], Resume.YES, []),
        (["--resume", "r.yaml"], Resume.YES, []),
        (["r.yaml", "--resume", "steps=3"], Resume.YES, ["steps=3"]),
        (["r.yaml", "steps=3", "--resume"], Resume.YES, ["steps=3"]),
        (["r.yaml", "--resume", "--check"], Resume.YES, []),
        (["r.yaml", "--resume", "auto"], Resume.AUTO, []),
        (["r.yaml", "--resume=auto"], Resume.AUTO, []),
        (["--resume", "auto", "r.yaml", "steps=3"], Resume.AUTO, ["steps=3"]),
        (["r.yaml", "a=1", "--resume", "auto", "b=2"], Resume.AUTO, ["a=1", "b=2"]),
        (["r.yaml", "--resume", "--", "auto"], Resume.YES, ["auto"]),
        (["r.yaml", "--", "-x=--resume"], Resume.NO, ["-x=--resume"]),
        (["r.yaml", "data.prompt_suffix=--resume"], Resume.NO, ["data.prompt_suffix=--resume"]),
        (["r.yaml", "--resume", "--allow-change", "auto"], Resume.YES, []),
        (["--allow-change", "a.b", "r.yaml", "--resume", "auto", "a.b=1"], Resume.AUTO, ["a.b=1"]),
    ],
)
def test_resume_takes_auto_and_nothing_else(arguments: list[str], resume: Resume, overrides: list[str]) -> None:
    given = COMMAND.make_context("train", list(arguments)).params
    assert (given["resume"], given["recipe"], given["overrides"] or []) == (resume, Path("r.yaml"), overrides)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--learner.ranks=2"], "write learner.ranks=2"),
        (["-steps=2"], "write steps=2"),
        (["--resume=maybe"], "auto"),
        (["--adress=x"], "--address"),
        (["--allow-change", "steps"], "add --resume"),
        (["--resume", "--allow-change", "learner.learning_rat"], "did you mean learner.learning_rate?"),
        (["--resume=auto", "--allow-change="], "names a key or a section"),
    ],
)
def test_what_is_no_option_is_told(arguments: list[str], told: str) -> None:
    result = train("quickstart", *arguments)
    assert result.exit_code == 2 and told in result.stderr, result.stderr


def test_check_says_what_would_run_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    result = train(recipe, "--check", f"output_dir={tmp_path}/run", "checkpoint.every=2", "checkpoint.minutes=7")
    assert result.exit_code == 0, result.output
    said = {line[:16].strip(): line[16:] for line in result.stdout.splitlines()}
    assert said["run folder"] == f"{tmp_path}/run: starts anew"
    assert said["method"] == "opd, 4 steps"
    assert said["student"].startswith(f"{recipe.parent}/student: fp32, transformers")
    assert f"teacher         {recipe.parent}/teacher: fp32, transformers, sampled\n" in result.stdout
    assert said["teacher"] == "1 × 0.2 CPU, 0 GPU"  # its pool, further down
    assert "8 rows, the longest prompt " in said["data"]
    assert said["responses end"].startswith("at <eos> (")
    assert said["rollout"] == "3 × 0.2 CPU, 0 GPU"
    assert said["in all"] == "1.1 CPU, 0 GPU"
    assert said["checkpoints"] == "every 7 minutes and every 2 steps, the newest 2 kept"
    assert everything(tmp_path) == before and not ray.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["student.model=/absent"], "/absent: no such folder"),
        (["data.path=/absent.jsonl"], "/absent.jsonl"),
        (["rollout.max_new_tokens=100000"], "context"),
        (["--resume"], "holds none"),
        (["output_dir=TMP/taken"], "holds another run"),
        (["verifier.kind=TMP/own.py:f"], "own.py line 1: ZeroDivisionError"),
    ],
)
def test_check_refuses_what_a_run_would(arguments: list[str], told: str, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("method: opd")
    (tmp_path / "own.py").write_text("1 / 0\n")
    before = everything(tmp_path)
    changes = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    result = train(recipe, "--check", f"output_dir={tmp_path}/run", *changes)
    assert result.exit_code == 2 and told in result.stderr, result.output
    assert everything(tmp_path) == before and not ray.is_initialized()


def run_folder(recipe: Path, folder: Path, interrupted: bool | None) -> None:
    """A run of `recipe` in `folder`, as it was left; None: killed before its end."""
    folder.mkdir()
    config = load_config(recipe, [f"output_dir={folder}"])
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    if interrupted is not None:
        (folder / "summary.json").write_text(json.dumps({"interrupted": interrupted, "steps": 2 if interrupted else 4}))


def test_auto_leaves_a_finished_run_alone(recipe: Path, tmp_path: Path) -> None:
    run_folder(recipe, tmp_path / "run", interrupted=False)
    before = everything(tmp_path)
    for more in ([], ["--check"], ["steps=3"]):
        result = train(recipe, f"output_dir={tmp_path}/run", "--resume", "auto", *more)
        assert result.exit_code == 0 and "finished after 4 steps" in result.stdout, result.output
    assert everything(tmp_path) == before and not ray.is_initialized()


@pytest.mark.parametrize("interrupted", [True, False, None])
def test_auto_goes_on_with_what_is_not_finished(interrupted: bool | None, recipe: Path, tmp_path: Path) -> None:
    run_folder(recipe, tmp_path / "run", interrupted)
    result = train(recipe, f"output_dir={tmp_path}/run", "--resume", "auto", "--check", "steps=5")
    assert result.exit_code == 0 and f"{tmp_path}/run: starts anew" in result.stdout, result.output  # no checkpoint


def test_auto_starts_where_nothing_is_and_refuses_another_run(recipe: Path, tmp_path: Path) -> None:
    result = train(recipe, f"output_dir={tmp_path}/run", "--resume", "auto", "--check")
    assert result.exit_code == 0 and "starts anew" in result.stdout, result.output
    run_folder(recipe, tmp_path / "run", interrupted=False)
    result = train(recipe, f"output_dir={tmp_path}/run", "--resume", "auto", "seed=5")
    assert result.exit_code == 2 and "seed: 0 before, 5 now" in result.stderr, result.output


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "auto"]])
def test_what_alters_the_result_wants_to_be_named(resume: list[str], recipe: Path, tmp_path: Path) -> None:
    run_folder(recipe, tmp_path / "run", interrupted=True)
    before = everything(tmp_path)
    arguments = [recipe, f"output_dir={tmp_path}/run", *resume, "--check", "learner.max_grad_norm=3", "learner.ranks=2"]
    result = train(*arguments)
    assert result.exit_code == 2 and "--allow-change learner.max_grad_norm" in result.stderr, result.output
    for key in ("learner.max_grad_norm", "learner"):
        result = train(*arguments, "--allow-change", key)
        assert result.exit_code == 0, result.output
        told = [line for line in result.stdout.splitlines() if " before, " in line]
        assert [line.split(":")[0] for line in told] == ["learner.max_grad_norm", "learner.ranks"], result.stdout
    result = train(*arguments, "--allow-change", "learner", "--allow-change", "rollout.temperature")
    assert result.exit_code == 2 and "rollout.temperature is as it was" in result.stderr, result.output
    (tmp_path / "run" / "changes.jsonl").write_text('{"step": 2, "key": "rollout.temperature"}\n')
    result = train(*arguments, "--allow-change", "learner", "--allow-change", "rollout")
    assert result.exit_code == 0, "a job that is tried again says the same"
    (tmp_path / "run" / "changes.jsonl").unlink()
    result = train(*arguments, "seed=3", "--allow-change", "seed", "--allow-change", "learner")
    assert result.exit_code == 2 and "seed: 0 before, 3 now (the place of a run" in result.stderr, result.output
    assert everything(tmp_path).keys() == before.keys()


def test_another_teacher_is_taken_where_it_may_be(recipe: Path, tmp_path: Path) -> None:
    """By its content: the same path may hold another model."""
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    arguments = [recipe, f"output_dir={tmp_path}/run", f"teacher.model={tmp_path}/teacher", "--check"]
    folder = RunFolder(tmp_path / "run")
    config = load_config(recipe, [str(argument) for argument in arguments[1:3]])
    folder.identity = identity_of(config, check_inputs(config, compose_stages(config)))
    folder.create(config)
    assert train(*arguments, "--resume").exit_code == 0
    result = train(*arguments, "--resume", "--allow-change", "teacher.model")
    assert result.exit_code == 2 and "teacher.model is as it was" in result.stderr, result.output
    tiny_qwen3(tmp_path / "teacher", seed=7)
    result = train(*arguments, "--resume")
    assert result.exit_code == 2 and "reads what it began with" in result.stderr, result.output
    result = train(*arguments, "--resume", "--allow-change", "teacher")
    assert result.exit_code == 0 and "another result from here on" in result.stdout, result.output


def test_auto_allows_no_change_of_a_run_that_is_not_there(recipe: Path, tmp_path: Path) -> None:
    """A wrong output_dir, else it would start another run from its beginning."""
    result = train(recipe, f"output_dir={tmp_path}/run", "--resume", "auto", "--allow-change", "learner", "--check")
    assert result.exit_code == 2 and f"{tmp_path}/run holds none" in result.stderr, result.output


def test_check_says_who_is_told(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOOK", "https://hooks.example/secret")
    ways = ["notify.command=sh -c true", "notify.webhook_env=HOOK"]
    result = train(recipe, f"output_dir={tmp_path}/run", "--check", *ways)
    assert "alarms go to    the command of the recipe and the webhook of the recipe" in result.stdout, result.output
    assert "hooks.example" not in result.output
    result = train(recipe, f"output_dir={tmp_path}/run", "--check", "notify.webhook_env=NO_SUCH_HOOK")
    assert result.exit_code == 2 and "NO_SUCH_HOOK is not set" in result.stderr, result.output


@pytest.mark.parametrize(
    "place", ["/proc/nope", "/proc/1/nope", "FILE", "FILE/below", "LONG", "LONG/below", "/dev/null/x"]
)
@pytest.mark.parametrize("more", [[], ["--resume", "auto"]])
def test_an_output_dir_that_cannot_be(place: str, more: list[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    place = place.replace("FILE", f"{tmp_path}/file").replace("LONG", f"{tmp_path}/{'x' * 300}")
    result = train(recipe, f"output_dir={place}", *more, "--check")
    assert result.exit_code == 2 and "output_dir" in result.stderr, result.output
    assert not ray.is_initialized()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_dir_that_may_not_be_written(recipe: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert train(recipe, f"output_dir={tmp_path}/run", "--check").exit_code == 2
