"""REINFORCE++ (2501.03262): a clipped policy gradient whose rewards are whitened over the whole step.

A = (r − mean)/(std + 1e-8) over all answers of the step; with `baseline`, each group's mean is taken off first and the
deviation is still the step's (the paper's REINFORCE++-baseline). Ours: it is whitened by answer, so that every answer
counts once, whatever its length; and the KL is a loss (k3), and no part of the reward.
"""

from collections.abc import Sequence

from pydantic import Field

from ...contracts.config import Config
from .composition import Composition, Credit, Facts, read_options
from .credit import whitened
from .group_rl import Credited, Policy, policy_gradient, policy_terms


class ReinforceOptions(Policy):
    """REINFORCE++'s options."""

    baseline: bool = Field(False, description="take each group's mean off before whitening; needs groups")


def compose(config: Config) -> Composition:
    options = read_options(ReinforceOptions, config.method_options, config.method)

    def credit(facts: Sequence[Facts], step: int) -> Credited:
        judged = [fact for fact in facts if not fact.abstained]
        groups = [fact.group_id for fact in judged] if options.baseline else None
        advantages = iter(whitened([fact.reward for fact in judged], groups))
        return ["abstained" if fact.abstained else Credit(advantage=float(next(advantages))) for fact in facts]

    terms = policy_terms(options, "tokens", kl_weight=options.kl_weight)
    return policy_gradient(config, credit, terms, min_samples=2 if options.baseline else 1)
