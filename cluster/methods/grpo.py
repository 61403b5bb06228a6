"""GRPO (2402.03300): the student answers a prompt as a group, and each answer's advantage is relative to its group.

L = mean over answers of the mean over their tokens of −min(rA, clip(r, 1 − ε_l, 1 + ε_h)A) [+ β·k3 to the reference],
A = (r − mean)/(std + ε). The paper's: the formula, ε_l = ε_h = 0.2. Conventions that differ between codes: the sample's
standard deviation with ε = 1e-6 (verl's, the default here). β is 0 by default (the paper's 0.04 needs a reference).
A group whose rewards are all equal has advantage 0 and still counts in the means, unless `drop_zero_variance`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from .parts.composition import Composition, Credit, Crediting, RolloutSummary, read_options
from .parts.credit import Pace, Std, all_equal, group_relative, pace
from .parts.group_rl import Credited, Policy, by_group, policy_gradient, policy_terms


class GrpoOptions(Policy):
    """GRPO's options; KDRL has them too."""

    std: Std = Field(
        "sample", description="what r − mean is divided by: the group's deviation of this kind, or nothing"
    )
    epsilon: float = Field(1e-6, gt=0, description="added to the standard deviation")
    reduction: Literal["sequences", "tokens"] = Field(
        "sequences", description="mean of each answer's mean (the paper's), or mean over all tokens"
    )
    group_weight: Pace = Field("none", description="weight of a group with pass rate p: frontier 4p(1−p), paced p(1−p)")
    drop_zero_variance: bool = Field(False, description="leave groups of equal rewards out of the means")


def compose(config: Config) -> Composition:
    options = read_options(GrpoOptions, config.method_options, config.method)
    terms = policy_terms(options, options.reduction, kl_weight=options.kl_weight)
    return policy_gradient(config, group_relative_credit(options), terms)


def group_relative_credit(options: GrpoOptions) -> Crediting:
    """GRPO's advantages and group weights."""
    return by_group(partial(credited, options))


def credited(options: GrpoOptions, group: Sequence[RolloutSummary]) -> Credited:
    """Those of one group's judged answers."""
    rewards = [rollout.reward for rollout in group]
    if options.drop_zero_variance and all_equal(rewards):
        return ["zero_variance"] * len(group)
    weight = pace(rewards, options.group_weight)
    advantages = group_relative(rewards, options.std, options.epsilon)
    return [Credit(advantage=float(advantage), weight=weight) for advantage in advantages]
