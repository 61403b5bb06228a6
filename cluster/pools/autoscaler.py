"""The autoscaler: after each learner step it looks at where the run waits, and moves replicas there (balance.py).

It measures what the pools measure anyway: the busy seconds of their replicas in each step, and the driver's seconds by
stage. After a change, whoever made it, the steps in flight are let pass and the figures are collected anew: a cool-down
as long as it takes to know what the change did. What a pool's work was at another number of replicas stays known for a
while, so that nothing is tried twice that did not help.

It looks at steps and not at a clock: a run that stands still tells nothing new. Pools that have nothing to do are left
alone, and so is one that a person has scaled: the person wins.
"""

import asyncio
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from ...contracts.config import REFERENCE, Config
from ...contracts.reliability import Autoscale
from ...contracts.status import ScaleDecision
from ..flow.flow import Flow
from ..recording.metrics import StepRow
from .balance import HORIZON, Load, Move, Run, Sizes, better_sizes, cost_of
from .pool import Pool
from .replica import Backend
from .room import Tell
from .services import pool_of

LEAST_STEPS, MOST_STEPS = 3, 10  # that a decision is made from: fewer have no spread, older ones are of another load
PATIENCE = 120.0  # seconds that a replica may take to find its place, before a decision goes without it
KEPT = 10  # decisions
BESIDE = ("total", "evaluate", "checkpoint")  # what a step's seconds hold that is no part of training


class Autoscaler:
    """Of one stage's `pools`, which share the budget. `free`: what the cluster has left of each resource; one that it
    does not name has no end. Made inside the run's loop."""

    def __init__(
        self,
        settings: Autoscale,
        flow: Flow,
        pools: Sequence[Pool],
        free: Callable[[], Mapping[str, float]],
        note: Tell,
    ) -> None:
        self.budget = budget_of(settings)
        self.pools = [pool for pool in dict.fromkeys(pools) if self.budget.keys() & pool.need.each.keys()]
        self.decisions: deque[ScaleDecision] = deque(maxlen=KEPT)
        self.held: set[str] = set()  # pools that a person has scaled
        self._flow, self._free, self._note = flow, free, note
        self._in_flight = flow.config.max_staleness + 1  # steps
        self._now = asyncio.get_running_loop().time
        self._rows: deque[StepRow] = deque(maxlen=MOST_STEPS)
        self._passing, self._short_since = 0, math.inf  # steps that are let pass; since when replicas are missing
        self._sizes: Sizes = {}  # as the last step saw them
        self._step = -1  # that one
        self._work: dict[str, dict[int, tuple[float, float]]] = {}  # pool → replicas → when, busy seconds a step

    def hold(self, names: Iterable[str]) -> list[str]:
        """A person has scaled these pools: those of them that it leaves alone from now on."""
        own = [pool.name for pool in self.pools if pool.name in names]
        self.held.update(own)
        return own

    def step(self, row: StepRow) -> None:
        """A step is done: look, and move replicas where that is worth it."""
        waits, begins = self._waits(), self._step < 0
        if self._disturbed(row):
            self._rows.clear()
            self._passing = 1 if begins else self._in_flight  # at its beginning nothing is queued
        if self._passing:
            self._passing -= not waits
        else:
            self._rows.append(row)
        if len(self._rows) >= LEAST_STEPS and not waits:
            self._decide(row)

    def _disturbed(self, row: StepRow) -> bool:
        """Whether this step tells nothing of the next ones: sizes have changed, or the run went back."""
        sizes = {pool.name: pool.members.wanted for pool in self.pools}
        known, (self._sizes, self._step) = (self._sizes, self._step + 1), (sizes, row.step)
        return known != (sizes, row.step)

    def _waits(self) -> bool:
        """Whether replicas are still to come, and have not been for long: those that find no place are waited for no
        more, though they may still come."""
        short = any(len(pool.replicas) < pool.members.wanted for pool in self.pools)
        self._short_since = min(self._short_since, self._now()) if short else math.inf
        return self._now() - self._short_since < PATIENCE if short else False

    # ---- what was measured ----

    def _run(self) -> Run:
        spent = [sum(own for name, own in row.seconds.items() if name not in BESIDE) for row in self._rows]
        waits = [row.seconds.get("wait", 0.0) for row in self._rows]
        steps = self._flow.last - self._step
        alone = statistics.fmean(spent) - statistics.fmean(waits)
        return Run(alone=alone, step_seconds=statistics.fmean(spent), in_flight=self._in_flight, steps=steps)

    def _loads(self) -> list[Load]:
        """Of the pools that may be scaled, and had something to do."""
        return [load for pool in self.pools if pool.name not in self.held and (load := self._load(pool))]

    def _load(self, pool: Pool) -> Load | None:
        busy = [row.pools[pool.name].busy_seconds for row in self._rows if pool.name in row.pools]
        wanted, serving = pool.members.wanted, len(pool.replicas)
        if not any(busy) or not wanted or not serving:
            return None
        settings, calls = pool.settings, self._calls(pool)
        most = calls if settings.max_replicas is None else min(calls, settings.max_replicas)
        if serving < wanted:
            most = min(most, serving)  # there is no place for more
        return Load(
            name=pool.name,
            now=serving,
            least=(least := max(1, settings.min_replicas)),
            most=max(least, most),
            each=pool.need.each,
            work=self._works(pool.name, serving, statistics.fmean(busy)),
            error=self._error(busy),
            start_seconds=pool.members.start_seconds,
            drain_seconds=2 * statistics.fmean(busy) / self._flow.calls_per_step,  # one runs, and one waits beside it
        )

    def _error(self, busy: Sequence[float]) -> float:
        """The standard error of their mean."""
        return statistics.stdev(busy) / math.sqrt(len(busy))

    def _calls(self, pool: Pool) -> int:
        """That the pool can be asked at once. Of an asynchronous run a step is split for as many generators as there
        are; of a synchronous one it is not, for its weights are the same to the last bit whatever the clock says."""
        flow, generators = self._flow, self._flow.services.generators.values()
        finest = self._in_flight > 1 and pool in generators
        return self._in_flight * (flow.config.prompts_per_step if finest else flow.calls_per_step)

    def _works(self, name: str, replicas: int, seconds: float) -> dict[int, float]:
        """By replicas; what was measured with others before goes up and down with what is measured now."""
        now = self._now()
        known = {n: own for n, own in self._work.get(name, {}).items() if now - own[0] < HORIZON}
        ratio = seconds / known[replicas][1] if replicas in known else 1.0
        self._work[name] = {n: (when, own * ratio) for n, (when, own) in known.items()} | {replicas: (now, seconds)}
        return {n: own for n, (_, own) in self._work[name].items()}

    def _limits(self, loads: Sequence[Load]) -> dict[str, float]:
        """What these pools may take together: the budget without what the others take, and no more than there is."""
        sizes = {load.name: load.now for load in loads}
        others = [pool for pool in self.pools if pool.name not in sizes]
        limits = {
            resource: budget - sum(pool.need.each.get(resource, 0.0) * pool.members.awake for pool in others)
            for resource, budget in self.budget.items()
        }
        for resource, free in self._free().items():
            there = max(0.0, free) + cost_of(loads, sizes, resource)
            limits[resource] = min(limits.get(resource, there), there)
        return limits

    # ---- what is done ----

    def _decide(self, row: StepRow) -> None:
        loads, run = self._loads(), self._run()
        if not loads or run.steps < 1:
            return
        if move := better_sizes(loads, self._limits(loads), run):
            self._go(loads, run, move, row)

    def _go(self, loads: Sequence[Load], run: Run, move: Move, row: StepRow) -> None:
        pools = {pool.name: pool for pool in self.pools}
        for load in sorted(loads, key=lambda own: move.sizes[own.name] - own.now):  # who goes makes room
            pools[load.name].resize(move.sizes[load.name])
        if self._in_flight > 1:
            generators = self._flow.services.rollouts.members.awake
            self._flow.split_for = max(self._flow.config.rollout.replicas, generators)
        changed = [load for load in loads if load.now != move.sizes[load.name]]
        decision = ScaleDecision(
            step=row.step,
            seconds=row.wall_seconds,
            what=", ".join(f"{load.name} {load.now} → {move.sizes[load.name]}" for load in changed),
            why=_why(loads, run, move),
            step_seconds=run.step_seconds,
            expected_seconds=move.step_seconds,
        )
        self.decisions.append(decision)
        expected = f"{decision.step_seconds:.3g} s a step, {decision.expected_seconds:.3g} s are expected"
        self._note(f"autoscaler: {decision.what} replicas: {decision.why}; {expected}")


