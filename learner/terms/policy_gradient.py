"""Sampled-token reverse KL as a policy gradient: the teacher need only say log π_T(y_t).

The advantage uses the student's current logprobs, recomputed here; the sampler's serve the importance weight alone.
With the sampler's inside the advantage, a stale policy would add +∇KL(π_θ‖μ) and push away from itself.
"""

import torch

from .base import StudentChunk, TermOutput, TokenRows


def policy_gradient(student: StudentChunk, rows: TokenRows, *, importance_clip: float = 2.0) -> TermOutput:
    """loss_t = −sg(w_t · A_t) · log π_θ(y_t), with A_t = log π_T − log π_θ and w_t = min(π_θ/μ, importance_clip).

    Source: Thinking Machines, "On-Policy Distillation" (2025), with the current policy in the advantage and a
    truncated weight (ours). Metrics: k1 and k3 estimates of the reverse KL, the weight and the share clipped.
    """
    log_ratio = rows.teacher_C - student.sampled_C.detach()
    ratio = (student.sampled_C.detach() - rows.behaviour_C).exp()
    weight = ratio.clamp(max=importance_clip)
    metrics = {
        "reverse_kl": -log_ratio,
        "reverse_kl_k3": torch.expm1(log_ratio) - log_ratio,
        "importance_weight": weight,
        "clipped_share": (ratio > importance_clip).to(weight.dtype),
    }
    return TermOutput(loss_C=-(weight * log_ratio) * student.sampled_C, metrics=metrics)
