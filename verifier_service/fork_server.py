"""The fork server of verifier processes, and what its children do. It runs in a process of its own, with one thread.

It loads the verifier and tries it once, then forks at its owner's word: a child is ready in a few milliseconds and
start-up counts against no sample. A child writes each judgement as a line of JSON: what comes out of a process that
hostile text went through is never unpickled.

Nobody outlives the owner: the server ends at the end of its control socket or of the thread that started it, and its
children with it. A child has its own process group, which is killed as a whole, and nothing that it prints is seen.
"""

import contextlib
import ctypes
import decimal
import gc
import json
import marshal
import os
import pickle
import random
import resource
import select
import signal
import socket
import struct
import sys
import warnings
from operator import attrgetter
from typing import Any

from ..contracts.protocols import Judgement, Response, Verifier, error_class_of

LENGTH = struct.Struct("<Q")
FIELDS = attrgetter(*Response.__dataclass_fields__)
ANSWER_CHARACTERS = 4096  # of an answer that leaves the process
PR_SET_PDEATHSIG = 1
WHOLE, MAIN = "", "main"  # what is asked of a verifier
FLOAT_BITS = 53  # mpmath's own precision
RECURSION = sys.getrecursionlimit()
WARM_UP = (  # spellings of x, y, z that take a parser through much of its grammar
    ("\\frac{x}{2}+\\sqrt{3}", "0.5x+3^{1/2}"),
    ("(x+1)(x-\\frac{1}{2})", "x^2+\\frac{x}{2}-\\frac{1}{2}"),
    ("\\left(\\frac{1}{2}, 2\\pi\\right]", "(0.5, \\pi \\cdot 2]"),
    ("\\{1, \\sqrt{2}\\}", "\\{\\sqrt{2}, 1\\}"),
    ("x = 3, y = -2", "(3, -2)"),
    ("x \\in (-\\infty, 1] \\cup [2, \\infty)", "x \\le 1 \\text{ or } x \\ge 2"),
    ("y = 2x + \\ln 2", "y - 2x = \\ln(2)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}"),
)


def request_of(response: Response, asked: str = WHOLE) -> bytes:
    """What a child reads: its length, and what is asked of a response, in a form that holds any string and is equal
    for equal ones. `asked`: the verifier's judgement, that of its MAIN part alone, or `parts_of` an error class."""
    values = marshal.dumps((asked, *FIELDS(response)), 0)
    return LENGTH.pack(len(values)) + values


def parts_of(error_class: str) -> str:
    """Asks a composite verifier for the parts of a response's reward, its MAIN part having failed so."""
    return f"parts {error_class}"


def serve(control_fd: int, owner: int) -> None:
    """The server's life. The pickled verifier and the memory budget in bytes are on stdin; `owner` is a process id."""
    _die_with(owner, signal.SIGTERM)
    control = socket.socket(fileno=control_fd)
    try:
        verifier, memory_bytes = pickle.load(sys.stdin.buffer)
        _warm_up()
    except BaseException as error:  # the user's module may even exit
        control.send(f"failed {type(error).__name__}: {error}".encode("utf-8", "replace")[:4096])
        return
    for fd in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    gc.freeze()
    _Server(control, verifier, memory_bytes).run()


def _warm_up() -> None:
    """Do once what makes a first call slow: imports, regular expressions, parser tables."""
    if f"{__package__}.math" in sys.modules:
        from .math import MathVerifier

        judge = MathVerifier()
        for answer, gold in WARM_UP:
            judge(Response(f"\\boxed{{{answer}}}", gold))


