"""Read a recipe: one YAML file and dotted overrides, validated once, before any actor starts.

Imports neither torch nor Ray, so a wrong key costs a second. Unknown keys name the nearest known one.
"""

import copy
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .config import (
    Checkpoint,
    Config,
    Learner,
    Metrics,
    ModelPool,
    OffPolicy,
    Reference,
    Rollout,
    Section,
    Skills,
    Strategies,
    Student,
    Teacher,
    Verifier,
)
from .data_config import Data, Eval, Replay
from .errors import ConfigError
from .overrides import apply
from .places import at_home, exists, located
from .recipe_text import below, leaves, members, read
from .reliability import Autoscale, Guards, Notify

SHOWN = 200  # characters of a value in a message
PACKAGED = Path(__file__).parents[1] / "recipes"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `key.path=value` overrides. `path`: a file, or the name of one that comes with the
    package. Raises ConfigError."""
    path = locate_recipe(path)
    try:
        tree = read(path.read_text(encoding="utf-8-sig"), Config)
    except OSError as error:
        raise ConfigError(
            "a recipe must be a readable file", f"{path}: {error.strerror}", "give a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("a recipe must be UTF-8", f"{path}: {error}", "save it as UTF-8") from error
    except yaml.YAMLError as error:
        remedy = "indent with spaces" if "'\\t'" in str(error) else "text with special characters goes into quotes"
        raise ConfigError("a recipe must be YAML, in one document", f"{path}: {error}", remedy) from error
    if tree is None:
        raise ConfigError("a recipe is a mapping of keys", f"{path} is empty")
    if not isinstance(tree, dict):
        raise ConfigError("a recipe is a mapping of keys", f"{path} holds {type(tree).__name__}")
    return parse_config(tree, overrides)


def locate_recipe(path: Path) -> Path:
    """The file itself, or where there is none and `path` is a bare name, the package's recipe. Raises ConfigError."""
    path = at_home(path)
    if path.suffix or len(path.parts) != 1 or exists(path):
        return path
    known = {recipe.stem: recipe for recipe in PACKAGED.glob("*.yaml")}
    if path.name in known:
        return known[path.name]
    near = difflib.get_close_matches(path.name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"tutorloop's own: {', '.join(sorted(known))}"
    raise ConfigError("a recipe is a YAML file, or the name of one of tutorloop's", f"{path}: no such file", hint)


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate a tree of plain values with overrides applied; all its faults come in one ConfigError."""
    tree = copy.deepcopy(dict(tree))
    for override in overrides:
        apply(tree, override)
    given = _given(tree)
    faults = [f"{key}: {fault}" for key, value in leaves(given) if (fault := _unusable(value))]
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        faults += [explain(fault, _known_keys) for fault in error.errors() if not _unusable(fault["input"])]
    if faults:
        rule = "a recipe and its overrides hold known keys with fitting values"
        raise ConfigError(rule, "\n         ".join(faults), "docs/configuration.md lists every key") from None
    return located(config)


def _unusable(value: Any) -> str:
    """What is wrong with a value wherever it stands; "" where nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"a number must be finite (found {value})"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        return f"text has no NUL and no half of a surrogate pair (found {value!a})"
    return ""


def _given(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that hold nothing: `key:` means the default. What a chat template is given is the template's."""
    inside = {k: _given(v) if isinstance(v, dict) and k != "chat_template_kwargs" else v for k, v in tree.items()}
    return {key: value for key, value in inside.items() if value is not None}


WRITTEN = {  # types of faults: how what is wanted is written
    "string_type": "put it in quotes",
    "tuple_type": "write [a, b]",
    "dict_type": "write {key: value}",
    "model_type": "write {key: value}",
}


def explain(fault: Any, known_keys: Callable[[Sequence[str]], Collection[str]], prefix: Sequence[str] = ()) -> str:
    """One of pydantic's faults in our words. `known_keys(place)`: of the section there; `prefix`: where all lies."""
    place = [*prefix, *(str(part) for part in fault["loc"] if part != "[key]")]  # of a mapping: the key itself
    key = ".".join(place) or "recipe"
    if fault["type"] == "extra_forbidden":
        known = known_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known keys: {', '.join(sorted(known))}"
        )
        return f"{key}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: required, and not given"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if prefix else message  # a section's own message names its keys
    if fault["type"] == "blank":
        return f"{'.'.join([*place, fault['ctx']['field']])}: {message}"
    how = WRITTEN.get(fault["type"], "")
    found = repr(fault["input"])
    found = found if len(found) <= SHOWN else f"{found[:SHOWN]}…"
    return f"{key}: {message} (found {found}{how and f'; {how}'})"


def _known_keys(place: Sequence[str]) -> Collection[str]:
    kind: Any = Config
    for part in place:
        kind = below(kind, part)
    sections = [part for part in members(kind) if isinstance(part, type) and issubclass(part, Section)]
    return [name for section in sections for name in section.model_fields]


SECTIONS: dict[str, type[Section]] = {
    "student": Student,
    "teacher": Teacher,
    "reference": Reference,
    "data": Data,
    "replay": Replay,
    "rollout": Rollout,
    "teacher_rollout": ModelPool,
    "verifier": Verifier,
    "skills": Skills,
    "strategies": Strategies,
    "learner": Learner,
    "off_policy": OffPolicy,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "metrics": Metrics,
    "guards": Guards,
    "notify": Notify,
    "autoscale": Autoscale,
}
