"""What a simulation must find once replicas die, hang, come and go, and the learner dies: each fault is planted."""

import asyncio
from contextlib import suppress

import pytest
from simulate import find, simulate

from tutorloop.cluster.driver import Driver
from tutorloop.cluster.flow.flow import Flow
from tutorloop.cluster.learner_group import LearnerGroup
from tutorloop.cluster.pools.calls import Pace
from tutorloop.cluster.pools.members import Members
from tutorloop.cluster.pools.pool import Pool
from tutorloop.cluster.pools.weight_broadcast import WeightBroadcast
from tutorloop.cluster.recovery import Recovery
from tutorloop.contracts.errors import BroadcastBroken

SEEDS = 1500


def no_deadline(monkeypatch):
    """A call that hangs is waited for until its answer comes, a day later: the run looks stuck for its people."""
    monkeypatch.setattr(Pace, "deadline", lambda pace, method, cost: 1e12)


def a_late_answer_counts_too(monkeypatch):
    """A call's first replica answers after the call was made again, and its answer is taken as the second's."""
    real = Pool._settle
    monkeypatch.setattr(Pool, "_settle", lambda pool, member, call, found=None: real(pool, member, call, found) or True)


def draining_drops_calls(monkeypatch):
    """A replica that is let go ends at once, and what it worked on is forgotten."""

    def drain(members, member):
        member.calls.clear()
        real(members, member)

    real = Members.drain
    monkeypatch.setattr(Members, "drain", drain)


def a_new_replica_works_before_its_weights(monkeypatch):
    """One that has started gets calls before it has taken the published weights."""

    def arrived(pool, member):
        member.version = pool.version
        pool._dispatch()

    monkeypatch.setattr(Pool, "_arrived", arrived)


def the_dead_are_not_replaced(monkeypatch):
    monkeypatch.setattr(Members, "_replace", lambda members, error: None)


def a_lost_call_is_forgotten(monkeypatch):
    """What a replica worked on when it died is asked for nowhere else."""

    def lose(pool, member, error):
        member.calls = []
        pool.members.lose(member, error)

    monkeypatch.setattr(Pool, "lose", lose)


def poison_is_tried_for_ever(monkeypatch):
    """A call that takes replicas down is never told from the others."""
    monkeypatch.setattr("tutorloop.cluster.pools.pool.MOST_DEATHS", 10**9)


def going_back_keeps_what_is_too_early(monkeypatch):
    """After the learner's death steps that the bound does not allow yet go on."""

    def rewind(flow, step, keep):
        flow.dropped.clear()
        flow.admitted = step

    monkeypatch.setattr(Flow, "rewind", rewind)


def going_back_counts_twice(monkeypatch):
    """After the learner's death what had been counted before stays counted."""
    real = Recovery.go_back

    async def go_back(recovery, error):
        before = dict(recovery.driver.counters.dropped)
        done = await real(recovery, error)
        recovery.driver.counters.dropped.update(before)
        return done

    monkeypatch.setattr(Recovery, "go_back", go_back)


def half_taken_weights_count(monkeypatch):
    """A replica counts as holding its old version while it takes another in."""
    real = Pool._load

    def load(pool, member, taking_in, new=False):
        before = member.version
        real(pool, member, taking_in, new)
        member.version = before

    monkeypatch.setattr(Pool, "_load", load)


def a_publication_has_no_deadline(monkeypatch):
    """A learner that hangs while it publishes is waited for."""

    async def in_time(learner, method, cost, answers):
        return await (asyncio.gather(*answers) if method == "publish" else real(learner, method, cost, answers))

    real = LearnerGroup.in_time
    monkeypatch.setattr(LearnerGroup, "in_time", in_time)


def a_hung_learner_ends_the_run(monkeypatch):
    """What is late is an error as any other."""

    async def final(recovery, error):
        return error if "deadline" in error.rule else await real(recovery, error)

    real = Recovery.final
    monkeypatch.setattr(Recovery, "final", final)


def dying_again_of_its_start_ends_the_run(monkeypatch):
    """A learner that is started again may not die of that."""

    async def final(recovery, error):
        return None if await recovery.go_back(error) else error

    monkeypatch.setattr(Recovery, "final", final)


def nobody_looks_at_idle_replicas(monkeypatch):
    """A death is noticed at the next call alone."""
    monkeypatch.setattr(Members, "_idle", lambda members: [])


def newcomers_are_served_while_the_learner_steps(monkeypatch):
    """The weights that one then gets are others than their version says."""
    real = Driver.learn
    monkeypatch.setattr(Driver, "learn", lambda driver, shards: driver._beside(real(driver, shards)))


def newcomers_wait_for_a_broadcast(monkeypatch):
    """One that came after a version was sent is to receive it, and nobody sends it again."""

    def send(pool, version, members, method, *args):
        loads = real(pool, version, members, method, *args)
        pool._taking_in = (method, args)
        return loads

    real = Pool.send
    monkeypatch.setattr(Pool, "send", send)


def a_broken_broadcast_counts(monkeypatch):
    """A replica that has half of a version works as if it held it."""

    async def loaded(pool, member, version, answer, adopts):
        async def half():
            with suppress(BroadcastBroken):
                return await answer

        await real(pool, member, version, half(), adopts)

    real = Pool._loaded
    monkeypatch.setattr(Pool, "_loaded", loaded)


def a_group_meets_once(monkeypatch):
    """Those that came later are in no group, and those that died still are."""

    async def meet(broadcast, learner):
        if not broadcast._members:
            await real(broadcast, learner)

    real = WeightBroadcast._meet
    monkeypatch.setattr(WeightBroadcast, "_meet", meet)


FAULTS = (
    *(newcomers_are_served_while_the_learner_steps, newcomers_wait_for_a_broadcast, a_broken_broadcast_counts),
    *(a_group_meets_once,),
    *(no_deadline, a_late_answer_counts_too, draining_drops_calls, a_new_replica_works_before_its_weights),
    *(the_dead_are_not_replaced, a_lost_call_is_forgotten, poison_is_tried_for_ever),
    *(going_back_keeps_what_is_too_early, going_back_counts_twice, half_taken_weights_count),
    *(a_publication_has_no_deadline, a_hung_learner_ends_the_run, dying_again_of_its_start_ends_the_run),
    nobody_looks_at_idle_replicas,
)


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(monkeypatch, plant):
    plant(monkeypatch)
    seed = find(SEEDS)
    monkeypatch.undo()
    simulate(seed)
