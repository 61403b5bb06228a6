"""The autoscaler on a virtual clock, with replicas whose seconds are known: it finds the bottleneck, follows it when it
moves, and keeps still otherwise. Faults that are planted do not pass."""

import math
import random
from collections import deque
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from balancing import POOLS, Load, Ran, recipe, run
from simulate import find, simulate

from tutorloop.cluster.pools import balance
from tutorloop.cluster.pools.autoscaler import Autoscaler
from tutorloop.cluster.pools.balance import Load as Measured
from tutorloop.cluster.pools.balance import Run

BUDGET = 6
EACH = {"rollout": 0.1, "a": 0.05, "verifier": 0.01}  # of 32 rollouts a step: 3.2, 1.6 and 0.32 s
WORST = {"rollout": 1, "a": 1, "verifier": 4}
MINUTE = 60.0


@cache
def best_static(staleness: int, pool: str = "rollout", times: float = 1.0) -> float:
    """Steps a second with the best of all splits of the budget; the pool takes `times` as long."""
    each = {**EACH, pool: EACH[pool] * times}
    splits = [dict(zip(POOLS, own, strict=True)) for own in product(range(1, BUDGET), repeat=3) if sum(own) == BUDGET]
    runs = (run(recipe(staleness), Load(each=each, learner=0.3), split, MINUTE) for split in splits)
    return max(ran.pace(MINUTE / 3, MINUTE) for ran in runs)


def keeps_the_slowest_stage_busy(each: dict, learner: float, slowest: float) -> None:
    """With three steps in flight."""
    ran = run(recipe(2), Load(each=each, learner=learner), WORST, 5 * MINUTE, budget=BUDGET)
    assert ran.pace(2 * MINUTE, 5 * MINUTE) >= 0.95 / slowest


def reaches_the_best_split(staleness: int) -> None:
    """From the worst one, within a minute."""
    ran = run(recipe(staleness), Load(each=EACH, learner=0.3), WORST, 2 * MINUTE, budget=BUDGET)
    assert ran.pace(MINUTE, 2 * MINUTE) >= 0.9 * best_static(staleness)


def keeps_still(staleness: int, noise: float, seed: int) -> None:
    """For ten minutes in which calls take now more, now less."""
    load = Load(each=EACH, learner=0.3, noise=noise, rng=random.Random(seed))
    ran = run(recipe(staleness, batch=8), load, WORST, 10 * MINUTE, budget=BUDGET)
    assert ran.changes and not returns_of(ran), ran.changes


def follows_the_load(staleness: int, pool: str = "rollout", times: float = 3.0) -> None:
    """Responses become three times as long: a minute later it goes as fast as the best split then does."""
    load = Load(each=EACH, learner=0.3, shifts=[(2 * MINUTE, pool, times)])
    ran = run(recipe(staleness), load, WORST, 5 * MINUTE, budget=BUDGET)
    assert ran.pace(3 * MINUTE, 5 * MINUTE) >= 0.9 * best_static(staleness, pool, times)


def takes_no_more_than_it_can_use() -> None:
    """The learner takes two seconds a step: neither are replicas started beyond that, nor kept."""
    ran = run(recipe(2), Load(each=EACH, learner=2.0), WORST, 4 * MINUTE, budget=12)
    assert sum(ran.sizes[-1][1].values()) <= 6 and ran.pace(MINUTE, 4 * MINUTE) >= 0.95 / 2.0, ran.sizes[-1]


def pays_no_more_than_it_gains() -> None:
    """Replicas take a minute to start, and the run ends before that pays."""
    load = Load(each=EACH, learner=0.3, start=MINUTE, begins=MINUTE)
    ran = run(recipe(0, steps=14), load, WORST, 60 * MINUTE, budget=BUDGET)
    assert ran.steps[-1][1] == 14 and not ran.changes


def goes_back_where_more_did_not_help() -> None:
    """Teachers work on all that they have at once: another one is of no use, but looks as if it were."""
    each = {**EACH, "a": 0.0}
    slow = Load(each=each, fixed={"a": 3.0}, learner=0.3, noise=0.3, rng=random.Random(3))
    told = {"at_once": {"a": 8}}
    ran = run(recipe(1, batch=8), slow, {"rollout": 2, "a": 1, "verifier": 1}, 10 * MINUTE, budget=7, **told)
    slow.rng.seed(3)
    left = run(recipe(1, batch=8), slow, {"rollout": 4, "a": 2, "verifier": 1}, 10 * MINUTE, **told)
    assert ran.pace(5 * MINUTE, 10 * MINUTE) >= 0.97 * left.pace(5 * MINUTE, 10 * MINUTE)


