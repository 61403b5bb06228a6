"""The rollout engines by name. A new engine is one file, one line here and one test."""

from collections.abc import Callable
from typing import Any

from ..contracts.errors import ConfigError
from ..contracts.protocols import RolloutEngine
from .fake_engine import FakeEngine
from .transformers_engine import TransformersEngine
from .vllm_engine import VllmEngine

ENGINES: dict[str, Callable[..., RolloutEngine]] = {
    "transformers": TransformersEngine,
    "vllm": VllmEngine,
    "fake": FakeEngine,
}
CALLS_AT_ONCE = {"vllm": 4}  # of engines that batch continuously: the stragglers of one call run beside the next


def make_engine(name: str, model: str, **options: Any) -> RolloutEngine:
    """The engine called `name`, its model loaded; `options` are those of its class. Raises ConfigError, ModelError."""
    if name not in ENGINES:
        raise ConfigError("rollout.engine is a known engine", name, f"known: {', '.join(sorted(ENGINES))}")
    return ENGINES[name](model, **options)
