"""Verifiers in processes that can be killed: a budget of seconds and memory for each sample, no verdict lost.

What a verifier can decide at once is decided in the calling thread (`prepare`). The rest goes to processes, one sample
at a time in each. A sample over its budget costs its process and abstains as "timeout" or "memory"; a process that dies
abstains as "crash"; an exception abstains under its name. What was killed twice is not run a third time, and abstains
as "quarantined". Equal samples in flight run once.
"""

import hashlib
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

from ..contracts.errors import VerifierError
from ..contracts.protocols import Judgement, Response, Verifier, error_class_of
from .fork_server import request_of
from .processes import Outcome, Processes, Task

WAITING_SLOTS = 16  # of verifiers that wait for others
EXTRA = 4  # slow samples beside the slots, for each slot
KILLS = ("timeout", "memory", "crash")
MOST_KILLS = 2
OFFENDERS = 4096  # the last so many are known


class VerifierPool:
    """Judges with `verifier`, which must pickle, in processes; all methods can be called from several threads at once.

    timeout_seconds and memory_gib are each sample's budget, memory over what the warm process has. `processes` samples
    run side by side, and beside them at most 4 · `processes` that have had 0.25 s of a CPU, or a second; 16 and none
    where the verifier waits for others. Raises VerifierError: here where the verifier cannot be pickled, and from
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
        try:
            prepared = self.verifier.prepare(response)
        except Exception as error:  # data, as in the processes
            prepared = Judgement(False, error_class=error_class_of(error))
        if isinstance(prepared, Judgement):
            return Outcome(prepared, time.perf_counter() - start)
        return self._run(request_of(prepared))

    def _run(self, request: bytes) -> "Outcome | Future[Outcome]":
        key = hashlib.blake2b(request, digest_size=16).digest()
        with self._lock:
            if self._kills.get(key, 0) >= MOST_KILLS:
                self._kills.move_to_end(key)
                return Outcome(Judgement(False, error_class="quarantined"), 0.0)
            if key in self._in_flight:
                return self._in_flight[key]
            task = Task(request, lambda outcome: self._ended(key, outcome))
            while self._processes is None or not self._processes.submit(task):
                self._processes = Processes(
                    self._pickled, timeout_seconds=self.timeout_seconds, slots=self.slots, extra=self.extra
                )
            self._in_flight[key] = task.future
            return task.future

    def _ended(self, key: bytes, outcome: Outcome | None) -> None:
        with self._lock:
            self._in_flight.pop(key, None)
            if outcome and outcome.judgement.error_class in KILLS:
                self._kills[key] = self._kills.pop(key, 0) + 1
                while len(self._kills) > OFFENDERS:
                    self._kills.popitem(last=False)
