"""A verifier that does what it is told: hangs, eats, crashes, lies. A module of its own, for processes to import."""

import decimal
import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np

from tutorloop.contracts.protocols import Judgement, Response

PATIENCE = 60.0  # seconds that anything here may take on a busy machine
MIB = 2**20


def eat(mebibytes):
    block = bytearray(mebibytes * MIB)
    for start in range(0, len(block), 4096):
        block[start] = 1
    return block


def sockets():
    """The file descriptors of a verifier process that are sockets."""
    return [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}") and stat.S_ISSOCK(os.fstat(fd).st_mode)]


class Behaving:
    """Does what the gold says, as verifiers of other people's code do. `row` is a path, where one is needed."""

    needs_gold, waits, harmless = True, False, ""

    def __init__(self):
        self.leaked = []

    def prepare(self, response):
        if response.gold == "raise early":
            raise LookupError
        return Judgement(True, "at once") if response.gold == "decided" else response

    def __call__(self, response):
        what, _, number = response.gold.partition(" ")
        return getattr(self, what)(response, int(number or 0)) or Judgement(True, str(os.getpid()))

    def fine(self, response, number): ...

    def hang(self, response, number):
        pow(7, 10**9)  # one long call in C: no signal handler of Python runs meanwhile

    def leave(self, response, number):
        os._exit(3)

    def abort(self, response, number):
        os.abort()

    def fail(self, response, number):
        raise LookupError("no such answer")

    def depart(self, response, number):
        sys.exit(2)

    def recurse(self, response, number):
        return self.recurse(response, number)

    def return_junk(self, response, number):
        return threading.Lock()

    def return_odd(self, response, number):
        return Judgement(np.bool_(True), 7, np.float32(0.5), "", (("style", np.float64(0.25)),))

    def return_much(self, response, number):
        return Judgement(True, "9" * 10**7)

    def allocate(self, response, number):
        eat(number)

    def die_full(self, response, number):
        block = eat(number)
        block[0] = 1
        os.abort()

    def leak(self, response, number):
        self.leaked.append(eat(number))

    def sleep(self, response, number):
        time.sleep(number / 1000)
        return Judgement(True, response.text)

    def count(self, response, number):
        with open(response.row, "a") as file:
            file.write(".")
        time.sleep(0.5)

    def print(self, response, number):
        print("[bold]printed[/]", response.text)
        os.write(1, b"printed\n")
        os.write(2, b"printed\n")
        os.system("echo printed; echo printed >&2")

    def digest(self, response, number):
        return Judgement(True, hashlib.sha256(response.text.encode("utf-8", "surrogatepass")).hexdigest())

    def reply_junk(self, response, number):
        for fd in sockets():
            os.write(fd, b"[false, true, 1, 1\n")
        time.sleep(PATIENCE)

    def reply_for_ever(self, response, number):
        while True:
            for fd in sockets():
                os.write(fd, b"9" * MIB)

    def hang_up(self, response, number):
        for fd in sockets():
            os.close(fd)

    def kill_server(self, response, number):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(PATIENCE)

    def start_another(self, response, number):
        child = subprocess.Popen(["sleep", "1000"])
        Path(response.row).write_text(str(child.pid))
        time.sleep(PATIENCE)

    def meet(self, response, number):
        """Pass only while `number` samples are here at the same time."""
        folder = Path(response.row)
        (folder / response.text).touch()
        while len(list(folder.iterdir())) < number:
            time.sleep(0.01)


class Blaming(Behaving):
    """Does what the text says, where the gold is fine: a response can be at fault."""

    harmless = "fine"

    def __call__(self, response):
        told = super().__call__(response)
        what, _, number = response.text.partition(" ")
        return getattr(self, what)(response, int(number or 0)) or told

    def burn(self, response, number):
        """So many milliseconds of a CPU."""
        start = time.process_time()
        while time.process_time() - start < number / 1000:
            pass

    def nap(self, response, number):
        time.sleep(number / 1000)

    def disturb(self, response, number):
        """What judging may leave behind, such as an exception within mpmath; says what the one before left."""
        import mpmath
        from sympy.core.random import rng

        draws, limits = (random.random(), rng.random()), (sys.getrecursionlimit(), sys.get_int_max_str_digits())
        before = (mpmath.mp.prec, decimal.getcontext().prec, *limits, *draws, [kind for kind, *_ in warnings.filters])
        before = (*before, signal.getitimer(signal.ITIMER_REAL)[0])
        mpmath.mp.prec = 500
        decimal.getcontext().prec = 3
        sys.setrecursionlimit(5000)
        sys.set_int_max_str_digits(0)
        warnings.simplefilter("error")
        signal.setitimer(signal.ITIMER_REAL, 100)
        return Judgement(True, str(before))

    def mark(self, response, number):
        """Write down when it begins; burn a CPU."""
        with open(response.row, "a") as file:
            file.write(f"{response.text} {os.getpid()} {time.monotonic()}\n")
        self.hang(response, number)


def disturbing():
    import sympy  # noqa: F401 before the first sample, as verifiers of formulas have it

    return object.__new__(Disturbing)


class Disturbing(Blaming):
    def __reduce__(self):
        return disturbing, ()


class Raising:
    """Raises for the gold `bad`, and for the response `bad` with any."""

    needs_gold, waits, harmless = True, False, "harmless"

    def prepare(self, response):
        return response

    def __call__(self, response):
        if "bad" in (response.text, response.gold):
            raise LookupError
        return Judgement(response.text == response.gold, response.text)


class Waiting(Behaving):
    waits = True


class Unpicklable(Behaving):
    def __reduce__(self):
        raise TypeError("it holds a lock")


def refuse():
    raise ImportError("no module named sphinx")


class Unloadable(Behaving):
    def __reduce__(self):
        return refuse, ()


# ---- reward functions: here, since a process imports the whole module that a function is of --------------------------


def half(completions):
    if completions[0].startswith("nap"):
        raise LookupError
    if completions[0].startswith("burn"):
        while True:
            pass
    return [0.5]


def describe(prompts, completions, answer, level, **columns):
    """A reward function: hangs at level 9, and else scores a tenth of the level where the answer is in the text."""
    if level == [9]:
        pow(7, 10**9)
    return [level[0] / 10 if answer[0] in completions[0] and prompts[0].startswith("What") else None]


def cheer(completions, **columns):
    return [float(completions[0].count("!"))]


def ask(*golds, text="text"):
    return [Response(text, gold) for gold in golds]


def errors(outcomes):
    return [outcome.judgement.error_class for outcome in outcomes]
