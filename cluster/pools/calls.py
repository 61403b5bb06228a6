"""A call as its pool keeps it, and how long one may take."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SLACK = 20.0  # times what calls of its kind took before
FORGETS = 0.9  # of the slowest call seen, with each one after it


@dataclass(slots=True, eq=False)
class Call:
    """One call that waits for a replica, or is being answered. `deaths`: replicas that died while they worked on it;
    after the first it is made alone, so that the second is its own doing."""

    method: str
    arguments: Mapping[str, Any]
    cost: int
    counted: bool
    answer: asyncio.Future[tuple[Any, Any]]
    asked: float  # when, by the loop's clock
    attempts: int = 0
    deaths: int = 0


@dataclass(slots=True)
class Pace:
    """Seconds that a unit of cost takes, by method, as the slowest lately took them."""

    least: float  # of any deadline, seconds
    _seconds: dict[str, float] = field(default_factory=dict)

    def took(self, method: str, cost: int, seconds: float) -> None:
        self._seconds[method] = max(FORGETS * self._seconds.get(method, 0.0), seconds / max(1, cost))

    def knows(self, method: str) -> bool:
        return method in self._seconds

    def deadline(self, method: str, cost: int) -> float:
        """Seconds after which a call with `cost` before it and in it counts as lost."""
        return max(self.least, SLACK * self._seconds.get(method, 0.0) * max(1, cost))
