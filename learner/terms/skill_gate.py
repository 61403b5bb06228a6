"""Skill-conditioned gated self-distillation: teachers that saw a skill and a mistake, validated by the verifier.

Each of W views is the student's own model under another context. Whether a view supports the whole response is its
stance; outcome × stance is its polarity: the loss pulls to a view that was right, away from one that was wrong, and
leaves out one without a stance. Source: SGSD, arXiv:2605.28791, and its code (walawalagoose/SGSD at f296a91).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import Gated, GatedTerm, NotNegative, Positive, StudentChunk, TermOutput, TokenRows


@dataclass(frozen=True)
class SkillGate(GatedTerm):
    """loss = Σ_k w_k p_k ℓ_k, ℓ = log 2 − softplus(−δ²/2τ) in [0, log 2); w_k p_k: a view's weight times its polarity.

    δ by `support`: sampled  log π_T(y_t | k) − log π_θ(y_t), over the whole vocabulary;
    local  KL(π_T ‖ π_θ) on the view's top-k ids and y_t, both renormalised there.
    |∂ℓ/∂log π_θ(y_t)| = σ(−δ²/2τ) |δ|/τ is 0 at δ = 0 and for |δ| → ∞. Metrics: the views' weighted mean of |δ|, ℓ.
    """

    signal = "views"

    tau: Positive = 1.0
    delta_clip: Positive = 3.0
    confidence: NotNegative = 0.05
    validated: bool = True  # false: every view is trusted
    support: Literal["sampled", "local"] = "sampled"

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        assert rows.views_CW is not None and rows.view_gate_CW is not None, "the term's signal is views"
        if self.support == "local":
            delta = local_divergence(student.logprobs_CV, rows)
        else:
            delta = rows.views_CW - student.sampled_C[:, None]
        token_loss = math.log(2.0) - softplus(-delta.square() / (2.0 * self.tau))
        share = rows.view_gate_CW.abs()
        share = share / share.sum(1, keepdim=True).clamp(min=1e-12)
        metrics = {"skill_gap": (share * delta.abs()).sum(1), "skill_token_loss": (share * token_loss).sum(1)}
        return TermOutput(
            loss_C=(rows.view_gate_CW * token_loss).sum(1),
            metrics={name: value.detach() for name, value in metrics.items()},
        )

    def gate(self, d: np.ndarray, advantage: float) -> Gated:
        """p_k `[W]` of one rollout = o · s_k: o the verifier's sign, s_k = sign(a_k) where |a_k| > `confidence`, else
        0, and a_k the mean of d_k clipped to ±`delta_clip` over the tokens that count, `d` `[R,W]`. Where `validated`
        is false the factors are 1, and the polarities are figures alone.
        """
        if not len(d):
            return Gated(np.zeros(d.shape[1]), polarities=(0,) * d.shape[1])
        score = np.clip(d, -self.delta_clip, self.delta_clip).mean(0)
        stance = np.where(np.abs(score) > self.confidence, np.sign(score), 0.0)
        polarity = np.sign(advantage) * stance
        named = {"helpful": polarity > 0, "harmful": polarity < 0, "neutral": polarity == 0}
        figures = {f"skill_{name}": float(is_so.mean()) for name, is_so in named.items()}
        figures |= {"skill_support": float(score.mean()), "skill_support_size": float(np.abs(score).mean())}
        outcome = "right" if advantage > 0 else "wrong" if advantage < 0 else "unjudged"
        for name, sign in (("for", 1.0), ("against", -1.0), ("silent", 0.0)):
            figures[f"skill_{outcome}_{name}"] = float((stance == sign).mean())
        factors = polarity if self.validated else np.ones_like(polarity)
        return Gated(factors, figures, tuple(int(p) for p in polarity))

    def gap(self, student: StudentChunk, rows: TokenRows) -> Tensor:
        """δ `[C,W]` of the sampled token, from which stances are read; with the local support both models' logprobs are
        renormalised on it."""
        assert rows.views_CW is not None, "the term's signal is views"
        if self.support == "sampled":
            return rows.views_CW - student.sampled_C[:, None]
        own, teacher = _on_support(student.logprobs_CV, rows)
        return (rows.views_CW - teacher.logsumexp(2)) - (student.sampled_C[:, None] - own.logsumexp(2))


def local_divergence(logprobs_CV: Tensor, rows: TokenRows) -> Tensor:
    """KL(π_T ‖ π_θ) `[C,W]` on each view's top-k ids and the sampled token, both renormalised over them."""
    student, teacher = _on_support(logprobs_CV, rows)
    student, teacher, out = student.log_softmax(2), teacher.log_softmax(2), teacher.isneginf()
    return (teacher.exp() * (teacher - student).masked_fill(out, 0.0)).sum(2)


def _on_support(logprobs_CV: Tensor, rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Both models' logprobs `[C,W,K+1]` on each view's support, −∞ where an id repeats."""
    ids, teacher = local_support(rows)
    student = logprobs_CV[:, None, :].expand(-1, ids.shape[1], -1).gather(2, ids)
    return student.masked_fill(teacher.isneginf(), -torch.inf), teacher


def local_support(rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Ids and logprobs `[C,W,K+1]`: each view's top-k, then the sampled token, −∞ where it is among them."""
    views = rows.views_CW
    assert views is not None, "the term's signal is views"
    ids = rows.topk_ids_CK.unflatten(1, (views.shape[1], -1))
    logprobs = rows.topk_logprobs_CK.unflatten(1, (views.shape[1], -1)).to(views.dtype)
    sampled = rows.targets_C[:, None, None].expand(-1, views.shape[1], 1)
    among = (ids == sampled).any(2, keepdim=True)
    own = views[:, :, None].masked_fill(among, -torch.inf)
    return torch.cat([ids, sampled], 2), torch.cat([logprobs, own], 2)
