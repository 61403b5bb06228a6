"""Which numbers of replicas make a learner step shortest, and whether going there is worth it: pure functions.

A stage that has `work` busy seconds a step takes work / n with n replicas. What the run spends beside its pools (the
learner's step, publishing) is a stage of one size. With `in_flight` steps at once, one comes out every

    max(the slowest stage, the sum of all stages / in_flight)   seconds:

no stage is passed faster than it works, and no step faster than through all of them. In a synchronous run one step is
in flight, and the sum counts; in an asynchronous one the slowest stage does, once the others are short enough.

A measurement is noise, and a replica that starts does nothing meanwhile. So sizes are left for others only where a step
gets shorter by more than the noise, and within a while by more than the way there costs.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

MARGIN = 0.1  # share of a step: less is not worth the turmoil, nor told from a model's own error
SIGMAS = 2.0  # of the measurements' standard error, beyond which a difference is one
SLACK = 0.01  # share of a step: a replica that brings less is not wanted
HEADROOM = 0.8  # of the time that the steps in flight may take through all stages: the rest is for chance delays
HORIZON = 600.0  # seconds that what was measured is taken to hold for
UNIT = 1e-4  # of a CPU or GPU: Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A pool as it was measured with `now` replicas, each of which takes `each` (CPU, GPU).

    `work`: seconds a step that its replicas were busy, all together, by how many they were: what one of them works on
    side by side it works on faster. `error`: the standard error of `work[now]`. `least` and `most` replicas that it may
    have, and has a use for; `start_seconds` until another one serves, `drain_seconds` until one that goes is gone.
    """

    name: str
    now: int
    least: int
    most: int
    each: Mapping[str, float]
    work: Mapping[int, float]
    error: float = 0.0
    start_seconds: float = 0.0
    drain_seconds: float = 0.0

    def seconds(self, replicas: int) -> float:
        """Of a step, with so many; beyond `most` they find nothing to do."""
        return self.work.get(replicas, self.work[self.now]) / min(replicas, self.most)


