"""Verifiers in processes that can be killed: a budget of CPU time and memory for each sample, no verdict lost.

What a verifier can decide at once is decided in the calling thread (`prepare`). The rest goes to processes, one sample
at a time in each. A sample over its budget costs its process and fails as "timeout" or "memory"; a process that dies
fails as "crash"; an exception fails under its name. Equal samples in flight run once.

Who is at fault. Of a verifier that reads answers (`harmless`) a sample that failed is tried again, one such sample of
the pool at a time. If it fails again, its gold is tried with a harmless response: where that fails too, the sample
abstains as "gold_…", and else the failure is the response's `fault`. Of other verifiers, which run code of one's own or
ask a server, a failure is never the response's. What was killed twice is known, and not run a third time.
"""

import contextlib
import hashlib
import pickle
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace

from ..contracts.errors import VerifierError
from ..contracts.protocols import Judgement, Response, Verifier, error_class_of
from .fork_server import request_of
from .processes import Outcome, Processes, Task

WAITING_SLOTS = 16  # of verifiers that wait for others
EXTRA = 4  # slow samples beside the slots, for each slot
WALL = 10  # times its CPU time that a sample may take in all, where the verifier does not wait
KILLS = ("timeout", "memory", "crash")
MOST_KILLS = 2
OFFENDERS = 4096  # the last so many are known, and as many golds that were tried


@dataclass(slots=True, eq=False)
class _Case:
    """A sample on its way through the processes."""

    key: bytes
    response: Response
    request: bytes
    seconds: float = 0.0
    future: "Future[Outcome]" = field(default_factory=Future)


