"""The learner's rank 0 and every process of the rollout replicas as one group, through which the weights go."""

from collections.abc import Sequence

import ray

from ..contracts.errors import LearnerError
from .learner_group import LearnerGroup
from .pool import Pool, pump
from .runtime import get


class WeightBroadcast:
    """Built once both sides have started. `parts`: processes of a replica."""

    def __init__(self, learner: LearnerGroup, rollouts: Pool, parts: int) -> None:
        self.learner, self.rollouts = learner, rollouts
        host, port = learner.rendezvous()
        size = 1 + parts * len(rollouts.replicas)
        joining = [learner.ranks[0].open_broadcast.remote(port, size)]
        for i, replica in enumerate(rollouts.replicas):
            joining.append(replica.join_broadcast.remote(host, port, 1 + parts * i, size))
        get(joining, LearnerError, "weights' broadcast")
        self.layout = get(learner.ranks[0].bucket_layout.remote(), LearnerError, "learner")

    def send(self, version: int, pools: Sequence[Pool]) -> None:
        """Send the learner's weights; returns when the learner may train on. Replicas prove them afterwards."""
        manifest, *_ = get([rank.announce.remote(version) for rank in self.learner.ranks], LearnerError, "learner")
        self.rollouts.broadcast("receive_weights", manifest, self.layout)
        sends = [rank.broadcast.remote() for rank in self.learner.ranks]
        pending = sends
        while pending:  # a replica that fails is heard meanwhile
            pump(pools, pending)
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
            get(done, LearnerError, "learner")
