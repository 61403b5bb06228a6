"""What a pool does that cannot start, has no room, or loses a replica: on a real cluster of two small nodes."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from rich.console import Console
from tiny import tiny_qwen3

from tutorloop.cluster import run
from tutorloop.cluster.pools.pool import Pool, need_of
from tutorloop.cluster.pools.ray_backend import RayBackend
from tutorloop.cluster.pools.ray_cluster import cluster
from tutorloop.cluster.pools.room import check_room
from tutorloop.contracts import config
from tutorloop.contracts.errors import (
    ConfigError,
    ModelError,
    ResourceError,
    RolloutError,
    TutorloopError,
)
from tutorloop.contracts.receipts import Receipt
from tutorloop.contracts.recipe import parse_config


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor cannot import a test
    both = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    both.add_node(num_cpus=2)
    yield str(both.address)
    both.shutdown()


@pytest.fixture
def joined(address: str) -> Iterator[None]:
    with cluster(address):
        yield
    assert not ray.is_initialized()


class Worker:
    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error

    def generate(self, seconds: float) -> tuple[None, Receipt]:
        print("the last words\tof a worker", file=sys.stderr, flush=True)
        time.sleep(seconds)
        return None, Receipt(rows=1, tokens=1, seconds=seconds)

    def pid(self) -> int:
        return os.getpid()


def pool_of(**settings: Any) -> Pool:
    own = {"replicas": 1, "num_cpus": 0.1, **settings}
    error = own.pop("error", None)
    return Pool("rollout", Worker, config.Pool(**own), RolloutError, RayBackend(), error=error)


async def refused(error: Exception) -> str:
    """What a pool says whose workers' constructor raises."""
    pool = pool_of(error=error)
    with pytest.raises(type(error) if isinstance(error, TutorloopError) else RolloutError) as caught:
        await pool.ready()
    pool.close()
    return str(caught.value)


@pytest.mark.parametrize("error", [ModelError("a rule", "a value", "a remedy"), ConfigError("another")])
def test_what_a_constructor_refuses_reaches_the_user_as_itself(joined: None, error: TutorloopError) -> None:
    assert asyncio.run(refused(error)) == str(error)


def test_another_error_of_a_constructor_is_said_with_its_place(joined: None) -> None:
    said = asyncio.run(refused(ValueError("no such head: 7")))
    assert "ValueError: no such head: 7" in said and "raise error" in said and "--resume" not in said
    assert len(said.splitlines()) <= 8


def test_a_death_is_described(joined: None) -> None:
    async def die() -> tuple[int, str]:
        pool = pool_of(replicas=2, max_restarts_per_minute=0)
        await pool.ready()
        _, pid = await pool.ask("pid")
        calls = [asyncio.ensure_future(pool.call("generate", 1, seconds=600.0)) for _ in range(2)]
        await asyncio.sleep(1)  # they have begun
        os.kill(pid, signal.SIGKILL)
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(RolloutError) as caught:
            done.pop().result()
        pool.close()
        return pid, str(caught.value)

    pid, said = asyncio.run(die())
    assert f"replica 1 of the rollout pool has died (pid {pid} on " in said
    assert "SIGKILL" in said and "| the last words  of a worker" in said and f"-{pid}.err" in said
    assert "\t" not in said and 2 <= len(said.splitlines()) <= 10


def test_a_busy_cluster_is_waited_for_aloud(joined: None) -> None:
    async def wait() -> list[str]:
        holders = [pool_of(replicas=4, num_cpus=1)]
        await holders[0].ready()
        waiting, told = pool_of(replicas=2, num_cpus=0.5), []

        def tell(text: str) -> None:
            told.append(text)
            holders.pop().close()

        await waiting.ready(tell)
        waiting.close()
        return told

    (said,) = asyncio.run(wait())
    assert said.startswith("rollout pool (2 of 2 replicas) waits for 0.5 CPU; free on the freest of 2 machines: 0 CPU")
    assert "this run has 4 CPU by Worker" in said


def test_what_no_single_machine_can_hold_is_refused(joined: None) -> None:
    check_room([need_of("rollout", config.Pool(replicas=2, num_cpus=2))])
    with pytest.raises(ResourceError, match=r"rollout asks for 3 CPU; the largest machine has 2 CPU"):
        check_room([need_of("rollout", config.Pool(replicas=1, num_cpus=3))])
    with pytest.raises(ResourceError, match=r"rollout asks for 4 CPU; the largest machine has 2 CPU"):
        check_room([need_of("rollout", config.Rollout(engine="vllm", tensor_parallel=4, num_cpus=1))])
    with pytest.raises(ResourceError, match=r"rollout 2 × 2 \+ verifier 1 × 1 = 5; the cluster has 4"):
        check_room(
            [need_of("rollout", config.Pool(replicas=2, num_cpus=2)), need_of("verifier", config.Pool(num_cpus=1))]
        )


# ---- a whole run -----------------------------------------------------------------------------------------------------


def recipe(folder: Path) -> config.Config:
    tiny_qwen3(folder / "student")
    rows = "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8))
    (folder / "problems.jsonl").write_text(rows)
    return parse_config(
        {
            "method": "opd",
            "output_dir": str(folder / "run"),
            "steps": 100_000,
            "prompts_per_step": 2,
            "student": {"model": str(folder / "student")},
            "teacher": {"model": str(folder / "student"), "signal": "sampled", "num_cpus": 0.1},
            "data": {"path": str(folder / "problems.jsonl")},
            "rollout": {"samples_per_prompt": 2, "max_new_tokens": 8, "num_cpus": 0.1, "max_restarts_per_minute": 0},
            "checkpoint": {"every": 0},
            "verifier": {"num_cpus": 0.1},
            "learner": {"num_cpus": 0.1},
        }
    )


@contextmanager
def killing_after_two_steps(metrics: Path, name: str) -> Iterator[None]:
    """Meanwhile the process of the actor class `name` is ended, once two steps are written down."""
    over = threading.Event()

    def wait() -> None:
        while not metrics.is_file() or metrics.read_text().count('"kind": "step"') < 2:
            if over.wait(0.05):
                return
        for process in psutil.Process().children(recursive=True):  # of this test's own cluster
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                process.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_death_that_is_not_made_good_saves_first(tmp_path: Path, address: str) -> None:
    killing = killing_after_two_steps(tmp_path / "run" / "metrics.jsonl", "RolloutWorker")
    with pytest.raises(RolloutError, match="0 were replaced within a minute") as caught, killing:
        run.train(recipe(tmp_path), False, address, Console(file=(tmp_path / "shown").open("w")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if row["kind"] == "step"]
    saved = [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")]
    said = str(caught.value)
    assert saved == [f"step-{steps[-1]:06d}"] and f"continue with --resume from {tmp_path}" in said
