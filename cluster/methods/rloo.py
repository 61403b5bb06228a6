"""RLOO (2402.14740): REINFORCE whose baseline is the mean reward of a prompt's other answers.

A = r − mean of the others = (r − mean)·G/(G − 1): the paper's. It takes one unclipped update a step; so does this with
`learner.updates_per_step` 1, where the ratio is 1 and nothing is clipped. Ours: the mean is over tokens, which within
a step has the direction of the paper's sum over each answer; the KL is a loss (k3), and no part of the reward.
"""

from ...contracts.config import Config
from .parts.composition import Composition, Credit, read_options
from .parts.credit import leave_one_out
from .parts.group_rl import Policy, by_group, policy_gradient, policy_terms


def compose(config: Config) -> Composition:
    options = read_options(Policy, config.method_options, config.method)
    credit = by_group(lambda group: [Credit(advantage=float(a)) for a in leave_one_out([f.reward for f in group])])
    terms = policy_terms(options, "tokens", kl_weight=options.kl_weight)
    return policy_gradient(config, credit, terms)
