"""Dr. GRPO (2503.20783): GRPO without its two biases.

A = r − mean, with no standard deviation that would weigh easy and hard prompts more; and token losses are summed and
divided by a constant, `rollout.max_new_tokens` · answers, so that a long wrong answer is not punished less per token.
Clip as in GRPO, no KL by default: the paper's.
"""

from ...contracts.config import Config
from .parts.composition import Composition, Credit, read_options
from .parts.credit import group_relative
from .parts.group_rl import Policy, by_group, policy_gradient, policy_terms


def compose(config: Config) -> Composition:
    options = read_options(Policy, config.method_options, config.method)
    credit = by_group(lambda group: [Credit(advantage=float(a)) for a in group_relative([f.reward for f in group])])
    terms = policy_terms(options, "length", config.rollout.max_new_tokens, kl_weight=options.kl_weight)
    return policy_gradient(config, credit, terms)
