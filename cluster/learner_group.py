"""The learner's ranks as one thing: plan a step, run it on every rank, publish, save, load, export."""

import random
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..contracts.config import Config
from ..contracts.errors import LearnerError
from ..contracts.records import Correction, StepPlan, StepReport, Term, WeightManifest
from ..learner.packing import Lengths, plan_updates
from ..learner.worker import LearnerWorker
from .flow import Shard
from .pool import peak_memory
from .room import wait_for_groups
from .runtime import end, get, make_actor, say
from .threads import threads_of


@ray.remote(num_cpus=0)
def _rendezvous() -> tuple[str, int]:
    """Address and a free port of the node this runs on.

    Rank 0 listens there some seconds later. Ports of the range from which the system takes those of outgoing
    connections are left alone: one of Ray's many could have it by then.
    """
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return ray.util.get_node_ip_address(), port
    raise LearnerError("a node has a free port for the learner's ranks", "100 of 20000-29999 are taken")


class LearnerGroup:
    """One actor per rank. `heads`: teachers whose frozen output projection the loss needs, by name; `longest`: of the
    run's sequences, in tokens."""

    def __init__(
        self,
        config: Config,
        terms: tuple[Term, ...],
        correction: Correction,
        heads: dict[str, tuple[str, str]],
        longest: int,
        tell: Callable[[str], None] = say,
    ) -> None:
        learner = self.config = config.learner
        need = {"CPU": learner.num_cpus, "GPU": learner.num_gpus}
        bundle = {name: amount for name, amount in need.items() if amount} or {"CPU": 0.001}
        self._group = placement_group([bundle] * learner.ranks, strategy="PACK")
        in_all = {name: amount * learner.ranks for name, amount in bundle.items()}
        wait_for_groups("learner", in_all, [self._group], tell)
        address, port = self.rendezvous()
        same_host = address == ray.util.get_node_ip_address()
        self.ranks: list[Any] = [
            make_actor(
                f"rank {rank} of {learner.ranks} of the learner",
                LearnerWorker,
                {"num_cpus": learner.num_cpus, "num_gpus": learner.num_gpus, "scheduling_strategy": self._bundle(rank)},
                rank=rank,
                world_size=learner.ranks,
                master_addr="127.0.0.1" if same_host and self._on_one_node() else address,
                master_port=port,
                student=config.student.model,
                heads=heads,
                config=learner,
                terms=terms,
                correction=correction,
                lora=config.student.lora,
                seed=config.seed,
                longest=longest,
                steps=config.steps,
                device="cuda" if learner.num_gpus else "cpu",
                threads=threads_of(config, learner),
            )
            for rank in range(learner.ranks)
        ]

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port of rank 0's node."""
        return get(_rendezvous.options(scheduling_strategy=self._bundle(0)).remote(), LearnerError, "learner's node")

    def _bundle(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)

    def _on_one_node(self) -> bool:
        nodes = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        return len(set(nodes.values())) == 1

    def _all(self, method: str, *args: Any) -> list[Any]:
        return get([getattr(rank, method).remote(*args) for rank in self.ranks], LearnerError, "learner")

    def ready(self) -> None:
        get([rank.started.remote() for rank in self.ranks], LearnerError, "learner")

    def start_step(self, step: int, version: int, shards: Sequence[Shard], rows: Lengths) -> list[ObjectRef]:
        """Begin a step on every rank; each gets its own plan and the same references. One report per rank."""
        plans = plan_updates(rows, len(self.ranks), self.config.tokens_per_batch, self.config.updates_per_step)
        scores = [ref for shard in shards for ref in shard.scores]
        batches = [*(s.rollouts for s in shards), *scores]
        common = {"step": step, "version": version, "rollout_batches": len(shards), "score_batches": len(scores)}
        return [
            rank.step.remote(StepPlan(updates=plan, **common), *batches)
            for rank, plan in zip(self.ranks, plans, strict=True)
        ]

    def finish_step(self, reports: list[ObjectRef]) -> list[StepReport]:
        return get(reports, LearnerError, "learner")

    def publish(self, version: int) -> tuple[WeightManifest, list[ObjectRef]]:
        """Put a version's buckets into the object store; returns its manifest and the buckets' references."""
        streams = [rank.publish.options(num_returns="streaming").remote(version) for rank in self.ranks]
        first, *_ = [list(stream) for stream in streams]  # the other ranks only take part
        *buckets, manifest = first
        return get(manifest, LearnerError, "learner"), buckets

    def restart(self) -> None:
        """Weights as the stage began, and a fresh optimizer."""
        self._all("restart")

    def save(self, folder: Path) -> None:
        self._all("save", str(folder))

    def load(self, folder: Path) -> None:
        self._all("load", str(folder))

    def export(self, folder: Path) -> None:
        self._all("export", str(folder))

    def peak_memory(self) -> int:
        """Resident bytes at their peak, summed over the ranks."""
        return sum(get([peak_memory(rank) for rank in self.ranks], LearnerError, "learner"))

    def close(self) -> None:
        for rank in self.ranks:
            end(rank)
        remove_placement_group(self._group)
