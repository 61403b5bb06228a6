"""The loss terms by name. Adding one: a new file, a line in TERMS, a test.

The learner knows no method: it sums the terms it is given, each over its own global count. Importance weights are no
term's business (learner/corrections.py).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

from ...contracts.errors import ConfigError
from ...contracts.records import Term
from .base import BoundTerm, LossTerm
from .clipped_policy_gradient import clipped_policy_gradient
from .exact_divergence import exact_divergence
from .likelihood import nll, reference_kl
from .policy_gradient import policy_gradient
from .sign_gate import sign_gate, soft_gate, soft_gated_policy_gradient
from .skill_gate import skill_gate, skill_polarity, view_gap
from .topk_divergence import topk_divergence

TERMS: dict[str, LossTerm] = {
    "nll": LossTerm(nll, "none"),
    "reference_kl": LossTerm(reference_kl, "none"),
    "clipped_policy_gradient": LossTerm(clipped_policy_gradient, "none"),
    "policy_gradient": LossTerm(policy_gradient, "sampled"),
    "sign_gate": LossTerm(sign_gate, "sampled"),
    "soft_gate": LossTerm(soft_gated_policy_gradient, "sampled", soft_gate),
    "skill_gate": LossTerm(skill_gate, "views", skill_polarity, view_gap),
    "topk_divergence": LossTerm(topk_divergence, "topk"),
    "exact_divergence": LossTerm(exact_divergence, "exact"),
}

# An option means the same in every term above: rule, test.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "temperature": ("above 0", lambda x: x > 0),
    "entry_clip": ("0 (off) or above", lambda x: x >= 0),
    "teacher_entropy_above": ("0 (off) or above", lambda x: x >= 0),
    "extrapolation": ("0 or above", lambda x: x >= 0),
    "agree": ("0 or above", lambda x: x >= 0),
    "conflict": ("0 or above", lambda x: x >= 0),
    "blend": ("0 or above", lambda x: x >= 0),
    "tau": ("above 0", lambda x: x > 0),
    "delta_clip": ("above 0", lambda x: x > 0),
    "confidence": ("0 or above", lambda x: x >= 0),
    "sharpness": ("above 0", lambda x: x > 0),
    "clip_low": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "clip_high": ("0 or above", lambda x: x >= 0),
    "dual_clip": ("0 (off) or above 1", lambda x: x == 0 or x > 1),
}


def bind_terms(terms: Sequence[Term]) -> tuple[BoundTerm, ...]:
    """The functions behind the names. Raises ConfigError, naming the term, its option and what it may be."""
    keys = [term.key for term in terms]
    if not keys or len(set(keys)) < len(keys):
        raise ConfigError(
            "a learner sums one or more loss terms, each with a key of its own", str(keys), "give one a label"
        )
    return tuple(_bind(term) for term in terms)


def _bind(term: Term) -> BoundTerm:
    loss = term.loss or TERMS.get(term.name)
    if loss is None:
        raise ConfigError("a loss term has a known name", term.name, f"known terms: {', '.join(TERMS)}")
    parameters = inspect.signature(loss.function).parameters.values()
    allowed = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in term.options.items():
        if option not in allowed:
            raise ConfigError(f"the options of {term.name} are: {', '.join(allowed) or 'none'}", option)
        rule = _broken_rule(option, value, allowed[option], own=term.loss is not None)
        if rule:
            raise ConfigError(f"{term.name}'s {option} is {rule}", repr(value))
    if term.loss is None:
        _check_together(term)
    reductions = get_args(BoundTerm.__annotations__["reduction"])
    if term.reduction not in reductions or (term.reduction == "length" and term.length < 1):
        found = f"{term.reduction}, length {term.length}"
        raise ConfigError(f"{term.key}'s reduction is one of {', '.join(reductions)}; the last has a length", found)
    return BoundTerm(
        key=term.key,
        weight=term.weight,
        loss=loss,
        options=term.options,
        teacher=term.teacher,
        reference=term.reference,
        sources=term.sources,
        reduction=cast(Any, term.reduction),
        length=term.length,
        of_batch=term.of_batch,
    )


def _broken_rule(option: str, value: Any, annotation: Any, own: bool) -> str:
    """What `value` should be and is not, in words; "" where it is."""
    choices = get_args(annotation)
    if choices:
        return "" if value in choices else f"one of {', '.join(map(str, choices))}"
    if annotation is bool:
        return "" if isinstance(value, bool) else "true or false"
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "a finite number"
        rule, holds = RANGES.get(option, ("", None))
        return "" if own or holds is None or holds(value) else rule
    return ""


def _check_together(term: Term) -> None:
    """What one option alone does not show. Raises ConfigError."""
    extrapolates = term.options.get("extrapolation", 1.0) != 1.0
    frozen = term.options.get("mode") == "frozen_ref"
    if (term.name == "reference_kl" or extrapolates or frozen) and not term.reference:
        raise ConfigError("a term that reads the reference model says so", term.key, "set reference=True on the Term")
    if str(term.options.get("direction")).startswith("skew") and term.options.get("beta") == 1:
        raise ConfigError("a skewed divergence has beta below 1: at 1 it is 0 for every student", term.key)
