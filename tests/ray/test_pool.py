"""A pool's order on real actors: what is asked after a broadcast is answered by what it brought."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from tutorloop.cluster.pool import Call, Pool, pump
from tutorloop.cluster.runtime import cluster
from tutorloop.contracts import config
from tutorloop.contracts.errors import RolloutError
from tutorloop.contracts.records import Receipt


class Worker:
    """Answers with the version that it holds and the calls that ran beside."""

    def __init__(self):
        self.version, self.running, self.most = 0, 0, 0
        self.lock = threading.Lock()

    def load_weights(self, version):
        time.sleep(0.3)
        self.version = version

    def generate(self, seconds):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(seconds)
        with self.lock:
            self.running -= 1
        return None, Receipt(rows=self.most, tokens=self.version, seconds=seconds, weight_version=self.version)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor cannot import a test
    with cluster("local"):
        yield
    assert not ray.is_initialized()


@pytest.mark.parametrize("at_once", [1, 3])
def test_calls_after_a_broadcast_are_answered_by_its_weights(at_once):
    pool = Pool("rollout", Worker, config.Pool(replicas=2, num_cpus=0.1), RolloutError, at_once=at_once)
    pool.ready()
    before, after = [], []
    for version in range(1, 5):
        for _ in range(4 * at_once):
            pool.submit(Call("generate", (0.05,), 1, lambda _, receipt: before.append(receipt)))
        pool.broadcast("load_weights", version)
        for _ in range(4 * at_once):
            wanted = version

            def answered(_, receipt, wanted=wanted):
                after.append((wanted, receipt))

            pool.submit(Call("generate", (0.05,), 1, answered))
        while pool.queue_depth or not pool.settled:
            pump([pool])
    pool.close()
    assert len(before) == len(after) == 16 * at_once
    assert all(receipt.weight_version == wanted for wanted, receipt in after)
    assert max(receipt.rows for _, receipt in after) == at_once  # as many side by side, and no more


PRIVATE = """
from tutorloop.cluster.runtime import cluster
with cluster(None):
    import ray
    print(ray._private.worker.global_worker.node.get_session_dir_path())
"""


def test_a_private_ray_starts_without_a_home_and_in_a_long_tmpdir(tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "RAY_AUTH_TOKEN")}
    for home in ({}, {"HOME": "/"}):
        before = Path("/.ray").exists()
        command = [sys.executable, "-c", PRIVATE]
        ran = subprocess.run(
            command, env={**environment, **home, "TMPDIR": str(folder)}, capture_output=True, text=True, check=True
        )
        assert ran.stdout.startswith("/tmp/ray")
        assert f"TMPDIR={folder}: is " in ran.stderr and "bytes too long" in ran.stderr
        assert Path("/.ray").exists() == before and not list(folder.iterdir())
