"""A pool: equal actors behind one backlog, each call going to the replica with the least outstanding cost.

Calls wait here, not at the actors, so a weight update or a new replica never stands behind a long queue. Every call
returns its payload (left in the object store) and a small `Receipt` (read by the driver). The pool measures itself:
tokens come with the receipts, busy time as it passes (busy.py).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import ObjectRef
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ..contracts import config
from ..contracts.errors import ResourceError, TutorloopError
from ..contracts.records import Receipt
from .busy import BusyTime
from .room import Need, wait_for_actors, wait_for_groups
from .runtime import end, get, make_actor, say


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a replica's method. `done(payload_ref, receipt)` runs in the driver when it has ended."""

    method: str
    args: tuple[Any, ...]
    cost: int
    done: Callable[[ObjectRef, Receipt], None]
    counted: bool = True  # in the pool's tokens; an evaluation's calls are not


class Pool:
    """Replicas of one worker class. `boundary` is the error that a lost replica becomes.

    `here`: its replicas run on the driver's node, whose files they read. `at_once`: calls that one replica works on
    side by side. With one, a second waits beside it at the replica, which takes everything in its order. With several,
    what is submitted after a broadcast waits here for its end.
    """

    def __init__(
        self,
        name: str,
        worker: type,
        pool: config.Pool,
        boundary: type[TutorloopError],
        *,
        at_once: int = 1,
        here: bool = False,
        **arguments: Any,
    ) -> None:
        self.name, self.boundary = name, boundary
        self.tokens, self.busy = 0, BusyTime(pool.replicas)
        self.errors: Counter[str] = Counter()
        self._outstanding, self._ordered = max(2, at_once), at_once == 1
        self.places = Places(pool, here)
        threads = 1 if at_once == 1 else at_once + 1
        self.replicas: list[Any] = [
            make_actor(
                f"replica {index} of {pool.replicas} of the {name} pool",
                worker,
                {"max_concurrency": threads, **place},
                **arguments,
            )
            for index, place in enumerate(self.places.options)
        ]
        self._backlog: deque[Call] = deque()
        self._in_flight: dict[ObjectRef, tuple[int, Call, ObjectRef]] = {}  # receipt → replica, call, payload
        self._acks: dict[ObjectRef, int] = {}  # unanswered broadcasts → replica

    def ready(self, tell: Callable[[str], None] = say) -> None:
        """Wait until every replica has started; its error, if it cannot, comes from here. Waiting for room is told."""
        self.places.ready(self.name, self.replicas, tell)
        get([replica.started.remote() for replica in self.replicas], self.boundary, f"{self.name} pool")

    def submit(self, call: Call) -> None:
        self._backlog.append(call)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._backlog:
            loads = [(0, 0)] * len(self.replicas)
            for replica, call, _ in self._in_flight.values():
                calls, cost = loads[replica]
                loads[replica] = (calls + 1, cost + call.cost)
            held = set() if self._ordered else set(self._acks.values())
            free = [i for i, (calls, _) in enumerate(loads) if calls < self._outstanding and i not in held]
            if not free:
                return
            index = min(free, key=lambda i: (loads[i][1], i))
            call = self._backlog.popleft()
            method = getattr(self.replicas[index], call.method).options(num_returns=2)
            payload, receipt = method.remote(*call.args)
            self._in_flight[receipt] = (index, call, payload)
            self.busy.sent(index, receipt)

    def broadcast(self, method: str, *args: Any) -> None:
        """Call every replica, after what it has in flight and before anything submitted later."""
        for index, replica in enumerate(self.replicas):
            self._acks[getattr(replica, method).remote(*args)] = index

    def call(self, replicas: Sequence[Any], method: str, *args: Any) -> None:
        """Call some replicas, behind what they have in flight, and wait for them."""
        calls = [getattr(replica, method).remote(*args) for replica in replicas]
        get(calls, self.boundary, f"{self.name} pool")

    @property
    def settled(self) -> bool:
        """No broadcast is unanswered."""
        return not self._acks

    @property
    def queue_depth(self) -> int:
        return len(self._backlog) + len(self._in_flight)

    @property
    def waiting_for(self) -> list[ObjectRef]:
        return [*self._in_flight, *self._acks]

    def collect(self, ref: ObjectRef) -> None:
        """Take a finished reference of `waiting_for`; raises what the replica raised."""
        result = get(ref, self.boundary, f"{self.name} pool")
        if ref in self._acks:
            del self._acks[ref]
            self._dispatch()
            return
        index, call, payload = self._in_flight.pop(ref)
        receipt: Receipt = result
        self.busy.done(index, ref, receipt.seconds, receipt.ended)
        if call.counted:
            self.tokens += receipt.tokens
        self.errors.update(receipt.errors)
        self._dispatch()
        call.done(payload, receipt)

    def peak_memory(self) -> int:
        """Resident bytes at their peak, summed over the replicas."""
        return sum(get([peak_memory(replica) for replica in self.replicas], self.boundary, f"{self.name} pool"))

    def least(self, figure: str) -> int:
        """The least of its replicas' engines: `context`, `largest_k`."""
        found = [
            replica.__ray_call__.remote(lambda worker: getattr(worker.engine, figure)) for replica in self.replicas
        ]
        return min(get(found, self.boundary, f"{self.name} pool"))

    def check_room(self, tokens: int) -> None:
        """Raises ResourceError where a replica's engine has no memory for a prompt and response of `tokens`."""
        context = self.least("context")
        if context < tokens:
            rule = "a replica has memory for the longest prompt and response"
            remedy = "more memory for it (num_gpus, tensor_parallel), or a shorter rollout.max_new_tokens"
            raise ResourceError(rule, f"{self.name} pool: {context} tokens; {tokens} needed", remedy)

    def close(self) -> None:
        for replica in self.replicas:
            end(replica)
        self.places.close()


