"""On-policy self-distillation: the teacher is the student's own model, and its prompt shows the answer.

The student answers the plain problem; the same weights, as they began, averaged or live (`teacher.follows`), score
that answer with the privileged prompt. Source: OPSD, arXiv:2601.18734, and its code: JSD with β = 0.5, or the sampled
signal; fixed first weights are what it recommends. entry_clip: the baseline of SGSD's repository, which clips each
(token, id) summand at 0.05. The default template shows the bare answer; solution@1 a worked one, as the paper does.
"""

from pydantic import Field

from ...contracts.config import Config
from .parts.composition import Composition, read_options
from .parts.distil import Direction, DistilOptions, check_self_teacher, distil


class OpsdOptions(DistilOptions):
    """With the paper's divergence."""

    direction: Direction = Field(
        "jsd", description="topk, exact: reverse is KL(student‖teacher), forward KL(teacher‖student)"
    )
    template: str = Field("answer@1", description="what the teacher is shown")
    entry_clip: float = Field(
        0.0, ge=0, description="topk, exact: most that one id adds to a token's loss; 0: no bound"
    )


def compose(config: Config) -> Composition:
    """Strength by `teacher.signal`: sampled, topk or exact."""
    options = read_options(OpsdOptions, config.method_options, "opsd")
    check_self_teacher(config, "opsd")
    divergence = {**options.divergence(), "entry_clip": options.entry_clip}
    return distil(config, options, divergence, context=options.template, support=options.support)
