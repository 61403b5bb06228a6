"""A user's own code, named in a recipe by a file or by a module: methods and reward functions."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .errors import ConfigError


def is_file(place: str) -> bool:
    """Whether `place` names a file, and not a module."""
    return "/" in place or place.endswith(".py")


def load_module(place: str, rule: str, label: str) -> ModuleType:
    """The module at `place`: a file is read anew at each call, under a name made of its path; a module is imported.

    Raises ConfigError with the caller's `rule` where it is absent, `label` before what was found; what its own code
    raises goes through.
    """
    return _from_file(Path(place), rule, label) if is_file(place) else _from_name(place, rule, label)


def _from_file(path: Path, rule: str, label: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(rule, f"{label}{path}: no such file", "check the path")
    name = f"own_{path.stem}_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(rule, f"{label}{path} is no Python file", "name it FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    spec.loader.exec_module(module)
    return module


def _from_name(name: str, rule: str, label: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(rule, f"{label}{name}: {error}", "install it, set PYTHONPATH, or give FILE.py") from error
    except (TypeError, ValueError) as error:  # a relative or an empty name
        raise ConfigError(rule, f"{label}{name!r}: {error}", "write the module's full name") from error