def _die_with(parent: int, signal_number: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os._exit(1)


class _Server:
    """Obeys `spawn N` (with a socket) and `kill N`; says `ready`, and `crash N` or `memory N` at a death."""

    def __init__(self, control: socket.socket, verifier: Verifier, memory_bytes: int) -> None:
        self.control, self.verifier, self.memory_bytes = control, verifier, memory_bytes
        self.pids: dict[int, int] = {}
        self.resident: dict[int, int] = {}  # bytes of each process as it started

    def run(self) -> None:
        signalled, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # it is read below, where nothing is left half done
        try:
            self.control.send(b"ready")
            while True:
                ready, _, _ = select.select([self.control, signalled], [], [])
                if signalled in ready:
                    if signal.SIGTERM in os.read(signalled, 4096):
                        return
                    self._reap()
                if self.control in ready and not self._obey():
                    return
        except OSError:  # the owner is gone
            return
        finally:
            for pid in self.pids.values():
                _kill_group(pid)

    def _obey(self) -> bool:
        message, fds, _, _ = socket.recv_fds(self.control, 64, 1)
        if not message:
            return False
        verb, number = message.decode().split()
        if verb == "spawn":
            self._spawn(int(number), socket.socket(fileno=fds[0]))
        elif int(number) in self.pids:
            _kill_group(self.pids[int(number)])
        return True

    def _spawn(self, number: int, connection: socket.socket) -> None:
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self.control.send(f"crash {number} {error}".encode())
            return
        if pid == 0:
            try:
                self.control.close()
                _become_child(server)
                _judge_all(connection, self.verifier, self.memory_bytes)
            finally:
                os._exit(1)
        connection.close()
        self.pids[number] = pid
        self.resident[number] = _resident(pid)
        with contextlib.suppress(OSError):  # the child does it too, whoever is first
            os.setpgid(pid, pid)

    def _reap(self) -> None:
        """Tell the owner of each death. Its group is killed while its id cannot be another's yet."""
        while dead := _dead_child():
            _kill_group(dead)
            _, _, usage = os.wait4(dead, 0)
            number = next(number for number, pid in self.pids.items() if pid == dead)
            del self.pids[number]
            full = usage.ru_maxrss * 1024 - self.resident.pop(number) >= 0.8 * self.memory_bytes
            self.control.send(f"{'memory' if full else 'crash'} {number}".encode())


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _dead_child() -> int | None:
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found else None


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a new child may not have its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _become_child(server: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):  # a handler in Python would wait for the end of a long C call
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)
    _die_with(server, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, this goes first


def _judge_all(connection: socket.socket, verifier: Verifier, memory_bytes: int) -> None:
    """Judge until the owner closes. The budget is of the sample: what the process had before it does not count.

    A process that has grown by half of the budget, or ran out of it, says so in its last reply and ends.
    """
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    warm, (_, most) = _address_space(statm), resource.getrlimit(resource.RLIMIT_AS)
    filters = list(warnings.filters)
    connection.sendall(b"%d\n" % os.getpid())
    stream = connection.makefile("rb")
    while header := stream.read(LENGTH.size):
        asked, *values = marshal.loads(stream.read(*LENGTH.unpack(header)))
        limit = _address_space(statm) + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
        _as_new(filters)
        judgement = _judge(verifier, asked, Response(*values))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        last = judgement.error_class == "memory" or _address_space(statm) - warm > memory_bytes / 2
        connection.sendall(json.dumps([last, *_reply(judgement)]).encode() + b"\n")
        if last:
            return


def _as_new(filters: list[Any]) -> None:
    """Undo what the sample before may have left in this process, so that no verdict hangs on it (18 µs): a precision
    that an exception did not restore, random states (sympy compares at random points), limits, warnings made errors,
    an alarm that would go off in the next sample."""
    if mpmath := sys.modules.get("mpmath"):
        mpmath.mp.prec = FLOAT_BITS
    if sympys := sys.modules.get("sympy.core.random"):
        sympys.rng.seed(0)
    random.seed(0)
    decimal.setcontext(decimal.Context())
    sys.setrecursionlimit(RECURSION)
    sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    if warnings.filters != filters:
        warnings.filters[:] = filters  # pyright: ignore[reportIndexIssue]
    signal.setitimer(signal.ITIMER_REAL, 0)


def _address_space(statm: int) -> int:
    return int(os.pread(statm, 32, 0).split()[0]) * resource.getpagesize()


def _judge(verifier: Any, asked: str, response: Response) -> Judgement:
    try:
        if asked.startswith("parts "):
            judgement = verifier.of_fault(asked.removeprefix("parts "), response)
        else:
            judgement = (getattr(verifier, "main", verifier) if asked == MAIN else verifier)(response)
        if not isinstance(judgement, Judgement):
            raise TypeError(f"a verifier returns a Judgement, not {type(judgement)}")
        json.dumps(_reply(judgement))
        return judgement
    except MemoryError:
        return Judgement(False, error_class="memory", fault=True)
    except BaseException as error:  # whatever a verifier raises, SystemExit too, is its verdict's error class
        return Judgement(False, error_class=error_class_of(error), fault=True)


def _reply(judgement: Judgement) -> list[Any]:
    """What `Judgement(*reply)` makes again; numpy's numbers become Python's."""
    parts = [(str(name), float(score)) for name, score in judgement.parts]
    answer, error_class = str(judgement.answer)[:ANSWER_CHARACTERS], str(judgement.error_class)[:256]
    rule = str(judgement.rule)[:256]
    return [bool(judgement.passed), answer, float(judgement.score), error_class, parts, bool(judgement.fault), rule]
