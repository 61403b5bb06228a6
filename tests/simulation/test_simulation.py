"""The core against scripted replicas on a virtual clock (simulate.py): a thousand seeds hold, planted faults do not.

`make simulate` runs ten thousand.
"""

import asyncio

import pytest
from simulate import find, replay, simulate

from tutorloop.cluster import driver as drivers
from tutorloop.cluster.driver import Driver
from tutorloop.cluster.flow import flow as flows
from tutorloop.cluster.flow.flow import Flow
from tutorloop.cluster.flow.shard import Shard
from tutorloop.cluster.pools.pool import Pool

SEEDS, CHUNK = 1000, 100


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeds_hold(first):
    broken = [line for line in map(replay, range(first, first + CHUNK)) if line]
    assert not broken, "\n".join(broken)


def ignore_weights(monkeypatch):
    """Calls go to replicas whatever weights they hold."""

    def dispatch(pool):
        held = [(member, member.version) for member in pool.members.here]
        for member, _ in held:
            member.version = pool.version
        real(pool)
        for member, version in held:
            member.version = version

    real = Pool._dispatch
    monkeypatch.setattr(Pool, "_dispatch", dispatch)


def admit_too_early(monkeypatch):
    """One step more than the staleness bound allows."""
    real = Flow.admit
    monkeypatch.setattr(Flow, "admit", lambda flow, done: real(flow, done + 1))


def follow_up_in_the_next_step(monkeypatch):
    """What is asked on top joins another step than its own."""

    def follow_up(flow, shard, step):
        shard.step, own = min(shard.step + 1, max(flow.shards)), shard.step
        real(flow, shard, step)
        shard.step = own

    real = Flow._follow_up
    monkeypatch.setattr(Flow, "_follow_up", follow_up)


def order_by_arrival(monkeypatch):
    """A step's shards come as they were begun."""
    monkeypatch.setattr(flows, "natural", lambda rollout_id: [])


def forget_what_is_in_flight(monkeypatch):
    """A checkpoint holds no shards."""
    monkeypatch.setattr(drivers, "kept", lambda shards: ([], []))


def follow_a_kept_shard_up_twice(monkeypatch):
    """A checkpoint does not say what was asked on top."""
    real = drivers.kept

    def kept(shards):
        known, batches = real(shards)
        return [{**one, "followed": False, "ready": False} for one in known], batches

    monkeypatch.setattr(drivers, "kept", kept)


def go_on_with_the_first_weights(monkeypatch):
    """What a checkpoint's shards lack is generated before the checkpoint's weights are published."""

    async def resume(driver, checkpoint, state):
        await driver.load(checkpoint, state)
        driver.flow.restore(drivers.read_shards(checkpoint, driver.recorder.backend))
        await asyncio.sleep(100)

    monkeypatch.setattr(Driver, "resume", resume)


def lose_a_call(monkeypatch):
    """A pool forgets the last of those that wait."""
    real = Pool._dispatch

    def dispatch(pool):
        real(pool)
        if len(pool._backlog) > 3:
            pool._backlog.pop()

    monkeypatch.setattr(Pool, "_dispatch", dispatch)


def train_what_is_not_scored(monkeypatch):
    """A step is taken when its shards have been generated, and not when they are ready."""

    async def take(flow, step):
        while not all(shard.generated for shard in flow.shards[step]) or not flow.shards[step]:
            flow.failure.check()
            await asyncio.sleep(0.01)
        shards = flow.shards.pop(step)
        return [shard for shard in shards if shard.generated]

    monkeypatch.setattr(Flow, "take", take)


def mix_up_scores(monkeypatch):
    """A shard's scores are those of the shard that was scored last."""
    newest = []
    real = Shard.add

    def add(shard, name, batch, receipt, annotation=None):
        real(shard, name, batch, receipt, annotation)
        if annotation and annotation.to_learner:
            newest[:] = [batch]

    monkeypatch.setattr(Shard, "add", add)
    monkeypatch.setattr(Shard, "for_learner", lambda shard, kind: newest if shard.to_learner else [])


def train_a_step_again(monkeypatch):
    """The weights are never published, and the first step is learnt twice."""
    real = Driver.learn

    async def learn(driver, shards):
        if driver.step == 0:
            await real(driver, shards)
            for shard in shards:
                shard.outcomes.clear()
        return await real(driver, shards)

    monkeypatch.setattr(Driver, "learn", learn)


FAULTS = (
    *(ignore_weights, admit_too_early, follow_up_in_the_next_step, order_by_arrival, forget_what_is_in_flight),
    *(lose_a_call, train_what_is_not_scored, mix_up_scores, train_a_step_again),
    *(follow_a_kept_shard_up_twice, go_on_with_the_first_weights),
)


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(monkeypatch, plant):
    plant(monkeypatch)
    seed = find(SEEDS)
    monkeypatch.undo()
    simulate(seed)
