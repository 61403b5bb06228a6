"""`tutorloop scale RUN POOL=N …`: have a running run's pools go to other numbers of replicas."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..contracts.errors import InputError

EXAMPLE = "e.g. teacher=3 rollout=2"


def scale(
    run: Annotated[Path, typer.Argument(help="The run's folder: its output_dir.")],
    pools: Annotated[
        list[str] | None, typer.Argument(help="POOL=N, e.g. teacher=3; `tutorloop status` names them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> bool:
    """Have pools of a running run go to other numbers of replicas: all of them, or none where one cannot be had.

    It returns at once; replicas come and go while the run goes on, and `tutorloop status` shows them.
    """
    wanted = _wanted(pools or [])
    from ..cluster.control import client
    from ..cluster.recording.progress import plain

    answer = client.scale(run, wanted)
    if as_json:
        typer.echo(json.dumps(answer))
        return True
    for pool, number in answer["wanted"].items():
        before = answer["before"].get(pool, "?")
        typer.echo(plain(f"{pool}: {before} → {number} replica{'' if number == 1 else 's'}"))
    return True


def _wanted(pairs: Sequence[str]) -> dict[str, int]:
    """Raises InputError."""
    if not pairs:
        raise InputError("tutorloop scale is given at least one POOL=N", "none", EXAMPLE)
    wanted: dict[str, int] = {}
    for pair in pairs:
        pool, _, number = pair.rpartition("=")
        if not pool or not re.fullmatch(r"[0-9]{1,9}", number, re.ASCII):
            raise InputError("a pool and a whole number of replicas are written POOL=N", pair, EXAMPLE)
        if pool in wanted:
            raise InputError("a pool is named once", " ".join(pairs), "leave one of them out")
        wanted[pool] = int(number)
    return wanted
