"""Verifiers in processes that can be killed: a budget of CPU time and memory for each sample, no verdict lost.

What a verifier can decide at once is decided in the calling thread (`prepare`). The rest goes to processes, one sample
at a time in each. A sample over its budget costs its process and fails as "timeout" or "memory"; a process that dies
fails as "crash"; an exception fails under its name. Equal samples in flight run once.

Who is at fault. Of a verifier that reads answers (`harmless`) a sample that failed is tried again, one such sample of
the pool at a time, in a process that judged nothing before. If it fails again, its gold is tried with a harmless
response: where that fails too, the sample abstains as "gold_…", and else the failure is the response's `fault`. Several
golds are then judged one by one. What a reward function does is no response's fault: where one stands beside the
verifier, the verifier alone is tried again. Of other verifiers, which run code of one's own or ask a server, a failure
is never the response's. What was killed twice is known: it is not run a third time, and its judgement stays.
"""

import hashlib
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from ..contracts.errors import VerifierError
from ..contracts.protocols import Judgement, Response, Verifier, error_class_of
from .any_gold import best, singles
from .fork_server import MAIN, WHOLE, parts_of, request_of
from .processes import Outcome, Processes, Task, closed, failure

WAITING_SLOTS = 16  # of verifiers that wait for others
EXTRA = 4  # slow samples beside the slots, for each slot
WALL = 10  # times its CPU time that a sample may take in all, where the verifier does not wait
KILLS = ("timeout", "memory", "crash")
MOST_KILLS = 2
OFFENDERS = 4096  # the last so many are known, and as many golds that were tried


Course = Generator["Future[Outcome]", Outcome, Judgement]  # yields what it waits for, and is sent what came of it


@dataclass(slots=True, eq=False)
class _Case:
    """A sample on its way through the processes, and those that it started in: it goes on in no others."""

    key: bytes
    processes: Processes | None = None
    seconds: float = 0.0
    kills: int = 0
    future: "Future[Outcome]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody can cancel it


