"""Real deaths in a running job: SIGKILL of each kind of actor and of a whole node. The run ends by itself, and where it
is synchronous with the weights of one that nobody disturbed."""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
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
from tutorloop.cluster.learner_group import LearnerGroup
from tutorloop.cluster.pools.pool import Pool
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


def processes(actor: str) -> list[psutil.Process]:
    """Of the actor class `actor`, of this test's own clusters."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{actor}"):
                found.append(process)
    return found


def kill(actor: str) -> None:
    processes(actor)[0].kill()


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


class Killed:
    """Calls of a class's `method`, of which those whose numbers are in `fatal` are killed while they run: the actor's
    processes stop before the call is sent to them, and are killed once it has been. `after`: a file that is there
    first."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        owner: type,
        method: str,
        actor: str,
        fatal: set[int],
        after: Path | None = None,
    ) -> None:
        real, self.calls, self.killed = getattr(owner, method), 0, 0

        def stop() -> list[psutil.Process]:
            self.calls += 1
            found = processes(actor) if self.calls in fatal else []
            for process in found:
                process.suspend()
            return found

        def later(found: list[psutil.Process]) -> None:
            self.killed += len(found)
            for process in found:
                asyncio.get_running_loop().call_later(0.3, process.kill)

        async def call(own: Any, *args: Any, **options: Any) -> Any:
            while after and self.calls + 1 in fatal and not after.exists():
                await asyncio.sleep(0.01)
            later(stop())
            return await real(own, *args, **options)

        def begin(own: Any, *args: Any, **options: Any) -> Any:
            found = stop()
            begun = real(own, *args, **options)
            later(found)
            return begun

        patch.setattr(owner, method, call if inspect.iscoroutinefunction(real) else begin)


def test_kills_of_every_kind_and_in_each_call_change_nothing(
    models: Path, undisturbed: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator, a teacher and a verifier after a step each; the learner in a publication, a step and a checkpoint; a
    generator while it takes weights in. No unfinished checkpoint is gone back to: each that is read has its manifest,
    and is of a step's end."""
    folder, shown = tmp_path / "run", StringIO()
    actors = ["RolloutWorker", "TeacherWorker", "VerifierWorker"]
    deeds = {step: lambda actor=actor: kill(actor) for step, actor in enumerate(actors, 5)}
    deaths = [
        Killed(monkeypatch, LearnerGroup, "publish", "LearnerWorker", {3}),
        Killed(monkeypatch, LearnerGroup, "step", "LearnerWorker", {5}, folder / "checkpoints" / "step-000002"),
        Killed(monkeypatch, LearnerGroup, "save", "LearnerWorker", {2}),
        Killed(monkeypatch, Pool, "_load", "RolloutWorker", {7}),
    ]
    read = []
    monkeypatch.setattr(LearnerGroup, "load", partialmethod(_noting, LearnerGroup.load, read))
    with at_steps(folder, deeds) as done:
        assert run.train(recipe(models, folder), False, address, Console(file=shown, width=200))
    assert done == list(deeds)
    assert [own.killed for own in deaths] == [1, 1, 1, 1], shown.getvalue()
    # Once no checkpoint stood yet, and the stage began again.
    assert read == [True, True]
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    check_whole(folder, undisturbed)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == {"rollout": 2, "teacher": 1, "verifier": 1, "learner": 3}
    said = shown.getvalue()
    for name in ("rollout", "teacher", "verifier"):
        assert f"of the {name} pool is lost" in said
    assert "the learner goes on from step" in said


async def _noting(learner: LearnerGroup, load: Callable[..., Any], read: list[bool], folder: Path) -> None:
    read.append((folder.parent / "manifest.json").is_file())
    await load(learner, folder)


@pytest.mark.sweep  # a minute; scripted in tests/unit/test_learner_deadlines.py
def test_a_learner_that_hangs_is_started_again(
    models: Path, undisturbed: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks one is killed inside of a step, on which the other waits or fails; later both stop, and stay so."""
    folder, shown = tmp_path / "run", StringIO()
    real, steps = LearnerGroup.step, []

    async def step(learner: LearnerGroup, *args: Any) -> Any:
        steps.append(args[1])
        ranks = processes("LearnerWorker")
        if len(steps) == 3:
            ranks[-1].suspend()
            asyncio.get_running_loop().call_later(0.3, ranks[-1].kill)
        if len(steps) == 6:
            ranks[-1].suspend()
        return await real(learner, *args)

    monkeypatch.setattr(LearnerGroup, "step", step)
    config = recipe(models, folder, **{"learner.ranks": 2, "learner.deadline_seconds": 20})
    assert run.train(config, False, address, Console(file=shown, width=200))
    said = shown.getvalue()
    assert "step: no answer in" in said and "of the learner has died" in said
    assert [row["step"] for row in steps_in(folder)] == list(range(1, STEPS + 1))
    assert json.loads((folder / "summary.json").read_text())["restarts"]["learner"] == 2


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
