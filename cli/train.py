"""`tutorloop train RECIPE.yaml [key.path=value …] [--resume] [--address …]`"""

from pathlib import Path
from typing import Annotated

import typer

from ..contracts.recipe import load_config


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, e.g. recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, e.g. learner.learning_rate=1e-4")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster (default: a private local one).")] = None,
) -> bool:
    """Train a student as a recipe says."""
    config = load_config(recipe, overrides or [])
    from rich.console import Console

    from ..cluster.methods import compose_stages

    compose_stages(config)  # a wrong method is answered before torch and Ray are loaded
    from ..cluster import run

    return run.train(config, resume, address, Console())
