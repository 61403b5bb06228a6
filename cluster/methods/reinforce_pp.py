"""REINFORCE++ (2501.03262): a clipped policy gradient whose rewards are whitened over the whole step.

A = (r − mean)/(std + 1e-8) over all answers of the step; with `baseline`, each group's mean is taken off first and the
deviation is still the step's (the paper's REINFORCE++-baseline). Ours: it is whitened by answer, so that every answer
counts once, whatever its length; and the KL is a loss (k3), and no part of the reward.
"""

from collections.abc import Sequence

from pydantic import Field

from ...contracts.config import Config
from .parts.composition import Composition, Credit, RolloutSummary, read_options
from .parts.credit import whitened
from .parts.group_rl import Credited, Policy, judged_in_order, policy_gradient, policy_terms


class ReinforceOptions(Policy):
    """REINFORCE++'s options."""

    baseline: bool = Field(False, description="take each group's mean off before whitening; needs groups")


def compose(config: Config) -> Composition:
    options = read_options(ReinforceOptions, config.method_options, config.method)

    def credit(rollouts: Sequence[RolloutSummary], step: int) -> Credited:
        judged = judged_in_order(rollouts)
        groups = [rollouts[index].group_id for index in judged] if options.baseline else None
        made: list[Credit | str] = ["abstained"] * len(rollouts)
        for index, advantage in zip(
            judged, whitened([rollouts[index].reward for index in judged], groups), strict=True
        ):
            made[index] = Credit(advantage=float(advantage))
        return made

    terms = policy_terms(options, "tokens", kl_weight=options.kl_weight)
    return policy_gradient(config, credit, terms, min_samples=2 if options.baseline else 1)
