"""Replicas in this process, for `--local`: a call is made where it is asked for, and has ended when it returns.

So a breakpoint in an engine, a verifier or a loss term stops the whole run, with whatever asked for the call in the
frames above it. What a worker raises that is no error of ours comes out as it is, with its traceback.
"""

import asyncio
import os
import resource
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import torch

from ...contracts.errors import ConfigError, TutorloopError
from ...contracts.receipts import Receipt
from .ports import free_port
from .replica import Replica
from .room import Need, Tell


def _made(function: Callable[..., Any], *args: Any, **arguments: Any) -> asyncio.Future[Any]:
    """What a call returned or raised."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    try:
        answer.set_result(function(*args, **arguments))
    except Exception as error:
        answer.set_exception(error)
    return answer


class InProcessReplica:
    """A worker of this process."""

    dead = False

    def __init__(self, worker: Any) -> None:
        self.worker, self.where = worker, f"pid {os.getpid()}"

    def ready(self) -> Awaitable[None]:
        return _made(lambda: None)

    def call(self, method: str, arguments: Mapping[str, Any]) -> tuple[Any, Awaitable[Receipt]]:
        answer = _made(getattr(self.worker, method), **arguments)
        if answer.exception():
            return None, answer
        batch, receipt = answer.result()
        return batch, _made(lambda: receipt)

    def ask(self, method: str, *args: Any) -> Awaitable[Any]:
        return _made(getattr(self.worker, method), *args)

    def read(self, function: Callable[[Any], Any]) -> Awaitable[Any]:
        return _made(function, self.worker)

    async def stream(self, method: str, *args: Any) -> tuple[list[Any], Any]:
        found = list(getattr(self.worker, method)(*args))
        return found[:-1], found[-1] if found else None

    def end(self) -> None:
        close = getattr(self.worker, "close", None)
        if close:
            close()
        self.worker = None


class InProcessBackend:
    """See replica.py: Backend. A reference is the batch itself."""

    def __init__(self) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        torch.set_num_threads(1)  # as in an actor; a model that works on more says so (threads.py)

    def check_room(self, needs: Sequence[Need]) -> None:
        """All share this process."""

    def free(self) -> None:
        """There is no other."""

    def put(self, value: Any) -> Any:
        return value

    def run(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        return _made(function, *args)

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def start(
        self,
        who: str,
        worker: type,
        error_type: type[TutorloopError],
        need: Need,
        concurrent_calls: int,
        arguments: dict[str, Any],
    ) -> InProcessReplica:
        return InProcessReplica(worker(**arguments))

    async def started(self, need: Need, replicas: Sequence[Replica], tell: Tell) -> None:
        """They have."""

    async def start_ranks(
        self, worker: type, need: Need, arguments: Callable[[int, str, int], dict[str, Any]], tell: Tell
    ) -> list[InProcessReplica]:
        """One rank. Raises ConfigError."""
        if need.replicas > 1:
            rule = "a run in one process has one learner rank"
            raise ConfigError(rule, f"learner.ranks: {need.replicas}", "set learner.ranks=1, or leave --local out")
        return [InProcessReplica(worker(**arguments(0, "127.0.0.1", free_port())))]

    async def peak_memory(self, replicas: Mapping[str, Sequence[Replica]]) -> dict[str, int]:
        """Of the process, which is all of them."""
        return {"process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
