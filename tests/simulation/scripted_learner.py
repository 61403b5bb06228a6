"""A scripted learner: it trains nothing, and looks at everything that it is given."""

import asyncio

from scripted import Broken, World

from tutorloop.contracts.errors import LearnerError
from tutorloop.contracts.records import StepReport


class ScriptedLearner:
    """Trains nothing, and looks at everything that it is given."""

    def __init__(self, world: World) -> None:
        self.world, self.ranks, self.group = world, [ScriptedRank(self)], None
        self.at = 0  # steps that its weights have seen; None: it has begun anew since
        self.turn = asyncio.Lock()  # it does one thing at a time

    @classmethod
    async def again(cls, world: World) -> "ScriptedLearner":
        """After a death: with its first weights, until a checkpoint is loaded."""
        await asyncio.sleep(0.01)  # what is let go ends in some turns of the loop
        world.before, world.trained = world.trained, []
        world.finished_steps = 0
        return cls(world)

    async def load(self, folder):
        step = int(folder.parent.name)
        self.world.trained = [row for row in self.world.before if row[0] < step]
        self.at = self.world.finished_steps = self.world.steps_done = step

    async def ready(self):
        await asyncio.sleep(self.world.fate.delay())

    async def _works(self):
        """For a while; or it dies in the middle of it."""
        self.world.learner_calls += 1
        dies = self.world.learner_calls in self.world.fate.learner_deaths
        await asyncio.sleep(self.world.fate.delay())
        if dies:
            self.close()
            error = LearnerError("the learner keeps its ranks", "scripted")
            error.lost = True
            raise error

    # ---- the way of weights: each gives the manifest, which is the version of what it sends ----

    async def publish(self, version):
        async with self.turn:
            await self._works()
            self._check(version)
            return version, []

    async def announce(self, version):
        manifest, _ = await self.publish(version)
        return manifest

    def _check(self, version):
        if self.at != version:
            raise Broken(f"weights of {self.at} steps are published as {version}")
        self.world.steps_done = version

    async def bucket_layout(self):
        return ()

    async def open_broadcast(self, port, size):
        async with self.turn:
            await self._works()
            await self.world.groups.enter(self, port, size)

    async def broadcast(self):
        async with self.turn:
            sending = asyncio.ensure_future(self.group.transfer(self, self.at))
            await self._works()
            await sending

    def close(self):
        if self.group:
            self.group.leave(self)

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
        async with self.turn:
            await self._works()
            self.at = version + 1
        self.world.trained += trained
        self.world.finished_steps += 1
        self.world.steps_done = version + 1
        metrics = {"grad_norm": 1.0, "missing_scores": 0.0}
        return StepReport(loss=0.0, tokens=len(rows), rollouts=len(rows), seconds=0.0, metrics=metrics)

    async def restart(self):
        await asyncio.sleep(0)
        self.at = None

    async def save(self, folder):
        await self._works()
        self.world.saved.append(self.world.steps_done)


class ScriptedRank:
    """Rank 0 of a scripted learner, as the broadcast asks it."""

    def __init__(self, learner):
        self.learner = learner

    async def read(self, function):
        return "host", next(self.learner.world.groups.ports)

    async def ask(self, method, *args):
        return await getattr(self.learner, method)(*args)
