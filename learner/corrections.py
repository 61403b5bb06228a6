"""Corrections for rollouts of another policy: detached weights, and which tokens count.

μ generated the tokens (an engine with its own numerics, and maybe older weights); π_old is the proximal policy of the
clipped ratios. The learner multiplies each token's loss with a weight made of ρ = π_old/μ, and leaves rejected tokens
out of the loss and of what the loss is divided by. Truncation needs one token's ρ alone; all else is decided over a
whole rollout, before the gradient.

Sources: truncation, Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), with
verl's levels, veto and masks; `masked` on tokens is IcePop (Ring-1T), [0.5, 5] there; the gap in probability is
prime-rl's; the denominator of the kept tokens is ours (a rejected token with weight 0 that still counts shrinks the
step).

Shape suffixes: C tokens of any chunk, R the tokens of one rollout that its loss mask keeps. Logs are natural.
"""

import torch
from torch import Tensor

from ..contracts.records import Correction
from .terms.divergence import k3


def needs_rollout(correction: Correction) -> bool:
    """Whether whole rollouts must be weighed before the first gradient: `weigh`, and not `token_weights`."""
    whole = correction.kind == "truncated" and correction.level != "token"
    rejects = correction.kind == "masked" or correction.veto > 0 or correction.probability_gap > 0
    return whole or rejects or correction.normalise


def token_weights(old_C: Tensor, mu_C: Tensor, correction: Correction) -> Tensor:
    """Weights `[C]` where nothing needs the whole rollout: min(ρ, high), or ones for the kind "none"."""
    if correction.kind == "none":
        return torch.ones_like(old_C)
    return (old_C - mu_C).detach().exp().clamp(max=correction.high)


def weigh(old_R: Tensor, mu_R: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """Weights `[R]` and whether each token counts (bool `[R]`) of one rollout, from log π_old and log μ of its tokens.

    A token that does not count has weight 0. A geometric mean decides alone: what it keeps weighs 1, for it is no
    importance weight. `normalise` is the caller's: it knows the batch's mean weight.
    """
    log_ratio = (old_R - mu_R).detach()
    keep = torch.ones_like(log_ratio, dtype=torch.bool)
    weights = torch.ones_like(log_ratio)
    if correction.kind != "none" and len(log_ratio):
        ratio = _at_level(log_ratio, correction.level).exp()
        if correction.kind == "masked":
            keep = (ratio >= correction.low) & (ratio <= correction.high)
        if correction.level != "geometric":
            weights = ratio.clamp(max=correction.high)
    if correction.veto > 0:
        keep = keep & (log_ratio.exp() >= correction.veto).all()
    if correction.probability_gap > 0:
        keep = keep & ((old_R.exp() - mu_R.exp()).abs() <= correction.probability_gap)
    return torch.where(keep, weights, 0.0), keep


def _at_level(log_ratio_R: Tensor, level: str) -> Tensor:
    if level == "token":
        return log_ratio_R
    whole = log_ratio_R.sum() if level == "sequence" else log_ratio_R.mean()
    return whole.expand_as(log_ratio_R)


def current_share(proximal: str, behaviour_version: float, old_version: float, current_version: float) -> float:
    """The share s of log π_old = log μ + s · (log π_θ − log μ), for a `Correction.proximal`.

    "recompute" is 1 (π_old is the current policy, where no pass gave another) and "behaviour" 0. "interpolate" is
    (v_old − v_μ)/(v_θ − v_μ), and 1 where the rollout is as new as the weights. Source: AReaL's log-linear
    approximation of the proximal policy, which saves the pass that would recompute it.
    """
    if proximal != "interpolate":
        return float(proximal == "recompute")
    gap = current_version - behaviour_version
    return min(max((old_version - behaviour_version) / gap, 0.0), 1.0) if gap > 0 else 1.0


def mismatch(old_C: Tensor, mu_C: Tensor) -> tuple[Tensor, Tensor]:
    """k1 and k3 `[C]`, whose means estimate KL(μ‖π_old) on tokens that μ sampled: −log ρ, and ρ − 1 − log ρ."""
    log_ratio = (old_C - mu_C).detach()
    return -log_ratio, k3(log_ratio)


def effective_share(mean_weight: float, mean_square: float) -> float:
    """Effective sample size over the number of tokens: (mean w)²/mean w², 1 where all weigh the same, 0 without any."""
    return mean_weight**2 / mean_square if mean_square > 0 else 0.0
