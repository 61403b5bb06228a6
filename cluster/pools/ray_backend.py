"""Replicas as actors on a Ray cluster, batches in its object store; Ray's failures as errors named after the pool."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ...contracts.errors import BatchLost, LearnerError, RolloutError, TutorloopError
from ...contracts.receipts import Receipt
from .deaths import ActorState, first_line, obituary, tail_of
from .ports import free_port
from .replica import Replica
from .room import Need, Tell, check_room, free, wait_for_actors, wait_for_groups

names: dict[str, str] = {}  # actor id → what it is called: replica 1 of 2 of the rollout pool


class RayReplica:
    """An actor, and the placement group that ends with it."""

    def __init__(self, actor: Any, error_type: type[TutorloopError], who: str, group: PlacementGroup | None) -> None:
        self.actor: Any = actor
        self.group, self.where = group, ""
        self._error_type, self._who = error_type, who

    @property
    def dead(self) -> bool:
        """As the head has told this process, which holds the actor's handle."""
        return self.actor is not None and self.actor._get_local_state() == ActorState.DEAD

    def ready(self) -> Awaitable[None]:
        return self.ask("started")

    def call(self, method: str, arguments: Mapping[str, Any]) -> tuple[ObjectRef, Awaitable[Receipt]]:
        batch, receipt = getattr(self.actor, method).options(num_returns=2).remote(**arguments)
        return batch, self._answer(receipt)

    def ask(self, method: str, *args: Any) -> Awaitable[Any]:
        return self._answer(getattr(self.actor, method).remote(*args))

    def read(self, function: Callable[[Any], Any]) -> Awaitable[Any]:
        return self._answer(self.actor.__ray_call__.remote(function))

    async def stream(self, method: str, *args: Any) -> tuple[list[ObjectRef], Any]:
        found = getattr(self.actor, method).options(num_returns="streaming").remote(*args)
        refs = [ref async for ref in found]
        return refs[:-1], await self._answer(refs[-1]) if refs else None

    def end(self) -> None:
        """And let go of the handle, while the Ray that it is of still stands."""
        if self.actor is None:
            return
        ray.kill(self.actor)
        if self.group:
            remove_placement_group(self.group)
        self.actor = self.group = None

    def _answer(self, ref: ObjectRef) -> asyncio.Future[Any]:
        return _answer(ref, self._error_type, self._who)


class RayBackend:
    """See replica.py: Backend."""

    put = staticmethod(ray.put)
    check_room = staticmethod(check_room)
    free = staticmethod(free)

    def __init__(self) -> None:
        self._tasks: asyncio.Semaphore | None = None

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """As many at once as Ray keeps workers for them, one a CPU: a worker that it has to start costs a second."""
        if self._tasks is None:
            self._tasks = asyncio.Semaphore(max(1, int(ray.cluster_resources().get("CPU", 1))))
        async with self._tasks:
            return await _answer(_task(function).remote(*args), RolloutError, "task")

    def make(self, function: Callable[..., Any], *args: Any) -> ObjectRef:
        return _task(function).remote(*args)

    def start(
        self,
        who: str,
        worker: type,
        error_type: type[TutorloopError],
        need: Need,
        concurrent_calls: int,
        arguments: dict[str, Any],
    ) -> RayReplica:
        """A replica whose model is split gets a placement group of one bundle: its GPUs are on one node."""
        group = placement_group([dict(need.each)], strategy="STRICT_PACK") if need.split else None
        strategy = PlacementGroupSchedulingStrategy(group) if group else None
        if need.on_driver_node:
            strategy = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = _resources(need) | ({"scheduling_strategy": strategy} if strategy else {})
        options["max_concurrency"] = 1 if concurrent_calls == 1 else concurrent_calls + 1  # a weight update beside them
        return RayReplica(_make_actor(who, worker, options, arguments), error_type, f"{need.pool} pool", group)

    async def started(self, need: Need, replicas: Sequence[Replica], tell: Tell) -> None:
        own = [replica for replica in replicas if isinstance(replica, RayReplica)]
        if groups := [replica.group for replica in own if replica.group]:
            await wait_for_groups(f"{need.pool} pool", need.each, groups, tell)
        await wait_for_actors(f"{need.pool} pool", need.each, [replica.actor for replica in own], tell)
        for replica, where in zip(own, await asyncio.gather(*(replica.ask("started") for replica in own)), strict=True):
            replica.where = where

    async def start_ranks(
        self, worker: type, need: Need, arguments: Callable[[int, str, int], dict[str, Any]], tell: Tell
    ) -> list[RayReplica]:
        """One placement group with a bundle a rank, as close together as there is room."""
        group = placement_group([dict(need.each) or {"CPU": 0.001}] * need.replicas, strategy="PACK")
        places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(need.replicas)]
        try:
            host, port = await _meeting_of(group, places[0], need, tell)
        except BaseException:  # a node died meanwhile, or nobody waits any more
            remove_placement_group(group)
            raise
        ranks = []
        for rank, place in enumerate(places):
            who = f"rank {rank} of {need.replicas} of the learner"
            options = _resources(need) | {"scheduling_strategy": place}
            actor = _make_actor(who, worker, options, arguments(rank, host, port))
            ranks.append(RayReplica(actor, LearnerError, "learner", None if rank else group))
        return ranks

    async def peak_memory(self, replicas: Mapping[str, Sequence[Replica]]) -> dict[str, int]:
        """Of each living actor and the processes that it runs."""
        found = {}
        for name, own in replicas.items():
            read = await asyncio.gather(*(replica.read(_peak_bytes) for replica in own), return_exceptions=True)
            found[name] = sum(size for size in read if isinstance(size, int))
        return found


