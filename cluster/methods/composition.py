"""What a method is made of, and how its options are read."""

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ...contracts.config import Section
from ...contracts.errors import ConfigError
from ...contracts.records import Sampling, ScoreRequest, Term

Options = TypeVar("Options", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """One method, ready to run: how the student samples, what every teacher is asked, which terms are summed."""

    sampling: Sampling
    scoring: ScoreRequest
    terms: tuple[Term, ...]


def read_options(model: type[Options], options: dict[str, Any], method: str) -> Options:
    """`method_options` as the method's own model. Raises ConfigError."""
    try:
        return model.model_validate(options)
    except ValidationError as error:
        faults = [f"method_options.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        known = f"{method} knows: {', '.join(model.model_fields)}"
        raise ConfigError("method_options are those of the method", "\n  ".join(faults), known) from None
