"""Ray itself: join or start a cluster, know what it has, turn its failures into errors named after the pool.

Without `--address` (or Ray's own RAY_ADDRESS, which a Ray job sets) a private local cluster is started; `ray.init()`
alone would join whatever cluster stands on the machine.
"""

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ..contracts.errors import ResourceError, TutorloopError

# One thread a process unless the actor is given more CPUs; quiet libraries.
ACTOR_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray for the length of the block; a cluster that was started here ends with it."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    options["runtime_env"] = {"env_vars": ACTOR_ENVIRONMENT}
    if address == "local":
        options["include_dashboard"] = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address not in ("local", "auto"):
        _check_address(address)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address == "local":
            raise
        raise ResourceError(
            "--address names a running Ray cluster", f"{address}: {error}", "ray start --head"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Is anything there? Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        rule = "--address is the HOST:PORT of a running Ray cluster, or auto"
        raise ResourceError(rule, f"{address}: {error}", "start one with: ray start --head") from error


def check_resources(need: Mapping[str, float]) -> None:
    """The cluster must have at least `need` of each resource. Raises ResourceError."""
    have = ray.cluster_resources()
    for resource, amount in need.items():
        if amount > have.get(resource, 0.0) + 1e-9:
            found = f"the recipe's pools ask for {amount:g}, the cluster has {have.get(resource, 0.0):g}"
            key = f"num_{resource.lower()}s"
            raise ResourceError(
                f"the cluster has every {resource} that the recipe asks for", found, f"lower {key} or replicas"
            )


def get(refs: Any, boundary: type[TutorloopError], who: str) -> Any:
    """`ray.get` whose failures are ours: an actor's own error as itself, a lost actor as `boundary`."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else None
        if isinstance(cause, TutorloopError):
            raise cause from None
        raise boundary(f"the {who} must finish its call", _plain(error)) from None
    except RayActorError as error:
        remedy = "look into Ray's logs; continue with --resume"
        raise boundary(f"the {who}'s actors must stay alive", _plain(error), remedy) from None


def _plain(error: Exception) -> str:
    """Ray's message without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def end(actor: Any) -> None:
    """End an actor's process at once."""
    ray.kill(actor)