class VerifierPool:
    """Judges with `verifier`, which must pickle, in processes; all methods can be called from several threads at once.

    timeout_seconds and memory_gib are each sample's budget: seconds of a CPU (ten times as long in all; of a verifier
    that waits for others, seconds in all), and memory over what the warm process has. `processes` samples run side by
    side, and beside them at most 4 · `processes` that have had 0.25 s of a CPU, or a second; 16 and none where the
    verifier waits. Raises VerifierError: here where the verifier cannot be pickled, and from
    `judge` or the future where no process could be started.
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
        self._kills: OrderedDict[bytes, int] = OrderedDict()
        self._settled: OrderedDict[bytes, Judgement] = OrderedDict()  # of samples that were killed
        self._golds: OrderedDict[bytes, str] = OrderedDict()  # golds that were tried: their error class or ""
        self._tried: dict[bytes, list[tuple[_Case, Judgement]]] = {}  # golds being tried, and what waits for it
        self._again: deque[_Case] = deque()  # to be tried again; the first of them is

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
        try:
            return self.verifier.prepare(response)
        except Exception as error:  # data, as in the processes
            name = error_class_of(error)
        if not self.verifier.harmless:
            return Judgement(False, error_class=name)
        try:
            self.verifier.prepare(replace(response, text=self.verifier.harmless))
        except Exception as error:
            return Judgement(False, error_class=f"gold_{error_class_of(error)}")
        return Judgement(False, error_class=name, fault=True)

    def _run(self, response: Response) -> "Outcome | Future[Outcome]":
        request = request_of(response)
        key = _digest(request)
        with self._lock:
            if self._kills.get(key, 0) >= MOST_KILLS:
                self._kills.move_to_end(key)
                return Outcome(self._settled.get(key, Judgement(False, error_class="quarantined")), 0.0)
            if key in self._in_flight:
                return self._in_flight[key]
            case = _Case(key, response, request)
            case.future.set_running_or_notify_cancel()  # nobody can cancel it
            self._in_flight[key] = case.future
        self._send(case, request, lambda outcome: self._first(case, outcome))
        return case.future

    def _send(self, case: _Case, request: bytes, ended: Callable[[Outcome], None]) -> None:
        """Have a request judged for a case; `ended` runs in the processes' thread."""
        task = Task(request)
        with self._lock:
            while self._processes is None or not self._processes.submit(task):
                self._processes = Processes(
                    self._pickled,
                    timeout_seconds=self.timeout_seconds,
                    wall_seconds=self.timeout_seconds * (1 if self.verifier.waits else WALL),
                    slots=self.slots,
                    extra=self.extra,
                )

        def done(future: "Future[Outcome]") -> None:
            if error := future.exception():
                return self._refuse(case, error)
            ended(future.result())

        task.future.add_done_callback(done)

    def _refuse(self, case: _Case, error: BaseException) -> None:
        """No process could be started, or the pool was closed: of this case, and of those that wait behind it."""
        with self._lock:
            cases = {case, *self._again, *(one for waiting in self._tried.values() for one, _ in waiting)}
            self._again.clear()
            self._tried.clear()
            for one in cases:
                self._in_flight.pop(one.key, None)
        for one in cases:
            with contextlib.suppress(InvalidStateError):  # it was settled meanwhile
                one.future.set_exception(error)

    # ---- who is at fault -------------------------------------------------------------------------------------------

    def _first(self, case: _Case, outcome: Outcome) -> None:
        judgement = self._counted(case, outcome)
        if not judgement.fault or not self.verifier.harmless:
            return self._settle(case, replace(judgement, fault=False))
        with self._lock:
            self._again.append(case)
            alone = len(self._again) == 1
        if alone:
            self._send(case, case.request, lambda outcome: self._second(case, outcome))

    def _second(self, case: _Case, outcome: Outcome) -> None:
        judgement = self._counted(case, outcome)
        with self._lock:
            self._again.popleft()
            following = self._again[0] if self._again else None
        if following:
            self._send(following, following.request, lambda outcome: self._second(following, outcome))
        if not judgement.fault:
            return self._settle(case, judgement)
        self._try_gold(case, judgement)

    def _try_gold(self, case: _Case, judgement: Judgement) -> None:
        """Blame the gold if a harmless response to it fails too, and else the response."""
        probe = replace(case.response, text=self.verifier.harmless)
        key = _digest(request_of(probe))

        def known(error_class: str) -> None:
            with self._lock:
                self._golds[key] = error_class
                while len(self._golds) > OFFENDERS:
                    self._golds.popitem(last=False)
                waiting = self._tried.pop(key, [])
            for one, found in waiting:
                self._settle(one, _blamed(error_class, found))

        with self._lock:
            if key in self._golds:
                found, tried = self._golds[key], True
            else:
                found, tried = "", key in self._tried
                self._tried.setdefault(key, []).append((case, judgement))
                if tried:
                    return
        if tried:
            return self._settle(case, _blamed(found, judgement))
        prepared = self._prepared(probe)
        if isinstance(prepared, Judgement):
            return known(prepared.error_class)
        self._send(case, request_of(prepared), lambda outcome: known(outcome.judgement.error_class))

    def _counted(self, case: _Case, outcome: Outcome) -> Judgement:
        case.seconds += outcome.seconds
        if outcome.judgement.error_class in KILLS and outcome.judgement.fault:
            with self._lock:
                self._kills[case.key] = self._kills.pop(case.key, 0) + 1
                while len(self._kills) > OFFENDERS:
                    self._settled.pop(self._kills.popitem(last=False)[0], None)
        return outcome.judgement

    def _settle(self, case: _Case, judgement: Judgement) -> None:
        with self._lock:
            self._in_flight.pop(case.key, None)
            if case.key in self._kills and self.verifier.harmless:
                self._settled[case.key] = judgement
        with contextlib.suppress(InvalidStateError):  # it was refused meanwhile
            case.future.set_result(Outcome(judgement, case.seconds))


def _blamed(of_gold: str, judgement: Judgement) -> Judgement:
    """A failure of a response, or of its gold where a harmless response fails as `of_gold`."""
    if of_gold:
        return replace(
            judgement, error_class=of_gold if of_gold.startswith("gold_") else f"gold_{of_gold}", fault=False
        )
    return judgement


def _digest(request: bytes) -> bytes:
    return hashlib.blake2b(request, digest_size=16).digest()
