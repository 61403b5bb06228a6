"""The learner's real group, with a scripted rank: calls have their deadlines, and nothing is trained."""

import asyncio

from scripted import LATE, Broken, World

from tutorloop.cluster.learner_group import LearnerGroup
from tutorloop.cluster.pools.calls import Pace
from tutorloop.contracts.errors import LearnerError
from tutorloop.contracts.records import StepReport


class ScriptedRank:
    """The learner's only rank: takes its time for each call, or dies or hangs of it."""

    def __init__(self, world: World) -> None:
        self.world, self.dead, self.where, self.answers = world, False, "simulated", []

    async def ready(self):
        await self.ask("started")

    def ask(self, method, *args):
        world, loop = self.world, asyncio.get_running_loop()
        answer = loop.create_future()
        self.answers.append(answer)
        if self.dead:
            answer.set_exception(_dead_learner())
            return answer
        world.learner_calls += 1
        hangs, dies = (world.learner_calls in fate for fate in (world.fate.learner_hangs, world.fate.learner_deaths))
        end = self.die if dies else lambda: answer.done() or answer.set_result(_report(method))
        loop.call_later(LATE if hangs else world.fate.delay(), end)
        return answer

    async def stream(self, method, version):
        await self.ask(method, version)
        return [], version

    def die(self):
        self.dead = True
        for answer in self.answers:
            if not answer.done():
                answer.set_exception(_dead_learner())

    def end(self):
        """Even what is ended may answer once more."""


def _report(method):
    metrics = {"grad_norm": 1.0, "missing_scores": 0.0}
    return StepReport(loss=0.0, tokens=1, rollouts=1, seconds=0.0, metrics=metrics) if method == "step" else None


def _dead_learner():
    error = LearnerError("the learner keeps its ranks", "scripted")
    error.lost = True
    return error


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
        self.world.trained = [row for row in self.world.before if row[0] < step]
        self.world.finished_steps = self.world.steps_done = step

    async def step(self, step, version, shards, rows):
        trained = []
        for length, row in rows:
            shard = shards[row.batch]
            request = shard.requests[row.row]
            if length != self.world.length(request) + 10:
                raise Broken(f"{request.rollout_id} is trained as if it had {length} tokens")
            made = shard.generated.weight_version if request.source == "student" else None
            trained.append((version, request.rollout_id, made, row.advantage))
            for batch in shard.for_learner("scores"):
                if batch[1] is not shard.requests:
                    raise Broken(f"{request.rollout_id} is trained with the scores of another shard")
        report = await super().step(step, version, shards, rows)
        self.world.trained += trained
        self.world.finished_steps += 1
        self.world.steps_done = version + 1
        return report

    async def publish(self, version):
        published = await super().publish(version)
        self.world.steps_done = version
        return published

    async def save(self, folder):
        await super().save(folder)
        self.world.saved.append(self.world.steps_done)