class VerifierPool:
    """Judges with `verifier`, which must pickle, in processes; all methods can be called from several threads at once.

    timeout_seconds and memory_gib are each sample's budget: seconds of a CPU (ten times as long in all; of a verifier
    that waits for others, seconds in all), and memory over what the warm process has. `processes` samples run side by
    side, and beside them at most 4 · `processes` that have had 0.25 s of a CPU, or a second; 16 and none where the
    verifier waits. Raises VerifierError: here where the verifier cannot be pickled, and from `judge` or the future
    where no process could be started.
    """

    def __init__(
        self, verifier: Verifier, *, timeout_seconds: float = 5.0, memory_gib: float = 1.0, processes: int = 2
    ) -> None:
        self.verifier, self.timeout_seconds = verifier, timeout_seconds
        self.slots, self.extra = (WAITING_SLOTS, 0) if verifier.waits else (processes, EXTRA * processes)
        try:
            self._pickled = pickle.dumps((verifier, int(memory_gib * 2**30)))
        except Exception as error:  # whatever its attributes raise
            found = f"{type(verifier).__name__}: {type(error).__name__}: {error}"
            raise VerifierError("a verifier can be pickled", found, "make it a class of a module") from error
        self._lock = threading.Lock()
        self._processes: Processes | None = None
        self._in_flight: dict[bytes, Future[Outcome]] = {}
        self._known: OrderedDict[bytes, tuple[int, Judgement]] = OrderedDict()  # what was killed: how often
        self._golds: OrderedDict[bytes, Future[Outcome]] = OrderedDict()  # a harmless response to each that was tried

    def judge(self, responses: Sequence[Response]) -> list[Outcome]:
        """An outcome for each response, in order. Raises VerifierError."""
        started = [self._start(response) for response in responses]
        return [one if isinstance(one, Outcome) else one.result() for one in started]

    def submit(self, response: Response) -> "Future[Outcome]":
        """The outcome of one response, in the future; it cannot be cancelled."""
        started = self._start(response)
        if isinstance(started, Future):
            return started
        decided: Future[Outcome] = Future()
        decided.set_result(started)
        return decided

    def close(self) -> None:
        """End the processes; what they were at raises VerifierError, and the next sample starts new ones."""
        with self._lock:
            processes, self._processes = self._processes, None
        if processes:
            processes.close()

    def _start(self, response: Response) -> "Outcome | Future[Outcome]":
        start = time.perf_counter()
        if self.verifier.needs_gold and not response.gold.strip():
            return Outcome(Judgement(False, error_class="no_gold"), 0.0)
        prepared = self._prepared(response)
        if isinstance(prepared, Judgement):
            return Outcome(prepared, time.perf_counter() - start)
        return self._run(prepared)

    def _prepared(self, response: Response) -> Judgement | Response:
        """As the verifier prepares it; for what it raises, and calls a fault, the gold is tried too."""
        prepared = _prepare(self.verifier, response)
        if isinstance(prepared, Response) or not prepared.fault:
            return prepared
        if not self.verifier.harmless:
            return replace(prepared, fault=False)
        tried = _prepare(self.verifier, self._probe(response))
        return _of_gold(tried) if isinstance(tried, Judgement) and tried.error_class else prepared

    def _probe(self, response: Response) -> Response:
        """A harmless response to the same golds."""
        return replace(response, text=self.verifier.harmless, tokens=0, truncated=False)

    def _run(self, response: Response, processes: Processes | None = None) -> "Outcome | Future[Outcome]":
        key = _digest(request_of(response))
        with self._lock:
            kills, judgement = self._known.get(key, (0, None))
            if judgement and kills >= MOST_KILLS:
                self._known.move_to_end(key)
                return Outcome(judgement, 0.0)
            if key in self._in_flight:
                return self._in_flight[key]
            case = _Case(key, processes)
            self._in_flight[key] = case.future
        self._go_on(case, self._course(case, response))
        return case.future

    def _go_on(self, case: _Case, course: Course, done: "Future[Outcome] | None" = None) -> None:
        """Take a case from what it waited for to what it waits for next; it runs in the processes' thread."""
        try:
            (course.send(done.result()) if done else next(course)).add_done_callback(
                lambda future: self._go_on(case, course, future)
            )
        except StopIteration as end:
            self._settled(case, end.value)
            case.future.set_result(Outcome(end.value, case.seconds))
        except Exception as error:  # no process could be started, the pool was closed, or a bug: whoever waits hears it
            self._settled(case, None)
            case.future.set_exception(error)

    def _settled(self, case: _Case, judgement: Judgement | None) -> None:
        with self._lock:
            del self._in_flight[case.key]
            if case.kills and judgement:
                self._known[case.key] = (self._known.pop(case.key, (0, None))[0] + case.kills, judgement)
                while len(self._known) > OFFENDERS:
                    self._known.popitem(last=False)

    def _send(self, case: _Case, request: bytes, *, alone: bool = False) -> "Future[Outcome]":
        task = Task(request, alone=alone)
        with self._lock:
            if started := case.processes:
                accepted = started.submit(task)
            else:
                while self._processes is None or not self._processes.submit(task):
                    self._processes = Processes(
                        self._pickled,
                        timeout_seconds=self.timeout_seconds,
                        wall_seconds=self.timeout_seconds * (1 if self.verifier.waits else WALL),
                        slots=self.slots,
                        extra=self.extra,
                    )
                case.processes, accepted = self._processes, True
        if not accepted:
            task.future.set_exception(closed())
        return task.future

    # ---- who is at fault -------------------------------------------------------------------------------------------

    def _course(self, case: _Case, response: Response) -> Course:
        """What becomes of a sample."""
        first = yield from self._judged(case, request_of(response))
        if not first.fault or not self.verifier.harmless:
            return replace(first, fault=False)
        if response.other_golds:
            return (yield from self._one_by_one(case, response))
        functions = getattr(self.verifier, "functions", False)  # of a composite
        again = yield from self._judged(case, request_of(response, MAIN if functions else WHOLE), alone=True)
        if not again.fault and functions:
            whole = yield from self._judged(case, request_of(response), alone=True)
            return whole if not whole.fault else Judgement(False, error_class=whole.error_class)
        if not again.fault:
            return again
        tried = (yield self._gold(case, response)).judgement
        if tried.error_class:
            return _of_gold(tried)
        fault = replace(again, passed=False, fault=True)
        if not hasattr(self.verifier, "main") or fault.parts:
            return fault
        whole = (yield self._send(case, request_of(response, parts_of(fault.error_class)))).judgement
        return whole if whole.parts or not whole.fault else fault

    def _judged(self, case: _Case, request: bytes, *, alone: bool = False) -> Course:
        outcome = yield self._send(case, request, alone=alone)
        case.seconds += outcome.seconds
        case.kills += outcome.judgement.fault and outcome.judgement.error_class in KILLS
        return outcome.judgement

    def _one_by_one(self, case: _Case, response: Response) -> Course:
        """Each gold alone, so that one that cannot be judged by hides no other."""
        found: list[Judgement] = []
        for single in singles(response):
            prepared = self._prepared(single)
            if isinstance(prepared, Response):
                outcome = self._run(prepared, case.processes)
                outcome = outcome if isinstance(outcome, Outcome) else (yield outcome)
                case.seconds += outcome.seconds
                prepared = outcome.judgement
            found.append(prepared)
        return best(found)

    def _gold(self, case: _Case, response: Response) -> "Future[Outcome]":
        """The outcome of a harmless response to its gold, tried once for all responses to it."""
        prepared = _prepare(getattr(self.verifier, "main", self.verifier), self._probe(response))
        if isinstance(prepared, Judgement):
            decided: Future[Outcome] = Future()
            decided.set_result(Outcome(prepared, 0.0))
            return decided
        request = request_of(prepared, MAIN)
        key = _digest(request)
        with self._lock:
            known = self._golds.get(key)
            if known and not (known.done() and known.exception()):
                self._golds.move_to_end(key)
                return known
        tried = self._send(case, request, alone=True)
        with self._lock:
            self._golds[key] = tried
            while len(self._golds) > OFFENDERS:
                self._golds.popitem(last=False)
        return tried


def _prepare(verifier: Verifier, response: Response) -> Judgement | Response:
    try:
        return verifier.prepare(response)
    except Exception as error:  # data, as in the processes
        return failure(error_class_of(error))


def _of_gold(tried: Judgement) -> Judgement:
    """An abstention, where a harmless response fails."""
    return Judgement(False, error_class=f"gold_{tried.error_class.removeprefix('gold_')}")


def _digest(request: bytes) -> bytes:
    return hashlib.blake2b(request, digest_size=16).digest()
