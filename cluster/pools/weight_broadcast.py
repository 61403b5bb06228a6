"""The learner's rank 0 and every process of the rollout replicas as one group, through which the weights go.

A group is for those that met: where a replica has died or come, or the learner is another, all meet anew before the
next version is sent. A death in the middle breaks the group, and the version is sent again by the next one. A replica
that comes while the learner waits takes the version out of the object store.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from ...contracts.errors import BroadcastBroken, LearnerError, RolloutError, TutorloopError
from ...models.weight_broadcast import MEETING_SECONDS
from ..learner_group import LearnerGroup
from .members import Member
from .pool import POLL_SECONDS, Pool
from .ray_backend import meeting_place
from .replica import Replica

T = TypeVar("T")
TRIES = 5  # to send one version
PATIENCE = 300.0  # seconds until the learner hears that one of its group is gone


class WeightBroadcast:
    """Into the replicas of a pool; each is `parts` processes."""

    def __init__(self, rollouts: Pool, parts: int) -> None:
        self.rollouts, self.parts = rollouts, parts
        self._learner: LearnerGroup | None = None  # and the replicas, that met last; None once their group broke
        self._members: list[Member] = []
        self._layout: Any = None

    async def send(self, learner: LearnerGroup, version: int) -> None:
        """Send the learner's weights; returns when the learner may train on. Replicas prove them afterwards."""
        found = ""
        for _ in range(TRIES):
            try:
                await self._meet(learner)
                await self._send(learner, version)
                return
            except BroadcastBroken as error:
                self._learner, found = None, f"version {version}, {TRIES} tries; the last: {error}"
        remedy = "see why the replicas end or do not reach the learner, or set rollout.transfer=object_store"
        raise RolloutError("a broadcast reaches all its replicas", found, remedy)

    # ---- the group ----

    async def _meet(self, learner: LearnerGroup) -> None:
        """See that those that serve now, and `learner`, are one group. Raises BroadcastBroken."""
        loads = [load for member in self._members if (load := self.rollouts.loads.get(member))]
        if loads:  # the version before, or the try before
            await self.rollouts.failure.beside(asyncio.wait(loads))
        members = [member for member in self.rollouts.members.serving if not member.loading]
        if learner is self._learner and members == self._members:
            return
        self._learner, self._members = None, members
        if members:
            await self._join(learner, members)
        self._learner = learner

    async def _join(self, learner: LearnerGroup, members: Sequence[Member]) -> None:
        for member in members:
            member.version = None  # it gets no calls before it has the next version
        while not self.rollouts.side_by_side and any(member.calls for member in members):
            await self.rollouts.failure.beside(asyncio.sleep(POLL_SECONDS))  # it would not hear the others in time
        first = learner.ranks[0]
        ((host, port),) = await learner.in_time("meeting_place", 1, [first.read(meeting_place)])
        size = 1 + self.parts * len(members)
        places = [(host, port, 1 + self.parts * i, size) for i in range(len(members))]
        joining = [self._joins(member, place) for member, place in zip(members, places, strict=True)]
        for error in await asyncio.gather(_opens(first, port, size), *joining, return_exceptions=True):
            if isinstance(error, BaseException):
                raise error
        (self._layout,) = await learner.in_time("bucket_layout", 1, [first.ask("bucket_layout")])

    async def _joins(self, member: Member, place: tuple[str, int, int, int]) -> None:
        """A replica that is lost, or hangs, is replaced. Raises BroadcastBroken."""
        rule, error = "every replica meets the learner", None
        if member in self.rollouts.members.here:
            try:
                async with asyncio.timeout(2 * MEETING_SECONDS):
                    await member.replica.ask("join_broadcast", *place)
                    return
            except TimeoutError:
                error = RolloutError(rule, "no answer").as_lost()
            except TutorloopError as failed:
                error = failed
            if error.lost:
                self.rollouts.lose(member, error)
        raise BroadcastBroken(rule, error.short if error else "a replica is gone") from error

    # ---- a version ----

    async def _send(self, learner: LearnerGroup, version: int) -> None:
        """Raises BroadcastBroken."""
        manifest, *_ = await learner.in_time("announce", 1, [rank.ask("announce", version) for rank in learner.ranks])
        if any(member not in self.rollouts.members.here for member in self._members):
            raise BroadcastBroken("a group is whole when it is sent weights", "a replica was lost before")
        loads = self.rollouts.send(version, self._members, "receive_weights", manifest, self._layout)
        if not loads:
            return
        sending = [rank.ask("broadcast") for rank in learner.ranks]
        sent = asyncio.ensure_future(learner.in_time("broadcast", 1, sending))
        try:
            await self.rollouts.failure.beside(self._heard(sent, loads, version))
        finally:
            sent.cancel()

    async def _heard(self, sent: asyncio.Future[Any], loads: dict[Member, asyncio.Task[None]], version: int) -> None:
        """Once the learner has sent all. One that does not hear for long that a replica is gone counts as lost."""
        waiting: set[asyncio.Future[Any]] = {sent, *loads.values()}
        while not sent.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(load in done and member.version != version for member, load in loads.items()):
                break
        await asyncio.wait({sent}, timeout=PATIENCE)
        if not sent.done():
            raise _hangs(
                f"a replica is gone, and the broadcast of version {version} has not ended after {PATIENCE:.0f} s"
            )
        sent.result()

    # ---- those that come later ----

    async def beside(self, work: Awaitable[T], learner: LearnerGroup, version: int) -> T:
        """The result of `work`, which the driver waits for while the learner is idle and has the weights of `version`:
        replicas that lack it take it out of the object store meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                lacking = asyncio.ensure_future(self.rollouts.lacks.wait())
                await asyncio.wait({task, lacking}, return_when=asyncio.FIRST_COMPLETED)
                lacking.cancel()
                if task.done():
                    return task.result()
                self.rollouts.lacks.clear()
                if self.rollouts.lacking and self.rollouts.version == version:
                    manifest, buckets = await learner.publish(version)
                    self.rollouts.supply("load_weights", manifest, *buckets)
        finally:
            task.cancel()


async def _opens(first: Replica, port: int, size: int) -> None:
    try:
        async with asyncio.timeout(2 * MEETING_SECONDS):
            await first.ask("open_broadcast", port, size)
    except TimeoutError as error:
        raise _hangs("no answer of its meeting with the replicas") from error


def _hangs(found: str) -> LearnerError:
    return LearnerError("the learner hears that its group is broken", found, "its rank 0 hangs").as_lost()
