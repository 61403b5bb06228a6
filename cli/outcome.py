"""How a command ends: 0 done, 2 the user's input, 3 stopped by a guard, 1 anything else, 130 interrupted. One clear
error, no traceback.
"""

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from ..contracts.errors import GuardTripped, InputError, TutorloopError

Arguments = ParamSpec("Arguments")

INPUT, GUARDED, OTHER, INTERRUPTED = 2, 3, 1, 130


def ends_clearly(command: Callable[Arguments, bool]) -> Callable[Arguments, None]:
    """Turn a command's errors into a message and an exit code; a command returns False if it was interrupted."""

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            code = 0 if command(*args, **kwargs) else INTERRUPTED
        except TutorloopError as error:
            sys.stderr.write(f"error: {_shown(error)}\n")
            code = INPUT if isinstance(error, InputError) else GUARDED if isinstance(error, GuardTripped) else OTHER
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            code = INTERRUPTED
        except OSError as error:
            named = error.errno == errno.ENAMETOOLONG  # none but the user gives such names
            rule = "a name is one that a disk takes" if named else "the machine refused"
            sys.stderr.write(f"error: {rule}: {_shown(error)}\n")
            code = INPUT if named else OTHER
        raise typer.Exit(code)

    return wrapped


def _shown(error: Exception) -> str:
    """Line by line without what could steer a terminal: it may hold text of a dataset, a server or a rollout."""
    from ..cluster.recording.progress import plain

    return "\n".join(plain(line) for line in str(error).split("\n"))
