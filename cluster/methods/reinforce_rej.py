"""Reinforce-Rej (2504.11343): a policy gradient with advantage ±1 on the groups that have right and wrong answers.

Groups that are all wrong or all right are dropped (`all_wrong`, `all_right`); no mean and no deviation is taken off.
The clip and the mean over answers are GRPO's. The paper's finding is about the all-wrong groups: dropping the
all-right ones alone does little.
"""

from collections.abc import Sequence

from ...contracts.config import Config
from .parts.composition import Composition, Credit, RolloutSummary, read_options
from .parts.credit import all_equal, plus_minus_one
from .parts.group_rl import Clip, Credited, by_group, policy_gradient, policy_terms


def compose(config: Config) -> Composition:
    options = read_options(Clip, config.method_options, config.method)
    return policy_gradient(config, by_group(mixed), policy_terms(options, "sequences"))


def mixed(group: Sequence[RolloutSummary]) -> Credited:
    """±1 in a group with both verdicts, else why not."""
    passed = [rollout.passed for rollout in group]
    if all_equal(passed):
        return ["all_right" if passed[0] else "all_wrong"] * len(group)
    return [Credit(advantage=float(sign)) for sign in plus_minus_one(passed)]
