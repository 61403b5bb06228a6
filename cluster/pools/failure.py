"""The first failure of what goes on in the background. Whoever waits for something else hears it at once."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Failure:
    """Holds no error until `set`. Made inside the event loop."""

    def __init__(self) -> None:
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self, error: BaseException) -> None:
        """Of several, the first counts."""
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # heard: asyncio need not report it, should nobody wait

    def check(self) -> None:
        """Raises the error, where there is one."""
        if self._failed.done():
            self._failed.result()

    async def beside(self, work: Awaitable[T]) -> T:
        """The result of `work`, or the error, whichever comes first; `work` is then cancelled."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            return task.result()
        finally:
            task.cancel()


def first_of(error: BaseException) -> BaseException:
    """The error itself, or the first one of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def kept(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """A task of it, among `tasks` until it has ended: asyncio itself holds no reference."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
