"""The replicas of a pool: started, replaced when they die, drained when there are too many.

A replica is `starting` until its worker has loaded, however long it waits for room, and the run goes on without it. It
then is `serving`. One that is let go is `draining` until its last call is answered. One that dies is gone, and another
is started in its place: at once, or after a while where several have died before they had answered anything.
"""

import asyncio
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from ...contracts.config import Pool as Settings
from ...contracts.errors import InputError, TutorloopError
from ...contracts.status import ReplicaState, ReplicaStatus
from .busy import BusyTime
from .calls import Call
from .failure import Failure, kept
from .replica import Backend, Replica
from .room import Need, Tell, say
from .watch import watch

MOST_BACKOFF = 30.0  # seconds
MINUTE = 60.0
LOOKED_AT = 5  # calls of each replica, by which one is compared with the others
SLOW = 5.0  # times as long as the others' slowest call


@dataclass(slots=True, eq=False)
class Member:
    """A replica as its pool sees it: its calls in flight, and the weights that it has proved."""

    number: int
    replica: Replica
    since: float  # when its state began, by the loop's clock
    state: ReplicaState = "starting"
    calls: list[Call] = field(default_factory=list)  # the oldest first
    cost: int = 0
    version: int | None = None
    loading: bool = False
    answered: int = 0
    failures: int = 0  # in a row
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=LOOKED_AT))  # seconds a unit of cost, lately

    @property
    def alone(self) -> bool:
        """Whether it works on a call that has taken a replica down, and so on no other."""
        return any(call.deaths for call in self.calls)


