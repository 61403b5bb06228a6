"""`tutorloop status RUN`: how a run stands. Its texts may be hostile: no markup, nothing steers a terminal."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

LAST_NOTES = 5
LAST_DECISIONS = 3
INDENT = 12  # of what stands behind a name
WHOLE = ("checkpoint", "next")  # lines that are copied from
COLUMNS = ("pool", "replica", "state", "version", "calls", "for", "where")
NUMBERS = ("version", "calls", "for")


def status(
    run: Annotated[Path, typer.Argument(help="The run's folder: its output_dir.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> bool:
    """Say how a run stands: how far it is, each replica, what its steps wait for, what was dropped, its alarms.

    A run that is not alive is described by its files: whether it ended, was interrupted or died, and how to go on.
    """
    from ..cluster.control import client

    known = client.ask(run)
    if as_json:
        typer.echo(json.dumps(known))
        return True
    from rich.console import Console

    _say(_headline(known))
    if known["pools"]:
        Console().print(_pool_table(known["pools"]))
    for name, text in _facts(known):
        _say(f"{name:{INDENT}}{text}", Console().width if name not in WHOLE else None)
    return True


def _say(line: str, width: int | None = None) -> None:
    """Print a line as it is, or wrapped to `width` columns between its words."""
    from ..cluster.recording.progress import plain

    options = {"subsequent_indent": " " * INDENT, "break_long_words": False, "break_on_hyphens": False}
    typer.echo(textwrap.fill(plain(line), width, **options) if width else plain(line))


def _headline(known: Mapping[str, Any]) -> str:
    of = f" of {known['steps']}" if known["steps"] else ""
    parts = [known["method"], f"step {known['step']}{of}"]
    parts += [f"version {known['version']}"] if known["version"] is not None else []
    parts += [known["phase"]]
    parts += [f"{known['learner_ranks']} learner ranks"] if (known["learner_ranks"] or 1) > 1 else []
    parts += [_clock(known["seconds"])] if known["seconds"] is not None else []
    return "  ".join(part for part in parts if part)


def _facts(known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What else is known, a name and a line each."""
    for step in known["in_flight"]:
        waits = ", ".join(f"{service} {shards}" for service, shards in step["waits_for"].items() if shards)
        ready = f"{step['ready']} of {step['shards']} shards ready"
        yield f"step {step['step']}", f"{ready}, {_clock(step['seconds'])}" + (f", waits for {waits}" if waits else "")
    oldest = sorted(((pool["oldest_seconds"], pool["name"]) for pool in known["pools"]), reverse=True)
    if stuck := [f"{name} {_clock(seconds)}" for seconds, name in oldest if seconds > 0]:
        yield "oldest call", ", ".join(stuck)
    yield from _replaced(known)
    for name in ("dropped", "figures"):
        if counts := {key: count for key, count in known[name].items() if count}:
            yield name, ", ".join(f"{key.replace('_', ' ')} {_number(count)}" for key, count in counts.items())
    for name, text in (("checkpoint", known["checkpoint"]), ("next", known["go_on"])):
        if text:
            yield name, text
    for alarm in known["alarms"][-LAST_NOTES:]:
        yield "alarm", f"{alarm['kind']} at step {alarm['step']}, {alarm['time']}: {alarm['text']}"
    for own in known["decisions"][-LAST_DECISIONS:]:
        expected = f"{own['step_seconds']:.3g} s a step, {own['expected_seconds']:.3g} s expected"
        yield "autoscaler", f"{_clock(own['seconds'])} step {own['step']}: {own['what']}: {own['why']}; {expected}"
    for note in known["notes"][-LAST_NOTES:]:
        yield "note", note


def _replaced(known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for pool in known["pools"]:
        if pool["restarts"] or pool["retries"]:
            yield (
                "failures",
                f"{pool['name']}: replicas replaced {pool['restarts']}, calls made again {pool['retries']}",
            )
    if known["learner_restarts"]:
        yield "failures", f"learner: restarts {known['learner_restarts']}"


def _pool_table(pools: list[dict[str, Any]]) -> "Table":
    """A row a pool, and beneath it one a replica."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in COLUMNS:
        side = "right" if column in NUMBERS else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column not in ("pool", "where"))
    for pool in pools:
        have, wanted = len(pool["replicas"]), pool["wanted"]
        many = f"{have} of {wanted}" if have != wanted else f"{have}"
        calls = sum(replica["calls"] for replica in pool["replicas"])
        bounds = f"may have {pool['least']} " + ("or more" if pool["most"] is None else f"to {pool['most']}")
        waiting = f"{pool['waiting']} waiting" if pool["waiting"] else ""
        table.add_row(_cell(pool["name"], "bold"), many, waiting, "", f"{calls}", "", _cell(bounds, "dim"))
        for replica in pool["replicas"]:
            version = "" if replica["version"] is None else f"{replica['version']}"
            about = (_cell(replica["state"]), version, f"{replica['calls']}", _clock(replica["seconds"]))
            table.add_row("", f"{replica['number']}", *about, _cell(replica["where"]))
    return table


def _cell(text: str, style: str = "") -> "Text":
    from rich.text import Text

    from ..cluster.recording.progress import plain

    return Text(plain(text), style)


def _clock(seconds: float) -> str:
    from ..cluster.recording.progress import clock

    return clock(seconds)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
