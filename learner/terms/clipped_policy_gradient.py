"""The clipped surrogate of reinforcement learning, on the advantage of a whole rollout: no teacher.

GRPO and its kin differ in how advantages are made and in what the sum is divided by, and neither is decided here. A
constant advantage of −1 is the control without a verifier.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from .base import LossTerm, NotNegative, Range, Share, StudentChunk, TermOutput, TokenRows
from .divergence import MAX_LOG_RATIO


@dataclass(frozen=True)
class ClippedPolicyGradient(LossTerm):
    """loss = −min(r A, clip(r, 1 − `clip_low`, 1 + `clip_high`) A), r = π_θ(y_t)/π_old(y_t).

    A is the rollout's advantage, plus the token's credit where the term names a credit service.
    Without `clip`: −r A. `dual_clip` c > 1: where A < 0 the loss is at most c |A|, however large r. At r = 1 the
    gradient is −A ∇log π_θ. Sources: PPO, arXiv:1707.06347, eq. 7; DAPO, arXiv:2503.14476, clips 0.2 and 0.28; dual
    clip, arXiv:1912.09729, eq. 5, c = 3.
    Metrics: r, the share of tokens that a clip cuts off from the gradient, and A.
    """

    reads_credit = True

    clip: bool = True
    clip_low: Share = 0.2
    clip_high: NotNegative = 0.2
    dual_clip: Annotated[float, Range("0 (off) or above 1", lambda x: x == 0 or x > 1)] = 0.0

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        advantage = rows.advantage_C if rows.credit_C is None else rows.advantage_C + rows.credit_C
        log_ratio = (student.sampled_C - rows.old_C).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # beyond: no gradient
        ratio = log_ratio.exp()
        floor, ceiling = torch.zeros_like(advantage), torch.full_like(advantage, float("inf"))
        if self.clip:
            floor = floor.masked_fill(advantage < 0, 1.0 - self.clip_low)
            ceiling = ceiling.masked_fill(advantage >= 0, 1.0 + self.clip_high)
        if self.dual_clip:
            ceiling = ceiling.masked_fill(advantage < 0, self.dual_clip)
        kept = ratio.clamp(floor, ceiling)
        clipped = (kept != ratio).to(ratio.dtype)
        metrics = {"ratio": ratio.detach(), "clip_fraction": clipped, "advantage": advantage}
        return TermOutput(loss_C=-advantage * kept, metrics=metrics)
