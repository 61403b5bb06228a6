"""Terms of the student's own log-likelihood of a token: imitation, and a leash to a reference model."""

from dataclasses import dataclass

from .base import LossTerm, StudentChunk, TermOutput, TokenRows
from .divergence import k3


@dataclass(frozen=True)
class NegativeLogLikelihood(LossTerm):
    """−log π_θ(y_t): imitate the rollout, whoever wrote it. Source: maximum likelihood. Metrics: none of its own."""

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        return TermOutput(loss_C=-student.sampled_C)


@dataclass(frozen=True)
class ReferenceKl(LossTerm):
    """exp(x) − x − 1 with x = log π_ref − log π_θ of y_t, differentiated directly: never negative, 0 where both agree.

    Over the student's own samples its mean is KL(π_θ‖π_ref). Source: GRPO, arXiv:2402.03300, eq. 4 ("k3").
    Metric: −x, the plain estimate of the same KL.
    """

    @property
    def reads_reference(self) -> bool:
        return True

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        log_ratio = rows.reference_C - student.sampled_C
        return TermOutput(loss_C=k3(log_ratio), metrics={"reference_kl": -log_ratio.detach()})
