"""Ctrl-C, and SIGTERM from a scheduler: once to stop at the next safe point with a checkpoint, twice to stop now."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop while it waited."""


class Interrupt:
    """A context in which the first signal is a request, and the second raises KeyboardInterrupt at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.requested = False
        self._tell, self._told = tell, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True  # and no more: printing here could interrupt a print

    def notice(self) -> None:
        """Tell the user, once, that the request was heard."""
        if self.requested and not self._told:
            self._told = True
            self._tell("stopping: a checkpoint is saved first (again to stop at once)")

    def check(self) -> None:
        """Raises Interrupted once a stop has been requested."""
        self.notice()
        if self.requested:
            raise Interrupted
