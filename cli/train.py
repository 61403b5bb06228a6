"""`tutorloop train RECIPE [key.path=value …] [--check] [--resume [auto] [--allow-change KEY]]`, on Ray or `--local`."""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from ..contracts.config import Config
from ..contracts.errors import RunFolderError
from ..contracts.recipe import load_config


class Resume(StrEnum):
    """What to do with a run that is in output_dir."""

    NO = "no"
    YES = "yes"
    AUTO = "auto"


class TrainCommand(TyperCommand):
    """`--resume` takes `auto` as its value and nothing else: what stands behind it may be an override."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_plain(args)))


def _plain(args: list[str]) -> Iterator[str]:
    """The arguments, with a value for every --resume. Raises typer.BadParameter."""
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            yield from [arg, *rest]
            return
        name = arg.lstrip("-").partition("=")[0]
        if arg.startswith("-") and "=" in arg and name.partition(".")[0] in Config.model_fields:
            raise typer.BadParameter(f"an override has no dashes: write {arg.lstrip('-')}")
        if arg != "--resume":
            yield arg
            continue
        following = next(rest, None)
        yield f"--resume={Resume.AUTO if following == Resume.AUTO else Resume.YES}"
        if following is not None and following != Resume.AUTO:
            yield from _plain([following, *rest])


def train(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML file, or the name of one of tutorloop's own recipes, e.g. quickstart.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, e.g. learner.learning_rate=1e-4")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check all that can be without Ray, say what would run, and end.")
    ] = False,
    resume: Annotated[
        Resume,
        typer.Option(
            metavar="[auto]",
            show_default=False,
            help="Continue the run in output_dir; auto: or start it, and leave it alone once it is finished.",
        ),
    ] = Resume.NO,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With --resume: a key or section that may alter the result. Repeatable."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster (default: a private local one).")] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Everything in this process and without Ray, for a debugger.")
    ] = False,
) -> bool:
    """Train a student as a recipe says."""
    if local and address:
        raise typer.BadParameter("--local runs without Ray: leave --address out")
    allow = tuple(allow_change or ())
    if allow and resume is Resume.NO:
        raise typer.BadParameter("--allow-change is for a run that goes on: add --resume")
    config = load_config(recipe, overrides or [])
    from rich.console import Console

    from ..cluster.methods import compose_stages
    from ..cluster.resume_keys import check_known

    compose_stages(config)  # a wrong method is answered before torch and Ray are loaded
    check_known(allow)
    from ..cluster.resuming import finished_after, holds_run

    console = Console()
    if resume is Resume.AUTO and (steps := finished_after(config, allow)):
        console.out(f"{config.output_dir} holds this run, finished after {steps} steps", highlight=False)
        return True
    goes_on = resume is Resume.YES or (resume is Resume.AUTO and holds_run(config))
    if allow and not goes_on:
        rule = "--allow-change is for a run that goes on"
        raise RunFolderError(rule, f"{config.output_dir} holds none", "leave it out, or see output_dir")
    if check:
        from ..cluster import check as checking

        return checking.check(config, goes_on, console, allow)
    from ..cluster import run

    return run.train(config, goes_on, address, console, local, allow)
