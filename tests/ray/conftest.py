"""A cluster that whole runs join; each leaves nothing behind on it."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session", autouse=True)
def own_folder() -> Iterator[str]:
    """Ray writes the address of the machine's newest cluster into its folder, and a job joins that one: of two
    processes that test side by side each has a folder of its own, with a short path."""
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="tl")
    yield os.environ["RAY_TMPDIR"]
    shutil.rmtree(os.environ.pop("RAY_TMPDIR"), ignore_errors=True)


@pytest.fixture(scope="module")
def four_cpus() -> Iterator[str]:
    """The address of a cluster with four CPUs. One a module: of a cluster that stood while this process was in others
    meanwhile (tests/ray/test_elastic.py has its own), the actors of later runs were cancelled."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield str(cluster.address)
    cluster.shutdown()


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """What a run held of its Ray is let go before a test begins another one."""
    yield
    gc.collect()


@pytest.fixture
def address(four_cpus: str) -> Iterator[str]:
    yield four_cpus
    assert not ray.is_initialized()
