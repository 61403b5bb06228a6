"""An event loop whose clock jumps to the next thing that is due: a simulated hour takes no time."""

import asyncio
import selectors
from contextlib import contextmanager

from tutorloop.cluster.driver import Stopwatch


class Stuck(AssertionError):
    """Everybody waits, and nothing is due."""


class JumpingSelector(selectors.SelectSelector):
    """Never sleeps. `loop` is set once there is one."""

    loop: "VirtualLoop"

    def select(self, timeout=None):
        if timeout is None:
            raise Stuck("everybody waits for somebody, and nothing is due")
        self.loop.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`now`: its seconds so far. `most_turns`: of the loop, before it is taken to run for ever."""

    def __init__(self, most_turns: int = 50_000) -> None:
        self.now, self.turns, self.most_turns = 0.0, 0, most_turns
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        self.turns += 1
        if self.turns > self.most_turns:
            raise Stuck(f"{self.turns} turns of the loop, and no end")
        super()._run_once()


class VirtualStopwatch(Stopwatch):
    """The driver's seconds by stage, by the loop's clock."""

    @contextmanager
    def __call__(self, stage):
        now = asyncio.get_running_loop().time
        start = now()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now() - start
