"""The rollout engines by name. A new engine is one file, one line here and one test."""

from collections.abc import Callable

from ..contracts.config import Lora
from ..contracts.errors import ConfigError
from ..contracts.protocols import RolloutEngine
from .fake_engine import FakeEngine
from .transformers_engine import TransformersEngine

ENGINES: dict[str, Callable[..., RolloutEngine]] = {"transformers": TransformersEngine, "fake": FakeEngine}


def make_engine(
    name: str, model: str, *, dtype: str, device: str, threads: int, lora: Lora | None = None
) -> RolloutEngine:
    """The engine called `name`, its model loaded; with `lora` it takes adapters. Raises ConfigError, ModelError."""
    if name not in ENGINES:
        raise ConfigError("rollout.engine is a known engine", name, f"known: {', '.join(sorted(ENGINES))}")
    return ENGINES[name](model, dtype=dtype, device=device, threads=threads, lora=lora)
