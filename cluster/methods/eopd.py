"""Entropy-aware OPD: the reverse KL everywhere, and the forward KL too where the teacher itself is undecided.

L_t = RKL_t + 1[H(π_T) > h] · FKL_t on the teacher's top-k ids, h = 0.8 nats, k = 16.
Source: arXiv:2603.07079, known second-hand (a survey's formula); the coefficient 1 of the forward term is assumed. The
paper clips its reverse KL: here the importance weight is truncated. Both terms count all tokens.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from .parts.composition import Composition, correction_of, read_options
from .parts.distil import SignalOptions, distil, signal_of


class EopdOptions(SignalOptions):
    """And the two terms."""

    reverse: Literal["policy_gradient", "divergence"] = Field(
        "policy_gradient", description="the reverse KL on the sampled token, or over all that the signal holds"
    )
    entropy_above: float = Field(0.8, ge=0, description="nats of the teacher above which the forward KL counts")
    forward_weight: float = Field(1.0, ge=0, description="of the forward KL")


def compose(config: Config) -> Composition:
    """A reverse and a forward term for each teacher."""
    options = read_options(EopdOptions, config.method_options, "eopd")
    signal_of(config, "eopd", ("topk", "exact"))
    sampled = options.reverse == "policy_gradient"
    base = distil(config, options, {"direction": "reverse"})
    gate = {"direction": "forward", "teacher_entropy_above": options.entropy_above}
    terms = []
    for term in base.terms:
        suffix = f".{term.teacher}" if term.teacher else ""
        own = {"name": "policy_gradient", "options": {}} if sampled else {}
        terms.append(replace(term, **own, label=f"reverse{suffix}"))
        weight = term.weight * options.forward_weight
        terms.append(replace(term, options=term.options | gate, weight=weight, label=f"forward{suffix}"))
    correction = correction_of(config, "truncated" if sampled else "none")
    return replace(base, terms=tuple(terms), correction=correction)