Sizes = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What else is known of a run: `alone` seconds of a step that no pool works in, `step_seconds` of a whole one, as
    measured; steps that may be `in_flight` at once, and `steps` that are left."""

    alone: float
    step_seconds: float
    in_flight: int
    steps: int

    @property
    def overlaps(self) -> bool:
        return self.in_flight > 1

    def stages(self, loads: Iterable[Load], sizes: Mapping[str, int]) -> list[float]:
        return [self.alone, *(load.seconds(sizes[load.name]) for load in loads)]

    def model(self, loads: Iterable[Load], sizes: Mapping[str, int]) -> float:
        """Seconds of a step by the stages' times alone."""
        stages = self.stages(loads, sizes)
        return max(*stages, sum(stages) / self.in_flight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Other sizes, with the seconds of a step that are expected there."""

    sizes: Sizes
    step_seconds: float
    forced: bool = False  # what there is now exceeds the limits


def cost_of(loads: Iterable[Load], sizes: Mapping[str, int], resource: str) -> float:
    return sum(load.each.get(resource, 0.0) * sizes[load.name] for load in loads)


def best_sizes(loads: Sequence[Load], limits: Mapping[str, float], run: Run) -> Sizes | None:
    """The sizes within `limits` (of CPU, GPU) at which the slowest stage is fastest, or in a synchronous run the sum of
    all shortest; the cheapest among those that are alike. None where there are none.

    Exact: pool after pool, the shortest step for each amount that is taken.
    """
    reached = _reached(loads, limits, run)
    if not reached:
        return None
    shortest = min(seconds for seconds, _ in reached.values())
    alike = {used: sizes for used, (seconds, sizes) in reached.items() if seconds <= shortest * (1 + SLACK)}

    def share(used: tuple[int, ...]) -> float:
        return sum(amount * UNIT / limit for amount, limit in zip(used, limits.values(), strict=True) if amount)

    least = min(alike, key=lambda used: (share(used), reached[used]))
    sizes = dict(zip((load.name for load in loads), alike[least], strict=True))
    return _with_headroom(loads, limits, run, sizes) if run.overlaps else sizes


def _reached(
    loads: Sequence[Load], limits: Mapping[str, float], run: Run
) -> dict[tuple[int, ...], tuple[float, tuple[int, ...]]]:
    """By what is taken of each limited resource, the shortest step and its sizes."""
    combine: Callable[..., float] = max if run.overlaps else lambda one, other: one + other
    most = [round(limit / UNIT) if math.isfinite(limit) else math.inf for limit in limits.values()]
    reached: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,) * len(limits): (run.alone, ())}
    for load in loads:
        each = [round(load.each.get(resource, 0.0) / UNIT) for resource in limits]
        further: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        choices = [
            (size, load.seconds(size), [size * one for one in each]) for size in range(load.least, load.most + 1)
        ]
        for used, (before, sizes) in reached.items():
            for size, seconds, takes in choices:
                total = tuple(map(int.__add__, used, takes))
                if any(amount > limit for amount, limit in zip(total, most, strict=True)):
                    break
                candidate = (combine(before, seconds), (*sizes, size))
                if total not in further or candidate < further[total]:
                    further[total] = candidate
        reached = further
    return reached


def _with_headroom(loads: Sequence[Load], limits: Mapping[str, float], run: Run, sizes: Sizes) -> Sizes:
    """What is left goes where it shortens a step's way most, until the steps in flight keep the slowest stage busy."""
    slowest = max(run.stages(loads, sizes))
    while sum(run.stages(loads, sizes)) > HEADROOM * slowest * run.in_flight:
        more = [{**sizes, load.name: sizes[load.name] + 1} for load in loads if sizes[load.name] < load.most]
        there = [own for own in more if all(cost_of(loads, own, r) <= most + UNIT / 2 for r, most in limits.items())]
        shortest = min(there, key=lambda own: sum(run.stages(loads, own)), default=sizes)
        if sum(run.stages(loads, shortest)) >= sum(run.stages(loads, sizes)) - SLACK * slowest:
            break
        sizes = shortest
    return sizes


def better_sizes(loads: Sequence[Load], limits: Mapping[str, float], run: Run) -> Move | None:
    """Where to go from the sizes that there are; None: they stay."""
    best = best_sizes(loads, limits, run)
    now = {load.name: load.now for load in loads}
    if best is None or best == now:
        return None
    expected = expected_seconds(loads, run, best)
    if any(cost_of(loads, now, resource) > limit + UNIT / 2 for resource, limit in limits.items()):
        return Move(sizes=best, step_seconds=expected, forced=True)
    gained, (wait, lost) = run.step_seconds - expected, way_to(loads, run, best)
    if gained > run.step_seconds * max(MARGIN, SIGMAS * noise_of(loads, run)):
        after = min(run.steps - wait / run.step_seconds, HORIZON / expected)  # steps that are shorter
        return Move(sizes=best, step_seconds=expected) if gained * after > lost else None
    fewer = {name: min(size, now[name]) for name, size in best.items()}
    return Move(sizes=fewer, step_seconds=run.step_seconds) if _idle(loads, run, now, fewer) else None


def _idle(loads: Sequence[Load], run: Run, now: Sizes, fewer: Sizes) -> bool:
    """Whether what `fewer` lets go brings nothing: the run goes as fast as what it spends beside its pools, and those
    that get smaller stay well below that."""
    left = [load.seconds(fewer[load.name]) for load in loads if fewer[load.name] < now[load.name]]
    as_fast = run.overlaps and max(run.step_seconds, run.model(loads, fewer)) <= (1 + MARGIN) * run.alone
    return bool(left) and as_fast and max(left) <= HEADROOM * run.alone


def expected_seconds(loads: Sequence[Load], run: Run, sizes: Sizes) -> float:
    """Of a step with these sizes: as long as one now, but for what the model says of both."""
    now = run.model(loads, {load.name: load.now for load in loads})
    return run.step_seconds * run.model(loads, sizes) / now if now else run.step_seconds


def noise_of(loads: Iterable[Load], run: Run) -> float:
    """The standard error of a step's seconds by its stages, as a share of them."""
    errors = math.hypot(*(load.error / load.now for load in loads))
    return errors / run.step_seconds if run.step_seconds else 0.0


def way_to(loads: Sequence[Load], run: Run, sizes: Sizes) -> tuple[float, float]:
    """Seconds until the new replicas are there, and those of them that the run loses: who goes is gone meanwhile."""
    slower = expected_seconds(loads, run, {load.name: min(load.now, sizes[load.name]) for load in loads})
    starts = max((load.start_seconds for load in loads if sizes[load.name] > load.now), default=0.0)
    drains = max((load.drain_seconds for load in loads if sizes[load.name] < load.now), default=0.0)
    wait = starts + drains
    return wait, wait * (1 - run.step_seconds / slower) if slower > run.step_seconds else 0.0
