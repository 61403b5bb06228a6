"""The learner's ranks as one thing: plan a step, run it on every rank, publish, save, load, export."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..contracts.config import Config
from ..contracts.errors import BatchLost, LearnerError
from ..contracts.records import Correction, StepPlan, StepReport, Term, WeightManifest
from ..learner.packing import Lengths, plan_updates
from ..learner.worker import LearnerWorker
from .flow.shard import Shard
from .pools.replica import Backend, Replica
from .pools.room import Need, Tell
from .pools.threads import threads_of


class LearnerGroup:
    """One replica a rank; every call goes to all of them, since each is collective."""

    def __init__(self, config: Config, ranks: Sequence[Replica]) -> None:
        self.config, self.ranks = config.learner, ranks

    @classmethod
    async def start(
        cls,
        config: Config,
        backend: Backend,
        terms: tuple[Term, ...],
        correction: Correction,
        heads: Mapping[str, tuple[str, str]],
        longest: int,
        tell: Tell,
    ) -> "LearnerGroup":
        """Ranks that have their places, and may still be loading. `heads`: teachers whose frozen output projection the
        loss needs, by name; `longest`: of the run's sequences, in tokens."""
        learner = config.learner

        def arguments(rank: int, host: str, port: int) -> dict[str, Any]:
            return {
                "rank": rank,
                "world_size": learner.ranks,
                "master_addr": host,
                "master_port": port,
                "student": config.student.model,
                "heads": heads,
                "config": learner,
                "terms": terms,
                "correction": correction,
                "lora": config.student.lora,
                "seed": config.seed,
                "longest": longest,
                "steps": config.steps,
                "device": "cuda" if learner.num_gpus else "cpu",
                "threads": threads_of(config, learner),
            }

        return cls(config, await backend.start_ranks(LearnerWorker, need_of_learner(config), arguments, tell))

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return await asyncio.gather(*(rank.ask(method, *args) for rank in self.ranks))

    async def ready(self) -> None:
        """Once every rank has loaded. Raises what its constructor raised."""
        await asyncio.gather(*(rank.ready() for rank in self.ranks))

    async def step(self, step: int, version: int, shards: Sequence[Shard], rows: Lengths) -> StepReport:
        """One step on every rank; each gets its own plan and the same references."""
        plans = plan_updates(rows, len(self.ranks), self.config.tokens_per_batch, self.config.updates_per_step)
        scores, credits = ([b for shard in shards for b in shard.for_learner(kind)] for kind in ("scores", "credits"))
        batches = [*(shard.rollouts for shard in shards), *scores, *credits]
        counts = {"rollout_batches": len(shards), "score_batches": len(scores), "credit_batches": len(credits)}
        common = {"step": step, "version": version, **counts}
        steps = [
            rank.ask("step", StepPlan(updates=plan, **common), *batches)
            for rank, plan in zip(self.ranks, plans, strict=True)
        ]
        try:
            return (await asyncio.gather(*steps))[0]
        except BatchLost as error:  # one rank has not begun, and the others wait for it
            lost = LearnerError("the learner's batches are there until they are trained", error.found)
            lost.lost = True
            raise lost from error

    async def publish(self, version: int) -> tuple[WeightManifest, list[Any]]:
        """References to a version's buckets, and its manifest. The other ranks only take part."""
        streams = [rank.stream("publish", version) for rank in self.ranks]
        (buckets, manifest), *_ = await asyncio.gather(*streams)
        return manifest, buckets

    async def restart(self) -> None:
        """Weights as the stage began, and a fresh optimizer."""
        await self._all("restart")

    async def save(self, folder: Path) -> None:
        await self._all("save", str(folder))

    async def load(self, folder: Path) -> None:
        await self._all("load", str(folder))

    async def export(self, folder: Path) -> None:
        await self._all("export", str(folder))

    def close(self) -> None:
        for rank in reversed(self.ranks):  # rank 0 last: their places end with it
            rank.end()


def need_of_learner(config: Config) -> Need:
    """What the learner asks the cluster for."""
    learner = config.learner
    need = {"CPU": learner.num_cpus, "GPU": learner.num_gpus}
    return Need("learner", learner.ranks, {name: amount for name, amount in need.items() if amount})
