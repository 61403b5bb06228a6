"""Divergence over the whole vocabulary, differentiated directly: no sampling noise and no truncation.

The teacher sends its last hidden states and the learner holds its frozen head, so both distributions exist for one
chunk of tokens at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Positive, StudentChunk, TermOutput, TokenRows
from .divergence import Buckets, DivergenceTerm, divergence, entropy


@dataclass(frozen=True)
class ExactDivergence(DivergenceTerm):
    """A divergence of each token from its teacher (divergence.py has the kinds, `beta` and `entry_clip`).

    `temperature` τ divides both models' logits; `hinton` multiplies the loss with τ². Sources: GKD's temperature (no
    τ²); Hinton et al., arXiv:1503.02531, section 2 (τ²).
    `teacher_entropy_above` h > 0: the loss is 0 where H(π_T) ≤ h, and the token still counts in the mean. Source: EOPD,
    arXiv:2603.07079, at second hand; there it gates a forward term beside a reverse one.

    Metrics, all at temperature 1: the reverse KL whatever the direction; whether both prefer the same token, and the
    teacher's probability of the student's; the teacher's entropy and |H(π_θ) − H(π_T)|; the total variation (1 minus
    the chance that speculative decoding would accept); with a clip, the share of tokens beyond it; with a gate, of
    those that it lets through.
    """

    signal = "exact"

    temperature: Positive = 1.0
    hinton: bool = False

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        assert rows.teacher_logprobs_CV is not None, "the exact signal comes with the teacher's logprobs"
        p, q = Buckets.of(student.logprobs_CV), Buckets.of(rows.teacher_logprobs_CV)
        if self.temperature == 1.0:
            loss = self.between(p, q)
        else:
            cool_p, cool_q = (Buckets.of((x.log_CB / self.temperature).log_softmax(1)) for x in (p, q))
            loss = self.between(cool_p, cool_q) * (self.temperature**2 if self.hinton else 1.0)
        metrics = _metrics(p, q)
        if self.direction == "reverse" and self.temperature == 1.0 and not self.entry_clip:
            metrics["reverse_kl"] = loss.detach()
        else:
            with torch.no_grad():
                metrics["reverse_kl"] = divergence(p, q, "reverse")
        loss = self.clipped(loss, metrics)
        if self.teacher_entropy_above:
            gate = (metrics["teacher_entropy"] > self.teacher_entropy_above).to(loss.dtype)
            loss = loss * gate
            metrics["gate_share"] = gate
        return TermOutput(loss_C=loss, metrics=metrics)


@torch.no_grad()
def _metrics(p: Buckets, q: Buckets) -> dict[str, Tensor]:
    teacher_entropy = entropy(q)
    best_C1, teacher_best_C1 = p.log_CB.argmax(1, keepdim=True), q.log_CB.argmax(1, keepdim=True)
    return {
        "top1_agreement": (best_C1 == teacher_best_C1).squeeze(1).to(teacher_entropy.dtype),
        "teacher_prob_of_student_argmax": q.mass_CB.gather(1, best_C1).squeeze(1),
        "teacher_entropy": teacher_entropy,
        "entropy_gap": (entropy(p) - teacher_entropy).abs(),
        "total_variation": (p.mass_CB - q.mass_CB).abs_().sum(1) / 2,
    }
