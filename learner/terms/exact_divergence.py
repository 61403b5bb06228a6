"""Divergence over the whole vocabulary, differentiated directly: no sampling noise and no truncation.

The teacher sends its last hidden states and the learner holds its frozen head, so both distributions exist for one
chunk of tokens at a time.
"""

from typing import Literal

from .base import StudentChunk, TermOutput, TokenRows
from .topk_divergence import divergence


def exact_divergence(
    student: StudentChunk, rows: TokenRows, *, direction: Literal["reverse", "forward"] = "reverse"
) -> TermOutput:
    """KL(π_θ‖π_T) (`reverse`) or KL(π_T‖π_θ) (`forward`) of each token. Source: GKD, arXiv:2306.13649, β = 1 and 0.

    Metrics: the reverse KL whatever the direction, and whether both would choose the same token.
    """
    p, q = student.logprobs_CV, rows.teacher_logprobs_CV
    assert q is not None, "the exact signal comes with the teacher's logprobs"
    loss = divergence(p, q) if direction == "reverse" else divergence(q, p)
    reverse = loss if direction == "reverse" else divergence(p.detach(), q)
    agreement = (p.detach().argmax(1) == q.argmax(1)).to(loss.dtype)
    return TermOutput(loss_C=loss, metrics={"reverse_kl": reverse.detach(), "top1_agreement": agreement})
