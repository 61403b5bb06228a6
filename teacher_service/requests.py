"""What a teacher is asked: which requests make sense, which rollouts can be scored, and which go together."""

from collections.abc import Sequence

import numpy as np

from ..contracts.engines import SIGNALS
from ..contracts.errors import TeacherError
from ..contracts.records import Rollout, ScoreRequest, TeacherScores


def check_request(request: ScoreRequest, vocab: int) -> None:
    """Raises TeacherError where the request itself cannot be met."""
    if request.signal not in SIGNALS:
        raise TeacherError("a signal is known", request.signal, f"known: {', '.join(SIGNALS)}")
    if request.signal == "topk" and not 0 < request.top_k <= vocab:
        raise TeacherError("top_k is between 1 and the vocabulary", f"{request.top_k} of {vocab}")


def refusal(rollout: Rollout, request: ScoreRequest, *, context: int, vocab: int) -> str:
    """Why `rollout` cannot be scored: "empty", "too_long", "bad_ids", "no_support"; "" where it can."""
    ids, support = rollout.token_ids, rollout.topk_ids
    if rollout.response_length == 0:
        return "empty"
    if len(ids) > context:
        return "too_long"
    if ids.min() < 0 or ids.max() >= vocab:
        return "bad_ids"
    if request.signal == "given":
        if not support.size:
            return "no_support"
        if support.min() < 0 or support.max() >= vocab:
            return "bad_ids"
    return ""


def only_numbers(score: TeacherScores) -> TeacherScores:
    """`score`, or its refusal as "not_finite": a teacher that overflowed, or that gives a sampled token no probability.

    An id of a support may have none: its logprob is then −∞, which the divergences take.
    """
    support = score.topk_logprobs
    sound = all(np.isfinite(array).all() for array in (score.logprobs, score.entropy, score.views))
    sound = sound and not (np.isnan(support) | np.isposinf(support)).any()
    if score.hidden.dtype == np.uint16:  # bits of bfloat16, whose exponent is full
        sound = sound and not (score.hidden & 0x7F80 == 0x7F80).any()
    else:
        sound = sound and bool(np.isfinite(score.hidden).all())
    if sound:
        return score
    return TeacherScores(
        rollout_id=score.rollout_id, teacher_id=score.teacher_id, context=score.context, error_class="not_finite"
    )


def batches_of(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of at most `tokens_per_batch` tokens, like lengths together; a longer one stands alone."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or lengths[i] > room:
            batches.append([])
            room = tokens_per_batch
        batches[-1].append(i)
        room -= lengths[i]
    return batches
