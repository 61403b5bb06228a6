"""Read a recipe: one YAML file and dotted overrides, validated once, before any actor starts.

Imports neither torch nor Ray, so a wrong key costs a second. Unknown keys name the nearest known one.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .config import (
    Checkpoint,
    Config,
    Learner,
    Lora,
    Metrics,
    ModelPool,
    OffPolicy,
    Reference,
    Rollout,
    Section,
    Skills,
    Stage,
    Student,
    Teacher,
    Until,
    Verifier,
)
from .data_config import Data, Eval
from .errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `key.path=value` overrides (values are YAML). Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "a recipe must be a readable file", f"{path}: {error.strerror}", "give a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("a recipe must be YAML", f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError("a recipe is a mapping of keys", f"{path} holds {type(tree).__name__}")
    return parse_config(tree, overrides)


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate a tree of plain values with overrides applied; all its faults come in one ConfigError."""
    tree = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(_given(tree))
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()]
        rule = "a recipe and its overrides hold known keys with fitting values"
        raise ConfigError(rule, "\n         ".join(faults), "docs/configuration.md lists every key") from None


def _given(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that hold nothing: `key:` and `key=` mean the default."""
    kept = {key: _given(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in kept.items() if value is not None}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("an override reads key.path=value", override, "e.g. learner.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("an override's value must be YAML", override) from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        below = node.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError("an override's path leads through sections", f"{key}: {parent} is a value")
        node = below
    node[leaf] = value


def _explain(fault: Any) -> str:
    place = [str(part) for part in fault["loc"]]
    key = ".".join(place) or "recipe"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known keys: {', '.join(sorted(known))}"
        )
        return f"{key}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: required, and not given"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    return f"{key}: {message} (found {fault['input']!r})"


def _known_keys(place: Sequence[str]) -> list[str]:
    """Keys of the section at `place`; below `teachers` every name holds a Teacher."""
    if not place:
        return list(Config.model_fields)
    if place[0] == "stages":
        return list((Until if place[-1] == "until" else Stage).model_fields)
    if place == ["student", "lora"]:
        return list(Lora.model_fields)
    return list(SECTIONS.get(place[0], Teacher).model_fields)


SECTIONS: dict[str, type[Section]] = {
    "student": Student,
    "teacher": Teacher,
    "reference": Reference,
    "data": Data,
    "rollout": Rollout,
    "teacher_rollout": ModelPool,
    "verifier": Verifier,
    "skills": Skills,
    "learner": Learner,
    "off_policy": OffPolicy,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "metrics": Metrics,
}
