"""Skill-conditioned gated self-distillation: the student under K skill-mistake pairs, validated by the verifier.

The student answers the plain problem. The same weights score the answer after the problem with each of K retrieved
pairs: K views. A view's stance (does it make the answer likelier?) times the verifier's outcome is its polarity; the
student is pulled to the views that were right, pushed from those that were wrong, and the loss of each is bounded
(learner/terms/skill_gate.py). Source: SGSD, arXiv:2605.28791, and its code, with its defaults; there the teachers are
the live weights, and may be an average or fixed (`teacher.follows`). `truncated: neutral` is ours: an answer that was
cut off is then neither right nor wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.records import ScoreRequest, Term
from .parts.composition import (
    Composition,
    Credit,
    RolloutSummary,
    correction_of,
    read_options,
    sampling_of,
    student_group,
)
from .parts.distil import check_self_teacher, refuse, signal_of


class SgsdOptions(Section):
    """Retrieval, the gate, and what it reads."""

    pairs: int = Field(8, ge=1, description="K: skill-mistake pairs, and so views, of a prompt")
    template: str = Field("skills@1", description="what a view shows")
    gate: bool = Field(True, description="false trusts every view: its polarity is 1, whatever the verifier says")
    tau: float = Field(1.0, gt=0, description="scale of the gap δ at which a token's loss saturates")
    delta_clip: float = Field(3.0, gt=0, description="δ is clipped to ± this in a view's stance")
    confidence: float = Field(0.05, ge=0, description="smallest mean δ that is a stance")
    support: Literal["sampled", "local"] = Field(
        "sampled", description="δ of the sampled token, or KL on the view's top-k ids and that token"
    )
    top_k: int = Field(16, ge=1, description="support=local: ids of a view")
    truncated: Literal["wrong", "neutral"] = Field("wrong", description="what an answer that was cut off counts as")
    mask_special: bool = Field(True, description="no loss on special tokens, <think>, </think>, <|…|>, 1-8 newlines")


def compose(config: Config) -> Composition:
    """One term over the K views of each answer; a mean of the answers' means."""
    options = read_options(SgsdOptions, config.method_options, "sgsd")
    local = options.support == "local"
    if not local:
        refuse(options, {"top_k"}, "top_k is for support=local", "remove it, or use support: local")
    check_self_teacher(config, "sgsd")
    signal = signal_of(config, "sgsd", ("topk",) if local else ("sampled",))
    own: dict[str, Any] = options.model_dump(include={"tau", "delta_clip", "confidence", "support"})
    own["validated"] = options.gate
    top_k = options.top_k if local else 0
    return Composition(
        terms=(Term(name="skill_gate", options=own, reduction="sequences"),),
        samples=student_group(config),
        sampling=replace(sampling_of(config), mask_special=options.mask_special),
        scoring=ScoreRequest(signal=signal, top_k=top_k, context=options.template, views=options.pairs),
        needs_verdicts=True,
        credit=_outcome(options.truncated == "neutral"),
        correction=correction_of(config, "truncated"),
    )


def _outcome(spare_truncated: bool) -> Callable[[Sequence[RolloutSummary], int], list[Credit | str]]:
    """The verifier's sign: 1 passed, −1 not, 0 where it abstained (and where it was cut off, if that is spared)."""

    def credit(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
        unjudged = [rollout.abstained or (spare_truncated and rollout.truncated) for rollout in rollouts]
        signs = [0.0 if no else 1.0 if rollout.passed else -1.0 for rollout, no in zip(rollouts, unjudged, strict=True)]
        return [Credit(advantage=sign) for sign in signs]

    return credit
