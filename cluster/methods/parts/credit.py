"""What rewards become: advantages, penalties, weights and choices, as pure float64 functions of one group or step.

No rollout, step or configuration is known here; group_rl.py puts these together. G rewards of one prompt group, N of a
step. Where all rewards of a group are equal, every group rule says exactly 0: float rounding cannot turn a group that
teaches nothing into a tiny signal that a small standard deviation then blows up.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Std = Literal["sample", "population", "none"]
Pace = Literal["none", "frontier", "paced"]


def all_equal(values: ArrayLike) -> bool:
    """No value differs from another: such a group has nothing to compare (DAPO's dynamic sampling, 2503.14476)."""
    array = np.asarray(values, np.float64)
    return bool((array == array[:1]).all())


def group_relative(rewards: ArrayLike, std: Std = "none", epsilon: float = 1e-6) -> np.ndarray:
    """(r − mean) / (std + ε) of one group, `[G]` → `[G]`.

    Source: GRPO, 2402.03300; `std` none, r − mean, is Dr. GRPO's (2503.20783). Codes differ in the rest: the sample's
    standard deviation and ε = 1e-6 (verl), or ε = 1e-4 (TRL). Of equal rewards, and of one alone: 0.
    """
    array = np.asarray(rewards, np.float64)
    if all_equal(array):
        return np.zeros_like(array)
    centred = array - array.mean()
    if std == "none":
        return centred
    return centred / (array.std(ddof=1 if std == "sample" else 0) + epsilon)


def leave_one_out(rewards: ArrayLike) -> np.ndarray:
    """r − the mean of the others, which is (r − mean)·G/(G−1), `[G]` → `[G]`. Source: RLOO, 2402.14740."""
    array = np.asarray(rewards, np.float64)
    return np.zeros_like(array) if all_equal(array) else group_relative(array) * (len(array) / (len(array) - 1))


def whitened(rewards: ArrayLike, groups: Sequence[Hashable] | None = None, epsilon: float = 1e-8) -> np.ndarray:
    """A step's rewards less their mean, over their population standard deviation + ε, `[N]` → `[N]`.

    With `groups` (the group of each reward) the mean is the group's own, and the deviation still the step's.
    Source: REINFORCE++ and its baseline variant, 2501.03262.
    """
    array = np.asarray(rewards, np.float64)
    if groups is None:
        centred = group_relative(array)
    else:
        centred = np.zeros_like(array)
        for rows in group_rows(groups):
            centred[rows] = group_relative(array[rows])
    return centred / (np.sqrt(np.square(centred).mean()) + epsilon) if centred.any() else centred


def plus_minus_one(passed: ArrayLike) -> np.ndarray:
    """+1 where passed and −1 where failed in a group that has both, else 0, `[G]` → `[G]`.

    Source: Reinforce-Rej, 2504.11343.
    """
    array = np.asarray(passed, bool)
    return np.zeros(len(array)) if all_equal(array) else np.where(array, 1.0, -1.0)


def overlong_penalty(lengths: ArrayLike, limit: int, buffer: int, factor: float = 1.0) -> np.ndarray:
    """0 up to limit − buffer tokens, from there linearly down to −factor at `limit`, `[N]` → `[N]`; buffer 0: all 0.

    Source: DAPO's soft overlong punishment, 2503.14476.
    """
    tokens = np.asarray(lengths, np.float64)
    if not buffer:
        return np.zeros_like(tokens)
    return -factor * np.clip((tokens - (limit - buffer)) / buffer, 0.0, 1.0)


def pace(rewards: ArrayLike, rule: Pace) -> float:
    """The weight of a group whose mean reward is p: 4p(1 − p) (frontier, at most 1), p(1 − p) (paced), or 1 (none).

    p(1 − p) is the variance of a 0/1 reward: largest for prompts that the student solves half the time, and 0 where it
    solves all or none. Source: ours, in the form that several curricula use.
    """
    p = float(np.asarray(rewards, np.float64).mean())
    return {"none": 1.0, "frontier": 4 * p * (1 - p), "paced": p * (1 - p)}[rule]


def best_of(rewards: ArrayLike, passed: ArrayLike) -> int:
    """The first of the passed rollouts with the highest reward, and −1 where none passed. Source: RAFT, 2304.06767."""
    chosen = np.where(np.asarray(passed, bool), np.asarray(rewards, np.float64), -np.inf)
    return int(chosen.argmax()) if np.isfinite(chosen).any() else -1


def first_of_each(paths: Sequence[Hashable]) -> list[bool]:
    """Which entries are the first with their value. Source: RFT's distinct reasoning paths, 2308.01825."""
    first = {path: index for index, path in reversed(list(enumerate(paths)))}
    return [first[path] == index for index, path in enumerate(paths)]


def improve_threshold(step: int, round_steps: int, thresholds: Sequence[float]) -> float:
    """The threshold of a step: a round of `round_steps` is cut into as many even parts as there are thresholds.

    Source: ReST's Improve steps, 2308.08998; that one learner step stands for a part of an Improve step is ours.
    """
    return thresholds[step % round_steps * len(thresholds) // round_steps]


def group_rows(groups: Sequence[Hashable]) -> list[list[int]]:
    """The indices of each group's entries, groups in the order in which they appear."""
    rows: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        rows.setdefault(group, []).append(index)
    return list(rows.values())
