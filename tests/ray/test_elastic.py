"""Real deaths in a running job: SIGKILL of each kind of actor and of a whole node. The run ends by itself, and where it
is synchronous with the weights of one that nobody disturbed."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_qwen3

from tutorloop.cluster import run
from tutorloop.contracts.config import Config
from tutorloop.contracts.recipe import parse_config

pytestmark = pytest.mark.xdist_group("elastic")
STEPS = 9


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_qwen3(folder / "student")
    tiny_qwen3(folder / "teacher", seed=1)
    rows = "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8))
    (folder / "problems.jsonl").write_text(rows)
    return folder


def recipe(models: Path, folder: Path, **changes: Any) -> Config:
    small = {"num_cpus": 0.1}
    tree = {
        "method": "opd",
        "output_dir": str(folder),
        "steps": STEPS,
        "prompts_per_step": 4,
        "max_staleness": 0,
        "student": {"model": str(models / "student")},
        "teacher": {"model": str(models / "teacher"), "signal": "topk", **small},
        "method_options": {"top_k": 4},
        "data": {"path": str(models / "problems.jsonl")},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 8, "batch_size": 4, **small},
        "checkpoint": {"every": 2},
        "verifier": small,
        "learner": {"learning_rate": 1e-3, "warmup_steps": 0, **small},
    }
    return parse_config(tree, [f"{key}={value}" for key, value in changes.items()])


def steps_in(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


@contextmanager
def at_steps(folder: Path, deeds: dict[int, Callable[[], object]]) -> Iterator[list[int]]:
    """Meanwhile each deed is done once so many steps are written down; which were done."""
    over, done = threading.Event(), []

    def watch() -> None:
        for step, deed in sorted(deeds.items()):
            while len(steps_in(folder)) < step:
                if over.wait(0.02):
                    return
            deed()
            done.append(step)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def kill(actor: str) -> None:
    """One process of the actor class `actor`, of this test's own clusters."""
    for process in psutil.Process().children(recursive=True):
        if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{actor}"):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError(f"no {actor} is there")


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "final" / "model.safetensors")


def check_whole(folder: Path, undisturbed: Path) -> None:
    """The run has every step once, lost no rollout, and has the undisturbed run's weights."""
    rows = steps_in(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    taken, trained = (sum(row["rollouts"][key] for row in rows) for key in ("taken", "trained"))
    assert taken == 8 * STEPS == trained + sum(rows[-1]["dropped"].values())
    assert [row["loss"] for row in rows] == [row["loss"] for row in steps_in(undisturbed)]
    ours, theirs = weights(folder), weights(undisturbed)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run.train(recipe(models, folder), False, None, Console(file=StringIO()), local=True)
    return folder


def test_kills_of_every_kind_change_nothing(models: Path, undisturbed: Path, tmp_path: Path, address: str) -> None:
    """One after the other: a generator, a teacher, a verifier, the learner, and a generator once more."""
    folder, shown = tmp_path / "run", StringIO()
    actors = ["RolloutWorker", "TeacherWorker", "VerifierWorker", "LearnerWorker", "RolloutWorker"]
    deeds = {step: lambda actor=actor: kill(actor) for step, actor in enumerate(actors, 1)}
    with at_steps(folder, deeds) as done:
        assert run.train(recipe(models, folder), False, address, Console(file=shown, width=200))
    assert done == list(deeds)
    check_whole(folder, undisturbed)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == {"rollout": 2, "teacher": 1, "verifier": 1, "learner": 1}
    said = shown.getvalue()
    for name in ("rollout", "teacher", "verifier"):
        assert f"of the {name} pool is lost" in said
    assert "the learner goes on from step" in said


def test_a_node_that_dies_takes_no_work_with_it(models: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder, shown = tmp_path / "run", StringIO()
    both = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = both.add_node(num_cpus=1)
    try:
        wide = {"rollout.replicas": 2, "rollout.num_cpus": 0.5, "teacher.replicas": 2, "teacher.num_cpus": 0.3}
        config = recipe(models, folder, **wide)
        with at_steps(folder, {3: lambda: both.remove_node(other, allow_graceful=False)}) as done:
            assert run.train(config, False, str(both.address), Console(file=shown, width=200))
    finally:
        both.shutdown()
    assert done == [3] and "is lost" in shown.getvalue()
    check_whole(folder, undisturbed)
