"""Where the time before the first step went."""

import time
from collections.abc import Callable


class Startup:
    """Seconds by phase; a phase lasts until the next one begins. `show` tells a person what goes on."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.show = show
        self._name, self._since = "", 0.0

    def phase(self, name: str, text: str) -> None:
        """`name` in summary.json's `startup_seconds`; a later stage's phases add to those of the same names."""
        self.end()
        self._name, self._since = name, time.monotonic()
        self.show(text)

    def end(self) -> None:
        if self._name:
            spent = time.monotonic() - self._since
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
        self._name = ""
