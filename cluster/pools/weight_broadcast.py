"""The learner's rank 0 and every process of the rollout replicas as one group, through which the weights go."""

import asyncio

from ..learner_group import LearnerGroup
from .pool import Pool
from .ray_backend import meeting_place


class WeightBroadcast:
    """A group whose members have met."""

    def __init__(self, learner: LearnerGroup, rollouts: Pool, layout: object) -> None:
        self.learner, self.rollouts, self.layout = learner, rollouts, layout

    @classmethod
    async def join(cls, learner: LearnerGroup, rollouts: Pool, parts: int) -> "WeightBroadcast":
        """Once both sides have started. `parts`: processes of a replica."""
        first = learner.ranks[0]
        host, port = await first.read(meeting_place)
        size = 1 + parts * len(rollouts.replicas)
        joining = [first.ask("open_broadcast", port, size)]
        for i, replica in enumerate(rollouts.replicas):
            joining.append(replica.ask("join_broadcast", host, port, 1 + parts * i, size))
        await asyncio.gather(*joining)
        return cls(learner, rollouts, await first.ask("bucket_layout"))

    async def send(self, version: int) -> None:
        """Send the learner's weights; returns when the learner may train on. Replicas prove them afterwards."""
        manifest, *_ = await asyncio.gather(*(rank.ask("announce", version) for rank in self.learner.ranks))
        self.rollouts.publish(version, "receive_weights", manifest, self.layout)
        sent = asyncio.gather(*(rank.ask("broadcast") for rank in self.learner.ranks))
        await self.rollouts.failure.beside(sent)  # a replica that fails is heard meanwhile
