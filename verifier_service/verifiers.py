"""The verifiers by name. A new verifier is one file, one line here and one test."""

from typing import Protocol

from ..contracts.errors import ConfigError
from ..contracts.protocols import Judgement, Verifier
from .exact import ExactVerifier
from .math import MathVerifier


class PooledVerifier(Verifier, Protocol):
    """A verifier that also says which texts it can decide at once, in the calling process, without any danger."""

    def decide_quickly(self, text: str, gold: str) -> Judgement | None: ...


VERIFIERS: dict[str, type[PooledVerifier]] = {"math": MathVerifier, "exact": ExactVerifier}


def make_verifier(kind: str) -> PooledVerifier:
    """The verifier called `kind`. Raises ConfigError."""
    if kind not in VERIFIERS:
        raise ConfigError("verifier.kind is a known verifier", kind, f"known: {', '.join(sorted(VERIFIERS))}")
    return VERIFIERS[kind]()
