"""What a step trains on is a function of the run, and not of who answered first (flow_cases.py: a random one)."""

import re
from dataclasses import replace

import numpy as np
import pytest
from flow_cases import World, in_loop

from tutorloop.cluster.methods import METHODS
from tutorloop.cluster.methods.parts.composition import Credit, RolloutSummary, natural
from tutorloop.contracts.errors import NotFinite
from tutorloop.contracts.recipe import parse_config
from tutorloop.learner.packing import plan_updates

ORDERS = 20
TEACHERS = {"teachers.a.model": "s", "teachers.b.model": "s"}
RUNS = {  # method → its options; those that ask again come first
    "dapo": {"method_options.max_refills": 3},
    "sg_opd": {**TEACHERS, "method_options.cold_start": 1.0, "method_options.cold_steps": 1.0},
    "star": {},
    "rft": {},
    "raft": {"method_options.keep": "best"},
    "reinforce_pp": {},
    "rloo": {},
    "sdpo": {**TEACHERS, "method_options.grpo_weight": 0.5},
    "kdrl": TEACHERS,
    "opd": {**TEACHERS, "method_options.teachers": "combined"},
}


class Judging(World):
    """Rewards whose sums are rounded; a few answers are abstained on; paths repeat."""

    def result(self, name, call):
        payload, receipt = super().result(name, call)
        if call.method == "judge":
            requests = payload[1]
            rewards = tuple(request.seed % 7 / 7 if self.passes(request) else 0.0 for request in requests)
            paths = tuple(str(request.seed % 2) for request in requests)
            abstained = tuple(request.seed % 11 == 0 for request in requests)
            receipt = replace(receipt, rewards=rewards, paths=paths, abstained=abstained)
        return payload, receipt


async def trained(order, method, options):
    """What the learner is given of two steps, answered in the order that `order` decides."""
    world = Judging(np.random.default_rng(order), passes=lambda request: request.seed % 3 == 0)
    flow = world.flow(METHODS[method], method=method, prompts_per_step=12, **{"rollout.replicas": 5}, **options)
    given = []
    for step in range(2):
        flow.admit(step)
        world.version = step
        shards = await world.take(flow, step)
        rows = flow.trainable(step, shards)
        plan = plan_updates(rows, 2, 64, 2)
        given.append(([(shard.requests, shard.for_learner("scores")) for shard in shards], rows, plan))
    return given, flow.dropped, len({shard.attempt for shard in shards})


@pytest.mark.parametrize("method", list(RUNS))
@in_loop
async def test_a_step_is_the_same_whoever_answers_first(method):
    first, dropped, attempts = await trained(0, method, RUNS[method])
    assert all(rows for _, rows, _ in first)
    assert (attempts > 1) == (method in ("dapo", "sg_opd", "star")), "what is asked on top is among it"
    for order in range(1, ORDERS):
        assert (await trained(order, method, RUNS[method]))[:2] == (first, dropped)


@in_loop
async def test_rows_that_were_asked_for_at_once_stay_as_they_were_asked():
    world = World(np.random.default_rng())
    flow = world.flow(METHODS["grpo"], step=3, prompts_per_step=12, **{"rollout.replicas": 5})
    await world.admit(flow, 3)
    world.version, asked = 3, world.requests()
    taken = [request for shard in await world.take(flow, 3) for request in shard.requests]
    assert taken == asked and [int(r.group_id) for r in taken[::3]] == list(range(36, 48))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_credit_does_not_depend_on_the_order_of_the_facts(method):
    rng = np.random.default_rng()
    tree = {
        "method": method,
        "output_dir": "unused",
        "steps": 100,
        "prompts_per_step": 8,
        "student": {"model": "s"},
        "data": {"path": "d"},
        "rollout": {"samples_per_prompt": 12},
        "teachers": {"a": {"model": "s", "follows": "live"}} if method in NEEDS_TEACHER else {},
        "reference": {"model": "s"} if method in ("g_opd", "exopd") else None,
    }
    credit = METHODS[method](parse_config(tree, [])).credit
    rollouts = [
        RolloutSummary(
            rollout_id=f"{group}-{mark}{sample}",
            group_id=str(group),
            source="teacher" if mark else "student",
            context="plain",
            length=int(rng.integers(1, 20)),
            truncated=bool(rng.random() < 0.1),
            reward=float(rng.choice([0.1, 0.3, 0.7, 1.0])),
            passed=bool(rng.random() < 0.5),
            abstained=bool(rng.random() < 0.1),
            answer=str(rng.integers(3)),
            path=str(rng.integers(3)),
        )
        for group in range(8)
        for mark, count in (("", 12), ("t", 2))
        for sample in range(count)
    ]
    wanted = dict(zip([rollout.rollout_id for rollout in rollouts], credit(rollouts, 3), strict=True))
    for _ in range(ORDERS):
        shuffled = [rollouts[i] for i in rng.permutation(len(rollouts))]
        assert dict(zip([rollout.rollout_id for rollout in shuffled], credit(shuffled, 3), strict=True)) == wanted


NEEDS_TEACHER = {
    *("seqkd", "kd", "gkd", "opd", "eopd", "g_opd", "exopd", "sg_opd", "opsd", "sgsd", "sdft", "sdpo", "kdrl"),
    "sgpo_guided",
}


def test_ids_are_ordered_as_numbers():
    ids = ["2-0", "2-1", "2-9", "2-10", "2-t0", "3-0", "10-0", "10-0+1.0-0", "10-0+1.0-1", "10-0+1.10-0", "10-1"]
    rng = np.random.default_rng()
    assert sorted([ids[i] for i in rng.permutation(len(ids))], key=natural) == ids


@pytest.mark.parametrize("credit", [Credit(advantage=float("nan")), Credit(weight=float("inf"))])
@in_loop
async def test_credit_that_is_no_number_is_named(credit):
    world = World(np.random.default_rng())
    flow = world.flow(
        lambda config: replace(METHODS["grpo"](config), credit=lambda rollouts, step: [credit] * len(rollouts))
    )
    flow.admit(0)
    with pytest.raises(NotFinite, match=re.escape("rollout 0-0")):
        flow.trainable(0, await world.take(flow, 0))
