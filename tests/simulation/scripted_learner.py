"""The learner's real group, with a scripted rank: calls have their deadlines, and nothing is trained."""

import asyncio
from pathlib import Path

from scripted import LATE, Broken, World

from tutorloop.cluster.learner_group import LearnerGroup
from tutorloop.cluster.pools.calls import Pace
from tutorloop.contracts.errors import LearnerError
from tutorloop.contracts.records import StepReport


class ScriptedRank:
    """The learner's only rank: takes its time for one call after the other, or dies or hangs of it."""

    def __init__(self, world: World) -> None:
        self.world, self.dead, self.where, self.answers = world, False, "simulated", []
        self.at = 0  # steps that its weights have seen; None: it has begun anew since
        self.turn, self.tasks = asyncio.Lock(), set()
        self.group, self.ranks = None, (self,)  # as its process group knows it

    async def ready(self):
        await self.ask("started")

    async def read(self, function):
        return "host", next(self.world.groups.ports)

    def ask(self, method, *args):
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        if self.dead:
            answer.set_exception(_dead_learner())
        else:
            self.tasks.add(asyncio.ensure_future(self._answer(answer, method, args)))
        return answer

    async def _answer(self, answer, method, args):
        try:
            async with self.turn:
                value = None if self.dead else await self._do(method, *args)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # it may be late, and nobody hears it any more
        else:
            if not answer.done():
                answer.set_result(value)

    async def _do(self, method, *args):
        sending = asyncio.ensure_future(self.group.transfer(self, self.at)) if method == "broadcast" else None
        await self._works(method)
        if sending:
            return await sending
        if method in ("publish", "announce"):
            self._check(*args)
            return args[0]
        if method == "open_broadcast":
            await self.world.groups.enter(self, *args)
        elif method == "step":
            self.at = args[0].version + 1
            metrics = {"grad_norm": 1.0, "missing_scores": 0.0}
            return StepReport(loss=0.0, tokens=1, rollouts=1, seconds=0.0, metrics=metrics)
        elif method == "restart":
            self.at = None
        elif method == "load":
            self.at = int(Path(args[0]).parent.name)
        return {"bucket_layout": (), "saved": {}}.get(method)

    async def _works(self, method):
        """For a while; or it dies in the middle of it, or comes back ten days later."""
        self.world.learner_calls += 1
        number, fate = self.world.learner_calls, self.world.fate
        await asyncio.sleep(LATE if number in fate.learner_hangs else fate.delay(method))
        if number in fate.learner_deaths:
            self.die()

    def _check(self, version):
        if self.at != version and not self.dead:
            raise Broken(f"weights of {self.at} steps are published as {version}")

    async def stream(self, method, version):
        return [], await self.ask(method, version)

    def die(self):
        self.dead = True
        self._leave()
        for answer in self.answers:
            if not answer.done():
                answer.set_exception(_dead_learner())
                answer.exception()

    def _leave(self):
        if self.group:
            self.group.leave(self)

    def end(self):
        """Even what is ended may answer once more."""
        self._leave()


def _dead_learner():
    return LearnerError("the learner keeps its ranks", "scripted").as_lost()


class ScriptedLearner(LearnerGroup):
    """The learner's group with a rank that trains nothing: looks at everything that it is given."""

    def __init__(self, config, world: World, pace: Pace) -> None:
        self.world, world.rank = world, ScriptedRank(world)
        super().__init__(config, [world.rank], pace)

    @classmethod
    async def again(cls, config, world: World, pace: Pace) -> "ScriptedLearner":
        """After a death: with its first weights, until a checkpoint is loaded."""
        await asyncio.sleep(0.01)  # what is let go ends in some turns of the loop
        if world.finished_steps:
            world.before = world.trained
        world.trained, world.finished_steps = [], 0
        return cls(config, world, pace)

    async def load(self, folder):
        await super().load(folder)
        step = int(folder.parent.name)
        self.world.trained = [row for row in self.world.before or self.world.trained if row[0] < step]
        self.world.finished_steps = self.world.steps_done = step

    async def step(self, step, version, shards, rows, rate=1.0):
        trained = []
        for length, row in rows:
            shard = shards[row.batch]
            request = shard.requests[row.row]
            if length != self.world.length(request) + 10:
                raise Broken(f"{request.rollout_id} is trained as if it had {length} tokens")
            made = shard.generated.weight_version if request.source == "student" else None
            trained.append((version, request.rollout_id, made, row.advantage))
            for batch in shard.for_learner("scores"):
                if batch[1] != shard.requests:
                    raise Broken(f"{request.rollout_id} is trained with the scores of another shard")
        report = await super().step(step, version, shards, rows, rate)
        self.world.trained += trained
        self.world.finished_steps += 1
        self.world.steps_done = version + 1
        return report

    async def in_time(self, method, cost, answers):
        done = await super().in_time(method, cost, answers)
        if method in ("publish", "announce"):
            self.world.steps_done = self.world.rank.at
        return done
