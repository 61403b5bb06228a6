"""What the extractor is trained with: pure functions of step vectors, and the codebook's own update.

L = L_InfoNCE + ½ L_CPC + ¼ L_VQ + 0.1 L_adv (ours; METHODS.md 8b).

Shapes: A anchors, N keys, B solutions, T steps of all of them, K codes, P problems, D size of a vector.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

TEMPERATURE = 0.1  # of InfoNCE and CPC
DECAY = 0.99  # of the codebook's averages, a step
DEAD = 0.1  # of an even share: a code of less is put elsewhere
NEW = 0.2  # of an even share: what a code begins with


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Of the extractor's losses; InfoNCE has 1."""

    cpc: float = 0.5
    vq: float = 0.25
    adversary: float = 0.1


def info_nce(
    anchors_AD: torch.Tensor,
    keys_ND: torch.Tensor,
    positives_A: torch.Tensor,
    negatives_AN: torch.Tensor | None = None,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """−log e^{s₊/τ} / (e^{s₊/τ} + Σ_negatives e^{s/τ}) for each anchor, s the cosine (van den Oord et al., 1807.03748).

    `positives_A`: where each one's positive is; `negatives_AN`: which keys are its negatives (None: all others).
    """
    logits_AN = F.normalize(anchors_AD, dim=-1) @ F.normalize(keys_ND, dim=-1).T / temperature
    if negatives_AN is not None:
        own_AN = F.one_hot(positives_A, len(keys_ND)).bool()
        logits_AN = logits_AN.masked_fill(~(negatives_AN | own_AN), -torch.inf)
    return F.cross_entropy(logits_AN, positives_A, reduction="none")


class NextStep(torch.nn.Module):
    """z_≤i of a solution to what z_{i+1} should be: contrastive predictive coding (1807.03748), a GRU and a matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.context = torch.nn.GRU(size, size, batch_first=True)
        self.ahead = torch.nn.Linear(size, size)

    def forward(self, vectors_BND: torch.Tensor) -> torch.Tensor:
        """Of each step the prediction of the one after it `[B, N, D]`."""
        return self.ahead(self.context(vectors_BND)[0])


def commitment(vectors_TD: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """Mean ‖z − sg(e)‖², e the nearest code: VQ-VAE's third term (1711.00937, eq. 3). Its second is the codebook's
    moving average, its β this loss's weight in the sum."""
    nearest_TD = codebook_KD[nearest_codes(vectors_TD, codebook_KD)]
    return (vectors_TD - nearest_TD.detach()).square().sum(-1).mean()


def nearest_codes(vectors_TD: torch.Tensor, codebook_KD: torch.Tensor) -> torch.Tensor:
    """argmin_k ‖z − e_k‖, int64 `[T]`."""
    return (vectors_TD @ codebook_KD.T - codebook_KD.square().sum(-1) / 2).argmax(-1)


class Codebook:
    """K codes as moving averages of the vectors that are nearest to them (1711.00937, appendix A.1).

    N_k ← γN_k + (1 − γ)n_k, m_k ← γm_k + (1 − γ)Σz, e_k = m_k / N_k. A code that next to no vector is near to is put
    on one of the batch.
    """

    def __init__(self, codes_KD: torch.Tensor, decay: float = DECAY) -> None:
        self.decay = decay
        self.codes_KD = codes_KD.clone()
        self.counts_K = codes_KD.new_full((len(codes_KD),), NEW)
        self.sums_KD = NEW * codes_KD

    @torch.no_grad()
    def update(self, vectors_TD: torch.Tensor, generator: torch.Generator) -> None:
        """With one batch. Counts are in units of an even share of a batch."""
        share = len(self.codes_KD) / len(vectors_TD)
        chosen_TK = F.one_hot(nearest_codes(vectors_TD, self.codes_KD), len(self.codes_KD)).to(vectors_TD.dtype)
        self.counts_K.lerp_(chosen_TK.sum(0) * share, 1 - self.decay)
        self.sums_KD.lerp_(chosen_TK.T @ vectors_TD * share, 1 - self.decay)
        dead = (self.counts_K < DEAD).nonzero()[:, 0]
        drawn = torch.randint(len(vectors_TD), (len(dead),), generator=generator).to(vectors_TD.device)
        self.sums_KD[dead], self.counts_K[dead] = NEW * vectors_TD[drawn], NEW
        self.codes_KD = self.sums_KD / self.counts_K[:, None]


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def reverse_gradient(values: torch.Tensor) -> torch.Tensor:
    """`values`, whose gradient comes back with its sign changed (Ganin & Lempitsky, 1409.7495)."""
    return _Reversal.apply(values)  # pyright: ignore[reportReturnType]


def adversary_loss(head: torch.nn.Module, vectors_TD: torch.Tensor, problems_T: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of a head that guesses each step's problem `[T, D] → [T, P]`: it learns to, and the vectors
    learn to keep it from it."""
    return F.cross_entropy(head(reverse_gradient(vectors_TD)), problems_T)


def k_means(vectors_TD: torch.Tensor, codes: int, generator: torch.Generator, rounds: int = 30) -> torch.Tensor:
    """Lloyd's algorithm from the seeds of k-means++ (Arthur & Vassilvitskii 2007) `[K, D]`."""
    centres = [vectors_TD[torch.randint(len(vectors_TD), (1,), generator=generator)[0]]]
    nearest_T = torch.full((len(vectors_TD),), torch.inf)
    for _ in range(codes - 1):
        nearest_T = torch.minimum(nearest_T, (vectors_TD - centres[-1]).square().sum(-1))
        weights_T = nearest_T + 1e-12  # where all are on centres already
        centres.append(vectors_TD[torch.multinomial(weights_T, 1, generator=generator)[0]])
    codes_KD = torch.stack(centres)
    for _ in range(rounds):
        chosen_TK = F.one_hot(nearest_codes(vectors_TD, codes_KD), codes).to(vectors_TD.dtype)
        counts_K = chosen_TK.sum(0)[:, None]
        codes_KD = torch.where(counts_K > 0, chosen_TK.T @ vectors_TD / counts_K.clamp(min=1), codes_KD)
    return codes_KD
