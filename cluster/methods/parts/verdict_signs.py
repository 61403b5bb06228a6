"""The verifier's sign on each rollout, for gates: +1, −1, or 0 where it has no say; and which teacher answers train."""

from collections.abc import Sequence

import numpy as np

from .composition import Credit, RolloutSummary
from .credit import group_relative, group_rows
from .group_rl import judged_in_order


def outcome_sign(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
    """+1 for a right answer, −1 for a wrong one; 0, a neutral gate, where it was cut off or the verifier abstained."""
    signs = [(1.0 if rollout.passed else -1.0) if _judged(rollout) else 0.0 for rollout in rollouts]
    return [_teacher(rollout) or Credit(advantage=sign) for rollout, sign in zip(rollouts, signs, strict=True)]


def group_sign(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
    """The sign of reward − mean over the student's answers to the prompt that were judged and not cut off (ours)."""
    signs = [0.0] * len(rollouts)
    judged = [i for i in judged_in_order(rollouts) if rollouts[i].source == "student" and _judged(rollouts[i])]
    for rows in group_rows([rollouts[i].group_id for i in judged]):
        members = [judged[row] for row in rows]
        for i, value in zip(members, group_relative([rollouts[i].reward for i in members]), strict=True):
            signs[i] = float(np.sign(value))
    return [_teacher(rollout) or Credit(advantage=sign) for rollout, sign in zip(rollouts, signs, strict=True)]


def _judged(rollout: RolloutSummary) -> bool:
    return not (rollout.truncated or rollout.abstained)


def _teacher(rollout: RolloutSummary) -> Credit | str | None:
    if rollout.source != "teacher":
        return None
    return Credit() if rollout.passed else "abstained" if rollout.abstained else "teacher_incorrect"
