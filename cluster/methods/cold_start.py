"""Phased teacher sampling: at first some prompts are answered by the teacher too, and ever fewer of them.

In step k of a stage a share ρ(k) = ρ0 · max(0, 1 − k/K) of the prompts gets ⌈ρG⌉ of the teacher's answers beside the
student's G. One that the verifier does not pass is sampled again; after some tries the student answers in its place.
Source: SG-OPD's abstract, arXiv:2606.09304, names the idea; schedule, tries and fall-back are ours.
"""

import math
from collections.abc import Sequence

from ...contracts.config import Config
from ...contracts.records import seed_of
from .parts.composition import FollowUp, RolloutSummary, Samples, SampleSpec


def teacher_share(step: int, start: float, steps: float) -> float:
    """ρ of a step: `start` at step 0, falling in a line to 0 at `steps`."""
    return start * max(0.0, 1 - step / steps)


def mixed_specs(config: Config, start: float, steps: float) -> Samples:
    """Who answers a prompt; a draw that the run's seed, the step and the position decide alone picks the teacher's."""
    samples = config.rollout.samples_per_prompt
    student = SampleSpec(samples=samples)

    def specs(step: int, position: int) -> Sequence[SampleSpec]:
        share = teacher_share(step, start, steps)
        if seed_of(config.seed, "cold_start", step, position) / 2**63 >= share:
            return (student,)
        count = math.ceil(share * samples - 1e-9)  # 0.3 · 10 is 3 answers, whatever its last bit
        return (student, SampleSpec(source="teacher", samples=count))

    return specs


def try_again(tries: int) -> FollowUp:
    """For each answer of the teacher that did not pass: another, or the student's once there were `tries`."""

    def follow_up(rollouts: Sequence[RolloutSummary], attempt: int) -> list[tuple[str, SampleSpec]]:
        spec = SampleSpec(source="teacher" if attempt < tries else "student")
        return [(rollout.group_id, spec) for rollout in rollouts if rollout.source == "teacher" and not rollout.passed]

    return follow_up
