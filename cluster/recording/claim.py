"""Who works in a run's folder: one process at a time, of this machine or of another that shares its disk.

A claim is a file `claim-N` that names its holder; the highest N counts. It is made with O_EXCL, which a network's disk
too grants to one process alone, so of two that start at once one wins. Its holder touches it every few seconds and
marks it at the end. A claim whose holder is gone is not taken away but followed: the next holder makes `claim-N+1`,
which one alone can do, and then removes those below. The highest one is never removed but a first one by its holder, so
no process that looked long ago can make one that counts.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ...contracts.errors import RunFolderError, StorageError

BEAT_SECONDS = 5.0  # between two touches of a claim
DEAD_SECONDS = 60.0  # a claim of another machine that nobody has touched for so long, as we watched it, has no holder
LONG_SECONDS = 86400.0  # nor has one whose file is so old: no two machines' clocks differ by that
NAME = "claim-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process, so that no other one can be mistaken for it."""

    host: str  # its name, for people
    machine: str  # a boot of a kernel and a space of process ids on it: processes of one can be looked up by their id
    pid: int
    started: str  # when the process began, as its kernel counts: a later one with its id has another
    since: str  # when it claimed the folder, for people
    ended: bool = False  # it has left the folder

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Claim:
    """This process's hold on a folder, from `take` to `release`."""

    def __init__(self, folder: Path, number: int, handle: int, made: list[Path]) -> None:
        self._folder, self._number, self._handle, self._made = folder, number, handle, made
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._beats.start()

    @classmethod
    def take(cls, folder: Path, tell: Callable[[str], None]) -> "Claim":
        """Claim `folder`, which is made where it is absent. `tell` hears of a claim whose holder is gone.

        Raises RunFolderError where a living process holds it, or where it cannot be written; StorageError where its
        disk is full.
        """
        try:
            return cls._take(folder, tell)
        except OSError as error:
            if error.errno in FULL:
                raise StorageError("output_dir has room", f"{folder}: {error.strerror}", "make room") from error
            found = f"{error.filename or folder}: {error.strerror or error}"
            raise RunFolderError("output_dir can be written", found, "choose another output_dir") from error

    @classmethod
    def _take(cls, folder: Path, tell: Callable[[str], None]) -> "Claim":
        while True:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            number = max(_numbers(folder), default=0)
            try:
                if number:
                    _wait_for_the_end(_file(folder, number), tell)
                handle = os.open(_file(folder, number + 1), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except (FileExistsError, FileNotFoundError):  # another was faster, or has left meanwhile
                continue
            try:
                _write(handle, ourselves())
            except OSError:
                _file(folder, number + 1).unlink()
                os.close(handle)
                _remove(made)
                raise
            if max(_numbers(folder), default=0) == number + 1:
                break
            _file(folder, number + 1).unlink(missing_ok=True)  # made by an old look: others have come and gone
            os.close(handle)
        for lower in _numbers(folder):
            if lower <= number:
                _file(folder, lower).unlink(missing_ok=True)
        return cls(folder, number + 1, handle, made)

    def check(self) -> None:
        """Raises RunFolderError where another holds the folder by now: this process stood still, and looked dead."""
        own, others = _file(self._folder, self._number), set(_numbers(self._folder)) - {self._number}
        try:
            ours = os.path.samestat(own.stat(), os.fstat(self._handle))
        except FileNotFoundError:  # removed by hand
            ours = not others
        if not ours or max(others, default=0) > self._number:
            rule = "one process at a time works in a run's folder"
            raise RunFolderError(rule, f"{self._folder} was taken over by another", "let that one go on")

    def release(self) -> None:
        """Leave the folder to others; where nothing was written into it, it goes."""
        self._ended.set()
        self._beats.join()
        own = _file(self._folder, self._number)
        with suppress(OSError):  # whatever is left behind names a process that is gone
            if os.path.samestat(own.stat(), os.fstat(self._handle)):
                if self._number == 1:
                    own.unlink()
                else:
                    _write(self._handle, ourselves(ended=True))
        os.close(self._handle)
        _remove(self._made)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that does not answer: the next one may come through
                os.utime(self._handle)


def holder_of(folder: Path) -> Holder | None:
    """Who claims the folder as its file says, be it alive or not; None where nobody does."""
    with suppress(OSError):
        number = max(_numbers(folder), default=0)
        holder = _read(_file(folder, number))[0] if number else None
        return None if holder is None or holder.ended else holder
    return None


def is_claim(path: Path) -> bool:
    return path.name.startswith(NAME) and path.name.removeprefix(NAME).isdigit()


def _wait_for_the_end(path: Path, tell: Callable[[str], None]) -> None:
    """Return once the claim's holder is known to be gone. Raises RunFolderError once it is known to live.

    A process of this machine can be looked up. One of another shows that it lives by touching its claim: it is watched
    until it does, or for as long as no living one takes. No two machines' clocks are compared.
    """
    _, first = _read(path)
    watched = time.monotonic()
    told = False
    while True:
        holder, touched = _read(path)
        if holder and holder.ended:
            return
        if holder and holder.machine == machine():
            if began(holder.pid) in (holder.started, "unknown"):
                raise _held(path, holder)
            break
        if touched != first:
            if holder:
                raise _held(path, holder)
            first, watched = touched, time.monotonic()  # it is being written
        if time.time() - touched / 1e9 > LONG_SECONDS or time.monotonic() - watched > DEAD_SECONDS:
            break
        if not told and time.monotonic() - watched > 1:
            told = True
            tell(f"{path} names {holder or 'nobody'}: waiting up to {DEAD_SECONDS:.0f} s for a sign of life")
        time.sleep(0.1)
    tell(f"taking over {path.parent}: {holder or 'its last holder'} is gone")


def _held(path: Path, holder: Holder) -> RunFolderError:
    found = f"{path.parent} is held by {holder}"
    return RunFolderError("one process at a time works in output_dir", found, "end that one, or choose another")


def _file(folder: Path, number: int) -> Path:
    return folder / f"{NAME}{number}"


def _numbers(folder: Path) -> list[int]:
    return [int(path.name.removeprefix(NAME)) for path in folder.iterdir() if is_claim(path)]


def _read(path: Path) -> tuple[Holder | None, int]:
    """Whom a claim names, None while it is being written, and when it was touched (ns). Opening asks a network's disk
    anew."""
    with path.open("rb") as file:
        data, touched = file.read(), os.fstat(file.fileno()).st_mtime_ns
    try:
        return Holder(**json.loads(data)), touched
    except (ValueError, TypeError):
        return None, touched


def _write(handle: int, holder: Holder) -> None:
    data = json.dumps(asdict(holder), indent=1).encode()
    if os.pwrite(handle, data, 0) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(handle, len(data))
    os.fsync(handle)


def _remove(made: list[Path]) -> None:
    """Folders that were made for a claim, those that are still empty."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def ourselves(ended: bool = False) -> Holder:
    pid, now = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %z")
    started = began(pid) or "unknown"
    return Holder(host=socket.gethostname(), machine=machine(), pid=pid, started=started, since=now, ended=ended)


def machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # two containers may give one id to two processes
    except OSError:  # no Linux
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def began(pid: int) -> str | None:
    """When a process began, as its kernel counts; None where it is gone, or waits for its parent to hear of it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        pass
    try:
        if Path("/proc/self/stat").exists():
            os.kill(pid, 0)  # the processes of others may be hidden in /proc
            return "unknown"
        return str(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
    except (psutil.AccessDenied, PermissionError):
        return "unknown"
