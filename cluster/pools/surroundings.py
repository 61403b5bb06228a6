"""What a private Ray needs of the machine: a short folder for its sockets, a place for its token, shared memory.

What can be put right plainly is put right, and said; the rest is refused before Ray starts.
"""

import os
import secrets
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path

from ray._private.ray_constants import REQUIRE_SHM_SIZE_THRESHOLD
from ray._private.utils import estimate_available_memory, get_shared_memory_bytes

from ...contracts.errors import ResourceError

SOCKET_PATH_BYTES = 107  # the longest path of a Unix socket, on Linux
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest that Ray makes in its folder
SYSTEM = Path("/tmp")  # Ray's own default
SHARE_OF_MEMORY = 0.3  # of the free memory, for Ray's object store


def temp_dir(environment: MutableMapping[str, str], tell: Callable[[str], None], system: Path = SYSTEM) -> str:
    """The folder of Ray's sessions: in RAY_TMPDIR, TMPDIR or /tmp. Raises ResourceError where none can be used."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in environment else "TMPDIR"
    given = environment.get(name)
    reason = ""
    if given is not None:
        folder = Path(given).absolute() / "ray"
        if not (reason := _unusable(folder)):
            return str(folder)
        if name == "RAY_TMPDIR":
            raise ResourceError("RAY_TMPDIR is a folder for Ray's sessions", f"{given}: {reason}", "choose another")
    for folder in (system / "ray", system / f"ray-{os.getuid()}"):
        if not (why := _unusable(folder)):
            if reason:
                tell(f"TMPDIR={given}: {reason}; Ray's session is in {folder} (RAY_TMPDIR chooses another)")
            return str(folder)
        reason = reason or f"{folder} {why}"
    remedy = "set RAY_TMPDIR to a folder with a short path that you may write to"
    raise ResourceError("Ray's sessions have a folder", reason, remedy)


def _unusable(folder: Path) -> str:
    """Why Ray cannot keep its sessions in `folder`; empty where it can."""
    longest = len(os.fsencode(f"{folder}{SOCKET}"))
    if longest > SOCKET_PATH_BYTES:
        return f"is {longest - SOCKET_PATH_BYTES} bytes too long for the paths of Ray's sockets"
    base = folder if folder.exists() else folder.parent
    if not base.is_dir():
        return "is no folder" if base.exists() else "does not exist"
    try:
        with tempfile.TemporaryDirectory(dir=base):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def give_token(environment: MutableMapping[str, str]) -> None:
    """Ray keeps a private cluster's token in ~/.ray. Without a home to write to, the cluster gets one for its life."""
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    home = environment.get("HOME", "")
    if home in ("", "/") or not _keeps_token(Path(home)):
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _keeps_token(home: Path) -> bool:
    try:
        folder = home / ".ray"
        token = folder / "auth_token"
        if token.exists():
            return bool(token.read_text(encoding="utf-8").strip())
        with tempfile.TemporaryDirectory(dir=folder if folder.is_dir() else home):
            return True
    except (OSError, ValueError):
        return False


def check_shared_memory(environment: MutableMapping[str, str], tell: Callable[[str], None], folder: str) -> None:
    """Ray puts its object store into files where /dev/shm is too small for it: slow, so it is said."""
    try:
        room = get_shared_memory_bytes()
    except OSError as error:
        remedy = "mount a tmpfs there (in a container: docker run --shm-size=4g)"
        raise ResourceError("Ray shares memory through /dev/shm", f"{error.strerror}", remedy) from None
    wanted = min(SHARE_OF_MEMORY * estimate_available_memory(), REQUIRE_SHM_SIZE_THRESHOLD)
    if room < wanted and not environment.get("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"):
        size = f"{wanted * 1.1 / 2**30:.0f}g"
        tell(
            f"/dev/shm has room for {room / 2**30:.2f} GiB, Ray's object store takes {wanted / 2**30:.2f} GiB: "
            f"it is in files in {folder}, which is slower (in a container: docker run --shm-size={size})"
        )
