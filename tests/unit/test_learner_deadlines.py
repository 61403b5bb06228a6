"""The learner's group against scripted ranks on a virtual clock: calls that hang, ranks that die."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "simulation"))
from clock import VirtualLoop

from tutorloop.cluster.learner_group import DEATH_SECONDS, LearnerGroup
from tutorloop.cluster.pools.calls import Pace
from tutorloop.cluster.pools.pool import Pool
from tutorloop.cluster.pools.watch import WATCH_SECONDS
from tutorloop.contracts import config
from tutorloop.contracts.errors import LearnerError, NotFinite, RolloutError
from tutorloop.contracts.records import TrainRow


def lost():
    return LearnerError("the learner keeps its ranks", "killed").as_lost()


class Rank:
    """Answers `seconds` later, or raises what `raises` holds then; `dead`: any call ends in its death."""

    def __init__(self):
        self.seconds, self.raises, self.dead, self.where = 1.0, None, False, "here"

    def ask(self, method, *args):
        answer = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.0 if self.dead else self.seconds, self._answer, answer)
        return answer

    def _answer(self, answer):
        error = lost() if self.dead else self.raises
        if not answer.done():
            answer.set_exception(error) if error else answer.set_result("report")

    async def stream(self, method, *args):
        await self.ask(method, *args)
        return ["bucket"], "manifest"

    async def ready(self):
        await self.ask("started")

    def end(self):
        self.dead = True


def learner_of(ranks=2, pace=None):
    settings = SimpleNamespace(learner=config.Learner(ranks=ranks, deadline_seconds=100))
    return LearnerGroup(settings, [Rank() for _ in range(ranks)], pace or Pace(100))


def run(test):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(test())


def rows(tokens):
    return [(tokens, TrainRow(batch=0, row=0, advantage=1.0, weight=1.0))]


CALLS = {
    "step": lambda learner: learner.step(0, 0, [], rows(10)),
    "publish": lambda learner: learner.publish(1),
    "save": lambda learner: learner.save(Path("there")),
    "load": lambda learner: learner.load(Path("there")),
    "export": lambda learner: learner.export(Path("there")),
    "restart": lambda learner: learner.restart(),
    "ready": lambda learner: learner.ready(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_rank_that_hangs_is_a_lost_learner_at_the_deadline(call):
    async def test():
        learner = learner_of()
        if call == "ready":
            learner.ranks[0].seconds = 500.0
            await learner.ready()  # a first start takes as long as it takes
            learner = learner_of(pace=Pace(100))
            learner._pace.took("ready", 1, 1.0)
        began = asyncio.get_running_loop().time()
        learner.ranks[1].seconds = 10_000.0
        with pytest.raises(
            LearnerError, match=rf"{call}: no answer in 100 s\n.* raise learner.deadline_seconds"
        ) as caught:
            await CALLS[call](learner)
        assert caught.value.lost and asyncio.get_running_loop().time() == began + 100.0

    run(test)


def test_a_step_has_as_long_as_its_tokens_take_and_the_next_learner_knows():
    async def test():
        pace = Pace(100)
        first = learner_of(pace=pace)
        for rank in first.ranks:
            rank.seconds = 90.0
        await first.step(0, 0, [], rows(100))
        for tokens, seconds in ((100, 1000.0), (1000, 10_000.0)):
            again = learner_of(pace=pace)
            again.ranks[0].seconds = seconds
            await again.step(0, 0, [], rows(tokens))
        assert pace.deadline("publish", 1) == 100

    run(test)


def test_what_a_death_does_to_the_other_ranks_is_not_taken_for_the_reason():
    async def test():
        learner = learner_of(3)
        learner.ranks[0].raises = LearnerError("the learner must finish its call", "connection closed by peer")
        learner.ranks[0].raises.again = True
        learner.ranks[1].seconds = 10_000.0
        learner.ranks[2].seconds, learner.ranks[2].raises = 1.0 + DEATH_SECONDS / 2, lost()
        with pytest.raises(LearnerError, match="keeps its ranks"):
            await learner.save(Path("there"))
        learner.ranks[2].raises = None
        with pytest.raises(LearnerError, match="connection closed by peer"):
            await learner.save(Path("there"))

    run(test)


def test_what_a_rank_refuses_is_raised_at_once():
    async def test():
        learner = learner_of()
        learner.ranks[0].raises, learner.ranks[1].seconds = NotFinite("gradients are finite"), 50.0
        with pytest.raises(NotFinite):
            await learner.step(0, 0, [], rows(10))
        assert asyncio.get_running_loop().time() == 1.0

    run(test)


def test_a_rank_that_dies_between_two_calls_is_heard_by_who_waits_for_something_else():
    async def test():
        learner, loop = learner_of(), asyncio.get_running_loop()
        assert await learner.beside(asyncio.sleep(1000, "shards")) == "shards"
        loop.call_later(100, learner.ranks[1].end)
        with pytest.raises(LearnerError, match="keeps its ranks"):
            await learner.beside(asyncio.sleep(1000))
        assert loop.time() <= 1100 + WATCH_SECONDS

    run(test)


class Backend:
    def __init__(self):
        self.made = []

    def start(self, *_):
        self.made.append(Rank())
        return self.made[-1]

    async def started(self, *_): ...


def test_an_idle_replica_that_dies_is_replaced_before_anything_is_asked():
    async def test():
        backend, told = Backend(), []
        pool = Pool("rollout", object, config.Pool(replicas=3), RolloutError, backend)
        await pool.ready(told.append)
        first, second, third = backend.made
        await asyncio.sleep(WATCH_SECONDS / 2)
        first.dead = second.dead = True
        await asyncio.sleep(WATCH_SECONDS)
        assert pool.replicas == [third, *backend.made[3:]] and len(backend.made) == 5
        assert pool.members.restarts == 2 and "replica 0 of the rollout pool is lost: killed" in told[0]
        pool.close()
        third.dead = True
        await asyncio.sleep(10 * WATCH_SECONDS)
        assert pool.members.restarts == 2

    run(test)
