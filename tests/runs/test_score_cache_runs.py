"""Runs with kept teacher scores: off, on, and with all of them known they end alike; a run that died asks for less."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from loop_cases import make_models, recipe, steps_of, train, weights_of
from rich.console import Console
from score_cases import keep_all

from tutorloop.cluster import run
from tutorloop.cluster.driver import Driver
from tutorloop.contracts.config import Config
from tutorloop.contracts.recipe import load_config
from tutorloop.learner.checkpoint import CheckpointWriter, Fragment
from tutorloop.teacher_service.score_cache import CachePlace

ROOT = Path(__file__).parents[2]
WAYS: dict[str, dict[str, Any]] = {  # by what is scored: plain, in a context, by an average, by the generators
    "plain": {"method": "opd", "teacher": {"replicas": 2}},
    "context": {"method": "opsd", "teacher": {"follows": "live"}, "method_options": {"template": "short@1"}},
    "average": {"method": "opsd", "teacher": {"follows": "ema"}, "method_options": {"template": "short@1"}},
    "shared": {
        "method": "opsd",
        "teacher": {"follows": "live", "shared": True},
        "method_options": {"template": "short@1"},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def all_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_all(monkeypatch)


def config_of(models: Path, folder: Path, way: str, **changes: Any) -> Config:
    own = {key: dict(value) if isinstance(value, dict) else value for key, value in WAYS[way].items()}
    if "follows" in own["teacher"]:
        own |= {"templates": {"short@1": "{answer} so {problem}"}}
        own["teacher"] |= {"model": str(models / "student"), "signal": "topk"}
        own["method_options"] |= {"top_k": 8}
    own["teacher"] |= changes.pop("teacher", {})
    return recipe(models, folder, **own, **changes)


def without_scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was known was not scored again."""
    return [{**row, "tokens": {k: v for k, v in row["tokens"].items() if k != "scored"}} for row in rows]


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.sweep] if way == "plain" else []) for way in WAYS]
)
def test_a_run_that_died_is_continued_with_the_scores_that_it_has(
    way: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_is_worth_it: None
) -> None:
    settings = {"steps": 5, "checkpoint": {"every": 2}}
    whole = train(config_of(models, tmp_path / "whole", way, teacher={"cache_gib": 0}, **settings), None)
    assert "score_cache" not in whole and not (tmp_path / "whole" / "scores").exists()

    config, learn = config_of(models, tmp_path / "cut", way, **settings), Driver.learn

    async def dies(driver: Driver, shards: Any) -> Any:
        if driver.step == 3:  # its rollouts and those of the step before are newer than the checkpoint
            raise RuntimeError("killed")
        return await learn(driver, shards)

    def on_a_slow_disk(writer: CheckpointWriter, own: list[Fragment], folder: Path) -> None:
        time.sleep(0.5)
        write(writer, own, folder)

    write = CheckpointWriter._write
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Driver, "learn", dies)
        patch.setattr(CheckpointWriter, "_write", on_a_slow_disk)
        train(config, None)
    resumed = train(config, None, resume=True)
    assert without_scored(steps_of(tmp_path / "cut")) == without_scored(steps_of(tmp_path / "whole"))
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert resumed["score_cache"]["hits"] == 2 * 8  # steps 3 and 4
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    cached = {row["step"]: row["score_cache"] for row in rows if row["kind"] == "step"}
    assert [cached[step]["hits"] for step in range(1, 6)] == [0, 0, 8, 8, 0]
    assert [cached[step]["misses"] for step in range(1, 6)] == [8, 8, 0, 0, 8]
    assert [row["tokens"]["scored"] > 0 for row in rows] == [True, True, False, False, True]
    assert "known" in (tmp_path / "cut" / "report.html").read_text()
    assert not [file for file in (tmp_path / "cut" / "scores").rglob("*") if file.is_file()]  # of no use any more


def lab_run(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, bytes], dict[str, Any]]:
    small = ["steps=3", "prompts_per_step=24", "max_staleness=0", "eval.path=", "eval.ood_path=", "checkpoint.every=0"]
    own = [f"output_dir={folder}", *small, "learner.warmup_steps=0", *overrides]
    config = load_config(ROOT / "recipes" / "quickstart.yaml", own)
    assert run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True)
    return steps_of(folder), weights_of(folder), json.loads((folder / "summary.json").read_text())


