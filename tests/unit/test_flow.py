"""Work in flight, without Ray (flow_cases.py): who is asked, scored and judged, what comes back, what is refused."""

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from flow_cases import PROMPTS, ROWS, World, in_loop, mixed, plain, run
from run_rows import fresh_rng

from tutorloop.cluster.data import PromptOrder
from tutorloop.cluster.interrupt import Interrupt, Interrupted
from tutorloop.cluster.methods import dapo, star
from tutorloop.cluster.methods.parts.composition import Credit, SampleSpec
from tutorloop.contracts.config import REFERENCE
from tutorloop.contracts.errors import TeacherError
from tutorloop.contracts.records import ScoreRequest, TrainRow, seed_of

# ---- asking ----------------------------------------------------------------------------------------------------------


@in_loop
async def test_every_ask_becomes_requests_of_its_prompt_by_source():
    world = World(fresh_rng())
    await run(world, mixed)
    order, found = PromptOrder(ROWS, 5), world.requests()
    expected = Counter()
    for position in range(12):
        samples = {"student": 3, "teacher": 2 * (position % 3 == 0), "dataset": int(position % 4 == 0)}
        expected += Counter({(str(position), order.row(position), source): n for source, n in samples.items()})
    assert Counter((r.group_id, r.row, r.source) for r in found) == expected
    assert {r.context for r in found if r.source == "student"} == {"clue@1"}
    assert {r.context for r in found if r.source != "student"} == {"plain"}
    for name, call in world.calls("generate"):
        assert {r.source for r in call.arguments["requests"]} == {name.removesuffix("rollout").rstrip("_") or "student"}


@pytest.mark.parametrize("case", range(10))
@in_loop
async def test_no_group_is_split_over_calls(case):
    rng = fresh_rng()
    world = World(rng)
    samples, batch, replicas, prompts = (int(rng.integers(1, high)) for high in (6, 20, 5, 12))
    options = {
        "rollout.samples_per_prompt": samples,
        "rollout.batch_size": batch,
        "rollout.replicas": replicas,
        "prompts_per_step": prompts,
    }
    await run(world, plain, steps=1, **options)
    groups = [{request.group_id for request in call.arguments["requests"]} for _, call in world.calls("generate")]
    assert sum(map(len, groups)) == len(set().union(*groups)) == prompts
    assert all(call.cost == len(call.arguments["requests"]) for _, call in world.calls("generate"))
    assert all(len(call.arguments["requests"]) <= max(batch, samples) for _, call in world.calls("generate"))
    assert len(groups) >= min(replicas, prompts), "no replica is idle while another has two groups"


@in_loop
async def test_ids_and_seeds_are_unique_and_the_runs_seed_decides_them_alone():
    async def drawn(**changes):
        world = World(fresh_rng(), passes=lambda request: request.seed % 2)
        await run(world, mixed, steps=9, **changes)
        found = [request for request in world.requests() if int(request.group_id) < 36]
        assert len({r.rollout_id for r in found}) == len({r.seed for r in found}) == len(found) > 100
        return {r.rollout_id: (r.seed, r.row, r.sample_index, r.group_id) for r in found}

    first = await drawn()
    cut_otherwise = {"rollout.batch_size": 3, "rollout.replicas": 4, "max_staleness": 2}
    assert await drawn() == first and await drawn(**cut_otherwise) == first
    others = await drawn(seed=6)
    assert others.keys() == first.keys()
    assert {seed for seed, *_ in others.values()}.isdisjoint(seed for seed, *_ in first.values())


@in_loop
async def test_a_source_asked_twice_gives_rollouts_of_their_own():
    world = World(fresh_rng())
    asks = (
        SampleSpec(samples=2),
        SampleSpec(samples=2, context="clue@1"),
        SampleSpec(source="teacher"),
        SampleSpec(source="teacher"),
    )
    await run(
        world, lambda config: replace(plain(config), samples=lambda step, position: asks), steps=1, prompts_per_step=1
    )
    found = world.requests()
    assert len({r.rollout_id for r in found}) == len({r.seed for r in found}) == 6
    assert sorted(r.sample_index for r in found) == list(range(6))


