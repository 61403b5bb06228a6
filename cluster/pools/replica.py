"""A replica is one worker of a pool, wherever it runs; a backend starts replicas and keeps what they make.

Two backends: actors on a Ray cluster (ray_backend.py), and workers in this process (in_process.py). A reference is
whatever a backend gives for a batch that stays where it was made: it is passed on, and never read by the driver.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from ...contracts.errors import TutorloopError
from ...contracts.receipts import Receipt
from .room import Need, Tell


class Replica(Protocol):
    """A call begins at once. What it raises is heard by whoever awaits its answer: an error of ours as itself, a lost
    replica as the error of its pool, with `lost`. `where`: its process and machine, "" while that is not known."""

    where: str

    @property
    def dead(self) -> bool:
        """Whether it is known here to have died; nobody is asked for it."""
        ...

    def ready(self) -> Awaitable[None]:
        """Once its worker has loaded. Raises what the constructor raised."""
        ...

    def call(self, method: str, arguments: Mapping[str, Any]) -> tuple[Any, Awaitable[Receipt]]:
        """A call that returns a batch and a receipt: a reference to the one, and the other."""
        ...

    def ask(self, method: str, *args: Any) -> Awaitable[Any]:
        """A call whose answer the driver reads."""
        ...

    def read(self, function: Callable[[Any], Any]) -> Awaitable[Any]:
        """`function(worker)`, where the worker is."""
        ...

    async def stream(self, method: str, *args: Any) -> tuple[list[Any], Any]:
        """Of a generator method, once it has ended: references to what it yields, and the last of all itself."""
        ...

    def end(self) -> None:
        """At once, whatever it does."""
        ...


class Backend(Protocol):
    """Where a run's replicas are."""

    def check_room(self, needs: Sequence[Need]) -> None:
        """Raises ResourceError where there is less than all these ask for."""
        ...

    def free(self) -> Mapping[str, float] | None:
        """CPUs and GPUs that are left for more replicas; what is not named has no end. None where all are in one
        process."""
        ...

    def put(self, value: Any) -> Any:
        """A reference to it."""
        ...

    def run(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        """`function(*args)` beside the batches that are referred to."""
        ...

    def make(self, function: Callable[..., Any], *args: Any) -> Any:
        """A reference to what `function(*args)` returns."""
        ...

    def start(
        self,
        who: str,
        worker: type,
        error_type: type[TutorloopError],
        need: Need,
        concurrent_calls: int,
        arguments: dict,
    ) -> Replica:
        """A replica of `worker(**arguments)`, which may still be starting. Its loss is a `error_type` error."""
        ...

    async def started(self, need: Need, replicas: Sequence[Replica], tell: Tell) -> None:
        """Once all have started; meanwhile a wait for room is told. Raises what a worker's constructor raised."""
        ...

    async def start_ranks(
        self,
        worker: type,
        need: Need,
        arguments: Callable[[int, str, int], dict[str, Any]],
        tell: Tell,
    ) -> Sequence[Replica]:
        """The learner's ranks, started; `arguments(rank, host, port)` where rank 0 listens."""
        ...

    def peak_memory(self, replicas: Mapping[str, Sequence[Replica]]) -> Awaitable[dict[str, int]]:
        """Resident bytes at their peak, by pool."""
        ...
