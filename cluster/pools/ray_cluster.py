"""Ray itself: join a cluster, or start one for this run alone.

Without `--address` (or Ray's own RAY_ADDRESS, which a Ray job sets) a private local cluster is started; `ray.init()`
alone would join whatever cluster stands on the machine.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import ray
from ray._private import services, worker

from ...contracts.errors import ResourceError, TutorloopError
from ..interrupt import unbroken
from .address import find, prove
from .deaths import first_line
from .orphans import ended_with_us
from .ray_backend import names
from .room import say
from .surroundings import check_shared_memory, give_token, temp_dir

# One thread a process, unless threads.py gives it more; one that waits for others spins for some microseconds and then
# sleeps: spinning on takes the core of a process that has work, sleeping at once made rollouts a quarter slower. Quiet
# libraries.
ACTOR_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "2000",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextmanager
def cluster(address: str | None, tell: Callable[[str], None] = say) -> Iterator[None]:
    """Ray for the length of the block; a cluster that was started here ends with it. Raises ResourceError."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    options["runtime_env"] = {"env_vars": ACTOR_ENVIRONMENT}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    running = find(address)
    if running:
        options["address"] = prove(running)
    else:
        folder = temp_dir(os.environ, tell)
        give_token(os.environ)
        check_shared_memory(os.environ, tell, folder)
        options |= {"address": "local", "include_dashboard": False, "_temp_dir": folder}
    with ExitStack() as stack:
        stack.callback(_leave)
        try:
            with unbroken(), _quiet_and_apart() as groups:
                ray.init(**options)
                if groups:
                    stack.enter_context(ended_with_us(groups))
                    stack.callback(_leave)  # before nobody watches any more
        except TutorloopError:
            raise
        except Exception as error:  # Ray raises bare ones too
            found = first_line(str(error))
            if running:
                running.refuse(found)
            remedy = f"its logs in {options['_temp_dir']}/session_latest/logs say more; on a busy machine try again"
            raise ResourceError("Ray starts on this machine", found, remedy) from error
        yield


def _leave() -> None:
    with unbroken():
        ray.shutdown()
    names.clear()


class _Apart(services.ConsolePopen):
    """A process of Ray's in a group of its own: what ends the command's group (a terminal's Ctrl-C, `timeout`, a
    shell's `kill %1`) must not end Ray before the run has saved."""

    groups: ClassVar[list[int]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, process_group=0)
        self.groups.append(self.pid)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what Ray prints of a dead worker, on stdout and whatever its settings: `get` says it."""


@contextmanager
def _quiet_and_apart() -> Iterator[list[int]]:
    """Ray has no setting for either. The groups of the processes that were started."""
    worker.print_to_stdstream = _nothing
    before, services.ConsolePopen = services.ConsolePopen, _Apart
    _Apart.groups.clear()
    try:
        yield _Apart.groups
    finally:
        services.ConsolePopen = before
