"""What a run begins with: its inputs and, where it goes on, its checkpoint.

`--resume auto` starts a run, goes on with it and, once it is finished, leaves it alone.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..contracts.config import Config
from ..contracts.errors import RunFolderError
from ..contracts.recipe import load_config
from .identity import Identity, compare, differing, identity_of
from .methods.parts.composition import Composition
from .preflight import Inputs, check_inputs
from .recording.run_folder import Checkpoint, RunFolder
from .resume_keys import check_used, content_changes, notes


def begin(
    config: Config, compositions: Sequence[Composition], folder: RunFolder, resume: bool, note: Callable[[str], None]
) -> tuple[Inputs, Checkpoint | None]:
    """All that the run reads, checked; `note` hears what a person should know of it. Raises an InputError."""
    inputs = check_inputs(config, compositions)
    checkpoint = folder.latest_checkpoint(note) if resume else None
    folder.identity = identity_of(config, inputs)
    for said in _changed(folder, checkpoint, folder.identity) if resume else []:
        note(said)
    for reason, count in inputs.left_out.items():
        note(f"{count} rows left out of the data: {reason}")
    for said in inputs.notes:
        note(said)
    for name, limits in inputs.servers.items():
        note(f"{name}: {limits}")
    if checkpoint:
        note(f"resuming after step {checkpoint[1]['step']} from {checkpoint[0]}")
    return inputs, checkpoint


def _changed(folder: RunFolder, checkpoint: Checkpoint | None, identity: Identity) -> list[str]:
    """What to tell of a run that goes on with other keys or inputs than it had. Raises an InputError."""
    before = folder.recorded(checkpoint)
    content = content_changes(differing(before, identity), folder.allow)
    said = compare(before, identity, [change.key for change in content])
    folder.changes = [*folder.changes, *content]
    check_used(folder.allow, [change.key for change in folder.changes], folder.path)
    return [*said, *notes(folder.changes)]


def holds_run(config: Config) -> bool:
    """Whether output_dir holds a run to go on with."""
    try:
        return (Path(config.output_dir) / "config.yaml").is_file()
    except OSError as error:
        found = f"{config.output_dir}: {error.strerror}"
        raise RunFolderError("output_dir can be read", found, "choose another output_dir") from error


def finished_after(config: Config, allow: Sequence[str] = ()) -> int:
    """Steps of the finished run in output_dir; 0 where it has none, or where `config` asks for more.

    Writes nothing. Raises RunFolderError where the run there has another configuration.
    """
    folder = Path(config.output_dir)
    if not holds_run(config):
        return 0
    RunFolder(folder, allow=allow).check(config, resume=True)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        interrupted, steps = bool(summary["interrupted"]), int(summary["steps"])
    except FileNotFoundError:  # it is written last, and goes when a run goes on
        return 0
    except (OSError, ValueError, TypeError, LookupError) as error:
        found = f"{folder}/summary.json: {type(error).__name__}: {error}"
        raise RunFolderError("a run's summary.json is as it was written", found, "remove it") from error
    more = config.total_steps > load_config(folder / "config.yaml").total_steps
    return 0 if interrupted or more else steps
