"""Tells people of a run's alarms and of its end: a command of theirs, or a server, is given one JSON object each.

Alarms are what the rows warn of (alarms.py, guards.py). Of the end there is one word: `failed` with the error, `done`,
or `interrupted`. All three, because whoever waits for a run, or sleeps, wants to know when it no longer trains, and
only then is silence worth something: it goes on, or its process was killed. An interruption is told too, since a
scheduler may have asked for it; whoever pressed Ctrl-C can leave such ones out by their `kind`. What is refused before
the folder is this run's is not told: it is the answer to whoever gave the command.

Nothing here can hold the run up. Few alarms wait for one thread; each try is a process with a deadline, killed with all
that it started; the end waits a bounded time. What fails or is dropped is said once in the log, and counted.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import psutil

from ...contracts.config import Config
from ...contracts.errors import ConfigError, InputError
from ...contracts.reliability import Notify
from ..pools.orphans import ended_with_us
from .metrics import EvalRow, StepRow
from .progress import clock, excerpt, percent

ALARMS = "alarms.jsonl"
DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"
COMMAND, WEBHOOK, DROPPED, KEPT = "command", "webhook", "dropped", "file"  # where an alarm may fail
POST = (sys.executable, "-P", "-m", "tutorloop.cluster.recording.webhook")

MOST_WAITING = 8  # alarms
DEADLINE_SECONDS = 10.0  # of a try
END_SECONDS = 15.0  # that the run's end waits for all that is still to be told
HURRY_SECONDS = 5.0  # the same, where somebody has asked it to stop
MOST_CHARACTERS = 4000  # of a text
TAIL_BYTES = 1 << 16  # of alarms.jsonl, that are read
LAST = 20  # alarms of a run, that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """`step`: steps done; `time`: UTC. Example: `Alarm(kind="truncated", step=3, text="in step 3 every response was cut
    off by rollout.max_new_tokens=16: …", time="2026-01-31T12:00:00Z")`."""

    kind: str
    step: int
    text: str
    time: str


def ways_of(config: Notify) -> dict[str, list[str]]:
    """The programs that each alarm is given to. Raises ConfigError where one cannot be run."""
    ways: dict[str, list[str]] = {}
    if config.command:
        ways[COMMAND] = shlex.split(config.command)
        if shutil.which(program := ways[COMMAND][0]) is None:
            raise ConfigError("notify.command begins with a program", f"{program}: none such", "give its whole path")
    if config.webhook_env:
        ways[WEBHOOK] = [*POST, config.webhook_env]
        rule, variable = "notify.webhook_env names an environment variable that holds an address", config.webhook_env
        if not (address := os.environ.get(variable, "")):
            raise ConfigError(rule, f"{variable} is not set", f"export {variable}=…")
        try:
            parts = urlsplit(address)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            known = False
        if not known:  # it is not shown: it may be most of a secret
            raise ConfigError(rule, f"{variable} holds something else", f"export {variable}=https://HOST/…")
    return ways


class Notifier:
    """Tells of one run while the block lasts. `kind_of` a warning's text; `tell` the log, from another thread too.

    `untold`: how often something failed, by COMMAND, WEBHOOK, DROPPED (too many waited) and KEPT (alarms.jsonl).
    Raises ConfigError where nobody could be told.
    """

    def __init__(
        self, config: Config, folder: Path, kind_of: Callable[[str], str], tell: Callable[[str], None]
    ) -> None:
        self.untold: Counter[str] = Counter()
        self._ways = ways_of(config.notify)
        self._folder, self._method, self._kind_of, self._tell = folder, config.methods, kind_of, tell
        self._step, self._patience = 0, END_SECONDS
        self._told = {(alarm["kind"], alarm["text"]) for alarm in kept(folder)}  # before the run was resumed
        self._waiting: deque[Alarm] = deque()
        self._changed = threading.Condition()
        self._closed = self._refused = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)

    def __enter__(self) -> "Notifier":
        if self._ways:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error:
            stopped = isinstance(error, KeyboardInterrupt)
            self._refused = isinstance(error, InputError)
            self._end(INTERRUPTED if stopped else FAILED, str(error) or type(error).__name__)
        self._close(self._patience)

    def row(self, row: StepRow | EvalRow) -> list[str]:
        """Tell of what a row warns of; the kinds of what is told, which is said once a run."""
        self._step = max(self._step, row.step)
        kinds = []
        for warning in row.warnings:
            kind, text = self._kind_of(warning), _short(warning)
            if (kind, text) not in self._told:
                self._told.add((kind, text))
                kinds.append(kind)
                self._raise(Alarm(kind=kind, step=row.step, text=text, time=_now()))
        return kinds

    def over(self, finished: bool, summary: Mapping[str, Any]) -> None:
        """The run has come to its end, or was interrupted and left a checkpoint."""
        self._step = summary["steps"]
        told, accuracy = [f"{summary['steps']} steps in {clock(summary['wall_seconds'])}"], summary["accuracy"]
        if {"before", "after"} <= accuracy.keys():
            told.append(f"accuracy {percent(accuracy['before'])} → {percent(accuracy['after'])}")
        told += [] if finished else ["continue it with --resume"]
        self._end(DONE if finished else INTERRUPTED, ", ".join(told))

    def _end(self, kind: str, text: str) -> None:
        self._patience = HURRY_SECONDS if kind == INTERRUPTED else END_SECONDS
        self._raise(Alarm(kind=kind, step=self._step, text=_short(text), time=_now()), last=True)

    def _raise(self, alarm: Alarm, last: bool = False) -> None:
        """The last one is told before those that still wait: it is what is waited for."""
        self._keep(alarm)
        if not self._ways:
            return
        with self._changed:
            full = len(self._waiting) >= MOST_WAITING and not last
            if last:
                self._waiting.appendleft(alarm)
            elif not full:
                self._waiting.append(alarm)
            self._changed.notify()
        if full:
            self._failed(DROPPED, f"{MOST_WAITING} others wait to be told")

    def _keep(self, alarm: Alarm) -> None:
        """In the run's folder, where `tutorloop status` finds it. Not before the run has begun, nor where it was
        refused: the folder stays as it is then, and may be another process's by now."""
        if self._refused or not (self._folder / "config.yaml").is_file():
            return
        try:
            with (self._folder / ALARMS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(alarm)) + "\n")
        except OSError as error:
            self._failed(KEPT, f"{self._folder / ALARMS}: {error.strerror}")

    def _failed(self, where: str, why: str) -> None:
        self.untold[where] += 1
        if self.untold[where] == 1:
            self._tell(f"an alarm was not told ({where}): {why}. Later ones are counted only")

    # ---- the thread ----

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                alarm = self._waiting.popleft()
            data = json.dumps({"run": str(self._folder), "method": self._method, **asdict(alarm)}).encode()
            for way, command in self._ways.items():
                if why := self._given(way, command, data):
                    self._failed(way, why)

    def _given(self, way: str, command: list[str], data: bytes) -> str:
        """Run a program with `data` on its standard input; why that failed, "" where it did not."""
        out = subprocess.PIPE if way == WEBHOOK else subprocess.DEVNULL  # the user's may print what it likes
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        self._process = process
        try:
            with ended_with_us([process.pid]):
                said = process.communicate(data, timeout=DEADLINE_SECONDS)[0]
        except (subprocess.TimeoutExpired, OSError) as error:  # or this machine has no room for another process
            _kill(process)
            process.communicate()
            late = isinstance(error, subprocess.TimeoutExpired)
            return f"not done within {DEADLINE_SECONDS:.0f} s, and killed" if late else f"killed: {error}"
        finally:
            self._process = None
        why = (said or b"").decode(errors="replace") or f"it ends with code {process.returncode}"
        return why if process.returncode else ""

    def _close(self, seconds: float) -> None:
        """Let the thread tell what waits, and end it after so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if not self._ways:
            return
        try:
            self._thread.join(seconds)
        finally:
            with self._changed:
                left = len(self._waiting)
                self._waiting.clear()
            if process := self._process:
                _kill(process)
                self._thread.join(1.0)
            for _ in range(left):
                self._failed(DROPPED, f"the run ends, and {seconds:.0f} s were not enough")


def kept(folder: Path) -> list[dict[str, Any]]:
    """The last alarms of the run in `folder`, oldest first. A line that a crash cut off is left out."""
    try:
        with (folder / ALARMS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError, TypeError):
            found.append(asdict(Alarm(**json.loads(line))))
    return found[-LAST:]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """A program and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _short(text: str) -> str:
    return excerpt(text, MOST_CHARACTERS)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