def _resources(need: Need) -> dict[str, Any]:
    return {"num_cpus": need.each.get("CPU", 0), "num_gpus": need.each.get("GPU", 0)}


def _make_actor(who: str, worker: type, options: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """An actor of a class. What its constructor raises is kept for `started`: Ray would make a dead actor of it."""

    class Actor(worker):
        def __init__(self, **arguments: Any) -> None:
            self.__raised: Exception | None = None  # two underscores: a worker may have any other name
            try:
                super().__init__(**arguments)
            except Exception as error:
                self.__raised = error

        def started(self) -> str:
            if self.__raised is not None:
                raise self.__raised
            return f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    Actor.__name__ = Actor.__qualname__ = worker.__name__
    actor = ray.remote(Actor).options(**options).remote(**arguments)
    names[actor._actor_id.hex()] = who
    return actor


@cache
def _task(function: Callable[..., Any]) -> Any:
    return ray.remote(num_cpus=0)(function)


def meeting_place(_: Any = None) -> tuple[str, int]:
    """Address and a free port of the node this runs on."""
    return ray.util.get_node_ip_address(), free_port()


async def _meeting_of(group: PlacementGroup, first: Any, need: Need, tell: Tell) -> tuple[str, int]:
    """Where the ranks meet, once they have their places: address and a free port of the first one's node."""
    in_all = {name: amount * need.replicas for name, amount in need.each.items()}
    await wait_for_groups("learner", in_all, [group], tell)
    where = _task(meeting_place).options(scheduling_strategy=first).remote()
    host, port = await _answer(where, LearnerError, "learner's node")
    alone = host == ray.util.get_node_ip_address() and _nodes_of(group) == 1
    return ("127.0.0.1" if alone else host), port


def _nodes_of(group: PlacementGroup) -> int:
    return len(set(placement_group_table(group)["bundles_to_node_id"].values()))


def _peak_bytes(_: Any) -> int:
    own, total = psutil.Process(), 0
    for process in [own, *own.children(recursive=True)]:
        with suppress(OSError, IndexError):  # it has ended meanwhile
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            total += 1024 * int(status.split("VmHWM:")[1].split()[0])
    return total


# ---- answers and failures -------------------------------------------------------------------------------------------


def _answer(ref: ObjectRef, error_type: type[TutorloopError], who: str) -> asyncio.Future[Any]:
    """What is referred to, once it is there. A failure is ours: an actor's own error as itself, a lost actor as
    `error_type`."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(done: Any) -> None:
        error = done.exception()
        if answer.done():  # nobody waits any more
            return
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(failure_of(error, error_type, who) if isinstance(error, RayError) else error)

    def arrived(done: Any) -> None:  # in a thread of Ray's
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, done)

    ref.future().add_done_callback(arrived)
    return answer


def failure_of(error: RayError, error_type: type[TutorloopError], who: str) -> TutorloopError:
    """Ray's failure as one of ours."""
    finishes = f"the {who} must finish its call"
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else None
        if isinstance(cause, TutorloopError):
            return cause
        if isinstance(cause, ObjectLostError):
            return BatchLost("a batch is there until it is trained", first_line(str(cause)))
        failed = error_type(finishes, _text_of(error, cause))
        failed.again = True
        return failed
    if isinstance(error, RayActorError):
        if error._actor_init_failed:  # before its constructor: the class could not be read there
            return error_type(f"the {who} must start", "\n".join(tail_of(str(error), 6)))
        name = names.get(error.actor_id or "", f"an actor of the {who}")
        said = obituary(name, error.actor_id, str(error))
        return error_type(f"the {who} keeps its actors", said).as_lost()
    if isinstance(error, ObjectLostError):
        return BatchLost("a batch is there until it is trained", first_line(str(error)))
    return error_type(finishes, first_line(str(error))).as_lost()  # its node has died


def _text_of(error: RayTaskError, cause: BaseException | None) -> str:
    """An exception of someone else's: what it says, and where it was raised."""
    said = f"{type(cause).__name__}: {cause}" if cause is not None else first_line(str(error))
    trace = [line for line in tail_of(str(error), 12) if line.strip(" ^~") and line.strip() not in said]
    return "\n".join([*tail_of(said, 8), *(f"| {line}" for line in trace[-4:])])
