"""How many threads a process gets that runs a model on CPUs: chosen here, for `num_cpus` only says what Ray reserves.

In a synchronous run the pools take turns: while one works the others wait, and it has the machine. In an asynchronous
one all work at once and share it.
"""

import os
from collections.abc import Iterator

import ray

from ...contracts.config import Config, Learner, Pool


def threads_of(config: Config, pool: Pool | Learner) -> int:
    """Torch threads of each process of `pool`: its share of a machine, at least its whole `num_cpus`.

    All processes are taken to be on the smallest machine of the cluster. One with GPUs needs no more than it reserves.
    """
    reserved = max(1, int(pool.num_cpus))
    if pool.num_gpus:
        return reserved
    if not ray.is_initialized():  # all in one process, whose calls take turns
        return max(reserved, len(os.sched_getaffinity(0)))
    at_work = _processes(pool) if config.max_staleness == 0 else sum(map(_processes, _on_cpus(config)))
    return max(reserved, _cpus_of_a_machine() // max(1, at_work))


def _processes(pool: Pool | Learner) -> int:
    if isinstance(pool, Learner):
        return pool.ranks
    return pool.replicas * getattr(pool, "tensor_parallel", 1)


def _on_cpus(config: Config) -> Iterator[Pool | Learner]:
    """The pools of one stage that run a model of their own on CPUs."""
    teachers = [t for t in config.named_teachers.values() if not t.remote and not t.shared]
    others = [pool for pool in (config.reference,) if pool]
    yield from (pool for pool in (config.learner, config.rollout, *teachers, *others) if not pool.num_gpus)


def _cpus_of_a_machine() -> int:
    found = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return int(min((cpus for cpus in found if cpus), default=1))
