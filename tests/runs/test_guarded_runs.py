"""Runs that collapse, in one process: a guard that stops one, or rolls it back, and what then stands; a resume."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from loop_cases import make_models, recipe, steps_of, train
from rich.console import Console

from tutorloop.cluster import run
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import GuardTripped, NotFinite

LAB = {
    "prompts_per_step": 16,
    "student": {"model": "lab:student"},
    "teacher": {"model": "lab:teacher", "signal": "sampled"},
    "data": {"path": "lab:train"},
    "rollout": {"samples_per_prompt": 1, "max_new_tokens": 64, "batch_size": 16},
}
RUNAWAY = {"learning_rate": 1.6e-2, "warmup_steps": 20, "tokens_per_batch": 8192}  # collapses within ten steps
GUARDS = {"warmup": 1, "patience": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def said_by(config: Config, error: type[Exception] | None = None) -> tuple[str, Any]:
    """The log of a run, and what it ended with."""
    console = Console(file=io.StringIO(), width=1000)
    try:
        assert run.train(config, False, None, console, local=True) and error is None
    except Exception as raised:
        assert error and isinstance(raised, error), raised
        return console.file.getvalue(), raised  # pyright: ignore[reportAttributeAccessIssue]
    return console.file.getvalue(), None  # pyright: ignore[reportAttributeAccessIssue]


def checkpoints_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def state_of(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").iterdir())
    return json.loads((newest / "state.json").read_text())["tally"]["guards"]


def test_a_guard_stops_a_collapse_and_what_stands_is_from_before(models: Path, tmp_path: Path) -> None:
    guards = {**GUARDS, "actions": {"reverse_kl": "stop"}}
    often = {"checkpoint": {"every": 1, "keep": 9}}
    config = recipe(models, tmp_path / "run", **LAB, **often, learner=RUNAWAY, guards=guards, steps=12)
    _, error = said_by(config, GuardTripped)
    rows = steps_of(tmp_path / "run")
    last = rows[-1]["step"]
    assert last < 12 and f"in step {last}, 2 steps in a row" in error.found
    assert any(error.found in warning for warning in rows[-1]["warnings"])
    assert checkpoints_of(tmp_path / "run") == [f"step-{step:06d}" for step in range(1, last - 2)]
    assert f"--resume from {tmp_path / 'run'}/checkpoints/step-{last - 3:06d}" in error.remedy
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert any(warning.startswith(error.found) for warning in summary["warnings"]) and "rollbacks" not in summary
    assert error.found.split(":")[0] in (tmp_path / "run" / "report.html").read_text()

    slower = recipe(models, tmp_path / "run", **LAB, **often, learner={**RUNAWAY, "learning_rate": 1e-3}, steps=last)
    train(slower, None, resume=True, allow=["learner.learning_rate"])
    assert [row["step"] for row in steps_of(tmp_path / "run")] == list(range(1, last + 1))


@pytest.mark.sweep
def test_without_any_checkpoint_a_stopped_run_leaves_one(models: Path, tmp_path: Path) -> None:
    guards = {**GUARDS, "actions": {"reverse_kl": "stop"}}
    config = recipe(models, tmp_path / "run", **LAB, learner=RUNAWAY, guards=guards, steps=12)
    _, error = said_by(config, GuardTripped)
    assert checkpoints_of(tmp_path / "run") == [f"step-{steps_of(tmp_path / 'run')[-1]['step']:06d}"]
    assert "no checkpoint stands from before the trouble" in error.remedy


@pytest.mark.parametrize("every", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_rollback_goes_on_at_a_lower_rate(models: Path, tmp_path: Path, every: int) -> None:
    """From the checkpoint before the trouble, or with none from the beginning."""
    guards = {**GUARDS, "actions": {"reverse_kl": "rollback"}, "rate": 0.03}
    often = {"checkpoint": {"every": every, "keep": 9}, "max_staleness": 1}
    config = recipe(models, tmp_path / "run", **LAB, **often, learner=RUNAWAY, guards=guards, steps=10)
    log, _ = said_by(config)
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 11))
    rates = [row["learner"]["learning_rate"] for row in rows]
    shares = [rate / (8e-4 * step) for step, rate in enumerate(rates, start=1)]
    back = sum(share > 0.5 for share in shares)  # steps that stand
    assert shares == pytest.approx([1.0] * back + [0.03] * (10 - back)) and (back == 0) == (every == 0)
    (said,) = [text for text in rows[back]["warnings"] if text.startswith("rollback 1 of at most 2")]
    assert "the learning rate is 0.03 of the recipe's" in said and said in log.replace("warning: ", "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rollbacks"] == 1 and said in summary["warnings"]
    assert summary["dropped"]["rolled_back"] >= 16  # what was in flight
    assert "rollback 1 of at most 2" in (tmp_path / "run" / "report.html").read_text()
    assert state_of(tmp_path / "run")["rate"] == 0.03


def test_the_bound_of_rollbacks_stops_a_run(models: Path, tmp_path: Path) -> None:
    guards = {**GUARDS, "actions": {"reverse_kl": "rollback"}, "rate": 1.0, "rollbacks": 1}
    config = recipe(models, tmp_path / "run", **LAB, learner=RUNAWAY, guards=guards, steps=12)
    log, error = said_by(config, GuardTripped)
    assert "guards.rollbacks=1 are used up" in error.found and "rollback 1 of at most 1" in log
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rollbacks"] == 1


def test_what_is_not_finite_leaves_its_batch_out_then_lowers_the_rate(models: Path, tmp_path: Path) -> None:
    guards = {"action": "rollback", "actions": {"update": "off"}, "rate": 1e-22}
    config = recipe(models, tmp_path / "run", learner={"learning_rate": 1e20}, guards=guards, steps=4)
    log, _ = said_by(config)
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    untrained = [row["step"] for row in rows if not row["rollouts"]["trained"]]
    assert untrained and rows[-1]["dropped"]["not_finite"] == 8 * len(untrained)
    assert state_of(tmp_path / "run")["skipped"] == [step - 1 for step in untrained]
    assert "trains nothing" in log and rows[-1]["learner"]["learning_rate"] == pytest.approx(1e-2)
    assert all(math.isfinite(row["loss"]) for row in rows)
    plain = recipe(models, tmp_path / "plain", learner={"learning_rate": 1e20}, steps=4)
    said_by(plain, NotFinite)


def test_a_resumed_run_keeps_what_its_guards_have_seen(models: Path, tmp_path: Path) -> None:
    settings = {"checkpoint": {"every": 2, "keep": 9}, "guards": {"warmup": 3}}
    train(recipe(models, tmp_path / "whole", **settings), None)
    train(recipe(models, tmp_path / "cut", **{**settings, "steps": 2}), None)
    train(recipe(models, tmp_path / "cut", **settings), None, resume=True)
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")
    assert len(state_of(tmp_path / "whole")["starts"]["entropy_up"]) == 3
