"""Self-distillation policy optimisation: the teacher is the student's own model, shown a peer's right answer.

Once a prompt group is judged, each answer is scored after a prompt with another answer of the group that passed, never
itself. Answers without such a peer are left out. Source: SDPO, arXiv:2601.20802, and its code: JSD with β = 0.5 on the
student's top-100 ids and a tail bucket, weights of at most 2, a teacher that averages the student at a rate of 0.05.
`grpo_weight` λ: the paper blends A = λ·A_GRPO + (1−λ)·A_SDPO (second-hand). Here the two losses are mixed so, which for
the sampled signal is the same at π_θ = π_old; for the divergences it is ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from ...contracts.records import Term
from .parts.composition import Composition, Credit, RolloutSummary, correction_of, read_options
from .parts.credit import group_relative
from .parts.distil import Direction, DistilOptions, check_self_teacher, distil
from .parts.group_rl import by_group


class SdpoOptions(DistilOptions):
    """With the paper's divergence and support."""

    direction: Direction = Field(
        "jsd", description="topk, exact: reverse is KL(student‖teacher), forward KL(teacher‖student)"
    )
    top_k: int = Field(100, ge=1, description="topk only: ids for each token")
    support: Literal["teacher", "student"] = Field(
        "student", description="topk only: whose ids, the teacher's best or the sampler's"
    )
    template: str = Field(
        "peer@1", description="what the teacher is shown; peer_feedback@1 adds the verifier's finding"
    )
    grpo_weight: float = Field(0.0, ge=0, lt=1, description="λ: share of GRPO's loss beside the teacher's")


def group_advantage(members: Sequence[RolloutSummary]) -> list[Credit | str]:
    """GRPO's (r − mean)/(std + ε) of one prompt group, with the sample's standard deviation."""
    return [Credit(advantage=float(a)) for a in group_relative([f.reward for f in members], "sample")]


def compose(config: Config) -> Composition:
    """Strength by `teacher.signal`: sampled, topk (the paper's) or exact."""
    options = read_options(SdpoOptions, config.method_options, "sdpo")
    check_self_teacher(config, "sdpo")
    base = replace(
        distil(config, options, options.divergence(), context=options.template, support=options.support),
        after_verdicts=True,
        needs_verdicts=True,
        min_samples=2,
        correction=correction_of(config, "truncated"),
    )
    share = options.grpo_weight
    if not share:
        return base
    own = tuple(replace(term, weight=term.weight * (1 - share), of_batch=True) for term in base.terms)
    grpo = Term(name="clipped_policy_gradient", weight=share, of_batch=True)
    return replace(base, terms=(*own, grpo), credit=by_group(group_advantage))
