"""Runs in which it is known how long everything takes, to see what an autoscaler makes of them: virtual minutes.

`Load` says what a rollout costs in each pool, and how much that varies; `run` drives the real driver, flow and pools
with that for a while, and says when which step was done, and with which replicas.
"""

import asyncio
import math
import random
from dataclasses import dataclass, field

from clock import VirtualLoop
from scripted import Fate, ScriptedBackend, World, scripted_pool
from scripted_folder import Quiet
from simulate import driver_of

from tutorloop.cluster.interrupt import Interrupt
from tutorloop.cluster.methods import METHODS
from tutorloop.cluster.pools.autoscaler import Autoscaler
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.reliability import Autoscale

CPU = 0.2  # that each replica takes
POOLS = ("rollout", "a", "verifier")  # a is the teacher


@dataclass
class Load(Fate):
    """`each`: pool → seconds of a replica for one rollout. `noise`: standard deviation of a call's log seconds.
    `shifts`: (from when, pool, times as long)."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    each: dict = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)  # pool → seconds of a call, however many rollouts it is about
    learner: float = 0.0
    start: float = 2.0
    begins: float = 0.0  # as `start`, of the replicas that are there from the beginning
    noise: float = 0.0
    shifts: list = field(default_factory=list)

    def delay(self, what="", rollouts=1):
        if what not in self.each:
            return {"step": self.learner, "start": self.start}.get(what, 0.0)
        now = asyncio.get_running_loop().time()
        times = math.prod(factor for since, pool, factor in self.shifts if pool == what and now >= since)
        chance = math.exp(self.rng.gauss(-(self.noise**2) / 2, self.noise)) if self.noise else 1.0
        return (self.each[what] * rollouts + self.fixed.get(what, 0.0)) * times * chance


@dataclass
class Ran:
    """What came of it: (seconds, step) of each step, and (seconds, replicas by pool) at each."""

    steps: list = field(default_factory=list)
    sizes: list = field(default_factory=list)
    decisions: list = field(default_factory=list)
    error: Exception | None = None

    def pace(self, begin: float, end: float) -> float:
        """Steps a second in that time."""
        return sum(begin < at <= end for at, _ in self.steps) / (end - begin)

    @property
    def changes(self) -> list:
        """When the wanted replicas changed, and to what."""
        pairs = zip(self.sizes, self.sizes[1:], strict=False)
        return [(at, new) for (_, old), (at, new) in pairs if new != old]


class Timed(Quiet):
    """Notes when each step was done."""

    def __init__(self, ran, pools):
        super().__init__()
        self.ran, self.pools, self.now = ran, pools, asyncio.get_running_loop().time

    def log_step(self, row):
        self.ran.steps.append((self.now(), row.step))
        self.ran.sizes.append((self.now(), {pool.name: pool.members.wanted for pool in self.pools}))


def recipe(staleness: int, prompts: int = 16, batch: int = 4, **own):
    """Of two rollouts a prompt, with one teacher and a verifier."""
    tree = {
        "method": "opd",
        "output_dir": "unused",
        "steps": 100_000,
        "prompts_per_step": prompts,
        "max_staleness": staleness,
        "student": {"model": "s"},
        "data": {"path": "d"},
        "teachers": {"a": {"model": "s"}},
        "rollout": {"samples_per_prompt": 2, "batch_size": batch},
        **own,
    }
    return parse_config(tree, [])


def run(config, load: Load, sizes: dict, seconds: float, **options) -> Ran:
    """For so many seconds. `options`: those of `_run`."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(5_000_000)) as runner:
        return runner.run(_run(config, load, sizes, seconds, **options))


async def _run(config, load, sizes, seconds, budget=0, room=math.inf, do=None, at_once=()) -> Ran:
    """`budget`: replicas that an autoscaler may have in all; 0: there is none. `room`: those that the cluster has room
    for. `do(driver, pools)` may disturb. `at_once`: calls that a pool's replicas work on side by side."""
    world = World(load, most_ahead=config.max_staleness, per_step=config.prompts_per_step)
    backend, ran = ScriptedBackend(world, {"rollout", "a"}), Ran()
    own = {name: scripted_pool(name, world, backend, sizes[name], dict(at_once).get(name, 1)) for name in POOLS}
    quiet, interrupt = Timed(ran, own.values()), Interrupt(lambda _: None)
    driver = driver_of(config, METHODS["opd"](config), world, own, quiet, interrupt)
    driver.flow.split_for = max(config.rollout.replicas, sizes["rollout"])
    if budget:

        def free():
            return {"CPU": CPU * (room - sum(len(pool.members.here) for pool in own.values()))}

        driver.autoscaler = Autoscaler(Autoscale(cpus=CPU * budget), driver.flow, [*own.values()], free, lambda _: None)
    await asyncio.sleep(load.begins)
    for pool in own.values():
        await pool.ready(quiet.note)
    with interrupt.saving():
        asyncio.get_running_loop().call_later(seconds, interrupt.stop)
        if do:
            do(driver, own)
        await driver.train()
    if world.broken:
        raise world.broken
    ran.decisions = list(driver.autoscaler.decisions) if driver.autoscaler else []
    for pool in own.values():
        pool.close()
    return ran
