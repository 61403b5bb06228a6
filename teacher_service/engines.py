"""The teacher engines by name. A new engine is one file, one line here and one test."""

from collections.abc import Callable

from ..contracts.errors import ConfigError
from ..contracts.protocols import TeacherEngine
from .fake_engine import FakeTeacher
from .transformers_engine import TransformersTeacher

ENGINES: dict[str, Callable[..., TeacherEngine]] = {"transformers": TransformersTeacher, "fake": FakeTeacher}


def make_engine(
    name: str, model: str, *, teacher_id: str, dtype: str, device: str, threads: int, tokens_per_batch: int
) -> TeacherEngine:
    """The engine called `name`, its model loaded. Raises ConfigError, ModelError."""
    if name not in ENGINES:
        raise ConfigError("teacher.engine is a known engine", name, f"known: {', '.join(sorted(ENGINES))}")
    return ENGINES[name](
        model,
        teacher_id=teacher_id,
        dtype=dtype,
        device=device,
        threads=threads,
        tokens_per_batch=tokens_per_batch,
    )
