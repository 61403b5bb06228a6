"""A look at replicas of which nothing is asked: the others' deaths are heard by whoever waits for their answers."""

import asyncio
from collections.abc import Callable, Iterable

from ...contracts.errors import TutorloopError
from .replica import Replica

WATCH_SECONDS = 5.0  # between two looks


async def watch(idle: Callable[[], Iterable[Replica]], heard: Callable[[Replica, TutorloopError], None]) -> None:
    """Until it is cancelled: `heard` is told of each idle replica that has died, with what a call to it ends in."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        for replica in [replica for replica in idle() if replica.dead]:
            try:
                await replica.ready()
            except TutorloopError as error:
                heard(replica, error)
