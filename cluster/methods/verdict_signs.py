"""The verifier's sign on each rollout, for gates: +1, −1, or 0 where it has no say; and which teacher answers train."""

from collections.abc import Sequence

import numpy as np

from .composition import Credit, Facts
from .credit import group_relative, group_rows
from .group_rl import judged_in_order


def outcome_sign(facts: Sequence[Facts], step: int) -> list[Credit | str]:
    """+1 for a right answer, −1 for a wrong one; 0, a neutral gate, where it was cut off or the verifier abstained."""
    signs = [(1.0 if fact.passed else -1.0) if _judged(fact) else 0.0 for fact in facts]
    return [_teacher(fact) or Credit(advantage=sign) for fact, sign in zip(facts, signs, strict=True)]


def group_sign(facts: Sequence[Facts], step: int) -> list[Credit | str]:
    """The sign of reward − mean over the student's answers to the prompt that were judged and not cut off (ours)."""
    signs = [0.0] * len(facts)
    judged = [i for i in judged_in_order(facts) if facts[i].source == "student" and _judged(facts[i])]
    for rows in group_rows([facts[i].group_id for i in judged]):
        members = [judged[row] for row in rows]
        for i, value in zip(members, group_relative([facts[i].reward for i in members]), strict=True):
            signs[i] = float(np.sign(value))
    return [_teacher(fact) or Credit(advantage=sign) for fact, sign in zip(facts, signs, strict=True)]


def _judged(fact: Facts) -> bool:
    return not (fact.truncated or fact.abstained)


def _teacher(fact: Facts) -> Credit | str | None:
    if fact.source != "teacher":
        return None
    return Credit() if fact.passed else "abstained" if fact.abstained else "teacher_incorrect"
