"""A pool's order on real actors: what is asked after new weights is answered by them."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from tutorloop.cluster.pools.pool import Pool
from tutorloop.cluster.pools.ray_backend import RayBackend
from tutorloop.cluster.pools.ray_cluster import cluster
from tutorloop.contracts import config
from tutorloop.contracts.errors import RolloutError
from tutorloop.contracts.receipts import RolloutReceipt

pytestmark = pytest.mark.xdist_group("pool")


class Worker:
    """Answers with the version that it holds and the calls that ran beside."""

    def __init__(self):
        self.version, self.running, self.most = 0, 0, 0
        self.lock = threading.Lock()

    def load_weights(self, version):
        time.sleep(0.3)
        self.version = version

    def pid(self):
        return os.getpid()

    def generate(self, seconds):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(seconds)
        with self.lock:
            self.running -= 1
        return None, RolloutReceipt(rows=self.most, tokens=self.version, seconds=seconds, weight_version=self.version)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor cannot import a test
    with cluster("local"):
        yield
    assert not ray.is_initialized()


@pytest.mark.parametrize("concurrent_calls", [1, 3])
def test_calls_after_new_weights_are_answered_by_them(concurrent_calls):
    before, after = asyncio.run(publish_four_times(concurrent_calls))
    assert len(before) == len(after) == 16 * concurrent_calls
    assert all(receipt.weight_version == wanted for wanted, receipt in after)
    assert max(receipt.rows for _, receipt in after) == concurrent_calls  # as many side by side, and no more


async def publish_four_times(concurrent_calls):
    """What was asked before each publication, and after it with the version wanted."""
    settings = config.Pool(replicas=2, num_cpus=0.1)
    pool = Pool("rollout", Worker, settings, RolloutError, RayBackend(), concurrent_calls=concurrent_calls)
    await pool.ready()
    before, after = [], []

    async def ask(answers, wanted):
        _, receipt = await pool.call("generate", 1, seconds=0.05)
        answers.append((wanted, receipt))

    for version in range(1, 5):
        async with asyncio.TaskGroup() as group:
            for _ in range(4 * concurrent_calls):
                group.create_task(ask(before, version))
            await asyncio.sleep(0)
            pool.publish(version, "load_weights", version)
            for _ in range(4 * concurrent_calls):
                group.create_task(ask(after, version))
        await pool.loaded()
        assert pool.queue_depth == 0
    pool.close()
    return before, after


def test_an_idle_replica_that_is_killed_is_replaced_before_anything_is_asked():
    before, after, told = asyncio.run(kill_an_idle_one())
    assert len(before) == len(after) == 2 and len(set(before) & set(after)) == 1
    assert "replica 1 of the verifier pool is lost" in told and f"pid {before[1]} " in told


async def kill_an_idle_one():
    """Process ids before and after, and what was told."""
    told = []
    pool = Pool("verifier", Worker, config.Pool(replicas=2, num_cpus=0.1), RolloutError, RayBackend())
    await pool.ready(told.append)
    before = await pool.ask("pid")
    os.kill(before[1], signal.SIGKILL)
    async with asyncio.timeout(60):  # a process starts meanwhile
        while "is lost" not in "".join(told) or len(pool.replicas) < 2:
            await asyncio.sleep(0.1)
    after = await pool.ask("pid")
    pool.close()
    return before, after, "\n".join(told)


PRIVATE = """
from tutorloop.cluster.pools.ray_cluster import cluster
with cluster(None):
    import ray
    print(ray._private.worker.global_worker.node.get_session_dir_path())
"""


def test_a_private_ray_starts_without_a_home_and_in_a_long_tmpdir(tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    own = ("HOME", "RAY_AUTH_TOKEN", "RAY_TMPDIR")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    for home in ({}, {"HOME": "/"}):
        before = Path("/.ray").exists()
        command = [sys.executable, "-c", PRIVATE]
        ran = subprocess.run(
            command, env={**environment, **home, "TMPDIR": str(folder)}, capture_output=True, text=True, check=True
        )
        assert ran.stdout.startswith("/tmp/ray")
        assert f"TMPDIR={folder}: is " in ran.stderr and "bytes too long" in ran.stderr
        assert Path("/.ray").exists() == before and not list(folder.iterdir())
