"""The loss terms by name. Adding one: a new file, a line in TERMS, a test.

The learner knows no method: it sums the terms it is given, each over its own global count. Importance weights are no
term's business (learner/corrections.py).
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin

from ...contracts.errors import ConfigError
from ...contracts.records import Term
from .base import BoundTerm, LossTerm
from .clipped_policy_gradient import ClippedPolicyGradient
from .exact_divergence import ExactDivergence
from .likelihood import NegativeLogLikelihood, ReferenceKl
from .policy_gradient import PolicyGradient
from .sign_gate import SignGate, SoftGate
from .skill_gate import SkillGate
from .topk_divergence import TopkDivergence

TERMS: dict[str, type[LossTerm]] = {
    "nll": NegativeLogLikelihood,
    "reference_kl": ReferenceKl,
    "clipped_policy_gradient": ClippedPolicyGradient,
    "policy_gradient": PolicyGradient,
    "sign_gate": SignGate,
    "soft_gate": SoftGate,
    "skill_gate": SkillGate,
    "topk_divergence": TopkDivergence,
    "exact_divergence": ExactDivergence,
}

REDUCTIONS = ("tokens", "sequences", "length")


def bind_terms(terms: Sequence[Term]) -> tuple[BoundTerm, ...]:
    """The terms behind the names. Raises ConfigError, naming the term, its option and what it may be."""
    keys = [term.key for term in terms]
    if not keys or len(set(keys)) < len(keys):
        raise ConfigError(
            "a learner sums one or more loss terms, each with a key of its own", str(keys), "give one a label"
        )
    return tuple(_bind(term) for term in terms)


def _bind(term: Term) -> BoundTerm:
    loss = _with_options(term)
    if loss.reads_reference and not term.reference:
        raise ConfigError("a term that reads the reference model says so", term.key, "set reference=True on the Term")
    if term.credit and not loss.reads_credit:
        readers = ", ".join(name for name, kind in TERMS.items() if kind.reads_credit)
        found = f"{term.key} with the credit of {term.credit!r}"
        raise ConfigError(f"credit is for a term that reads it: {readers}", found, "take the credit off the Term")
    if term.reduction not in REDUCTIONS or (term.reduction == "length" and term.length < 1):
        found = f"{term.reduction}, length {term.length}"
        raise ConfigError(f"{term.key}'s reduction is one of {', '.join(REDUCTIONS)}; the last has a length", found)
    known: dict[str, Any] = {field.name: getattr(term, field.name) for field in fields(term)}
    known["loss"] = loss
    return BoundTerm(**known)


def _with_options(term: Term) -> LossTerm:
    kind = term.loss or TERMS.get(term.name)
    if kind is None:
        raise ConfigError("a loss term has a known name", term.name, f"known terms: {', '.join(TERMS)}")
    if not (isinstance(kind, type) and issubclass(kind, LossTerm)):
        raise ConfigError("a Term's loss is a class that is derived from LossTerm", f"{term.key}: {kind!r}")
    types = {field.name: field.type for field in fields(kind) if field.init}
    for option, value in term.options.items():
        if option not in types:
            raise ConfigError(f"the options of {term.name} are: {', '.join(types) or 'none'}", option)
        rule = _broken_rule(value, types[option])
        if rule:
            raise ConfigError(f"{term.name}'s {option} is {rule}", repr(value))
    return kind(**term.options)


def _broken_rule(value: Any, kind: Any) -> str:
    """What a value of this type should be and is not, in words; "" where it is."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    kind, *ranges = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if kind is not float:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "a finite number"
    return next((allowed.rule for allowed in ranges if not allowed.holds(value)), "")
