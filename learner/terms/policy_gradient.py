"""Sampled-token reverse KL as a policy gradient: the teacher need only say log π_T(y_t).

The advantage uses the student's current logprobs, recomputed here; the sampler's serve the importance weight alone
(learner/corrections.py). With the sampler's inside the advantage, a stale policy would add +∇KL(π_θ‖μ) and push away
from itself. The loss is always −sg(A) log π_θ: back-propagating the log-ratio itself would give a gradient that the
teacher is not in.
"""

from dataclasses import dataclass

from torch import Tensor

from .base import LossTerm, NotNegative, StudentChunk, TermOutput, TokenRows
from .divergence import k3


@dataclass(frozen=True)
class PolicyGradient(LossTerm):
    """loss = −sg(A) log π_θ(y_t), A = d + (λ − 1)(log π_T − log π_ref), d = log π_T − sg(log π_θ), λ `extrapolation`.

    Where the term names a credit service, A also has the token's credit added; a rollout's own advantage is not read.
    λ = 1 is on-policy distillation and reads no reference; λ > 1 goes past the teacher, away from the reference; λ < 1
    stops between them. Sources: Thinking Machines, "On-Policy Distillation" (2025), with the current policy in d
    (ours); G-OPD and ExOPD (λ = 1.25), arXiv:2602.12125, its code.
    Metrics: those of `student_gap`, and |A|.
    """

    signal = "sampled"
    reads_credit = True

    extrapolation: NotNegative = 1.0

    @property
    def reads_reference(self) -> bool:
        return self.extrapolation != 1.0

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        gap, metrics = student_gap(student, rows)
        advantage = gap
        if self.extrapolation != 1.0:
            advantage = gap + (self.extrapolation - 1.0) * (rows.teacher_C - rows.reference_C)
        if rows.credit_C is not None:
            advantage = advantage + rows.credit_C
        metrics["advantage_abs"] = advantage.abs()
        return TermOutput(loss_C=-advantage * student.sampled_C, metrics=metrics)


def student_gap(student: StudentChunk, rows: TokenRows) -> tuple[Tensor, dict[str, Tensor]]:
    """d = log π_T − log π_θ `[C]` of the sampled tokens, detached, and the metrics that it gives.

    `reverse_kl` is −d and `reverse_kl_k3` exp(d) − 1 − d: both have the reverse KL as their mean over the student's own
    samples, the second with less noise and never below 0. Source: J. Schulman, "Approximating KL Divergence" (2020).
    """
    gap = rows.teacher_C - student.sampled_C.detach()
    return gap, {"reverse_kl": -gap, "reverse_kl_k3": k3(gap)}
