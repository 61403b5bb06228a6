"""OPD that goes on beyond the teacher, along the way from a reference to it (`g_opd`, and `exopd` for the same).

A_t = d_t + (λ−1)(log π_T − log π_ref), d_t = log π_T − log π_θ; the optimum is π ∝ π_ref^(1−λ) · π_T^λ. λ = 1 is OPD
and needs no reference; 0 < λ < 1 stays between the two; λ > 1 extrapolates, and 1.25 is the paper's ExOPD.
Source: G-OPD, arXiv:2602.12125, and its code, also for the importance weight's bound of 5.
The reference is the student before training, or the teacher's base model.
"""

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.records import ScoreRequest, Term
from .parts.composition import Composition, correction_of, read_options, sampling_of, student_group
from .parts.distil import signal_of


class GOpdOptions(Section):
    """How far."""

    extrapolation: float = Field(1.25, ge=0, description="λ: 0 the reference, 1 the teacher, above 1 beyond it")


def compose(config: Config) -> Composition:
    """One term; it reads the reference unless λ is 1."""
    options = read_options(GOpdOptions, config.method_options, config.method)
    signal_of(config, config.method, ("sampled",))
    reference = options.extrapolation != 1
    own = {"extrapolation": options.extrapolation}
    return Composition(
        terms=(Term(name="policy_gradient", options=own, reference=reference),),
        samples=student_group(config),
        sampling=sampling_of(config),
        scoring=ScoreRequest(signal="sampled"),
        reference=reference,
        correction=correction_of(config, "truncated", high=5.0),
    )
