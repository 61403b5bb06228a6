"""How long a replica was busy, where several calls run side by side."""

import time
from collections.abc import Callable
from threading import Lock


class BusyClock:
    """Each call's share of the time in which any ran, so that the shares sum to that time."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._lock = now, Lock()
        self._running, self._at, self._share = 0, 0.0, 0.0

    def start(self) -> float:
        """A call begins; what `stop` is given at its end."""
        with self._lock:
            self._advance()
            self._running += 1
            return self._share

    def stop(self, started: float) -> float:
        """Seconds of the call that `start` began."""
        with self._lock:
            self._advance()
            self._running -= 1
            return self._share - started

    def _advance(self) -> None:
        now = self._now()
        if self._running:
            self._share += (now - self._at) / self._running
        self._at = now