def test_off_on_and_all_known_the_lab_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_is_worth_it: None
) -> None:
    monkeypatch.setattr(CachePlace, "folder", tmp_path / "scores")  # of both runs
    off, on, known = (
        lab_run(tmp_path / name, *own) for name, own in (("off", ["teacher.cache_gib=0"]), ("on", []), ("known", []))
    )
    assert off[0] == on[0] and off[1] == on[1] == known[1]
    assert without_scored(known[0]) == without_scored(off[0])
    assert "score_cache" not in off[2]
    assert (on[2]["score_cache"]["hits"], on[2]["score_cache"]["misses"]) == (0, 72)
    assert (known[2]["score_cache"]["hits"], known[2]["score_cache"]["misses"]) == (72, 0)
    assert known[2]["score_cache"]["bytes_read"] == on[2]["score_cache"]["bytes_written"] > 0
    assert known[2]["tokens"]["scored"] == 0 and known[2]["pools"]["teacher"]["tokens_per_second"] == 0


def test_given_answers_are_scored_once_in_all_epochs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_is_worth_it: None
) -> None:
    """Eight problems, four a step; where each answer is alone in its forward pass."""
    problems = [json.loads(line) for line in (models / "problems.jsonl").open()]
    solved = "".join(json.dumps({**row, "solution": f"it is {row['answer']}"}) + "\n" for row in problems)
    (models / "solved.jsonl").write_text(solved)
    own = {"method": "kd", "data": {"path": str(models / "solved.jsonl"), "solution_field": "solution"}, "steps": 6}
    off, on = (
        train(recipe(models, tmp_path / f"{gib}", teacher={"tokens_per_batch": 1, "cache_gib": gib}, **own), None)
        for gib in (0, 1)
    )
    assert weights_of(tmp_path / "0") == weights_of(tmp_path / "1")
    assert on["score_cache"]["misses"] == 8 and on["score_cache"]["hits"] == 16
    assert 3 * on["tokens"]["scored"] == off["tokens"]["scored"]


def test_a_folder_that_takes_nothing_is_said_once_and_changes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(CachePlace, "folder", tmp_path / "file" / "teacher")
    said = io.StringIO()
    config = config_of(models, tmp_path / "run", "plain", steps=2)
    assert run.train(config, False, None, Console(file=said, width=300), local=True)
    train(config_of(models, tmp_path / "off", "plain", steps=2, teacher={"cache_gib": 0}), None)
    assert said.getvalue().count("no more scores of teacher are kept: Not a directory") == 1
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "off")


ALL_KEPT = """
from tutorloop.teacher_service import score_cache
score_cache.EXPECTED = dict.fromkeys(score_cache.EXPECTED, float("inf"))
from tutorloop.cli.main import main
main()
"""


@pytest.mark.sweep
def test_a_killed_run_in_one_process_is_continued_with_its_scores(tmp_path: Path) -> None:
    """By SIGKILL, on the lab, two steps after a checkpoint."""
    small = ["steps=8", "prompts_per_step=48", "max_staleness=0", "eval.path=", "eval.ood_path=", "checkpoint.every=4"]

    def command(folder: Path, *more: str) -> list[str]:
        own = ["train", str(ROOT / "recipes" / "quickstart.yaml"), f"output_dir={folder}", *small, "--local", *more]
        return [sys.executable, "-c", ALL_KEPT, *own]

    subprocess.run(command(tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    running = subprocess.Popen(command(tmp_path / "cut"), stdout=subprocess.DEVNULL)
    rows = tmp_path / "cut" / "metrics.jsonl"
    while not rows.exists() or len(rows.read_bytes().splitlines()) < 6:
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    subprocess.run(command(tmp_path / "cut", "--resume"), check=True, stdout=subprocess.DEVNULL)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert without_scored(steps_of(tmp_path / "cut")) == without_scored(steps_of(tmp_path / "whole"))
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["score_cache"]["hits"] in (2 * 48, 3 * 48)
