"""Checkpoints are written while the run goes on: what must be as it is now is taken first, and files follow.

One at a time. Until its files are whole and renamed into place, the checkpoint before it is what a resume finds.
"""

import asyncio
import shutil
from asyncio import to_thread
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..models.digests import Written
from .recording.run_folder import RunFolder

Take = Callable[[Path], Awaitable[None]]  # begins to fill a folder, with what is now
Await = Callable[[Path], Awaitable[Written]]  # fills in the rest; the files, once they are on the disk


class Checkpoints:
    """Of one run, in its folder; the newest `keep` stay there."""

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._writing: asyncio.Task[None] | None = None
        self._aside: Path | None = None  # where the last one was begun, and is not yet at its end
        self._closing = False  # its files are there, and it is about to be whole

    async def begin(self, state: dict[str, Any], take: Take, written: Await, proven: int | None = None) -> None:
        """Returns once what the checkpoint holds is taken. `proven`: see RunFolder.end_checkpoint. Raises StorageError,
        of the one before it too, and whatever `take` raises."""
        await self.finish()
        with self._room():
            self._aside = aside = self.folder.begin_checkpoint(state["step"])
            await take(aside)
        self._writing = asyncio.create_task(self._write(aside, state, written, proven))

    async def _write(self, aside: Path, state: dict[str, Any], written: Await, proven: int | None) -> None:
        with self._room():
            files = await written(aside)
            self._closing = True
            await to_thread(self.folder.end_checkpoint, aside, state, files, self.keep, proven)
            self._aside = None

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Of what fails nothing is left."""
        try:
            with self.folder.room_for("a checkpoint"):
                yield
        except BaseException:
            self._remove()
            raise
        finally:
            self._closing = False

    def check(self) -> None:
        """Raises what the last one failed with."""
        if self._writing and self._writing.done():
            self._writing.result()

    async def finish(self) -> None:
        """Once none is being written. Raises StorageError, and what a learner died of meanwhile."""
        writing, self._writing = self._writing, None
        if writing:
            await writing

    async def drop(self) -> None:
        """The one that is being written will not be whole, where it is not about to be: its writer has died."""
        writing, self._writing = self._writing, None
        if writing:
            if not self._closing:
                writing.cancel()
            await asyncio.wait({writing})
            self._remove()  # of one that had not even begun

    def _remove(self) -> None:
        """What was begun and is not whole. Where nothing could be begun there is nothing to remove."""
        aside, self._aside = self._aside, None
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