def returns_of(ran: Ran) -> list[str]:
    """Pools that were given up a number of replicas, and came back to it."""
    found = []
    for name in POOLS:
        sizes = [sizes[name] for _, sizes in ran.sizes]
        kept = [size for size, before in zip(sizes, [None, *sizes], strict=False) if size != before]
        found += [name] if len(set(kept)) < len(kept) else []
    return found


BOUND = {
    "rollout": (EACH, 0.3, 3.2 / 3),
    "teacher": ({"rollout": 0.05, "a": 0.1, "verifier": 0.01}, 0.3, 3.2 / 3),
    "learner": (EACH, 2.0, 2.0),
}


@pytest.mark.parametrize("bound", BOUND)
def test_the_slowest_stage_is_kept_busy(bound):
    keeps_the_slowest_stage_busy(*BOUND[bound])


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_it_reaches_the_best_split(staleness):
    reaches_the_best_split(staleness)


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize(("noise", "seed"), [(0.2, 1), (0.6, 3)])
def test_it_keeps_still(staleness, noise, seed):
    keeps_still(staleness, noise, seed)


@pytest.mark.parametrize(
    ("staleness", "pool", "times"), [(0, "verifier", 20.0), (1, "rollout", 3.0), (2, "rollout", 3.0)]
)
def test_it_follows_the_load(staleness, pool, times):
    follows_the_load(staleness, pool, times)


def test_it_takes_no_more_than_it_can_use():
    takes_no_more_than_it_can_use()


def test_it_pays_no_more_than_it_gains():
    pays_no_more_than_it_gains()


def test_it_goes_back_where_more_did_not_help():
    goes_back_where_more_did_not_help()


# ---- planted faults --------------------------------------------------------------------------------------------------


def the_fastest_stage_counts(monkeypatch):
    monkeypatch.setattr(Run, "model", lambda own, loads, sizes: min(own.stages(loads, sizes)))


def the_learner_counts_for_nothing(monkeypatch):
    real = Autoscaler._run
    monkeypatch.setattr(Autoscaler, "_run", lambda own: replace(real(own), alone=0.0))


def every_difference_counts(monkeypatch):
    """Noise is no reason to stay, nor is the way."""
    monkeypatch.setattr(balance, "MARGIN", 0.0)
    monkeypatch.setattr(balance, "SIGMAS", 0.0)
    monkeypatch.setattr(balance, "SLACK", 0.0)


def starts_cost_nothing(monkeypatch):
    monkeypatch.setattr(balance, "way_to", lambda *_: (0.0, 0.0))


def old_loads_are_never_forgotten(monkeypatch):
    """What is measured is the mean since the last change, however long ago."""
    real = Autoscaler.__init__

    def begin(own, *args):
        real(own, *args)
        own._rows = deque()

    monkeypatch.setattr(Autoscaler, "__init__", begin)


def other_sizes_are_forgotten(monkeypatch):
    monkeypatch.setattr(Autoscaler, "_works", lambda own, name, replicas, seconds: {replicas: seconds})


CAUGHT = (
    (the_fastest_stage_counts, lambda: reaches_the_best_split(1)),
    (the_learner_counts_for_nothing, takes_no_more_than_it_can_use),
    (every_difference_counts, lambda: keeps_still(2, 0.6, 3)),
    (starts_cost_nothing, pays_no_more_than_it_gains),
    (old_loads_are_never_forgotten, lambda: follows_the_load(1)),
    (other_sizes_are_forgotten, goes_back_where_more_did_not_help),
)


@pytest.mark.parametrize(("plant", "check"), CAUGHT, ids=lambda own: own.__name__.strip("<>"))
def test_a_planted_fault_does_not_pass(monkeypatch, plant, check):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def the_budget_has_no_end(monkeypatch):
    monkeypatch.setattr(Autoscaler, "_limits", lambda own, loads: {"CPU": math.inf})


def a_pool_may_have_nobody(monkeypatch):
    """Of a pool that works, all replicas go where it is the shortest stage."""

    def load(own, pool):
        found = real(own, pool)
        return found and replace(found, least=0, work=dict.fromkeys(range(99), 0.0) | found.work)

    real = Autoscaler._load
    monkeypatch.setattr(Autoscaler, "_load", load)
    monkeypatch.setattr(Measured, "seconds", lambda own, n: own.work[own.now] / n if n else 0.0)


def what_a_person_holds_is_free(monkeypatch):
    """Pools that it leaves alone take nothing of the budget."""
    real = Autoscaler._limits

    def limits(own, loads):
        return {name: own.budget[name] for name in real(own, loads)}

    monkeypatch.setattr(Autoscaler, "_limits", limits)


@pytest.mark.parametrize("plant", [the_budget_has_no_end, a_pool_may_have_nobody, what_a_person_holds_is_free])
def test_a_planted_fault_is_found_in_some_seed(monkeypatch, plant):
    plant(monkeypatch)
    seed = find(1000)
    monkeypatch.undo()
    simulate(seed)