class Members:
    """`start(who)` begins a replica; `arrived` hears of each that serves from now on."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        need: Need,
        error_type: type[TutorloopError],
        backend: Backend,
        start: Callable[[str], Replica],
        arrived: Callable[[Member], None],
    ) -> None:
        self.name, self.settings, self.need, self.backend = name, settings, need, backend
        self.wanted = settings.replicas if settings.min_replicas else 0
        self.awake = settings.replicas  # replicas that it wants, or will once it is asked for something again
        self.busy, self.failure, self.tell = BusyTime(), Failure(), say
        self.restarts = 0
        self.here: list[Member] = []
        self._error_type, self._start, self._arrived = error_type, start, arrived
        self.now = asyncio.get_running_loop().time
        self._numbers = count()
        self._replaced: deque[float] = deque()  # when, within the last minute
        self._starts: deque[float] = deque(maxlen=LOOKED_AT)  # seconds that the last ones took to serve
        self._barren = 0  # that died before they had answered anything, in a row
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        for _ in range(self.wanted):
            self._begin()

    @property
    def serving(self) -> list[Member]:
        return [member for member in self.here if member.state == "serving"]

    @property
    def active(self) -> list[Member]:
        """Those that are to stay."""
        return [member for member in self.here if member.state != "draining"]

    @property
    def start_seconds(self) -> float:
        """That a replica takes to serve: as the fastest of the last few did, since others may have waited for room."""
        return min(self._starts, default=0.0)

    async def ready(self, tell: Tell) -> None:
        """Once all that were begun have started. Raises what the first one that cannot raised."""
        self.tell = tell
        starting = [member for member in self.here if member.state == "starting"]
        await self.backend.started(self.need, [member.replica for member in starting], tell)
        for member in starting:
            self._serve(member)
        self.watching = kept(watch(lambda: [member.replica for member in self._idle()], self._found_dead), self._tasks)

    # ---- coming ----

    def _begin(self) -> Member:
        number = next(self._numbers)
        replica = self._start(f"replica {number} of the {self.name} pool")
        self.here.append(member := Member(number, replica, self.now()))
        return member

    def _serve(self, member: Member) -> None:
        if member not in self.here:
            return  # let go meanwhile
        self._starts.append(self.now() - member.since)
        member.state, member.since = "serving", self.now()
        self.busy.joined(member.number)
        self._arrived(member)

    def _fill(self) -> None:
        """Begin as many as are missing."""
        while not self._closed and len(self.active) < self.wanted:
            try:
                member = self._begin()
            except Exception as error:  # of one in this process
                self.failure.set(error)
                return
            kept(self._arrive(member), self._tasks)

    async def _arrive(self, member: Member) -> None:
        try:
            await self.backend.started(self.need, [member.replica], self.tell)
        except InputError as error:  # another would say the same
            self.failure.set(error)
        except Exception as error:
            self.lose(member, error)
        else:
            self._serve(member)

    # ---- going ----

    def _idle(self) -> list[Member]:
        """Those from which nobody waits for an answer."""
        return [member for member in self.serving if not member.calls and not member.loading]

    def _found_dead(self, replica: Replica, error: TutorloopError) -> None:
        for member in [member for member in self._idle() if member.replica is replica]:
            self.lose(member, error)

    def lose(self, member: Member, error: Exception) -> None:
        """It has died, or counts as dead: another is started in its place."""
        if member not in self.here:
            return
        self._remove(member)
        self._barren = 0 if member.answered else self._barren + 1
        self.tell(f"replica {member.number} of the {self.name} pool is lost: {getattr(error, 'short', error)}")
        self._replace(error)

    def retire(self, member: Member, why: str) -> None:
        """It is drained, and another is started in its place."""
        self.tell(f"replica {member.number} of the {self.name} pool is replaced: {why}")
        self.drain(member)
        self._replace(self._error_type("a replica answers as the others do", why))

    def _replace(self, error: Exception) -> None:
        if self._closed or len(self.active) >= self.wanted:
            return
        while self._replaced and self.now() - self._replaced[0] >= MINUTE:
            self._replaced.popleft()
        if len(self._replaced) >= self.settings.max_restarts_per_minute:
            rule = f"the {self.name} pool keeps its replicas"
            found = f"{len(self._replaced)} were replaced within a minute; the last: {error}"
            self.failure.set(self._error_type(rule, found, "see why they end, or raise its max_restarts_per_minute"))
            return
        self._replaced.append(self.now())
        self.restarts += 1
        wait = min(MOST_BACKOFF, 2.0 ** (self._barren - 2)) if self._barren > 1 else 0.0
        kept(self._later(wait), self._tasks)

    async def _later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._fill()

    def resize(self, wanted: int) -> None:
        """Go to `wanted` replicas: the missing ones are begun, of too many those with least to do are drained."""
        self.wanted, self.awake = wanted, wanted or self.awake
        leaving = sorted(self.active, key=lambda member: (member.state == "serving", member.cost))
        for member in leaving[: max(0, len(leaving) - wanted)]:
            self.drain(member)
        self._fill()

    def drain(self, member: Member) -> None:
        """Let it go as soon as it has answered its calls and taken in what it is sent."""
        starting = member.state == "starting"
        member.state, member.since = "draining", self.now()
        if starting or not (member.calls or member.loading):
            self._remove(member)

    def _remove(self, member: Member) -> None:
        self.here.remove(member)
        self.busy.left(member.number)
        member.replica.end()

    def answered(self, member: Member, pace: float | None) -> None:
        """It has answered a call, which took `pace` seconds a unit of cost; None where a cache answered for it."""
        member.answered, member.failures = member.answered + 1, 0
        if pace is None:
            return
        member.paces.append(pace)
        others = [other.paces for other in self.serving if other is not member]
        slowest = [max(paces) for paces in others if len(paces) == LOOKED_AT]
        if len(member.paces) == LOOKED_AT and slowest and min(member.paces) > SLOW * statistics.median(slowest) > 0:
            self.retire(member, f"it takes {min(member.paces) / statistics.median(slowest):.0f} times as long")

    def settled(self, member: Member) -> None:
        """Its last call or load may be over."""
        if member.state == "draining" and not (member.calls or member.loading) and member in self.here:
            self._remove(member)

    def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for member in list(self.here):
            self._remove(member)
        self._arrived = lambda _: None  # its pool, and with it all that it holds, is let go at once

    def status(self) -> list[ReplicaStatus]:
        return [
            ReplicaStatus(
                number=member.number,
                state="loading" if member.loading and member.state == "serving" else member.state,
                seconds=self.now() - member.since,
                version=member.version,
                calls=len(member.calls),
                where=member.replica.where,
            )
            for member in list(self.here)
        ]
