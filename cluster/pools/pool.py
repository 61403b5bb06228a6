"""A pool: equal replicas behind one backlog, each call going to the replica with the least outstanding cost.

Calls wait here, not at the replicas, so a weight update or a new replica never stands behind a long queue. Weights are
a state and no event: the pool knows which version was published, and a replica gets calls only while it holds that one.
The pool measures itself: tokens come with the receipts, busy time as it passes (busy.py).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...contracts import config
from ...contracts.errors import ResourceError, TutorloopError
from .busy import BusyTime
from .failure import Failure
from .replica import Backend, Replica
from .room import Need, say


@dataclass(slots=True, eq=False)
class Member:
    """A replica as its pool sees it: what it has in flight, and the weights that it has proved."""

    number: int
    replica: Replica
    calls: int = 0
    cost: int = 0
    version: int | None = None
    loading: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call that waits for a replica, or is being answered."""

    method: str
    arguments: Mapping[str, Any]
    cost: int
    counted: bool
    answer: asyncio.Future[tuple[Any, Any]]


class Pool:
    """Replicas of one worker class. A lost replica is an `error_type`.

    `concurrent_calls`: those that one replica works on side by side. With one, a second waits beside it at the replica.
    `on_driver_node`: its replicas read files of the driver's node.
    """

    def __init__(
        self,
        name: str,
        worker: type,
        settings: config.Pool,
        error_type: type[TutorloopError],
        backend: Backend,
        *,
        concurrent_calls: int = 1,
        on_driver_node: bool = False,
        **arguments: Any,
    ) -> None:
        self.name, self.backend, self.need = name, backend, need_of(name, settings, on_driver_node)
        self.tokens, self.busy = 0, BusyTime(settings.replicas)
        self.errors: Counter[str] = Counter()
        self.version: int | None = None  # of the weights that were published
        self._taking_in: tuple[str, tuple[Any, ...]] = ("", ())  # how a replica gets that version
        self.failure = Failure()
        self._most_calls = max(2, concurrent_calls)
        self._members: list[Member] = []
        for number in range(settings.replicas):
            who = f"replica {number} of {settings.replicas} of the {name} pool"
            self._members.append(
                Member(number, backend.start(who, worker, error_type, self.need, concurrent_calls, arguments))
            )
        self._backlog: deque[Call] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loads: set[asyncio.Task[None]] = set()

    @property
    def replicas(self) -> list[Replica]:
        return [member.replica for member in self._members]

    async def ready(self, tell: Callable[[str], None] = say) -> None:
        """Once every replica has started; its error, if it cannot, comes from here. Waiting for room is told."""
        await self.backend.started(self.need, self.replicas, tell)

    # ---- calls ----

    async def call(self, method: str, cost: int, *, counted: bool = True, **arguments: Any) -> tuple[Any, Any]:
        """A reference to the batch that a replica's method made, and its receipt. `counted` in the pool's tokens."""
        call = Call(method, arguments, cost, counted, asyncio.get_running_loop().create_future())
        self._backlog.append(call)
        self._dispatch()
        return await self.failure.beside(call.answer)

    def _dispatch(self) -> None:
        """Begin as many calls as replicas are free, the first first."""
        while self._backlog:
            free = [m for m in self._members if m.calls < self._most_calls and m.version == self.version]
            if not free:
                return
            call = self._backlog.popleft()
            if not call.answer.done():  # else nobody waits for it any more
                self._begin(min(free, key=lambda member: member.cost), call)

    def _begin(self, member: Member, call: Call) -> None:
        member.calls, member.cost = member.calls + 1, member.cost + call.cost
        self.busy.sent(member.number, call)
        self._keep(self._end(member, call, *member.replica.call(call.method, call.arguments)), self._tasks)

    async def _end(self, member: Member, call: Call, batch: Any, receipt: Any) -> None:
        """Count an answer when it is there, and pass it on to whoever still waits for it."""
        try:
            found = await receipt
        except Exception as error:
            self.busy.done(member.number, call, 0.0, time.time())
            if not call.answer.done():
                call.answer.set_exception(error)
        else:
            self.busy.done(member.number, call, found.seconds, found.ended)
            self.tokens += found.tokens if call.counted else 0
            self.errors.update(found.errors)
            if not call.answer.done():
                call.answer.set_result((batch, found))
        member.calls, member.cost = member.calls - 1, member.cost - call.cost
        self._dispatch()

    @property
    def queue_depth(self) -> int:
        return len(self._backlog) + sum(member.calls for member in self._members)

    def _keep(self, work: Any, tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)  # asyncio itself holds no reference
        task.add_done_callback(tasks.discard)

    # ---- weights ----

    def publish(self, version: int, method: str, *args: Any) -> None:
        """Have every replica take `version` in by `method(*args)`, behind what it has in flight. One that still takes
        an older version in goes on to the newest when it has."""
        self.version, self._taking_in = version, (method, args)
        for member in self._members:
            if not member.loading:
                self._load(member)

    def _load(self, member: Member) -> None:
        assert self.version is not None
        method, args = self._taking_in
        member.loading = True
        self._keep(self._loaded(member, self.version, member.replica.ask(method, *args)), self._loads)

    async def _loaded(self, member: Member, version: int, answer: Any) -> None:
        try:
            await answer
        except Exception as error:  # whoever waits for this pool hears it
            self.failure.set(error)
            return
        member.version, member.loading = version, False
        if version != self.version:
            self._load(member)
        elif all(other.version == version for other in self._members):
            self._taking_in = ("", ())  # the buckets may go
        self._dispatch()

    async def loaded(self) -> None:
        """Once every replica holds the published weights. Raises WeightsMismatch."""
        while self._loads:
            await asyncio.wait(self._loads)
        self.failure.check()

    # ---- all replicas ----

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """Call every replica, behind what it has in flight."""
        return await asyncio.gather(*(replica.ask(method, *args) for replica in self.replicas))

    async def least(self, figure: str) -> int:
        """The least of its replicas' engines: `context`, `largest_k`."""
        return min(
            await asyncio.gather(*(r.read(lambda worker: getattr(worker.engine, figure)) for r in self.replicas))
        )

    async def check_room(self, tokens: int) -> None:
        """Raises ResourceError where a replica's engine has no memory for a prompt and response of `tokens`."""
        context = await self.least("context")
        if context < tokens:
            rule = "a replica has memory for the longest prompt and response"
            remedy = "more memory for it (num_gpus, tensor_parallel), or a shorter rollout.max_new_tokens"
            raise ResourceError(rule, f"{self.name} pool: {context} tokens; {tokens} needed", remedy)

    def close(self) -> None:
        for replica in self.replicas:
            replica.end()


def parts_of(pool: config.Pool) -> int:
    """Parts that a replica's model is split into, each with the pool's CPUs and GPUs."""
    return pool.tensor_parallel if isinstance(pool, config.ModelPool) else 1


def need_of(name: str, pool: config.Pool, on_driver_node: bool = False) -> Need:
    """What a pool asks the cluster for: the parts of a replica are on one node."""
    parts = parts_of(pool)
    each = {"CPU": pool.num_cpus * parts, "GPU": pool.num_gpus * parts}
    used = {resource: amount for resource, amount in each.items() if amount}
    return Need(name, pool.replicas, used, on_driver_node, split=parts > 1)
