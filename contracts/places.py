"""The paths of a configuration: `~` is the home folder, and one that is there is written out in full.

Actors run in folders of their own, on a cluster in another one than the command: a relative path is not theirs.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .config import Config
from .errors import ConfigError
from .own_code import is_file


def located(config: Config) -> Config:
    """With every path in full where something is; output_dir, which is the driver's, only without `~`."""
    data, evaluation, verifier = config.data, config.eval, config.verifier
    teachers = {name: _teacher(teacher) for name, teacher in config.teachers.items()}
    rewards = tuple(_with(reward, kind=_code(reward.kind)) for reward in verifier.rewards)
    stages = tuple(_with(stage, method=_code(stage.method)) for stage in config.stages)
    return _with(
        config,
        output_dir=str(at_home(config.output_dir)) if config.output_dir.startswith("~") else config.output_dir,
        method=_code(config.method),
        stages=stages,
        student=_with(config.student, model=_place(config.student.model)),
        teacher=config.teacher and _teacher(config.teacher),
        teachers=teachers,
        reference=config.reference and _with(config.reference, model=_place(config.reference.model)),
        data=_with(data, path=_place(data.path)),
        eval=_with(evaluation, path=_place(evaluation.path), ood_path=_place(evaluation.ood_path)),
        verifier=_with(verifier, kind=_code(verifier.kind), rewards=rewards),
        rollout=_with(config.rollout, engine=_code(config.rollout.engine)),
        replay=config.replay and _with(config.replay, path=_place(config.replay.path)),
        skills=config.skills and _with(config.skills, path=_place(config.skills.path)),
        strategies=config.strategies and _with(config.strategies, path=_place(config.strategies.path)),
    )


def at_home(path: str | Path) -> Path:
    """`path` with `~` as the home folder. Raises ConfigError where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError("~ is a home folder", f"{path}: {error}", "write the path in full") from error


def exists(path: Path) -> bool:
    """Whether anything is there; nothing has a name that no disk takes."""
    try:
        return path.exists()
    except OSError:
        return False


def _with(section: Any, **values: Any) -> Any:
    """The same section where nothing of it changes: what was given and what is a default stay apart."""
    changed = {key: value for key, value in values.items() if value != getattr(section, key)}
    assert isinstance(section, BaseModel)
    return section.model_copy(update=changed) if changed else section


def _teacher(teacher: Any) -> Any:
    model = teacher.model if teacher.remote else _place(teacher.model)
    return _with(teacher, model=model, engine=_code(teacher.engine))


def _code(name: str) -> str:
    """A file of one's own, FILE.py, FILE.py:FUNCTION or FILE.py:CLASS, in full; any other name as it is."""
    file, colon, function = name.rpartition(":") if ":" in name else (name, "", "")
    return f"{_place(file)}{colon}{function}" if is_file(file) else name


def _place(name: str) -> str:
    if not name or name.startswith("lab:") or "://" in name:
        return name
    path = at_home(name)
    return str(path.absolute()) if name.startswith("~") or exists(path) else name
