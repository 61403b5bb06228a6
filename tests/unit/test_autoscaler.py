"""The autoscaler's decision against a search of all splits, and what it must leave alone."""

import asyncio
import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "simulation"))
from balancing import POOLS, recipe, run
from balancing import Load as Latencies

from tutorloop.cluster.control.live_run import LiveRun
from tutorloop.cluster.methods import compose_stages
from tutorloop.cluster.pools.balance import (
    HEADROOM,
    MARGIN,
    SLACK,
    Load,
    Run,
    best_sizes,
    better_sizes,
    cost_of,
    way_to,
)
from tutorloop.cluster.preflight import check_inputs
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import parse_config

SECONDS = 60.0


def drawn(rng: random.Random) -> tuple[list[Load], dict[str, float], Run]:
    """Two to four pools, some of which take GPUs, and limits of CPU alone or of both."""
    loads = []
    for name in "abcd"[: rng.randint(2, 4)]:
        least, now = rng.randint(1, 2), rng.randint(1, 4)
        each = {"CPU": rng.choice([0.2, 0.5, 1.0]), **({"GPU": rng.choice([1.0, 2.0])} if rng.random() < 0.5 else {})}
        measured = {n: rng.uniform(0.1, 20.0) for n in range(1, 5) if n == now or rng.random() < 0.2}
        bounds = {"now": now, "least": least, "most": rng.randint(least, 6)}
        loads.append(Load(name=name, each=each, work=measured, **bounds))
    limits = {"CPU": rng.choice([2.0, 4.0, 6.0])} | ({"GPU": rng.choice([2.0, 5.0, 9.0])} if rng.random() < 0.5 else {})
    in_flight = rng.choice([1, 1, 2, 3])
    return loads, limits, Run(alone=rng.uniform(0.0, 5.0), step_seconds=10.0, in_flight=in_flight, steps=100)


def allowed(loads: list[Load], limits: dict[str, float]) -> list[dict[str, int]]:
    """All sizes within the limits, one by one."""
    choices = itertools.product(*(range(load.least, load.most + 1) for load in loads))
    splits = (dict(zip((load.name for load in loads), own, strict=True)) for own in choices)
    return [own for own in splits if all(cost_of(loads, own, r) <= limit + 1e-9 for r, limit in limits.items())]


@pytest.mark.parametrize("seed", range(200))
def test_no_other_split_is_faster(seed):
    loads, limits, run_ = drawn(random.Random(f"{seed}"))
    splits, best = allowed(loads, limits), best_sizes(loads, limits, run_)
    assert (best is None) == (not splits)
    if best is None:
        return
    assert best in splits
    seconds = max if run_.overlaps else sum
    shortest = min(seconds(run_.stages(loads, own)) for own in splits)
    assert seconds(run_.stages(loads, best)) <= shortest * (1 + SLACK) + 1e-9
    fewer = [own for own in splits if own != best and all(own[name] <= best[name] for name in best)]
    if not run_.overlaps:
        assert all(sum(run_.stages(loads, own)) > shortest * (1 + SLACK) for own in fewer)
    elif sum(run_.stages(loads, best)) <= HEADROOM * run_.in_flight * shortest:
        through = HEADROOM * run_.in_flight * shortest * (1 - SLACK)
        assert all(max(run_.stages(loads, own)) > shortest or sum(run_.stages(loads, own)) > through for own in fewer)


@pytest.mark.parametrize("seed", range(100))
def test_a_move_is_allowed_and_worth_it(seed):
    loads, limits, run_ = drawn(random.Random(f"move {seed}"))
    now, move = {load.name: load.now for load in loads}, better_sizes(loads, limits, run_)
    if move is None:
        return
    assert move.sizes in allowed(loads, limits) and move.sizes != now
    if any(cost_of(loads, now, r) > limit + 1e-9 for r, limit in limits.items()):
        assert move.forced
    elif any(move.sizes[name] > now[name] for name in now):
        assert run_.model(loads, move.sizes) < (1 - MARGIN) * run_.model(loads, now)


def two(rollout: float, teacher: float, **own) -> list[Load]:
    """Pools of two replicas each, with so many busy seconds a step."""
    same = {"now": 2, "least": 1, "most": 9, "each": {"CPU": 1.0}, **own}
    return [Load(name="rollout", work={2: rollout}, **same), Load(name="teacher", work={2: teacher}, **same)]


SYNCHRONOUS = Run(alone=1.0, step_seconds=12.8, in_flight=1, steps=50)
FOUR = {"CPU": 4.0}


def test_noise_is_no_reason_to_move():
    move = better_sizes(two(22.0, 1.6), FOUR, SYNCHRONOUS)
    assert move and move.sizes == {"rollout": 3, "teacher": 1}
    assert move.step_seconds == pytest.approx(1.0 + 22.0 / 3 + 1.6)
    assert better_sizes(two(22.0, 1.6, error=4.0), FOUR, SYNCHRONOUS) is None


