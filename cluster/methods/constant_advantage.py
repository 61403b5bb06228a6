"""A control arm for OPD: every token that the student sampled is pushed down alike, and no teacher is asked.

The advantage is −1 everywhere. What OPD gains beyond this is what the teacher gave. Source: arXiv:2608.31046 reports
that a fixed negative advantage comes close to the teacher's (known from its abstract); the form here is ours.
"""

from collections.abc import Sequence

from ...contracts.config import Config, Section
from ...contracts.records import Term
from .parts.composition import (
    Composition,
    Credit,
    RolloutSummary,
    correction_of,
    read_options,
    sampling_of,
    student_group,
)


class ConstantAdvantageOptions(Section):
    """It has none."""


def push_down(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
    """The same for every rollout."""
    return [Credit(advantage=-1.0) for _ in rollouts]


def compose(config: Config) -> Composition:
    """As opd with the sampled signal, without the teacher."""
    read_options(ConstantAdvantageOptions, config.method_options, "constant_advantage")
    return Composition(
        terms=(Term(name="clipped_policy_gradient"),),
        samples=student_group(config),
        sampling=sampling_of(config),
        credit=push_down,
        correction=correction_of(config, "truncated"),
    )
