"""Verifiers in processes that can be killed: a budget of seconds for each sample, and no verdict lost in silence.

What a verifier can decide at once is decided in the calling process. The rest goes, one task a sample, to a pebble
pool of forked processes. A sample over its budget costs its process, and abstains as "timeout"; a process that dies
abstains as "crash"; an exception abstains under its name. The processes come from a fork server, started at the first
need, which has the verifiers imported and warm: a killed one is replaced in about 10 ms, and start-up never counts
against a sample's budget. They die with whoever owns the pool, however that ends.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pebble import ProcessExpired, ProcessPool

from ..contracts.errors import VerifierError
from .verifiers import PooledVerifier

PROCESSES = 2  # so that one sample that hangs does not hold up the rest
MEMORY_BYTES = 4 * 2**30  # address space of one verifier process
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one sample; abstained where `error_class` is not empty."""

    passed: bool
    answer: str
    seconds: float
    error_class: str = ""


class VerifierPool:
    """Judges with `verifier`, which must pickle, in PROCESSES processes; `timeout_seconds` is each sample's budget."""

    def __init__(self, verifier: PooledVerifier, timeout_seconds: float) -> None:
        self.verifier, self.timeout_seconds = verifier, timeout_seconds
        self._pool: ProcessPool | None = None

    def judge(self, texts: Sequence[str], golds: Sequence[str]) -> list[Outcome]:
        """An outcome for each text, in order. An empty gold abstains as "no_gold". Raises VerifierError."""
        outcomes: list[Outcome | None] = []
        pending: dict[int, Future[Outcome]] = {}
        for i, (text, gold) in enumerate(zip(texts, golds, strict=True)):
            start = time.perf_counter()
            if not gold.strip():
                outcomes.append(Outcome(False, "", 0.0, "no_gold"))
                continue
            quick = self.verifier.decide_quickly(text, gold)
            outcomes.append(Outcome(quick.passed, quick.answer, time.perf_counter() - start) if quick else None)
            if quick is None:
                pending[i] = self._schedule(text, gold)
        for i, future in pending.items():
            outcomes[i] = self._collect(future)
        return [outcome for outcome in outcomes if outcome is not None]

    def _schedule(self, text: str, gold: str) -> "Future[Outcome]":
        if self._pool is None or not self._pool.active:
            self.close()
            self._pool = self._start()
        return self._pool.schedule(_judge, args=(self.verifier, text, gold), timeout=self.timeout_seconds)

    def _start(self) -> ProcessPool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", f"{__package__}.preload"])
        return ProcessPool(max_workers=PROCESSES, context=context, initializer=_start_process)

    def _collect(self, future: "Future[Outcome]") -> Outcome:
        try:
            return future.result()
        except TimeoutError:
            return Outcome(False, "", self.timeout_seconds, "timeout")
        except ProcessExpired:
            return Outcome(False, "", 0.0, "crash")
        except MemoryError:
            return Outcome(False, "", 0.0, "memory")
        except BrokenProcessPool as error:
            remedy = "see the actor's log; the machine may be short of memory"
            raise VerifierError("verifier processes start, and idle ones stay", str(error), remedy) from error
        except Exception as error:  # whatever a verifier raises is its verdict's error class
            return Outcome(False, "", 0.0, type(error).__name__)

    def close(self) -> None:
        """End the processes; the next sample that needs one starts them again."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


def _start_process() -> None:
    """In each verifier process: die with the parent and at once when told to, and keep within the memory."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler in Python would wait for the end of a long C call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _judge(verifier: PooledVerifier, text: str, gold: str) -> Outcome:
    start = time.perf_counter()
    judgement = verifier(text, gold)
    return Outcome(judgement.passed, judgement.answer, time.perf_counter() - start)