@in_loop
async def test_a_resumed_stage_asks_for_the_same_prompts():
    whole = World(fresh_rng())
    await run(whole, mixed, steps=5)
    rest = World(fresh_rng())
    flow = rest.flow(mixed, step=3)
    for step in (3, 4):
        await rest.admit(flow, step)
        await rest.answer_all()
    later = [r for r in whole.requests() if int(r.group_id) >= 12]
    assert sorted(rest.requests(), key=repr) == sorted(later, key=repr)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@in_loop
async def test_only_what_the_staleness_bound_allows_is_in_flight(staleness):
    """Back-pressure: with s steps done, the groups of steps up to s + N, and none past the stage's end."""
    world = World(fresh_rng())
    flow = world.flow(plain, first=10, step=10, steps=6, max_staleness=staleness)
    for step in range(10, 16):
        flow.admit(step)
        await world.admit(flow, step)
        asked = {int(request.group_id) // 4 for request in world.requests()}
        assert asked == set(range(10, min(step + staleness, 15) + 1))
        await world.take(flow, step)


# ---- follow-ups ------------------------------------------------------------------------------------------------------


@in_loop
async def test_dapo_refills_dropped_groups_up_to_its_budget():
    """Nothing ever passes: each of 4 groups is replaced 3 times by a fresh prompt, all in the same step."""
    world = World(fresh_rng(), passes=lambda request: False)
    _, (shards,) = await run(world, dapo.compose, steps=1, method="dapo", **{"method_options.max_refills": 3})
    groups = {request.group_id: request for request in world.requests()}
    assert len(groups) == 4 * (1 + 3) and len(world.requests()) == 3 * len(groups)
    assert len({r.rollout_id for r in world.requests()}) == len(world.requests())
    assert sorted({shard.attempt for shard in shards}) == [1, 2, 3, 4]
    assert all(shard.ready and shard.step == 0 for shard in shards)
    assert len({r.row for r in groups.values()}) > 4, "fresh prompts, and not the same again"


@in_loop
async def test_dapo_stops_refilling_what_has_become_mixed():
    """First-attempt groups at even positions are all wrong; every other answer is mixed."""

    def passes(request):
        return request.sample_index == 0 and not (request.group_id.isdigit() and int(request.group_id) % 2 == 0)

    refills = []
    for _ in range(2):
        world = World(fresh_rng(), passes)
        flow, (shards,) = await run(world, dapo.compose, steps=1, method="dapo")
        fresh = [r for r in world.requests() if not r.group_id.isdigit()]
        assert len(fresh) == 3 * 2
        rows = flow.trainable(0, shards)
        assert len(rows) == 3 * 4 and flow.dropped == {"zero_variance": 6}
        refills.append(sorted(fresh, key=lambda r: r.rollout_id))
    assert refills[0] == refills[1], "whatever order the answers come in"


@in_loop
async def test_star_asks_once_more_with_the_answer_where_nothing_passed():
    world = World(fresh_rng(), passes=lambda request: int(request.group_id) % 2)
    _, (shards,) = await run(world, star.compose, steps=1, method="star")
    hinted = [request for request in world.requests() if request.context != "plain"]
    plain_row = {r.group_id: r.row for r in world.requests() if r.context == "plain"}
    assert sorted(r.group_id for r in hinted) == ["0", "2"] and {r.context for r in hinted} == {"answer@1"}
    assert all(r.row == plain_row[r.group_id] for r in hinted)
    facts = [fact for shard in shards for fact in shard.summaries()]
    assert Counter(fact.context for fact in facts) == {"plain": 12, "answer@1": 2}


# ---- annotating ------------------------------------------------------------------------------------------------------


def scored(config, **changes):
    changes = {"scoring": ScoreRequest(), "generators": ("student", "teacher", "dataset"), **changes}
    return replace(mixed(config), **changes)


@in_loop
async def test_each_shard_goes_to_its_teachers_and_to_the_verifier():
    world = World(fresh_rng())
    options = {"scored": ("student", "dataset"), "reference": True}
    _, taken = await run(world, lambda config: scored(config, **options))
    asked = {}
    for name, call in world.calls("score"):
        (_, requests), request = call.arguments["rollouts"], call.arguments["request"]
        assert call.arguments.keys() == {"rollouts", "request"}, "the plain prompt is all that is shown"
        assert request == (ScoreRequest(everyone=True) if name == REFERENCE else ScoreRequest())
        assert call.cost == sum(10 + world.length(r) for r in requests), "the prompt is read too"
        asked.setdefault(requests, set()).add(name)
    for shard in (shard for shards in taken for shard in shards):
        named = {world.teacher_of_row[request.row] for request in shard.requests}
        wanted = set() if shard.source == "teacher" else named | {REFERENCE}
        assert asked.get(shard.requests, set()) == wanted and len(shard.for_learner("scores")) == len(wanted)
        assert (shard.judged is None) == (shard.source == "dataset")


@in_loop
async def test_everyone_scores_all():
    world = World(fresh_rng())
    await run(world, lambda config: scored(config, scoring=ScoreRequest(everyone=True)), steps=1)
    names = Counter(name for name, _ in world.calls("score"))
    students = [call for name, call in world.calls("generate") if name == "rollout"]
    assert names == {"a": len(students), "b": len(students)}


@in_loop
async def test_teachers_and_verifier_are_asked_at_once():
    world = World(fresh_rng())
    flow = world.flow(lambda config: replace(plain(config), scoring=ScoreRequest()))
    await world.admit(flow, 0)
    for item in list(world.pending):
        world.answer(*item)
    await world.settle()
    assert {name for name, _ in world.pending} == {"a", "b", "verifier"}
    assert flow.queue_depth == 0, "no shard is ready before its last answer"
    await world.answer_all()
    assert flow.queue_depth == len(flow.shards[0])


@in_loop
async def test_teachers_that_are_shown_verdicts_are_asked_after_them():
    world = World(fresh_rng())
    peers = ScoreRequest(context="peer@1")
    await run(world, lambda config: scored(config, scoring=peers, after_verdicts=True))
    judged = []
    for name, call in world.answered:
        if name == "verifier":
            judged.append(call.arguments["rollouts"][1])
        elif call.method == "score":
            (_, requests), given = call.arguments["rollouts"], call.arguments
            assert requests in judged and given["request"] is peers and given["prompts"] is PROMPTS
            assert given["verdicts"] == ("verdicts", requests) and "skills" not in given, "those of the same rollouts"
    assert world.calls("score")


@in_loop
async def test_given_responses_are_scored_though_nobody_judges_them():
    """after_verdicts waits for no verdict that will not come."""
    world = World(fresh_rng())
    options = {"after_verdicts": True, "scored": ("student", "dataset")}
    _, taken = await run(world, lambda config: scored(config, **options))
    assert all(shard.for_learner("scores") for shards in taken for shard in shards if shard.source != "teacher")


# ---- handing over ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staleness, round_steps", [(0, 1), (2, 1), (0, 4), (1, 3)])
@in_loop
async def test_what_is_too_old_is_refused_and_counted(staleness, round_steps):
    bound = staleness + round_steps - 1
    for behind in range(bound + 3):
        world = World(fresh_rng())
        flow = world.flow(
            lambda config: replace(mixed(config), round_steps=round_steps), step=20, max_staleness=staleness
        )
        flow.admit(20)
        world.version = 20 - behind
        shards = await world.take(flow, 20)
        old = behind > bound
        assert flow.dropped == ({"stale": 12} if old else {})
        assert sum(s.source == "student" for s in shards) == (0 if old else 2)
        assert sum(s.source != "student" for s in shards) == len(shards) - (0 if old else 2) > 0, "no policy is old"
        assert 20 not in flow.shards


@in_loop
async def test_rows_keep_their_place_and_the_others_their_reason(monkeypatch):
    """Place, tokens and credit of each row; an empty response is refused whatever the method says of it."""
    rng = fresh_rng()
    world = World(rng)
    monkeypatch.setattr(World, "length", lambda self, request: request.seed % 4)
    seen = []

    def credit(facts, step):
        seen.append((step, len(facts)))
        return [("too_" + "long" if f.length == 3 else Credit(advantage=f.length, weight=0.5)) for f in facts]

    flow = world.flow(lambda config: replace(plain(config), credit=credit), first=2, step=2)
    flow.admit(2)
    world.version = 2
    shards = await world.take(flow, 2)
    rows = flow.trainable(2, shards)
    lengths = {(b, r): world.length(q) for b, shard in enumerate(shards) for r, q in enumerate(shard.requests)}
    expected = [
        (length + 10, TrainRow(batch=b, row=r, advantage=length, weight=0.5))
        for (b, r), length in lengths.items()
        if length in (1, 2)
    ]
    assert rows == expected and seen == [(0, 12)]
    counts = Counter(lengths.values())
    assert flow.dropped == +Counter({"empty_response": counts[0], "too_long": counts[3]})


@in_loop
async def test_facts_say_what_the_receipts_said():
    world = World(fresh_rng(), passes=lambda request: request.seed % 2)
    _, (shards,) = await run(world, mixed, steps=1)
    for shard in shards:
        for request, fact in zip(shard.requests, shard.summaries(), strict=True):
            assert (fact.rollout_id, fact.group_id) == (request.rollout_id, request.group_id)
            assert (fact.source, fact.context) == (request.source, request.context)
            assert (fact.length, fact.truncated) == (world.length(request), world.length(request) == 6)
            given = request.source == "dataset"
            assert fact.passed == (given or request.seed % 2 == 1) and fact.reward == float(fact.passed)
            assert fact.answer == ("" if given else request.rollout_id)


@in_loop
async def test_abandoned_work_is_counted_and_asks_for_nothing_more():
    world = World(fresh_rng(), passes=lambda request: False)
    flow = world.flow(dapo.compose, method="dapo", max_staleness=1)
    await world.admit(flow, 0)
    for item in [item for item in world.pending if item[0] == "rollout"][:3]:
        world.answer(*item)
    await world.settle()
    flow.abandon("interrupted")
    assert flow.dropped == {"interrupted": 18} and flow.queue_depth == 0
    asked = len(world.requests())
    await world.answer_all()
    assert len(world.requests()) == asked and flow.queue_depth == 0


@in_loop
async def test_waiting_ends_when_the_run_is_interrupted():
    world = World(fresh_rng())
    flow = world.flow(plain)
    flow.admit(0)
    interrupt = Interrupt(print)
    with interrupt.saving():
        waiting = asyncio.ensure_future(interrupt.beside(flow.take(0)))
        await world.settle()
        assert not waiting.done()
        interrupt.stop()
        with pytest.raises(Interrupted):
            await waiting
    assert flow.shards[0], "what is in flight stays, to be counted"


@pytest.mark.parametrize("failing", ["rollout", "verifier", "a"])
@in_loop
async def test_what_a_shard_fails_with_is_heard_whatever_is_waited_for(failing):
    """A shard of the next step fails while this step is waited for; what then comes of others is not lost."""
    world = World(fresh_rng())
    flow = world.flow(lambda config: replace(plain(config), scoring=ScoreRequest(everyone=True)), max_staleness=1)
    await world.admit(flow, 0)
    waiting = asyncio.ensure_future(flow.take(0))
    error = TeacherError("a rule", "a value")
    while not waiting.done():
        later = [item for item in world.pending if item[0] == failing and position_of(item) >= 4]
        if later:
            later[0][1].answer.set_exception(error)
            world.pending.remove(later[0])
        else:  # the next step's first, so that this one is still waited for when it fails
            others = [item for item in world.pending if position_of(item) >= 4]
            world.answer(*others[world.rng.integers(len(others))])
        await world.settle()
    with pytest.raises(TeacherError) as caught:
        await waiting
    assert caught.value is error
    with pytest.raises(TeacherError):
        flow.failure.check()


def position_of(item):
    given = item[1].arguments
    requests = given["requests"] if "requests" in given else given["rollouts"][1]
    return int(requests[0].group_id)


def test_fresh_prompts_are_drawn_from_the_whole_dataset():
    rows = {int(np.random.default_rng(seed_of(5, "fresh", str(i))).integers(ROWS)) for i in range(400)}
    assert rows == set(range(ROWS))