def _why(loads: Sequence[Load], run: Run, move: Move) -> str:
    stages = {load.name: load.seconds(load.now) for load in loads} | {"the learner": run.alone}
    slowest, *others = sorted(stages, key=lambda name: -stages[name])
    if move.forced:
        return "the replicas exceed the budget"
    if all(move.sizes[load.name] <= load.now for load in loads):
        return f"{slowest} takes {stages[slowest]:.3g} s a step without them"
    rest = ", ".join(f"{name} {stages[name]:.3g} s" for name in others)
    return f"{slowest} takes {stages[slowest]:.3g} s a step, {rest}"


def autoscaler_of(config: Config, flow: Flow, backend: Backend, note: Tell) -> Autoscaler | None:
    """That of a stage; None where the recipe asks for none, and in one process, where replicas take turns."""
    if not config.autoscale.on:
        return None
    if backend.free() is None:
        note("autoscale is off: a run in one process has the replicas of its recipe")
        return None
    pools = [pool for pool in flow.pools if pool.name in scaled_pools(config)]
    return Autoscaler(config.autoscale, flow, pools, lambda: backend.free() or {}, note)


def scaled_pools(config: Config) -> set[str]:
    """Names of the pools that it may scale: all that generate, score or judge, where replicas do the work, and not
    servers that somebody else runs."""
    teachers = config.named_teachers
    own = {name for name, teacher in teachers.items() if not teacher.remote}
    return {"rollout", "teacher_rollout", REFERENCE, "verifier", *(pool_of(name, teachers) for name in own)}


def budget_of(settings: Autoscale) -> dict[str, float]:
    """By the names that Ray gives resources."""
    given = {"CPU": settings.cpus, "GPU": settings.gpus}
    return {resource: amount for resource, amount in given.items() if amount}
