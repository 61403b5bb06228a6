"""Divergence on K given ids and what is left outside them, differentiated directly.

The tail bucket makes it a true divergence of two coarsened distributions: never negative, at most the divergence over
the whole vocabulary, and equal to it at K = V − 1. Renormalised over the ids, mass outside them goes unseen. The bare
partial sum over the ids, which can be negative, does not exist here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import StudentChunk, TermOutput, TokenRows
from .divergence import Buckets, DivergenceTerm, divergence, floored


@dataclass(frozen=True)
class TopkDivergence(DivergenceTerm):
    """A divergence of each token over the ids that came with the scores, whoever chose them (divergence.py: the kinds).

    `rest`: "tail", one bucket for all other tokens (source: SDPO's code, `add_tail`, arXiv:2601.20802); "renormalise",
    both distributions made to sum to 1 over the ids (source: revisiting_opd's code, arXiv:2603.25562).
    `teacher_entropy_above`: as in exact_divergence; H(π_T) comes from the teacher.

    Metrics: `topk_reverse_kl`, the reverse KL of the ids and their tail, a lower bound of the whole one (the more mass
    outside the ids, the further below); agreement with the teacher's best id; both models' mass on the ids; the
    teacher's entropy; with a clip, the share of tokens beyond it; with a gate, of those that it lets through.
    """

    signal = "topk"

    rest: Literal["tail", "renormalise"] = "tail"

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        p = Buckets.of(coarsened(student.logprobs_CV, rows.topk_ids_CK))
        q = Buckets.of(with_tail(rows.topk_logprobs_CK))
        if self.rest == "tail":
            loss = self.between(p, q)
        else:
            inside_p, inside_q = (Buckets.of(x.log_CB[:, :-1].log_softmax(1)) for x in (p, q))
            loss = self.between(inside_p, inside_q)
        with torch.no_grad():
            best = rows.topk_ids_CK.gather(1, rows.topk_logprobs_CK.argmax(1, keepdim=True)).squeeze(1)
            metrics = {
                "topk_reverse_kl": divergence(p, q, "reverse"),
                "top1_agreement": (student.logprobs_CV.argmax(1) == best).to(loss.dtype),
                "student_mass": p.mass_CB[:, :-1].sum(1),
                "teacher_mass": q.mass_CB[:, :-1].sum(1),
                "teacher_entropy": rows.teacher_entropy_C,
            }
        loss = self.clipped(loss, metrics)
        if self.teacher_entropy_above:
            unknown = 0 * rows.teacher_entropy_C  # NaN where the teacher sent none: the loss must not be 0 in silence
            gate = (rows.teacher_entropy_C > self.teacher_entropy_above).to(loss.dtype) + unknown
            loss = loss * gate
            metrics["gate_share"] = gate
        return TermOutput(loss_C=loss, metrics=metrics)


def coarsened(logprobs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Logprobs `[C, K+1]` of the ids and of the rest together, finite.

    The rest is summed where it lies instead of as 1 − Σ, which in float32 loses a tail below 1e-7 and its gradient.
    """
    rest = logprobs_CV.scatter(1, ids_CK, float("-inf")).logsumexp(1, keepdim=True)
    return floored(torch.cat([logprobs_CV.gather(1, ids_CK), rest], 1))


def with_tail(logprobs_CK: Tensor) -> Tensor:
    """Logprobs `[C, K+1]`: the given ones and log(1 − Σ exp), at least log(machine epsilon). No gradient needed.

    Summed in float64: of a sharp teacher's tail float32 would leave noise.
    """
    tail = (1 - logprobs_CK.double().exp().sum(1, keepdim=True)).clamp(min=torch.finfo(logprobs_CK.dtype).eps)
    return floored(torch.cat([logprobs_CK, tail.log().to(logprobs_CK.dtype)], 1))
