"""A pool whose replicas die, hang, are slow, come and go: scripted workers on a virtual clock."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "simulation"))
from clock import VirtualLoop

from tutorloop.cluster.pools.pool import IDLE_SECONDS, Pool
from tutorloop.contracts import config
from tutorloop.contracts.errors import InputError, ModelError, Quarantined, RolloutError
from tutorloop.contracts.receipts import Receipt


def lost(text="killed"):
    return RolloutError("a pool keeps its replicas", text).as_lost()


class Replica:
    """Answers after `seconds` of the call; `raises` whatever a call's arguments say."""

    where, dead, spared = "here", False, 0  # tokens that its cache spares each call which names no number

    def __init__(self, number, slow=1.0):
        self.number, self.slow, self.open, self.ended, self.version = number, slow, [], False, None

    def call(self, method, arguments):
        answer = asyncio.get_running_loop().create_future()
        self.open.append(answer)
        seconds = arguments.get("seconds", 1.0) * self.slow
        spared = arguments.get("spared", 0)
        given = (arguments.get("raises"), seconds, self.spared if spared is None else spared)
        asyncio.get_running_loop().call_later(seconds, self._answer, answer, *given)
        return ("batch", self.number), answer

    def _answer(self, answer, error, seconds, spared):
        if self.ended or answer.done():
            return
        if error and error.lost:
            self.die()
        elif error:
            answer.set_exception(error)
        else:
            answer.set_result(Receipt(rows=1, seconds=seconds, spared=spared))

    def ask(self, method, *args):
        answer = asyncio.get_running_loop().create_future()
        if method == "load":
            self.version = args[0]
        answer.set_result(self.number)
        return answer

    def die(self):
        self.ended = True
        for answer in self.open:
            if not answer.done():
                answer.set_exception(lost())

    end = die


class Backend:
    """Starts replicas; `stillborn` of the later ones die at it, `refused` raises what a constructor would."""

    def __init__(self):
        self.made, self.stillborn, self.refused, self.slow, self.started_at = [], 0, None, {}, []

    def start(self, who, *_):
        self.made.append(Replica(len(self.made), self.slow.get(len(self.made), 1.0)))
        return self.made[-1]

    async def started(self, need, replicas, tell):
        self.started_at.append(asyncio.get_running_loop().time())
        if len(replicas) == 1 and replicas[0].number >= 2:
            if self.refused:
                raise self.refused
            if self.stillborn:
                self.stillborn -= 1
                raise lost("at its start")


def simulated(test):
    """Run `test(world)`: a pool of two, its backend and what it told."""

    def run_it(**own):
        async def main():
            backend, told = Backend(), []
            backend.slow = own.pop("slow", {})
            settings = config.Pool(**{"replicas": 2, **own})
            pool = Pool("rollout", object, settings, RolloutError, backend)
            await pool.ready(told.append)
            return await test(SimpleNamespace(pool=pool, backend=backend, told=told))

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(main())

    return run_it


def test_a_call_whose_replica_dies_is_made_elsewhere():
    @simulated
    async def run_it(world):
        call = asyncio.ensure_future(world.pool.call("generate", 1, seconds=10.0))
        await asyncio.sleep(1)
        world.backend.made[0].die()
        batch, _ = await call
        assert batch == ("batch", 1) and world.pool.retries == 1 and world.pool.members.restarts == 1
        await asyncio.sleep(1)
        assert [r.number for r in world.pool.replicas] == [1, 2] and "replica 0 of the rollout pool" in world.told[0]

    run_it()


def test_a_hung_replica_is_replaced_at_its_deadline_and_its_late_answer_counts_for_nothing():
    @simulated
    async def run_it(world):
        loop = asyncio.get_running_loop()
        hangs = world.backend.made[0]
        hangs.slow = 1000.0
        hangs.end = lambda: None  # it cannot even be ended, and answers after all
        batch, _ = await world.pool.call("generate", 1)
        assert batch[1] != 0 and 50 < loop.time() < 60 and "no answer in 50 s" in world.told[0]
        await asyncio.sleep(2000)
        assert world.pool.queue_depth == 0 and world.pool.retries == 1

    run_it(deadline_seconds=50)


def test_what_takes_replicas_down_is_quarantined_and_its_company_is_not():
    @simulated
    async def run_it(world):
        poison = world.pool.call("generate", 1, raises=lost(), seconds=5.0)
        company = [world.pool.call("generate", 1, seconds=20.0) for _ in range(3)]
        found = await asyncio.gather(poison, *company, return_exceptions=True)
        assert isinstance(found[0], Quarantined) and "took down 2 replicas" in str(found[0])
        assert all(isinstance(one, tuple) for one in found[1:]) and world.pool.members.restarts == 2

    run_it()


def test_a_failing_call_is_tried_as_often_as_it_may_be():
    @simulated
    async def run_it(world):
        error = RolloutError("out of memory")
        error.again = True
        with pytest.raises(RolloutError, match="out of memory"):
            await world.pool.call("generate", 1, raises=error)
        assert world.pool.retries == 3
        rule = RolloutError("a rule that would be broken anywhere")
        with pytest.raises(RolloutError, match="anywhere"):
            await world.pool.call("generate", 1, raises=rule)
        assert world.pool.retries == 3

    run_it(max_attempts=4)


def test_too_many_deaths_in_a_minute_end_the_run_and_later_ones_wait_longer():
    @simulated
    async def run_it(world):
        world.backend.stillborn = 100
        world.backend.made[0].die()
        with pytest.raises(RolloutError, match="5 were replaced within a minute"):
            world.backend.made[1].die()
            await world.pool.call("generate", 1)
        waits = [b - a for a, b in zip(world.backend.started_at[1:], world.backend.started_at[2:], strict=False)]
        assert len(waits) >= 3 and max(waits) >= 2.0, waits

    run_it(max_restarts_per_minute=5)


