"""TensorBoard's event files, written as the run goes and in its own thread of control.

A disk that takes no more is heard at once, by whoever adds figures. (tensorboardX's own writer hears of it in a thread
that dies of it, and then waits for that thread for ever.)
"""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FLUSH_SECONDS = 10.0


class TensorBoard:
    """One more event file in `folder`. `hides_from`: steps from this one on that older files hold are not shown."""

    def __init__(self, folder: Path, hides_from: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # it loads torch
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{time.time_ns()}"  # the name alone has whole seconds: a second file would overwrite the first
        self._events, self._flushed = EventsWriter(str(folder / "events"), suffix), time.monotonic()
        if hides_from is not None:
            start = SessionLog(status=SessionLog.START)
            for known in ({"file_version": "brain.Event:2"}, {"session_log": start}):
                self._events.write_event(Event(wall_time=time.time(), step=hides_from, **known))

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Raises OSError."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=re.sub(r"[^-/\w.]", "_", n), simple_value=v) for n, v in figures.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """What the disk does not take is lost: the record is metrics.jsonl."""
        with suppress(OSError):
            self._events.close()
