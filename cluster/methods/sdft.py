"""Self-distillation fine-tuning: the teacher is the student's own model, shown a demonstration of the solution.

What supervised fine-tuning would learn from a demonstration is learnt on the student's own answers, so that it forgets
less. Source: SDFT, arXiv:2601.19897, as in tinker's sdft.py: advantage log π_T − log π_θ of the sampled token, teacher
fixed at its first weights. The divergences of the stronger signals are ours. `teacher.follows` lets the teacher move.
"""

from pydantic import Field

from ...contracts.config import Config
from .parts.composition import Composition, read_options
from .parts.distil import DistilOptions, check_self_teacher, distil


class SdftOptions(DistilOptions):
    """And the demonstration."""

    template: str = Field("demonstration@1", description="what the teacher is shown")


def compose(config: Config) -> Composition:
    """Strength by `teacher.signal`: sampled (the paper's), topk or exact."""
    options = read_options(SdftOptions, config.method_options, "sdft")
    check_self_teacher(config, "sdft")
    return distil(config, options, options.divergence(), context=options.template, support=options.support)
