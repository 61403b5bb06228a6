"""`tutorloop train`: what its arguments mean, what --check says, and when --resume auto leaves a run alone. No Ray."""

import json
import os
from pathlib import Path

import pytest
import ray
import typer
import yaml
from tiny import tiny_qwen3
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.cli.train import Resume
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