def test_the_way_is_paid_by_the_steps_that_are_left():
    loads = two(22.0, 1.6, start_seconds=20.0, drain_seconds=2.0)
    wait, lost = way_to(loads, SYNCHRONOUS, {"rollout": 3, "teacher": 1})
    assert wait == 22.0 and lost == pytest.approx(22.0 * (1 - 12.8 / 13.6))
    steps = next(n for n in range(50) if better_sizes(loads, FOUR, replace(SYNCHRONOUS, steps=n)))
    gained = 12.8 - (1.0 + 22.0 / 3 + 1.6)
    assert (steps - 1 - wait / 12.8) * gained <= lost < (steps - wait / 12.8) * gained


def test_free_room_is_taken_without_a_loss():
    assert way_to(two(12.0, 3.0, start_seconds=20.0), SYNCHRONOUS, {"rollout": 4, "teacher": 2})[1] == 0.0


def test_what_a_pool_did_at_another_size_is_believed():
    load = Load(name="a", now=2, least=1, most=4, each={"CPU": 1.0}, work={1: 4.0, 2: 8.0})
    assert [load.seconds(n) for n in (1, 2, 4, 6)] == [4.0, 4.0, 2.0, 2.0]


# ---- beside a driver -------------------------------------------------------------------------------------------------

EACH = {"rollout": 0.1, "a": 0.05, "verifier": 0.01}
ONE = dict.fromkeys(POOLS, 1)


def test_a_pool_that_a_person_scales_is_left_alone():
    told = []

    def scale(driver, pools):
        live = LiveRun("opd", 9, SimpleNamespace(check_room=lambda needs: None), SimpleNamespace(note=told.append))
        live.driver = driver
        asyncio.get_running_loop().call_later(1.0, live._resize, {"rollout": 2})

    ran = run(recipe(1), Latencies(each=EACH, learner=0.3), ONE, 2 * SECONDS, budget=6, do=scale)
    sizes = ran.sizes[-1][1]
    assert sizes["rollout"] == 2 and sizes["a"] > 1 and sum(sizes.values()) <= 6
    assert told == ["rollout: 1 → 2 replicas, as asked; the autoscaler leaves it alone from now on"]


def test_a_pool_without_work_is_not_touched():
    ran = run(
        recipe(1), Latencies(each={**EACH, "verifier": 0.0}, learner=0.3), {**ONE, "verifier": 2}, SECONDS, budget=6
    )
    assert ran.sizes[-1][1]["verifier"] == 2 and len(ran.changes) == 1


def test_it_stays_within_the_room():
    ran = run(recipe(1), Latencies(each=EACH, learner=0.3), ONE, SECONDS, budget=8, room=5)
    assert sum(ran.sizes[-1][1].values()) == 5


@pytest.mark.parametrize(("staleness", "rollouts"), [(0, 2), (1, 4)])
def test_no_more_generators_than_calls(staleness, rollouts):
    """A synchronous run's step stays cut as its recipe says; an asynchronous one's is cut finer for more generators."""
    load = Latencies(each={**EACH, "a": 0.001}, learner=0.3)
    ran = run(recipe(staleness, prompts=4, batch=4), load, ONE, SECONDS, budget=9)
    most = max(sizes["rollout"] for _, sizes in ran.sizes)
    assert most == 2 if staleness == 0 else most >= rollouts


def test_a_replica_that_finds_no_place_is_not_waited_for():
    """Its pool stays as it is; the others go on being scaled."""

    def crowd(driver, pools):
        async def never(need, replicas, tell):
            if need.pool == "rollout" and len(pools["rollout"].replicas) >= 2:
                await asyncio.sleep(math.inf)
            return await real(need, replicas, tell)

        real = pools["rollout"].members.backend.started
        pools["rollout"].members.backend.started = never

    load = Latencies(each=EACH, learner=0.3, shifts=[(SECONDS, "a", 4.0)])
    ran = run(recipe(1), load, ONE, 5 * SECONDS, budget=7, do=crowd)
    assert ran.changes[0][1]["rollout"] > 2 and ran.sizes[-1][1]["rollout"] == 2 and ran.sizes[-1][1]["a"] > 2


# ---- before a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"autoscale": {"cpus": 0.6}, "rollout": {"replicas": 2}},
            "rollout 2 × 0.2 + teacher 1 × 0.2 + verifier 1 × 0.1",
        ),
        ({"autoscale": {"gpus": 2.0}}, "none of rollout, teacher, verifier takes a GPU"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(changes, found):
    tree = {
        "method": "opd",
        "output_dir": "unused",
        "steps": 1,
        "prompts_per_step": 1,
        "student": {"model": "lab:student"},
    }
    config = parse_config({**tree, "teacher": {"model": "lab:teacher"}, "data": {"path": "lab:train"}, **changes})
    with pytest.raises(ConfigError) as refused:
        check_inputs(config, compose_stages(config))
    assert found in refused.value.found and "autoscale" in refused.value.rule and refused.value.remedy
