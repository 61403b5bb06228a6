"""The learner's ranks as one thing: plan a step, run it on every rank, publish, save, load, export."""

import asyncio
import math
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..contracts.config import Config
from ..contracts.errors import BatchLost, LearnerError
from ..contracts.records import Correction, StepPlan, StepReport, Term, WeightManifest
from ..learner.packing import Lengths, plan_updates
from ..learner.worker import LearnerWorker
from ..models.digests import Written
from .flow.shard import Shard
from .pools.calls import Pace
from .pools.failure import Failure
from .pools.replica import Backend, Replica
from .pools.room import Need, Tell
from .pools.threads import threads_of
from .pools.watch import watch

T = TypeVar("T")
REMEDY = "see where a rank of it hangs, or raise learner.deadline_seconds"
POLL_SECONDS, MOST_POLL_SECONDS = 0.1, 5.0  # for files that are being written
DEATH_SECONDS = 5.0  # within which a rank's death is known, after it has broken off what the others do


class LearnerGroup:
    """One replica a rank; every call goes to all of them, since each is collective. Ranks that wait for each other for
    ever end like one that dies, at a call's deadline: in a LearnerError that is `lost`. `pace`: of the calls so far,
    which the learner that is started in its place goes on with."""

    def __init__(self, config: Config, ranks: Sequence[Replica], pace: Pace) -> None:
        self.config, self.ranks, self._pace = config.learner, ranks, pace
        self._worked = 0.0  # seconds in which a call was made
        self._since: float | None = None  # when the one that is made now was begun

    @classmethod
    async def start(
        cls,
        config: Config,
        backend: Backend,
        terms: tuple[Term, ...],
        correction: Correction,
        heads: Mapping[str, tuple[str, str]],
        longest: int,
        pace: Pace,
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

        return cls(config, await backend.start_ranks(LearnerWorker, need_of_learner(config), arguments, tell), pace)

    async def in_time(self, method: str, cost: int, answers: Iterable[Awaitable[T]]) -> list[T]:
        """What every rank answers to a call. Raises what one of them raised, and LearnerError, `lost`, where a rank has
        died or does not answer before the deadline of such a call."""
        loop, limit = asyncio.get_running_loop(), self._pace.deadline(method, cost)
        if method == "ready" and not self._pace.knows(method):
            limit = math.inf  # a first start takes as long as its models take to load
        self._since = began = loop.time()
        ranks = [asyncio.ensure_future(answer) for answer in answers]
        try:
            await asyncio.wait(ranks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
            if error := await _error_of(ranks):
                raise error
            if not all(rank.done() for rank in ranks):
                rule, found = "the learner answers before its deadline", f"{method}: no answer in {limit:.0f} s"
                raise LearnerError(rule, found, REMEDY).as_lost()
        finally:
            self._worked, self._since = self._worked + loop.time() - began, None
            for rank in ranks:
                rank.cancel()
        self._pace.took(method, cost, loop.time() - began)
        return [rank.result() for rank in ranks]

    async def beside(self, work: Awaitable[T]) -> T:
        """The result of `work`, while nothing is asked of the ranks; what it is that one of them has died of, if so."""
        death = Failure()
        watching = asyncio.create_task(watch(lambda: self.ranks, lambda _, error: death.set(error)))
        try:
            return await death.beside(work)
        finally:
            watching.cancel()

    async def _all(self, method: str, *args: Any) -> None:
        await self.in_time(method, 1, [rank.ask(method, *args) for rank in self.ranks])

    async def ready(self) -> None:
        """Once every rank has loaded. Raises what its constructor raised."""
        await self.in_time("ready", 1, [rank.ready() for rank in self.ranks])

    async def step(
        self, step: int, version: int, shards: Sequence[Shard], rows: Lengths, rate: float = 1.0
    ) -> StepReport:
        """One step on every rank, at `rate` times its learning rate; each gets its own plan and the same references."""
        plans = plan_updates(rows, len(self.ranks), self.config.tokens_per_batch, self.config.updates_per_step)
        scores, credits = ([b for shard in shards for b in shard.for_learner(kind)] for kind in ("scores", "credits"))
        batches = [*(shard.rollouts for shard in shards), *scores, *credits]
        counts = {"rollout_batches": len(shards), "score_batches": len(scores), "credit_batches": len(credits)}
        common = {"step": step, "version": version, "rate": rate, **counts}
        steps = [
            rank.ask("step", StepPlan(updates=plan, **common), *batches)
            for rank, plan in zip(self.ranks, plans, strict=True)
        ]
        try:
            return (await self.in_time("step", sum(tokens for tokens, _ in rows), steps))[0]
        except BatchLost as error:  # one rank has not begun, and the others wait for it
            rule = "the learner's batches are there until they are trained"
            raise LearnerError(rule, error.found).as_lost() from error

    async def publish(self, version: int) -> tuple[WeightManifest, list[Any]]:
        """References to a version's buckets, and its manifest. The other ranks only take part."""
        streams = [rank.stream("publish", version) for rank in self.ranks]
        (buckets, manifest), *_ = await self.in_time("publish", 1, streams)
        return manifest, buckets

    async def restart(self) -> None:
        """Weights as the stage began, and a fresh optimizer."""
        await self._all("restart")

    async def save(self, folder: Path) -> None:
        """Begin to write a checkpoint of what is now into `folder`; `saved` hears of its end."""
        await self._all("save", str(folder))

    async def saved(self) -> Written:
        """The files that `save` has written, once all ranks have; meanwhile they may be asked for other things. Raises
        what one of them raised, and LearnerError, `lost`, as `in_time` does: for its deadline only the time counts in
        which nothing else is asked of them."""
        began, pause = self._idle_seconds(), POLL_SECONDS
        limit = self._pace.deadline("saved", 1)
        asked = self._ask_saved()
        while True:
            await asyncio.wait(asked, timeout=pause, return_when=asyncio.FIRST_EXCEPTION)
            if error := await _error_of(asked):
                raise error
            waited = self._idle_seconds() - began
            if waited > limit:
                rule = "the learner answers before its deadline"
                raise LearnerError(rule, f"saved: no answer in {limit:.0f} s", REMEDY).as_lost()
            if all(one.done() for one in asked):
                found = [one.result() for one in asked]
                whole = [own for own in found if own is not None]
                if len(whole) == len(found):
                    self._pace.took("saved", 1, waited)
                    return {name: written for own in whole for name, written in own.items()}
                await asyncio.sleep(pause)
                asked = self._ask_saved()
            pause = min(2 * pause, MOST_POLL_SECONDS)

    def _ask_saved(self) -> list[asyncio.Future[Written | None]]:
        return [asyncio.ensure_future(rank.ask("saved")) for rank in self.ranks]

    def _idle_seconds(self) -> float:
        """Since the beginning of time, without those in which a call was made."""
        now = asyncio.get_running_loop().time()
        return now - self._worked - (now - self._since if self._since is not None else 0.0)

    async def load(self, folder: Path) -> None:
        await self._all("load", str(folder))

    async def export(self, folder: Path) -> None:
        await self._all("export", str(folder))

    def close(self) -> None:
        for rank in reversed(self.ranks):  # rank 0 last: their places end with it
            rank.end()


async def _error_of(ranks: Sequence[asyncio.Future[Any]]) -> BaseException | None:
    """What a call failed with, if it did. Where a rank has died, the others often say first that a collective of theirs
    was broken off."""
    errors = _errors(ranks)
    if errors and all(getattr(error, "again", False) for error in errors):  # nobody's rule
        await asyncio.wait(ranks, timeout=DEATH_SECONDS)
        errors = _errors(ranks)
    return next((error for error in errors if getattr(error, "lost", False)), errors[0] if errors else None)


def _errors(ranks: Sequence[asyncio.Future[Any]]) -> list[BaseException]:
    return [error for rank in ranks if rank.done() and (error := rank.exception())]


def need_of_learner(config: Config) -> Need:
    """What the learner asks the cluster for."""
    learner = config.learner
    need = {"CPU": learner.num_cpus, "GPU": learner.num_gpus}
    return Need("learner", learner.ranks, {name: amount for name, amount in need.items() if amount})
