"""Methods are compositions: who generates, what the teachers return, which loss terms the learner sums.

A new method is one file with a function `compose(config) -> Composition`, and one line in METHODS.
"""

import difflib
from collections.abc import Callable

from ...contracts.config import Config
from ...contracts.errors import ConfigError
from . import opd
from .composition import Composition

METHODS: dict[str, Callable[[Config], Composition]] = {
    "opd": opd.compose,
}


def compose(config: Config) -> Composition:
    """The composition that `config.method` names. Raises ConfigError."""
    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known methods: {', '.join(sorted(METHODS))}"
        raise ConfigError("method names a known method", f"method: {config.method}", hint)
    return METHODS[config.method](config)
