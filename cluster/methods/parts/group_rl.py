"""Building blocks of the methods that a verifier's reward drives: their shared options, crediting and compositions.

A rollout that the verifier abstained on has no reward: it is dropped (reason `abstained`) before any mean is taken, and
never counts as wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ....contracts.config import Config, Section
from ....contracts.errors import ConfigError
from ....contracts.records import Term
from .composition import (
    Composition,
    Credit,
    Crediting,
    RolloutSummary,
    correction_of,
    natural,
    sampling_of,
    student_group,
)
from .credit import group_rows

Credited = Sequence[Credit | str]


def _off_or_above_one(value: float) -> float:
    if value and value <= 1:
        raise ValueError("0 switches it off; else it is above 1")
    return value


class Clip(Section):
    """The trust region of a policy gradient: the ratio π_θ/π_old counts within [1 − clip_low, 1 + clip_high]."""

    clip_low: float = Field(0.2, gt=0, lt=1, description="how far below 1 the ratio π_θ/π_old counts")
    clip_high: float = Field(0.2, gt=0, description="how far above 1")
    dual_clip: Annotated[float, AfterValidator(_off_or_above_one)] = Field(
        0.0, ge=0, description="bound on the loss of a negative advantage, in |A|; 0: none (verl's is 3)"
    )


class Policy(Clip):
    """A clipped policy gradient, and how strongly it is held to the reference model."""

    kl_weight: float = Field(0.0, ge=0, description="β of the KL to the reference (k3); 0 needs no reference")


def policy_terms(options: Clip, reduction: str, length: int = 0, kl_weight: float = 0.0) -> tuple[Term, ...]:
    """The clipped policy gradient and, where `kl_weight` is above 0, the KL to the reference."""
    shape: dict[str, Any] = {"reduction": reduction, "length": length}
    clips = {"clip_low": options.clip_low, "clip_high": options.clip_high, "dual_clip": options.dual_clip}
    terms = [Term(name="clipped_policy_gradient", options=clips, **shape)]
    if kl_weight:
        terms.append(Term(name="reference_kl", weight=kl_weight, reference=True, **shape))
    return tuple(terms)


def policy_gradient(config: Config, credit: Crediting, terms: tuple[Term, ...], min_samples: int = 2) -> Composition:
    """The student answers each prompt as a group, the verifier judges, and `credit` makes advantages of it.

    Rollouts of an older policy are corrected by truncated weights. Raises ConfigError where the student would be
    greedy: its answers are equal and have no probabilities.
    """
    if config.rollout.temperature == 0:
        raise ConfigError(
            f"{config.method} is a policy gradient, and samples its answers",
            "rollout.temperature 0, which samples none",
            "set rollout.temperature above 0, e.g. 1",
        )
    return Composition(
        terms=terms,
        samples=student_group(config),
        sampling=sampling_of(config),
        reference=any(term.reference for term in terms),
        needs_verdicts=True,
        min_samples=min_samples,
        credit=credit,
        correction=correction_of(config, "truncated" if config.max_staleness else "none"),
    )


def likelihood(config: Config, credit: Crediting, min_samples: int = 1) -> Composition:
    """The student answers, and the negative log-likelihood of the answers that `credit` keeps is trained (token mean).

    That is imitation of chosen answers, whoever gave them and when, so no off-policy correction by default.
    """
    return Composition(
        terms=(Term(name="nll"),),
        samples=student_group(config),
        sampling=sampling_of(config),
        needs_verdicts=True,
        min_samples=min_samples,
        credit=credit,
        correction=correction_of(config, "none"),
    )


def judged_in_order(rollouts: Sequence[RolloutSummary]) -> list[int]:
    """Indices of those that the verifier judged, by their rollouts' ids: which is first, and how a sum is rounded, must
    not depend on who was ready first."""
    judged = [index for index, rollout in enumerate(rollouts) if not rollout.abstained]
    return sorted(judged, key=lambda index: natural(rollouts[index].rollout_id))


def by_group(rule: Callable[[Sequence[RolloutSummary]], Credited]) -> Crediting:
    """Credit each prompt group by `rule` of those of its rollouts that were judged, in the order of their ids."""

    def credit(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
        made: list[Credit | str] = ["abstained"] * len(rollouts)
        judged = judged_in_order(rollouts)
        for rows in group_rows([rollouts[index].group_id for index in judged]):
            members = [judged[row] for row in rows]
            for index, value in zip(members, rule([rollouts[index] for index in members]), strict=True):
                made[index] = value
        return made

    return credit


def in_rounds(composition: Composition, config: Config, round_steps: int, *, restart: bool = False) -> Composition:
    """The generators keep their weights for `round_steps` steps. Raises ConfigError where no round fits the stage."""
    if round_steps > config.steps:
        raise ConfigError(
            f"a round of {config.method} ends within its stage",
            f"method_options.round_steps {round_steps}, and {config.steps} steps",
            "set method_options.round_steps to at most the number of steps",
        )
    return replace(composition, round_steps=round_steps, restart=restart)