def test_a_refused_start_ends_it_at_once():
    @simulated
    async def run_it(world):
        world.backend.refused = ModelError("a model's folder is there", "gone")
        world.backend.made[0].die()
        world.backend.made[1].die()
        with pytest.raises(ModelError, match="gone"):
            await world.pool.call("generate", 1)
        assert len(world.backend.started_at) <= 3

    run_it()


def test_resizing_waits_for_nobody_and_drops_nothing():
    @simulated
    async def run_it(world):
        calls = [asyncio.ensure_future(world.pool.call("generate", 1, seconds=10.0)) for _ in range(8)]
        await asyncio.sleep(1)
        world.pool.resize(1)
        states = [own.state for own in world.pool.status().replicas]
        assert sorted(states) == ["draining", "serving"] and world.pool.status().wanted == 1
        world.pool.resize(3)
        assert len(world.pool.members.active) == 3
        found = await asyncio.gather(*calls)
        assert len(found) == 8 and world.pool.retries == 0
        await asyncio.sleep(1)
        assert len(world.pool.replicas) == 3 and world.backend.made[0].ended != world.backend.made[1].ended
        for wrong in (0, 9):
            with pytest.raises(InputError, match=f"{wrong} are asked for"):
                world.pool.resize(wrong)
        assert world.pool.members.wanted == 3

    run_it(max_replicas=8)


def test_a_replica_that_is_much_slower_than_the_others_is_replaced():
    @simulated
    async def run_it(world):
        for _ in range(40):
            await asyncio.gather(*(world.pool.call("generate", 1, seconds=1.0) for _ in range(4)))
        assert any("times as long" in said for said in world.told)
        assert 1 not in [replica.number for replica in world.pool.replicas] and len(world.pool.replicas) == 2

    run_it(slow={1: 30.0})


@pytest.mark.parametrize("spared", [0, 5])
def test_what_a_cache_answers_says_nothing_of_the_pace(spared):
    """After an answer in 10 s and many in none, a call that hangs is given up after twenty times the first; where those
    were the replica's own doing, after the least that any call has."""

    @simulated
    async def run_it(world):
        loop = asyncio.get_running_loop()
        await world.pool.call("score", 1, seconds=10.0)
        for _ in range(100):
            await world.pool.call("score", 1, seconds=0.001, spared=spared)
        start, hangs = loop.time(), world.backend.made[0]
        hangs.slow = 1e6
        await world.pool.call("score", 1)
        limit = 200 if spared else 50
        assert limit <= loop.time() - start < limit + 10

    run_it(deadline_seconds=50)


@pytest.mark.parametrize("spared", [0, 5])
def test_a_replica_that_works_is_not_slower_than_one_whose_cache_answers(spared):
    @simulated
    async def run_it(world):
        slow, quick = world.backend.made
        slow.slow = 30.0
        slow.spared, quick.spared = 0, spared
        for _ in range(40):
            await asyncio.gather(*(world.pool.call("score", 1, spared=None) for _ in range(4)))
        assert bool(world.told) == (not spared)

    run_it()


def test_a_new_replica_takes_the_published_weights_before_its_first_call():
    @simulated
    async def run_it(world):
        world.pool.publish(7, "load", 7)
        await world.pool.loaded()
        world.pool.resize(3)
        await asyncio.sleep(1)
        assert [replica.version for replica in world.backend.made] == [7, 7, 7]
        assert [own.version for own in world.pool.status().replicas] == [7, 7, 7]

    run_it()


def test_a_new_replica_adopts_what_its_peers_have_where_there_is_more_than_weights():
    @simulated
    async def run_it(world):
        seen = []

        async def adopt(newcomer, peers):
            seen.append((newcomer.number, [peer.number for peer in peers]))
            return 6

        world.pool.adopt = adopt
        world.pool.publish(7, "load", 7)
        await world.pool.loaded()
        world.pool.resize(3)
        await asyncio.sleep(1)
        assert seen == [(2, [0, 1])]
        assert world.backend.made[2].version == 7, "it goes on from the average of 6 to that of 7"

    run_it()


def test_a_pool_that_may_be_empty_starts_when_it_is_asked_and_ends_when_it_is_not():
    @simulated
    async def run_it(world):
        assert world.backend.made == []
        await world.pool.call("generate", 1)
        assert len(world.pool.replicas) == 2
        await asyncio.sleep(IDLE_SECONDS / 2)
        await world.pool.call("generate", 1)
        await asyncio.sleep(IDLE_SECONDS - 5)
        assert len(world.pool.replicas) == 2, "it has been asked meanwhile"
        await asyncio.sleep(10)
        assert world.pool.replicas == [] and all(replica.ended for replica in world.backend.made)
        await world.pool.call("generate", 1)

    run_it(min_replicas=0)


def test_the_first_replica_is_the_oldest_that_lives():
    @simulated
    async def run_it(world):
        assert await world.pool.first("who") == 0
        world.backend.made[0].ask = lambda *_: _raised(lost())
        assert await world.pool.first("who") == 1
        for replica in world.backend.made:
            if not replica.ended:
                world.pool.members.lose(_member(world.pool, replica), lost())
        assert await world.pool.first("who") > 1

    def _raised(error):
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(error)
        return answer

    def _member(pool, replica):
        return next(own for own in pool.members.here if own.replica is replica)

    run_it()
