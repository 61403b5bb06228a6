"""`--resume auto`: one command starts a run, goes on with it and, once it is finished, leaves it alone."""

import json
from pathlib import Path

from ..contracts.config import Config
from ..contracts.errors import RunFolderError
from ..contracts.recipe import load_config
from .run_folder import RunFolder


def holds_run(config: Config) -> bool:
    """Whether output_dir holds a run to go on with."""
    try:
        return (Path(config.output_dir) / "config.yaml").is_file()
    except OSError as error:
        found = f"{config.output_dir}: {error.strerror}"
        raise RunFolderError("output_dir can be read", found, "choose another output_dir") from error


def finished_after(config: Config) -> int:
    """Steps of the finished run in output_dir; 0 where it has none, or where `config` asks for more.

    Writes nothing. Raises RunFolderError where the run there has another configuration.
    """
    folder = Path(config.output_dir)
    if not holds_run(config):
        return 0
    RunFolder(folder).check(config, resume=True)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # it is written last, and goes when a run goes on
        return 0
    except (OSError, ValueError) as error:
        raise RunFolderError("a run's summary.json can be read", f"{folder}: {error}", "remove it") from error
    more = config.total_steps > load_config(folder / "config.yaml").total_steps
    return 0 if summary["interrupted"] or more else summary["steps"]
