"""Makes teacher engines. Their names, and what each can do, are in contracts/engines.py."""

from typing import Any

from ..contracts.engines import TEACHER_ENGINES
from ..contracts.protocols import TeacherEngine


def make_engine(engine: str | type, model: str, **options: Any) -> TeacherEngine:
    """The engine of that name, or of that class of one's own, its model loaded; `options` are those of its class.

    Raises ConfigError, ModelError.
    """
    made: Any = TEACHER_ENGINES.class_of(engine) if isinstance(engine, str) else engine
    return made(model, **options)
