"""A pool: equal actors behind one backlog, each call going to the replica with the least outstanding cost.

Calls wait here, not at the actors, so a weight update or a new replica never stands behind a long queue. Every call
returns its payload (left in the object store) and a small `Receipt` (read by the driver). The pool measures itself:
tokens and busy seconds come with the receipts.
"""

import resource
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef

from ..contracts import config
from ..contracts.errors import TutorloopError
from ..contracts.records import Receipt
from .runtime import end, get

OUTSTANDING = 2  # calls at one replica: one at work, one waiting beside it


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a replica's method. `done(payload_ref, receipt)` runs in the driver when it has ended."""

    method: str
    args: tuple[Any, ...]
    cost: int
    done: Callable[[ObjectRef, Receipt], None]
    counted: bool = True  # in the pool's tokens and busy seconds; an evaluation's calls are not


class Pool:
    """Replicas of one worker class. `boundary` is the error that a lost replica becomes."""

    def __init__(
        self, name: str, worker: type, pool: config.Pool, boundary: type[TutorloopError], **arguments: Any
    ) -> None:
        self.name, self.boundary = name, boundary
        self.tokens, self.busy_seconds = 0, 0.0
        self.errors: Counter[str] = Counter()
        actor = ray.remote(worker).options(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)
        self.replicas: list[Any] = [actor.remote(**arguments) for _ in range(pool.replicas)]
        self._backlog: deque[Call] = deque()
        self._in_flight: dict[ObjectRef, tuple[int, Call, ObjectRef]] = {}  # receipt → replica, call, payload
        self._acks: set[ObjectRef] = set()

    def ready(self) -> None:
        """Wait until every replica has started; its error, if it cannot, comes from here."""
        get([replica.__ray_ready__.remote() for replica in self.replicas], self.boundary, f"{self.name} pool")

    def submit(self, call: Call) -> None:
        self._backlog.append(call)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._backlog:
            loads = [(0, 0)] * len(self.replicas)
            for replica, call, _ in self._in_flight.values():
                calls, cost = loads[replica]
                loads[replica] = (calls + 1, cost + call.cost)
            free = [index for index, (calls, _) in enumerate(loads) if calls < OUTSTANDING]
            if not free:
                return
            index = min(free, key=lambda i: (loads[i][1], i))
            call = self._backlog.popleft()
            method = getattr(self.replicas[index], call.method).options(num_returns=2)
            payload, receipt = method.remote(*call.args)
            self._in_flight[receipt] = (index, call, payload)

    def broadcast(self, method: str, *args: Any) -> None:
        """Call every replica, after what it has in flight and before anything submitted later."""
        self._acks |= {getattr(replica, method).remote(*args) for replica in self.replicas}

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
            self._acks.remove(ref)
            return
        _, call, payload = self._in_flight.pop(ref)
        receipt: Receipt = result
        if call.counted:
            self.tokens += receipt.tokens
            self.busy_seconds += receipt.seconds
        self.errors.update(receipt.errors)
        self._dispatch()
        call.done(payload, receipt)

    def peak_memory(self) -> int:
        """Resident bytes at their peak, summed over the replicas."""
        return sum(get([peak_memory(replica) for replica in self.replicas], self.boundary, f"{self.name} pool"))

    def close(self) -> None:
        for replica in self.replicas:
            end(replica)


def peak_memory(actor: Any) -> ObjectRef:
    """An actor's resident bytes at their peak, as a reference."""
    return actor.__ray_call__.remote(lambda _: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def torch_placement(pool: config.Pool) -> dict[str, Any]:
    """Where a replica's model runs, and on how many threads: its whole CPUs, at least one."""
    return {"device": "cuda" if pool.num_gpus else "cpu", "threads": max(1, int(pool.num_cpus))}


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
