"""Ray itself: join or start a cluster, make actors, turn Ray's failures into errors named after the pool.

Without `--address` (or Ray's own RAY_ADDRESS, which a Ray job sets) a private local cluster is started; `ray.init()`
alone would join whatever cluster stands on the machine.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import services, worker
from ray.exceptions import RayActorError, RayError, RayTaskError

from ..contracts.errors import TutorloopError
from .address import find, prove
from .deaths import first_line, obituary, tail_of
from .interrupt import unbroken
from .surroundings import check_shared_memory, give_token, temp_dir

# One thread a process, unless threads.py gives it more; these sleep when they have nothing to do, for a spinning one
# takes the core of a process that has. Quiet libraries.
ACTOR_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
SLICE_SECONDS = 0.5  # of a wait: Ctrl-C and a failure of another reference are heard between two
_names: dict[str, str] = {}  # actor id → what it is called: rollout pool, replica 1 of 2


def say(text: str) -> None:
    """To a person, where no progress is shown."""
    print(text, file=sys.stderr, flush=True)


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
    try:
        try:
            with unbroken(), _quiet_and_apart():
                ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if not running:
                raise
            running.refuse(first_line(str(error)))
        yield
    finally:
        with unbroken():
            ray.shutdown()
        _names.clear()


class _Apart(services.ConsolePopen):
    """A process of Ray's in a group of its own: what ends the command's group (a terminal's Ctrl-C, `timeout`, a
    shell's `kill %1`) must not end Ray before the run has saved."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, process_group=0)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what Ray prints of a dead worker, on stdout and whatever its settings: `get` says it."""


@contextmanager
def _quiet_and_apart() -> Iterator[None]:
    """Ray has no setting for either."""
    worker.print_to_stdstream = _nothing
    before, services.ConsolePopen = services.ConsolePopen, _Apart
    try:
        yield
    finally:
        services.ConsolePopen = before


def make_actor(who: str, kind: type, options: dict[str, Any], **arguments: Any) -> Any:
    """An actor of a class. What its constructor raises is kept for `started`: Ray would make a dead actor of it."""

    class Actor(kind):
        def __init__(self, **arguments: Any) -> None:
            self._refusal: Exception | None = None
            try:
                super().__init__(**arguments)
            except Exception as error:
                self._refusal = error

        def started(self) -> None:
            if self._refusal is not None:
                raise self._refusal

    Actor.__name__ = Actor.__qualname__ = kind.__name__
    actor = ray.remote(Actor).options(**options).remote(**arguments)
    _names[actor._actor_id.hex()] = who
    return actor


def get(refs: Any, boundary: type[TutorloopError], who: str) -> Any:
    """`ray.get` whose failures are ours: an actor's own error as itself, a lost actor as `boundary`.

    Of several references the first failure is heard, whatever the others wait for.
    """
    wanted = list(refs) if isinstance(refs, list) else [refs]
    values, pending = {}, list(dict.fromkeys(wanted))
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=SLICE_SECONDS, fetch_local=False)
        for ref in done:
            values[ref] = _value(ref, boundary, who)
    found = [values[ref] for ref in wanted]
    return found if isinstance(refs, list) else found[0]


def _value(ref: Any, boundary: type[TutorloopError], who: str) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else None
        if isinstance(cause, TutorloopError):
            raise cause from None
        raise boundary(f"the {who} must finish its call", _failure(error, cause)) from None
    except RayActorError as error:
        if error._actor_init_failed:  # before its constructor: the class could not be read there
            raise boundary(f"the {who} must start", "\n".join(tail_of(str(error), 6))) from None
        name = _names.get(error.actor_id or "", f"an actor of the {who}")
        raise boundary(f"the {who} keeps its actors", obituary(name, error.actor_id, str(error))) from None
    except RayError as error:  # an object that is lost, a node that has died
        raise boundary(f"the {who} must finish its call", first_line(str(error))) from None


def _failure(error: RayTaskError, cause: BaseException | None) -> str:
    """An exception of someone else's: what it says, and where it was raised."""
    said = f"{type(cause).__name__}: {cause}" if cause is not None else first_line(str(error))
    trace = [line for line in tail_of(str(error), 12) if line.strip(" ^~") and line.strip() not in said]
    return "\n".join([*tail_of(said, 8), *(f"| {line}" for line in trace[-4:])])


def end(actor: Any) -> None:
    """End an actor's process at once."""
    ray.kill(actor)
