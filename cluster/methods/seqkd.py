"""Sequence-level distillation: fine-tuning on answers that the teacher samples, all of them or a checked part.

Source: Kim & Rush, arXiv:1606.07947, with samples in place of beam search. The filters are ours: `valid` keeps what
ended by itself and has an answer, whatever it is; `verified` keeps what the verifier passed.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.records import Term
from .parts.composition import Composition, Credit, RolloutSummary, SampleSpec, read_options, sampling_of, train_all


class SeqkdOptions(Section):
    """Which of the teacher's answers are kept."""

    filter: Literal["none", "valid", "verified"] = Field(
        "none", description="keep all answers, those that ended and hold an answer, or those that the verifier passed"
    )


def keep_valid(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
    """Whether it is right plays no part: a verifier that failed on a response still leaves it out, as `abstained`."""
    return [_valid(rollout) for rollout in rollouts]


def _valid(rollout: RolloutSummary) -> Credit | str:
    if rollout.truncated:
        return "invalid"
    if rollout.answer:
        return Credit()
    return "abstained" if rollout.abstained else "invalid"


def keep_verified(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
    """Only what passed."""
    return [Credit() if f.passed else "abstained" if f.abstained else "incorrect" for f in rollouts]


FILTERS = {"none": train_all, "valid": keep_valid, "verified": keep_verified}


def compose(config: Config) -> Composition:
    """The teacher answers each prompt `rollout.samples_per_prompt` times."""
    options = read_options(SeqkdOptions, config.method_options, "seqkd")
    spec = SampleSpec(source="teacher", samples=config.rollout.samples_per_prompt)
    return Composition(
        terms=(Term(name="nll", sources=("teacher",)),),
        samples=lambda step, position: (spec,),
        sampling=sampling_of(config),
        generators=("teacher",),
        scored=(),
        needs_verdicts=options.filter != "none",
        credit=FILTERS[options.filter],
    )
