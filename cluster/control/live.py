"""`live.json`: where a running run listens, which process it is, and the token that it wants to hear.

It stands in the run's folder while the run can be asked, readable for its owner alone. A run that is killed leaves it
behind: then its process is gone, which is looked up as for a claim (recording/claim.py).
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...contracts.errors import RunFolderError
from ..recording.claim import Holder, began, machine, ourselves

LIVE = "live.json"
URL = re.compile(r"http://(?:\[[0-9a-fA-F:.]+\]|[\w.-]+):[0-9]{1,5}")
RULE = "a run's live.json is as it was written"


@dataclass(frozen=True, slots=True, kw_only=True)
class Live(Holder):
    """A process that answers at `url` whoever knows the token."""

    url: str
    token: str = field(repr=False)


def lives(holder: Holder) -> bool | None:
    """Whether a process is there; None where it is another machine's, whose processes cannot be looked up."""
    return began(holder.pid) in (holder.started, "unknown") if holder.machine == machine() else None


@contextmanager
def announced(folder: Path, url: str, token: str) -> Iterator[None]:
    """A block during which the folder says that this process answers at `url`. Raises OSError."""
    path, aside = folder / LIVE, folder / f".{LIVE}.tmp"
    aside.unlink(missing_ok=True)  # of one that was killed
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # nobody else sees the token, ever
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(Live(url=url, token=token, **asdict(ourselves()))), file, indent=1)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    try:
        yield
    finally:
        with suppress(OSError, RunFolderError):  # taken away by hand, or spoilt: it is no longer ours
            live = read_live(folder)
            if live and live.token == token:
                path.unlink()


def read_live(folder: Path) -> Live | None:
    """Who says that it answers, be it alive or not; None where nobody does. Raises RunFolderError."""
    path = folder / LIVE
    try:
        live = Live(**json.loads(path.read_text(encoding="utf-8")))
        strings = (live.url, live.token, live.host, live.machine, live.started, live.since)
        if not all(isinstance(text, str) for text in strings) or type(live.pid) is not int or live.pid < 1:
            raise TypeError("a value of another kind")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        remedy = "ask as the user who runs it"
        raise RunFolderError("a run is asked by its owner", f"{path}: {error.strerror}", remedy) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RunFolderError(RULE, f"{path}: {error}", "remove it if the run has ended") from error
    if not URL.fullmatch(live.url) or not re.fullmatch(r"[\w-]+", live.token, re.ASCII):
        raise RunFolderError(RULE, f"{path}: no url or no token", "remove it if the run has ended")
    return live
