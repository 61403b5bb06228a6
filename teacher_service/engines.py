"""The teacher engines by name. A new engine is one file, one line here and one test."""

from collections.abc import Callable
from typing import Any

from ..contracts.errors import ConfigError
from ..contracts.protocols import TeacherEngine
from .fake_engine import FakeTeacher
from .http_engine import HttpTeacher
from .transformers_engine import TransformersTeacher
from .vllm_engine import VllmTeacher

ENGINES: dict[str, Callable[..., TeacherEngine]] = {
    "transformers": TransformersTeacher,
    "vllm": VllmTeacher,
    "http": HttpTeacher,
    "fake": FakeTeacher,
}


def make_engine(name: str, model: str, **options: Any) -> TeacherEngine:
    """The engine called `name`, its model loaded; `options` are those of its class. Raises ConfigError, ModelError."""
    if name not in ENGINES:
        raise ConfigError("teacher.engine is a known engine", name, f"known: {', '.join(sorted(ENGINES))}")
    return ENGINES[name](model, **options)
