"""KDRL (2506.02208): GRPO and reverse-KL distillation on the same sampled answers.

L = L_GRPO + β·½(log π_θ − log π_T)², the paper's k2 estimator with β = 2e-3, which is the default here for that reason.
Its gradient, −β·d·∇log π_θ with d = log π_T − log π_θ, is that of `policy_gradient` with weight β: a loss that depends
on the teacher in its gradient, where d itself, differentiated, would not. Both terms take the same mean over tokens.
GRPO's own options and defaults are grpo.py's.
"""

from dataclasses import replace

from pydantic import Field

from ...contracts.config import Config
from ...contracts.errors import ConfigError
from ...contracts.records import ScoreRequest, Term
from .grpo import GrpoOptions, group_relative_credit
from .parts.composition import Composition, read_options
from .parts.group_rl import policy_gradient, policy_terms


class KdrlOptions(GrpoOptions):
    """GRPO's options and the teacher's weight."""

    teacher_weight: float = Field(2e-3, gt=0, description="β of the reverse KL to the teacher")


def compose(config: Config) -> Composition:
    options = read_options(KdrlOptions, config.method_options, config.method)
    for name, teacher in config.named_teachers.items():
        if "signal" in teacher.model_fields_set and teacher.signal != "sampled":
            raise ConfigError(
                "kdrl asks its teacher for the sampled tokens' log-probabilities",
                f"signal {teacher.signal} of teacher {name!r}",
                "set signal: sampled",
            )
    reward = policy_terms(options, options.reduction, kl_weight=options.kl_weight)
    teacher = Term(name="policy_gradient", weight=options.teacher_weight, reduction=options.reduction)
    composition = policy_gradient(config, group_relative_credit(options), (*reward, teacher))
    return replace(composition, scoring=ScoreRequest(signal="sampled"))
