"""Divergence on K given ids plus one bucket for all the rest, differentiated directly.

The tail bucket makes it a true divergence of two coarsened distributions: never negative, at most the divergence over
the whole vocabulary, and equal to it at K = V − 1. Without it (or renormalised) mass outside the support goes unseen.
"""

from typing import Literal

import torch
from torch import Tensor

from .base import StudentChunk, TermOutput, TokenRows


def topk_divergence(
    student: StudentChunk, rows: TokenRows, *, direction: Literal["reverse", "forward"] = "reverse"
) -> TermOutput:
    """Σ_k p (log p − log q) + p̄ (log p̄ − log q̄), over the ids that came with the scores, whoever chose them.

    `reverse`: p the student, q the teacher; `forward`: the other way round. Source: SDPO's `add_tail`.
    Metrics: the reverse direction, a lower bound of the reverse KL, and agreement with the teacher's best id.
    """
    p = coarsened(student.logprobs_CV, rows.topk_ids_CK)
    q = with_tail(rows.topk_logprobs_CK)
    reverse = divergence(p, q)
    loss = reverse if direction == "reverse" else divergence(q, p)
    best = rows.topk_ids_CK.gather(1, rows.topk_logprobs_CK.argmax(1, keepdim=True)).squeeze(1)
    agreement = (student.logprobs_CV.detach().argmax(1) == best).to(loss.dtype)
    return TermOutput(loss_C=loss, metrics={"reverse_kl": reverse.detach(), "top1_agreement": agreement})


def divergence(p_CB: Tensor, q_CB: Tensor) -> Tensor:
    """KL(p‖q) `[C]` of two sets of logprobs over the same buckets."""
    return (p_CB.exp() * (p_CB - q_CB)).sum(1)


def coarsened(logprobs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Logprobs `[C, K+1]` of the ids and of the rest together.

    The rest is summed where it lies instead of as 1 − Σ, which in float32 loses a tail below 1e-7 and its gradient.
    """
    rest = logprobs_CV.scatter(1, ids_CK, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat([logprobs_CV.gather(1, ids_CK), rest], 1)


def with_tail(logprobs_CK: Tensor) -> Tensor:
    """Logprobs `[C, K+1]`: the given ones and log(1 − Σ exp), at least log(machine epsilon). No gradient needed."""
    tail = 1 - logprobs_CK.exp().sum(1, keepdim=True)
    return torch.cat([logprobs_CK, tail.clamp(min=torch.finfo(tail.dtype).eps).log()], 1)
