"""Runs requests in verifier processes, one at a time in each, and kills those over their budget.

One thread watches over all of it. It keeps a process warm beyond those at work, so that the next sample starts at once
after a kill. The budget is of CPU time, with a wall clock on top for those that sleep, so that a busy machine makes no
honest sample fail. A sample that has had SLOW_CPU_SECONDS of a CPU, or run for SLOW_SECONDS, leaves its slot to another
and goes on beside it, so that poison in every slot holds nobody up; beyond `extra` such samples they hold slots again.

A task that is to run alone gets a process that judged nothing before, beside the slots. It starts when no other such
task runs and the slow samples that began before it was asked for have ended. Others go on: its budget counts its own
CPU time and memory, so they cost it nothing, and it never waits for samples that came later.
"""

import contextlib
import json
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..contracts.errors import VerifierError
from ..contracts.protocols import Judgement
from .server import Server

SLOW_CPU_SECONDS, SLOW_SECONDS = 0.25, 1.0  # the first tells poison from a machine that is busy
START_SECONDS = 120.0  # for a server, and for a process of it, on a machine that is busy
SHORTEST_LOOK = 0.02
ATTEMPTS = 3
REPLY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one response. A judgement with an `error_class` and `fault` was killed or raised."""

    judgement: Judgement
    seconds: float


@dataclass(slots=True)
class Task:
    request: bytes
    alone: bool = False
    since: float = field(default_factory=time.monotonic)
    future: "Future[Outcome]" = field(default_factory=Future)
    lost: int = 0  # times that its process died before it had read the request

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody else can cancel it


@dataclass(slots=True, eq=False)
class Process:
    """The owner's side of one verifier process: starting, idle, or at work on its task."""

    number: int
    connection: socket.socket
    since: float
    pid: int = 0  # known when it is ready
    task: Task | None = None
    cpu: float = 0.0  # seconds that it had used as its task began
    due: float = math.inf  # when it is looked at
    slow: bool = False
    used: bool = False  # it has judged
    unread: bool = False  # it died before it had read the request
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    incoming: bytearray = field(default_factory=bytearray)


