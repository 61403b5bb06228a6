"""On-policy distillation: the student generates, the teacher scores, the student moves toward the teacher.

Sources: GKD, arXiv:2306.13649, at λ = 1, for the divergences; Thinking Machines, "On-Policy Distillation" (2025), for
the sampled signal, with the student's current logprobs in the advantage (ours). Top-k with a tail bucket: SDPO's.
"""

from ...contracts.config import Config
from .parts.composition import Composition, read_options
from .parts.distil import DistilOptions, distil


def compose(config: Config) -> Composition:
    """Strength by `teacher.signal`: sampled, topk or exact."""
    options = read_options(DistilOptions, config.method_options, "opd")
    return distil(config, options, options.divergence(), support=options.support)
