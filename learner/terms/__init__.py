"""The loss terms by name. Adding one: a new file, a line in TERMS, a test.

The learner knows no method: it sums the terms it is given, each over its own global token count.
"""

import inspect
from collections.abc import Sequence
from typing import get_args

from ...contracts.errors import ConfigError
from ...contracts.records import Term
from .base import BoundTerm, LossTerm
from .exact_divergence import exact_divergence
from .policy_gradient import policy_gradient
from .topk_divergence import topk_divergence

TERMS: dict[str, LossTerm] = {
    "policy_gradient": LossTerm(policy_gradient, "sampled"),
    "topk_divergence": LossTerm(topk_divergence, "topk"),
    "exact_divergence": LossTerm(exact_divergence, "exact"),
}


def bind_terms(terms: Sequence[Term]) -> tuple[BoundTerm, ...]:
    """The functions behind the names. Raises ConfigError for an unknown name or option, and for a name given twice."""
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ConfigError("a learner sums one or more loss terms, each named once", str(names))
    return tuple(_bind(term) for term in terms)


def _bind(term: Term) -> BoundTerm:
    known = TERMS.get(term.name)
    if known is None:
        raise ConfigError("a loss term has a known name", term.name, f"known terms: {', '.join(TERMS)}")
    allowed = {p.name: p for p in inspect.signature(known.function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, value in term.options.items():
        if option not in allowed:
            raise ConfigError(f"the options of {term.name} are {', '.join(allowed)}", option)
        choices = get_args(allowed[option].annotation)
        if choices and value not in choices:
            raise ConfigError(f"{term.name}'s {option} is one of {', '.join(choices)}", str(value))
    return BoundTerm(
        name=term.name, weight=term.weight, signal=known.signal, function=known.function, options=term.options
    )
