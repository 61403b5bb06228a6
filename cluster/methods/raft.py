"""RAFT: fine-tune on one's own answers that the verifier passed, and iterate.

`keep` best (2304.06767): the best of a prompt's answers, the first where several are equally good. `keep` positives
(2504.11343): all answers that passed. The loss is the mean negative log-likelihood of their tokens.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ...contracts.config import Config, Section
from .parts.composition import Composition, Credit, RolloutSummary, read_options
from .parts.credit import best_of
from .parts.group_rl import Credited, by_group, likelihood


class RaftOptions(Section):
    """RAFT's one option."""

    keep: Literal["positives", "best"] = Field("positives", description="all passed answers, or one a prompt")


def compose(config: Config) -> Composition:
    options = read_options(RaftOptions, config.method_options, config.method)
    best = options.keep == "best"
    return likelihood(config, by_group(best_one if best else positives), min_samples=2 if best else 1)


def positives(group: Sequence[RolloutSummary]) -> Credited:
    """All answers that passed."""
    return [Credit(advantage=1.0) if rollout.passed else "incorrect" for rollout in group]


def best_one(group: Sequence[RolloutSummary]) -> Credited:
    """The answer that passed with the highest reward; the others that passed are `not_best`."""
    chosen = best_of([rollout.reward for rollout in group], [rollout.passed for rollout in group])
    kept = positives(group)
    return [value if index == chosen or isinstance(value, str) else "not_best" for index, value in enumerate(kept)]
