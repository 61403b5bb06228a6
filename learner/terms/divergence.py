"""Divergences between the student's and the teacher's distributions over the same buckets.

Sources: reverse, forward and jsd: GKD, arXiv:2306.13649, eq. 1, in TRL's convention; the skewed ones: DistiLLM,
arXiv:2402.03898, eq. 4; the clip of single entries: OPSD's code (siyan-zhao/OPSD), arXiv:2601.18734.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...contracts.errors import ConfigError
from .base import LossTerm, OffOrPositive, Share

Direction = Literal["reverse", "forward", "jsd", "skew_forward", "skew_reverse"]

LOG_FLOOR = -1000.0  # nats
MAX_LOG_RATIO = 20.0  # nats; far beyond it a ratio's exponential leaves float32


class Buckets(NamedTuple):
    """A distribution over buckets, twice: the exponential is the dearest pass over a vocabulary, and is taken once."""

    log_CB: Tensor
    mass_CB: Tensor

    @classmethod
    def of(cls, logprobs_CB: Tensor) -> "Buckets":
        """Of finite logprobs: `floored` makes them so."""
        return cls(logprobs_CB, logprobs_CB.exp())


def floored(logprobs: Tensor) -> Tensor:
    """log 0 as a probability of e^-1000, so that a bucket without mass gives no infinite loss or gradient."""
    return logprobs.clamp(min=LOG_FLOOR)


def divergence(p: Buckets, q: Buckets, kind: Direction, beta: float = 0.5, entry_clip: float = 0.0) -> Tensor:
    """D `[C]` in nats of p, the student's (S, with its graph), and q, the teacher's (T).

    reverse       KL(S‖T)
    forward       KL(T‖S)
    jsd           β KL(T‖M) + (1 − β) KL(S‖M), M = β T + (1 − β) S; KL(T‖S) itself at β = 0 and KL(S‖T) at β = 1
    skew_forward  KL(T‖β T + (1 − β) S)
    skew_reverse  KL(S‖(1 − β) T + β S)

    Without `entry_clip` never negative where both sum to 1. With it each bucket's share of the sum is at most
    `entry_clip`, which bounds the pull of single words; the sum is then no divergence and may be negative.
    """
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse" if beta else "forward"
    if kind == "reverse":
        entries = p.mass_CB * (p.log_CB - q.log_CB)
    elif kind == "forward":
        entries = q.mass_CB * (q.log_CB - p.log_CB)
    elif kind == "jsd":
        middle = _log_mixture(q, p, beta)
        entries = beta * q.mass_CB * (q.log_CB - middle) + (1 - beta) * p.mass_CB * (p.log_CB - middle)
    elif kind == "skew_forward":
        entries = q.mass_CB * (q.log_CB - _log_mixture(q, p, beta))
    else:
        entries = p.mass_CB * (p.log_CB - _log_mixture(p, q, beta))
    return (entries.clamp(max=entry_clip) if entry_clip else entries).sum(1)


@dataclass(frozen=True)
class DivergenceTerm(LossTerm):
    """The options that the terms of a divergence share; `beta` and `entry_clip` are those of `divergence`.

    `token_clip` δ > 0: a token's divergence counts at most δ, and beyond it has no gradient. Source: published SGPO,
    arXiv:2606.24064, δ = 1; that clip_δ means a clamp is inferred.
    """

    direction: Direction = "reverse"
    beta: Share = 0.5
    entry_clip: OffOrPositive = 0.0
    token_clip: OffOrPositive = 0.0
    teacher_entropy_above: OffOrPositive = 0.0

    def __post_init__(self) -> None:
        if self.direction.startswith("skew") and self.beta == 1:
            rule = "a skewed divergence has beta below 1: at 1 it is 0 for every student"
            raise ConfigError(rule, f"{self.direction} with beta {self.beta}")

    def between(self, p: Buckets, q: Buckets) -> Tensor:
        """`[C]`, of the student's p and the teacher's q."""
        return divergence(p, q, self.direction, self.beta, self.entry_clip)

    def clipped(self, loss_C: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """`[C]`, each at most `token_clip`; with such a clip the metrics get the share of tokens beyond it."""
        if not self.token_clip:
            return loss_C
        metrics["divergence_clipped"] = (loss_C.detach() > self.token_clip).to(loss_C.dtype)
        return loss_C.clamp(max=self.token_clip)


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) − x − 1, never negative; beyond MAX_LOG_RATIO the exponential goes on as its tangent, and is finite.

    Source: J. Schulman, "Approximating KL Divergence" (2020).
    """
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    beyond = math.exp(MAX_LOG_RATIO) * (1 + log_ratio - MAX_LOG_RATIO) - 1
    return torch.where(log_ratio > MAX_LOG_RATIO, beyond, torch.expm1(bounded)) - log_ratio


def entropy(p: Buckets) -> Tensor:
    """H `[C]` in nats."""
    return -(p.mass_CB * p.log_CB).sum(1)


def _log_mixture(a: Buckets, b: Buckets, share: float) -> Tensor:
    """log(share · a + (1 − share) · b). Where both are below the smallest float, so is what multiplies the result."""
    if share in (0.0, 1.0):
        return a.log_CB if share else b.log_CB
    mixture = torch.lerp(b.mass_CB, a.mass_CB, share)
    return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
