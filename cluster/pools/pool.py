"""A pool: equal replicas behind one backlog, each call going to the replica with the least outstanding cost.

Calls wait here, not at the replicas, so a weight update or a new replica never stands behind a long queue. Weights are
a state and no event: the pool knows which version was published, and a replica gets calls only while it holds that one.
So a new replica (members.py) needs no way of its own. A call whose replica is lost, or that is not answered in time, is
made again elsewhere. The pool measures itself: tokens come with the receipts, busy time as it passes (busy.py).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...contracts import config
from ...contracts.errors import BroadcastBroken, InputError, Quarantined, ResourceError, TutorloopError
from ...contracts.status import PoolStatus
from .calls import Call, Pace
from .failure import kept
from .members import Member, Members
from .replica import Backend, Replica
from .room import Need, Tell, say

UNPUBLISHED = -1  # the version of weights that are still to come
MOST_DEATHS = 2  # of replicas, for one call
FAILURES = 3  # in a row, after which a replica is replaced
POLL_SECONDS = 0.1  # for a replica that starts
IDLE_SECONDS = 60.0  # after which a pool that may have no replicas has none

Adopt = Callable[[Replica, Sequence[Replica]], Awaitable[int | None]]


class Pool:
    """Replicas of one worker class. A lost replica is an `error_type`.

    `concurrent_calls`: those that one replica works on side by side. With one, a second waits beside it at the replica.
    `on_driver_node`: its replicas read files of the driver's node. `adopt`: how a new replica comes by what it cannot
    take from one published version alone (an average of them): given it and its peers, the version that it then holds.
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
        self.name, self.settings, self.need = name, settings, need_of(name, settings, on_driver_node)
        self.tokens, self.retries = 0, 0
        self.errors: Counter[str] = Counter()
        self.version: int | None = None  # of the weights that were published
        self.adopt: Adopt | None = None
        self.loads: dict[Member, asyncio.Task[None]] = {}  # of replicas that take weights in
        self.lacks = asyncio.Event()  # a replica lacks the published weights, and has no way to get them yet
        self.side_by_side = concurrent_calls > 1
        self._taking_in: tuple[str, tuple[Any, ...]] | None = None  # how a replica gets that version
        self._error_type, self._most_calls = error_type, max(2, concurrent_calls)
        self._pace, self._used = Pace(settings.deadline_seconds), 0.0
        self._backlog: deque[Call] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

        def start(who: str) -> Replica:
            return backend.start(who, worker, error_type, self.need, concurrent_calls, arguments)

        self.members = Members(name, settings, self.need, error_type, backend, start, self._arrived)
        self.busy, self.failure = self.members.busy, self.members.failure

    @property
    def replicas(self) -> list[Replica]:
        """Those that serve."""
        return [member.replica for member in self.members.serving]

    async def ready(self, tell: Tell = say) -> None:
        """Once every replica has started; its error, if it cannot, comes from here. Waiting for room is told, and later
        what becomes of replicas."""
        await self.members.ready(tell)

    def _arrived(self, member: Member) -> None:
        self._take_newest(member, new=True)
        self._dispatch()

    # ---- calls ----

    async def call(self, method: str, cost: int, *, counted: bool = True, **arguments: Any) -> tuple[Any, Any]:
        """A reference to the batch that a replica's method made, and its receipt. `counted` in the pool's tokens.

        Raises Quarantined once two replicas have died of the call, BatchLost where what it was to read is
        gone, and what it failed with at its last attempt.
        """
        loop = asyncio.get_running_loop()
        call = Call(method, arguments, cost, counted, loop.create_future(), loop.time())
        self._backlog.append(call)
        if not self.members.wanted:
            self.members.resize(self.members.awake)
        self._dispatch()
        return await self.failure.beside(call.answer)

    def _dispatch(self) -> None:
        """Begin as many calls as replicas are free, the first first."""
        while self._backlog:
            call = self._backlog[0]
            member = None if call.answer.done() else self._free_for(call)  # done: nobody waits for it any more
            if member is None and not call.answer.done():
                return
            self._backlog.popleft()
            if member:
                self._begin(member, call)

    def _free_for(self, call: Call) -> Member | None:
        """The least laden replica that has room; for a call that took one down, a replica with nothing else."""
        most = 1 if call.deaths else self._most_calls
        best = None
        for member in self.members.here:
            fits = member.state == "serving" and len(member.calls) < most and member.version == self.version
            if fits and (best is None or member.cost < best.cost) and not member.alone:
                best = member
        return best

    def _begin(self, member: Member, call: Call) -> None:
        call.attempts += 1
        member.calls.append(call)
        member.cost += call.cost
        self.busy.sent(member.number, call)
        kept(self._end(member, call, *member.replica.call(call.method, call.arguments)), self._tasks)

    async def _end(self, member: Member, call: Call, batch: Any, receipt: Any) -> None:
        """Count an answer when it is there, and pass it on to whoever still waits for it."""
        loop = asyncio.get_running_loop()
        sent, cost, limit = loop.time(), member.cost, self._pace.deadline(call.method, member.cost)
        late = loop.call_later(limit, self._late, member, call, limit)
        try:
            found = await receipt
        except Exception as error:
            if call in member.calls:
                self._failed(member, call, error)
        else:
            if self._settle(member, call, found):  # else it was made again elsewhere, and counts there
                if not found.spared:
                    self._pace.took(call.method, cost, loop.time() - sent)
                self.members.answered(member, None if found.spared else found.seconds / max(1, call.cost))
                self.tokens += found.tokens if call.counted else 0
                self.errors.update(found.errors)
                if not call.answer.done():
                    call.answer.set_result((batch, found))
        late.cancel()
        self.members.settled(member)
        self._idle()
        self._dispatch()

    def _settle(self, member: Member, call: Call, found: Any = None) -> bool:
        """The call is over there. Whether it still was that replica's."""
        if call not in member.calls:
            return False
        member.calls.remove(call)
        member.cost -= call.cost
        self.busy.done(member.number, call, *((found.seconds, found.ended) if found else (0.0, time.time())))
        return True

    def _late(self, member: Member, call: Call, limit: float) -> None:
        if call in member.calls:
            rule = "a call is answered before its deadline"
            self.lose(member, self._error_type(rule, f"{call.method}: no answer in {limit:.0f} s", "its replica hangs"))

    def _failed(self, member: Member, call: Call, error: Exception) -> None:
        """The replica raised, or has died."""
        if getattr(error, "lost", False):
            self.lose(member, error)
            return
        self._settle(member, call)
        again = getattr(error, "again", False)
        member.failures += 1
        if again and member.failures >= FAILURES and member.state == "serving" and len(self.members.serving) > 1:
            self.members.retire(member, f"it failed {FAILURES} times in a row: {getattr(error, 'short', error)}")
        self._again(call, error, again)

    def lose(self, member: Member, error: Exception) -> None:
        """A replica is gone, and what it worked on is asked for elsewhere."""
        calls, member.calls = member.calls, []
        self.members.lose(member, error)
        if load := self.loads.get(member):
            load.cancel()
        for call in reversed(calls):  # each comes before what waits
            call.deaths += 1
            self._again(call, error, True)
        self._dispatch()

    def _again(self, call: Call, error: Exception, again: bool) -> None:
        """Make a call once more, where that may help and is allowed."""
        if call.answer.done():
            return
        if call.deaths >= MOST_DEATHS:
            found = f"{call.method} took down {call.deaths} replicas of the {self.name} pool; the last: {error}"
            call.answer.set_exception(Quarantined("a call leaves its replica alive", found))
        elif again and call.attempts < self.settings.max_attempts:
            self.retries += 1
            self._backlog.appendleft(call)
        else:
            call.answer.set_exception(error)

    @property
    def queue_depth(self) -> int:
        return len(self._backlog) + sum(len(member.calls) for member in self.members.here)

    # ---- size ----

    def check_size(self, wanted: int) -> None:
        """Raises InputError where the pool may not have `wanted` replicas."""
        least, most = self.settings.min_replicas, self.settings.max_replicas
        if not least <= wanted <= (wanted if most is None else most):
            rule = f"the {self.name} pool has at least {least}" + ("" if most is None else f" and at most {most}")
            raise InputError(f"{rule} replicas", f"{wanted} are asked for", "set its min_replicas and max_replicas")

    def resize(self, wanted: int) -> None:
        """Go to `wanted` replicas while calls are in flight: nobody waits for those that come, and those that go answer
        their calls first. Raises InputError."""
        self.check_size(wanted)
        self.members.resize(wanted)
        self._dispatch()

    def renew(self) -> None:
        """Have other replicas in place of all that there are, which begin anew."""
        wanted = self.members.wanted
        self.withdraw()
        self.members.resize(0)
        self.members.resize(wanted)

    def _idle(self) -> None:
        """A pool that may have no replicas lets them go once nothing has been asked of it for a while."""
        if self.settings.min_replicas or self.queue_depth:
            return
        loop = asyncio.get_running_loop()
        self._used = used = loop.time()
        loop.call_later(IDLE_SECONDS, lambda: self._sleep(used))

    def _sleep(self, used: float) -> None:
        if used == self._used and not self.queue_depth:
            self.members.resize(0)

    def status(self) -> PoolStatus:
        now = self.members.now()
        calls = [*self._backlog, *(call for member in self.members.here for call in member.calls)]
        return PoolStatus(
            name=self.name,
            wanted=self.members.wanted,
            least=self.settings.min_replicas,
            most=self.settings.max_replicas,
            replicas=self.members.status(),
            waiting=len(self._backlog),
            oldest_seconds=now - min((call.asked for call in calls), default=now),
            restarts=self.members.restarts,
            retries=self.retries,
        )

    # ---- weights ----

    def publish(self, version: int, method: str, *args: Any) -> None:
        """Have every replica take `version` in by `method(*args)`, behind what it has in flight. One that still takes
        an older version in goes on to the newest when it has; one that comes later takes it in first of all."""
        self.version, self._taking_in = version, (method, args)
        for member in self.members.serving:
            if not member.loading:
                self._load(member, self._taking_in)

    def send(
        self, version: int, members: Sequence[Member], method: str, *args: Any
    ) -> dict[Member, asyncio.Task[None]]:
        """As `publish`, to `members` alone, and once: their loads. Others lack the version until `supply`."""
        self.version, self._taking_in = version, None
        for member in members:
            self._load(member, (method, args))
        return {member: self.loads[member] for member in members}

    def supply(self, method: str, *args: Any) -> None:
        """Have all that lack the published version, or come later, take it in by `method(*args)`."""
        self._taking_in = (method, args)
        for member in self.lacking:
            self._load(member, self._taking_in)

    @property
    def lacking(self) -> list[Member]:
        """Those that serve, and neither hold the published version nor take any in."""
        published = self.version not in (None, UNPUBLISHED)
        return [m for m in self.members.serving if published and not m.loading and m.version != self.version]

    def _take_newest(self, member: Member, new: bool = False) -> None:
        """A replica has come, or a load of its is over: on to what was published last."""
        if member.state != "serving":
            return
        if self._taking_in and member.version != self.version:
            self._load(member, self._taking_in, new)
        elif member in self.lacking:
            self.lacks.set()

    def _load(self, member: Member, taking_in: tuple[str, tuple[Any, ...]], new: bool = False) -> None:
        assert self.version is not None
        method, args = taking_in
        member.loading, member.version = True, None  # it holds none until it has proved them
        adopts = new and self.adopt
        if adopts:
            answer = adopts(
                member.replica, [other.replica for other in self.members.serving if other.version is not None]
            )
        else:
            answer = member.replica.ask(method, *args)
        load = asyncio.create_task(self._loaded(member, self.version, answer, bool(adopts)))
        self.loads[member] = load
        load.add_done_callback(lambda _: self.loads.get(member) is load and self.loads.pop(member))

    async def _loaded(self, member: Member, version: int, answer: Awaitable[Any], adopts: bool) -> None:
        loop, limit = asyncio.get_running_loop(), self._pace.deadline("load", 1)
        rule, found = "a replica takes weights in before its deadline", f"version {version}: no answer in {limit:.0f} s"
        late = loop.call_later(limit + self._pace.least, self.lose, member, self._error_type(rule, found))
        sent = loop.time()
        try:
            held = await answer
        except Exception as error:  # whoever waits for this pool hears it, unless another replica can take its place
            if getattr(error, "lost", False):
                self.lose(member, error)
            elif isinstance(error, BroadcastBroken):
                member.loading = False
                self._settled(member)
            elif member in self.members.here:
                self.failure.set(error)
            return
        finally:
            late.cancel()
        self._pace.took("load", 1, loop.time() - sent)
        member.version, member.loading = (held if adopts else version), False
        self._settled(member)

    def _settled(self, member: Member) -> None:
        if member in self.members.here:
            self._take_newest(member)
        self.members.settled(member)
        self._dispatch()

    def withdraw(self) -> None:
        """The published weights count no more: nothing is called until others are published."""
        self.version, self._taking_in = UNPUBLISHED, None

    async def loaded(self) -> None:
        """Once every replica that serves holds the published weights. Raises WeightsMismatch."""
        while self.loads:
            await asyncio.wait(set(self.loads.values()))
        self.failure.check()

    # ---- all replicas ----

    async def ask(self, method: str, *args: Any) -> list[Any]:
        """Call every replica, behind what it has in flight."""
        return await asyncio.gather(*(replica.ask(method, *args) for replica in self.replicas))

    async def first(self, method: str, *args: Any) -> Any:
        """Call one replica, of several always the oldest; where it is lost, the next."""
        for attempt in range(1, self.settings.max_attempts + 1):
            while not self.members.serving:
                await self.failure.beside(asyncio.sleep(POLL_SECONDS))
            member = self.members.serving[0]
            try:
                return await self.failure.beside(member.replica.ask(method, *args))
            except TutorloopError as error:
                if not error.lost or attempt == self.settings.max_attempts:
                    raise
                self.lose(member, error)
        raise AssertionError("max_attempts is 1 at least")

    async def least(self, figure: str) -> int:
        """The least of its replicas' engines: `context`, `largest_k`. Of a pool that has a replica."""
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
        self.members.close()


def parts_of(pool: config.Pool) -> int:
    """Parts that a replica's model is split into, each with the pool's CPUs and GPUs."""
    return pool.tensor_parallel if isinstance(pool, config.ModelPool) else 1


def need_of(name: str, pool: config.Pool, on_driver_node: bool = False) -> Need:
    """What a pool asks the cluster for: the parts of a replica are on one node."""
    parts = parts_of(pool)
    each = {"CPU": pool.num_cpus * parts, "GPU": pool.num_gpus * parts}
    used = {resource: amount for resource, amount in each.items() if amount}
    return Need(name, pool.replicas, used, on_driver_node, split=parts > 1)
