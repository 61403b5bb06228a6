"""Ctrl-C, and SIGTERM from a scheduler: heard in every phase of a command.

While there is something to save, the first signal is a request to stop at the next safe point with a checkpoint, and
the second stops now. Before and after that the first one stops now.
"""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar, TypeVar

from .pools.failure import Failure

SIGNALS = (signal.SIGINT, signal.SIGTERM)
T = TypeVar("T")
TELL_SECONDS = 5.0  # at most, for a word to a terminal that does not take it


class Interrupted(Exception):
    """The run was asked to stop while it waited."""


class Interrupt:
    """A context that hears the signals: they raise KeyboardInterrupt at once, or inside of `saving` are a request."""

    active: ClassVar["Interrupt | None"] = None

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.requested = False
        self._tell, self._saves = tell, False
        self._teller: threading.Thread | None = None
        self._before: dict[int, Any] = {}
        self._wake: Callable[[], object] = lambda: None

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        Interrupt.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Interrupt.active = None
        if self._teller is not None:
            self._teller.join(TELL_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """In this block a first signal is a request: what runs in it saves before it ends. Inside the event loop."""
        loop, self.request = asyncio.get_running_loop(), Failure()
        self._saves, self._wake = True, lambda: loop.call_soon_threadsafe(self.stop)
        try:
            yield
        finally:
            self._saves, self._wake = False, lambda: None

    def stop(self) -> None:
        """Ask what runs in `saving` to stop, as a signal does."""
        self.requested = True
        self.request.set(Interrupted())

    async def beside(self, work: Awaitable[T]) -> T:
        """The result of `work`; Interrupted, as soon as a stop is requested."""
        return await self.request.beside(work)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        self.tell("stopping: a checkpoint is saved first (again to stop at once)" if self._saves else "stopping")
        if again or not self._saves:
            raise KeyboardInterrupt
        self._wake()

    def tell(self, text: str) -> None:
        """Say, once, that the signal was heard. From a thread: here it could interrupt a print."""
        if self._teller is None:
            self._teller = threading.Thread(target=self._tell, args=(text,), daemon=True)
            self._teller.start()

    def check(self) -> None:
        """Raises Interrupted once a stop has been requested."""
        if self.requested:
            raise Interrupted


@contextmanager
def unbroken() -> Iterator[None]:
    """Ray's start and its end, which leave processes behind where they are broken off: a signal counts after the block,
    a second one at once. What handled signals before does so again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if Interrupt.active:
            Interrupt.active.tell("stopping, as soon as Ray lets go")
        if len(heard) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, later) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        signal.raise_signal(heard[0])
