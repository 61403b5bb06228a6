"""Verifier-gated distillation: the verifier's sign scales what the teacher says of each token.

`rows.advantage_C` carries the verifier: its sign z is +1 for a rollout that it accepts, −1 for one that it rejects, and
0 where it has no say (abstained, cut off by the length limit).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .base import Gated, GatedTerm, LossTerm, NotNegative, Positive, StudentChunk, TermOutput, TokenRows
from .policy_gradient import student_gap


@dataclass(frozen=True)
class SignGate(LossTerm):
    """loss = −sg(A) log π_θ(y_t), A = d + (λ − 1) x, d = log π_T − sg(log π_θ).

    λ is `agree` where the teacher's push d has the verifier's sign, `conflict` where it has the other, and 1 where
    either is 0. x by `mode`:
    live_ref    x = d, so A = λ d.
    frozen_ref  x = log π_T − log π_ref. `guard`: where A then has another sign than d, λ = 1.
    blend       as live_ref, but A = (d + β·advantage)/(1 + β) on conflict tokens, β `blend`.

    (agree, conflict) = (1, 1) is on-policy distillation; (1, 0) with live_ref is OPDVR, A = z ReLU(z d),
    arXiv:2608.24696. Source: SG-OPD, arXiv:2606.09304. Its abstract names the gate and the equation was not found:
    the form is ours, the defaults (1.8, 1.0) are what others report of the paper; guard and blend are ours.
    Metrics: those of `student_gap`; shares of agree, conflict and neutral tokens, and of those that the guard changed.
    """

    signal = "sampled"

    agree: NotNegative = 1.8
    conflict: NotNegative = 1.0
    mode: Literal["live_ref", "frozen_ref", "blend"] = "live_ref"
    blend: NotNegative = 1.0
    guard: bool = True

    @property
    def reads_reference(self) -> bool:
        return self.mode == "frozen_ref"

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        gap, metrics = student_gap(student, rows)
        consistency = rows.advantage_C.sign() * gap.sign()
        agrees, conflicts = consistency > 0, consistency < 0
        scale = torch.ones_like(gap).masked_fill(agrees, self.agree).masked_fill(conflicts, self.conflict)
        direction = rows.teacher_C - rows.reference_C if self.mode == "frozen_ref" else gap
        advantage = gap + (scale - 1.0) * direction
        if self.mode == "blend":
            blended = (gap + self.blend * rows.advantage_C) / (1.0 + self.blend)
            advantage = torch.where(conflicts, blended, advantage)
        guarded = torch.zeros_like(agrees)
        if self.mode == "frozen_ref" and self.guard:
            guarded = advantage.sign() != gap.sign()
            advantage = torch.where(guarded, gap, advantage)
        shares = {"agree": agrees, "conflict": conflicts, "neutral": consistency == 0, "guard": guarded}
        metrics |= {f"gate_{name}": share.to(gap.dtype) for name, share in shares.items()}
        return TermOutput(loss_C=-advantage * student.sampled_C, metrics=metrics)


@dataclass(frozen=True)
class SoftGate(GatedTerm):
    """loss = −sg(g d) log π_θ(y_t), d = log π_T − sg(log π_θ), and g from `gate`.

    Source: R²-OPD, arXiv:2609.35517, at second hand. Metrics: those of `student_gap`, and g.
    """

    signal = "sampled"

    sharpness: Positive = 1e-3

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        gap, metrics = student_gap(student, rows)
        metrics["gate"] = rows.gate_C
        return TermOutput(loss_C=-(rows.gate_C * gap) * student.sampled_C, metrics=metrics)

    def gate(self, d: np.ndarray, advantage: float) -> Gated:
        """g `[R]` of one rollout: σ(β z d/median|d|), times one factor that keeps Σ|g d| at Σ|d|; β `sharpness`.

        It moves the step's size to the tokens where the teacher's push has the verifier's sign, the more so the larger
        β. Ones where the verifier has no sign or the median is 0. `d` `[R]` holds the tokens that count, and no others.
        Source: R²-OPD, arXiv:2609.35517, at second hand; the median and the factor over one rollout are ours.
        """
        size = np.abs(d)
        median = np.median(size) if len(d) else 0.0
        if median == 0 or advantage == 0:
            return Gated(np.ones_like(d))
        log_gate = -np.logaddexp(0.0, -self.sharpness * np.sign(advantage) * d / median)
        gate = np.exp(log_gate - log_gate.max())  # the factor below takes the scale out again
        kept = (gate * size).sum()
        return Gated(gate * (size.sum() / kept) if kept > 0 else np.ones_like(d))