class Processes:
    """`slots` samples side by side, and up to `extra` slow ones beside them. `verifier` is for the fork server.

    A sample has `timeout_seconds` of CPU time, and `wall_seconds` in all.
    A future raises VerifierError where no process could be started ATTEMPTS times in a row, and at `close`.
    """

    def __init__(self, verifier: bytes, *, timeout_seconds: float, wall_seconds: float, slots: int, extra: int) -> None:
        self.verifier, self.slots, self.extra = verifier, slots, extra
        self.timeout_seconds, self.wall_seconds = timeout_seconds, wall_seconds
        self.alive = True
        self._queue: deque[Task] = deque()
        self._alone: deque[Task] = deque()
        self._all: dict[int, Process] = {}
        self._idle: list[Process] = []
        self._server: Server | None = None
        self._failures, self._started, self._found = 0, 0, ""
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: os.read(self._woken, 4096))
        self._thread = threading.Thread(target=self._run, name="verifier-processes", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> bool:
        """Queue a task; False where these processes have ended."""
        with self._lock:
            if self.alive:
                queue = self._alone if task.alone else self._queue
                queue.append(task)
                if len(queue) == 1:
                    self._wake_up()
            return self.alive

    def close(self) -> None:
        with self._lock:
            open_still, self.alive = self.alive, False
            if open_still:  # else the file descriptor may be another's by now
                self._wake_up()
        self._thread.join()

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            os.write(self._wake, b"!")

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = closed()
        try:
            while self.alive:
                self._staff()
                for key, _ in self._selector.select(self._pause()):
                    key.data()
                self._check_time()
        except VerifierError as raised:
            error = raised
        except BaseException as raised:  # a bug here: whoever waits must hear of it
            error = VerifierError("the verifier pool's thread goes on", f"{type(raised).__name__}: {raised}")
            raise
        finally:
            self._end(error)

    def _end(self, error: VerifierError) -> None:
        with self._lock:
            self.alive = False
            working = [process.task for process in self._all.values() if process.task]
            waiting = [*self._queue, *self._alone, *working]
            self._queue.clear()
            self._alone.clear()
            os.close(self._wake)
        if self._server:
            self._server.close()
        for process in self._all.values():
            process.connection.close()
        self._selector.close()
        os.close(self._woken)
        for task in waiting:
            task.future.set_exception(error)

    def _staff(self) -> None:
        """Start what is missing, and give each free slot a sample."""
        if self._server is None:
            if not self._queue and not self._alone:
                return
            self._server = Server(self.verifier)
            self._selector.register(self._server.control, selectors.EVENT_READ, self._hear)
        if not self._server.ready:
            return
        lone = self._staff_alone()
        working = [process for process in self._all.values() if process.task and not process.task.alone]
        free = self.slots - len(working) + min(self.extra, sum(process.slow for process in working))
        while self._queue and self._idle and free > 0:
            self._give(self._idle.pop(), self._queue.popleft())
            free -= 1
        starting = sum(not process.pid for process in self._all.values())
        wanted = min(len(self._queue), max(0, free)) + 1 - len(self._idle)
        for _ in range(max(wanted, lone) - starting):
            self._spawn()

    def _staff_alone(self) -> bool:
        """Start the next task that is to run alone, if it may; True where it has to wait for a new process only."""
        working = [process for process in self._all.values() if process.task]
        if not self._alone or any(process.task.alone for process in working if process.task):
            return False
        if any(process.slow and process.since < self._alone[0].since for process in working):
            return False
        new = next((process for process in self._idle if not process.used), None)
        if new is None:
            return True
        self._idle.remove(new)
        self._give(new, self._alone.popleft())
        return False

    def _spawn(self) -> None:
        assert self._server
        self._started += 1
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._server.spawn(self._started, theirs)
        except OSError as error:
            return self._failed(str(error))
        ours.setblocking(False)
        now = time.monotonic()
        process = Process(self._started, ours, now, due=now + START_SECONDS)
        self._all[process.number] = process
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._exchange(process))

    def _give(self, process: Process, task: Task) -> None:
        process.cpu, process.slow, process.used = _cpu_seconds(process.pid), False, True
        process.task, process.since, process.outgoing = task, time.monotonic(), memoryview(task.request)
        process.due = process.since + min(SLOW_CPU_SECONDS, self.timeout_seconds, self.wall_seconds)
        self._write(process)

    def _write(self, process: Process) -> None:
        try:
            process.outgoing = process.outgoing[process.connection.send(process.outgoing) :]
        except BlockingIOError:
            pass
        except OSError:  # it died: the server will say so
            process.unread, process.outgoing = True, memoryview(b"")
        self._listen(process, selectors.EVENT_READ | (selectors.EVENT_WRITE if process.outgoing else 0))

    def _listen(self, process: Process, events: int) -> None:
        key = self._selector.get_key(process.connection)
        if key.events != events:
            self._selector.modify(process.connection, events, key.data)

    def _exchange(self, process: Process) -> None:
        """Send what is left of the request, and take in what came."""
        if process.number not in self._all:  # it was ended since the selector named it
            return
        if process.outgoing:
            self._write(process)
        try:
            data = process.connection.recv(REPLY_BYTES)
        except BlockingIOError:
            return
        except OSError:  # ECONNRESET: Linux tells it from an orderly end
            process.unread, data = True, b""
        process.incoming += data
        if not data or len(process.incoming) > REPLY_BYTES or (process.pid and not process.task):
            self._selector.unregister(process.connection)
            self._kill(process)  # and the server says how it ended
            if process in self._idle:
                self._idle.remove(process)
        elif process.incoming.endswith(b"\n"):
            self._read(process)

    def _read(self, process: Process) -> None:
        line, task = bytes(process.incoming), process.task
        process.incoming.clear()
        if task is None:
            process.pid, self._failures = int(line), 0
            self._idle.append(process)
            return
        try:
            last, passed, answer, score, error_class, parts, fault, rule = json.loads(line)
            parts = tuple((str(name), float(value)) for name, value in parts)
            judgement = Judgement(
                bool(passed), str(answer), float(score), str(error_class), parts, bool(fault), str(rule)
            )
        except (ValueError, TypeError):
            last, judgement = True, failure("crash")
        if last:
            self._discard(process, judgement)
            return
        process.task = None
        self._idle.append(process)
        if len(self._idle) > self.slots + 1:  # slow samples had others started in their places
            self._discard(self._idle[0], judgement)
        _finish(task, judgement, process.since)

    def _discard(self, process: Process, judgement: Judgement) -> None:
        """Kill a process. If it had a task, this is its judgement."""
        del self._all[process.number]
        if process in self._idle:
            self._idle.remove(process)
        self._kill(process)
        with contextlib.suppress(KeyError):
            self._selector.unregister(process.connection)
        process.connection.close()
        if process.task:
            _finish(process.task, judgement, process.since)

    def _hear(self) -> None:
        assert self._server
        verb, _, rest = self._server.receive().partition(" ")
        number, _, why = rest.partition(" ")
        if verb == "ready":
            self._server.ready = True
        elif verb == "failed":
            raise VerifierError("a verifier loads in its processes", rest, "see that its module can be imported there")
        elif not verb:
            self._lost("the server of verifier processes ended")
        elif process := self._all.get(int(number)):
            self._died(process, verb, why)

    def _died(self, process: Process, how: str, why: str) -> None:
        if process.task:
            with contextlib.suppress(KeyError):
                self._exchange(process)  # a reply that it still sent
        if process.task and process.unread and process.task.lost < ATTEMPTS:
            process.task.lost += 1
            (self._alone if process.task.alone else self._queue).appendleft(process.task)
            process.task = None
        if process.number in self._all:
            self._discard(process, failure(how))
        if not process.pid:
            self._failed(why or "a process died before its first sample")

    def _lost(self, found: str) -> None:
        """The server is gone, and all processes with it."""
        assert self._server
        self._selector.unregister(self._server.control)
        found = f"{found}; {self._server.close()}"
        self._server = None
        for process in list(self._all.values()):
            self._discard(process, failure("crash"))
        self._failed(found)

    def _failed(self, found: str) -> None:
        self._failures += 1
        if self._failures >= ATTEMPTS:
            remedy = "see whether the machine is short of memory, processes or open files"
            raise VerifierError("verifier processes can be started", found, remedy)
        time.sleep(0.1 * self._failures)

    def _pause(self) -> float | None:
        """Seconds until a process, or the server, has to be looked after; None: for ever."""
        due = [process.due for process in self._all.values() if process not in self._idle]
        if self._server and not self._server.ready:
            due.append(self._server.since + START_SECONDS)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _check_time(self) -> None:
        now = time.monotonic()
        if self._server and not self._server.ready and now >= self._server.since + START_SECONDS:
            return self._lost(f"the server of verifier processes was not ready in {START_SECONDS:.0f} s")
        for process in list(self._all.values()):
            if process in self._idle or now < process.due:
                continue
            if not process.pid:
                return self._lost(f"a verifier process was not ready in {START_SECONDS:.0f} s")
            self._look_at(process, now)

    def _look_at(self, process: Process, now: float) -> None:
        """End a sample over its budget, or say when to look again: no sooner than the budget can be used up."""
        used = _cpu_seconds(process.pid) - process.cpu
        used = used if math.isfinite(used) else 0.0  # it is gone, and the server will say how
        if used >= self.timeout_seconds or now >= process.since + self.wall_seconds:
            return self._discard(process, failure("timeout"))
        process.slow |= used >= 0.9 * SLOW_CPU_SECONDS or now >= process.since + SLOW_SECONDS
        left = max(SHORTEST_LOOK, self.timeout_seconds - used)
        left = left if process.slow or not self.extra else min(left, SLOW_CPU_SECONDS)
        process.due = min(now + left, process.since + self.wall_seconds)

    def _kill(self, process: Process) -> None:
        if self._server:
            self._server.kill(process.number)


def _cpu_seconds(pid: int) -> float:
    """Of all threads of a process; infinite if it is gone. The clock is what clock_getcpuclockid(3) finds for it."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return math.inf


def closed() -> VerifierError:
    """Of a sample whose processes ended before it did."""
    return VerifierError("a verifier pool judges while it is open", "it was closed", "judge before close()")


def failure(error_class: str) -> Judgement:
    """Of a sample that did not end by itself."""
    return Judgement(False, error_class=error_class, fault=True)


def _finish(task: Task, judgement: Judgement, since: float) -> None:
    task.future.set_result(Outcome(judgement, time.monotonic() - since))
