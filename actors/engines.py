"""Makes rollout engines. Their names, and what each can do, are in contracts/engines.py."""

from typing import Any

from ..contracts.engines import ROLLOUT_ENGINES
from ..contracts.protocols import RolloutEngine


def make_engine(engine: str | type, model: str, **options: Any) -> RolloutEngine:
    """The engine of that name, or of that class of one's own, its model loaded; `options` are those of its class.

    Raises ConfigError, ModelError.
    """
    made: Any = ROLLOUT_ENGINES.class_of(engine) if isinstance(engine, str) else engine
    return made(model, **options)
