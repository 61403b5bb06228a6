"""What can be said of an actor that has died: where it ran, how it ended, and what it wrote last."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import state, worker
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError

LAST_LINES = 3  # of its log
LINE_CHARACTERS = 200
BY_KERNEL = "killed from outside (SIGKILL, or the kernel for want of memory) or crashed"
CAUSES = (  # a mark in Ray's text, and what it means
    (r"NODE_OUT_OF_MEMORY|low on memory|memory usage threshold", "Ray ended it: its machine ran out of memory"),
    (r"node (has )?died|node_died|NODE_DIED", "its machine left the cluster"),
    (r"ray\.kill|INTENDED_SYSTEM_EXIT", "it was ended by Ray"),
    (r"INTENDED_USER_EXIT|exit\(\)|SystemExit", "it left by itself (exit)"),
    (r"connection error code|SYSTEM_ERROR|SIGSEGV", BY_KERNEL),
)


Record: Any = gcs_pb2.ActorTableData  # pyright: ignore[reportAttributeAccessIssue]
ActorState: Any = Record.ActorState


def all_actors() -> list[Any]:
    """What the cluster's head knows of all actors, of every job."""
    accessor = state.state._connect_and_get_accessor()
    return [Record.FromString(raw) for raw in accessor.get_actor_table(None, None)]


def actor_record(actor_id: str) -> Any:
    """What the cluster's head knows of an actor, or None. Without a dashboard the table itself is read."""
    accessor = state.state._connect_and_get_accessor()
    found = accessor.get_actor_info(ray.ActorID(bytes.fromhex(actor_id)))
    return None if found is None else Record.FromString(found)


def obituary(who: str, actor_id: str | None, text: str) -> str:
    """Some lines on the dead actor that is called `who`; `text`: what Ray said."""
    record = None
    with suppress(RayError, RuntimeError, OSError):  # the head may have gone too: then Ray's own text is all
        record = actor_record(actor_id) if actor_id else None
    if record is None:
        return f"{who} has died: {cause_of(text)}"
    place = f"pid {record.pid} on {record.address.ip_address or 'no node yet'}"
    lines = [f"{who} has died ({place}): {cause_of(text)}{_kernel_says(record)}"]
    log = _log_of(record)
    if log is None:
        return lines[0]
    written = last_lines(log)
    if written is None:
        return "\n".join([*lines, f"its log, on that machine: {log}"])
    ends = "it ends:" if written else "it is empty"
    return "\n".join([*lines, f"its log {log}; {ends}", *(f"| {line}" for line in written)])


def cause_of(text: str) -> str:
    """How an actor ended, from Ray's text on it."""
    for mark, meaning in CAUSES:
        if re.search(mark, text):
            return meaning
    return first_line(text)


def first_line(text: str) -> str:
    """The first line of a text from elsewhere that says something, short and without its colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[0].replace("\t", " ")[:LINE_CHARACTERS] if lines else "no reason is known"


def last_lines(file: Path, count: int = LAST_LINES) -> list[str] | None:
    """The last lines of a log that say something; None where it is not on this machine."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 64 * 1024))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return None
    return tail_of(text, count)


def tail_of(text: str, count: int = LAST_LINES) -> list[str]:
    """The last `count` lines that say something, each of bounded length, tabs and colours taken out."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.rstrip().replace("\t", "  ") for line in plain.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(":")]  # Ray's own marks, :actor_name:…
    return [line[:LINE_CHARACTERS] for line in own[-count:]]


def _log_of(record: Any) -> Path | None:
    """The file that a worker's stderr goes to. Ray's folders have one name on all machines."""
    node = worker.global_worker.node
    name = record.address.worker_id.hex()
    if node is None or not name:
        return None
    folder = Path(node.get_logs_dir_path())
    found = sorted(folder.glob(f"worker-{name}-*-{record.pid}.err"))
    return found[0] if found else folder / f"worker-{name}-*-{record.pid}.err"


# ---- the kernel's word -----------------------------------------------------------------------------------------------

CGROUP_FILES = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat")


def oom_kills(files: Iterable[str] = CGROUP_FILES) -> int | None:
    """Processes that this machine's kernel has ended for want of memory so far; None where it does not say."""
    for name in files:
        with suppress(OSError, ValueError):
            counts: Mapping[str, str] = dict(
                line.split(maxsplit=1) for line in Path(name).read_text(encoding="utf-8").splitlines() if " " in line
            )
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return None


_kills_before = oom_kills()


def _kernel_says(record: Any) -> str:
    """Whether the kernel has ended a process of this machine since the run began, where the actor was on it."""
    kills = oom_kills()
    here = record.address.node_id.hex() == ray.get_runtime_context().get_node_id()
    if not here or kills is None or _kills_before is None or kills <= _kills_before:
        return ""
    return "; the kernel has ended a process for want of memory since the run began"