def peak_memory(actor: Any) -> ObjectRef:
    """Resident bytes at their peak of an actor and the processes that it runs, as a reference."""
    return actor.__ray_call__.remote(_peak_bytes)


def _peak_bytes(_: Any) -> int:
    own, total = psutil.Process(), 0
    for process in [own, *own.children(recursive=True)]:
        with suppress(OSError, IndexError):  # it has ended meanwhile
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            total += 1024 * int(status.split("VmHWM:")[1].split()[0])
    return total


def parts_of(pool: config.Pool) -> int:
    """Parts that a replica's model is split into, each with the pool's CPUs and GPUs."""
    return pool.tensor_parallel if isinstance(pool, config.ModelPool) else 1


def need_of(name: str, pool: config.Pool, here: bool = False) -> Need:
    """What a pool asks the cluster for: the parts of a replica are on one node."""
    parts = parts_of(pool)
    each = {"CPU": pool.num_cpus * parts, "GPU": pool.num_gpus * parts}
    return Need(name, pool.replicas, {resource: amount for resource, amount in each.items() if amount}, here)


class Places:
    """Where the replicas of a pool run: `options` for the actor of each.

    A replica whose model is split needs its GPUs on one node: it gets a placement group of one bundle with all of them.
    """

    def __init__(self, pool: config.Pool, here: bool = False) -> None:
        self._each = need_of("", pool).each
        own: dict[str, Any] = {"num_cpus": self._each.get("CPU", 0), "num_gpus": self._each.get("GPU", 0)}
        if here:
            node = ray.get_runtime_context().get_node_id()
            own["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        self.options: list[dict[str, Any]] = [own] * pool.replicas
        self._groups = []
        if parts_of(pool) > 1:
            self._groups = [placement_group([dict(self._each)], strategy="STRICT_PACK") for _ in range(pool.replicas)]
            self.options = [
                {**own, "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group)}
                for group in self._groups
            ]

    def ready(self, name: str, replicas: Sequence[Any], tell: Callable[[str], None]) -> None:
        """Wait for room, telling so."""
        if self._groups:
            wait_for_groups(f"{name} pool", self._each, self._groups, tell)
        wait_for_actors(f"{name} pool", self._each, replicas, tell)

    def close(self) -> None:
        for group in self._groups:
            remove_placement_group(group)


def pump(pools: Iterable[Pool], others: Iterable[ObjectRef] = (), timeout: float = 0.5) -> None:
    """Wait a moment for anything in flight, then let the pools take what has finished."""
    owner = {ref: pool for pool in pools for ref in pool.waiting_for}
    waiting = [*owner, *others]
    if not waiting:
        return
    ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout, fetch_local=False)
    if ready:
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
    for ref in ready:
        if ref in owner:
            owner[ref].collect(ref)
