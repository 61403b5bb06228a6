"""RFT (2308.01825): fine-tune on the distinct reasoning paths among many samples of a fixed policy.

Of each prompt's answers those that passed train, one for each path (the verifier's digest of the equations; the first
wins, the rest are `duplicate_path`). The paper's: 100 samples at temperature 0.7 of the policy that the stage starts
with, so the generators get no new weights by default. Ours: the paths of one pass over the data are compared, not those
of earlier passes; and the dataset's own solutions, which the paper adds, are a stage of `sft`.
"""

from collections.abc import Sequence

from pydantic import Field

from ...contracts.config import Config, Section
from .parts.composition import Composition, Credit, RolloutSummary, read_options
from .parts.credit import first_of_each
from .parts.group_rl import Credited, by_group, in_rounds, likelihood


class RftOptions(Section):
    """RFT's one option."""

    round_steps: int = Field(0, ge=0, description="steps between new weights for the generators; 0: they get none")


def compose(config: Config) -> Composition:
    options = read_options(RftOptions, config.method_options, config.method)
    return in_rounds(likelihood(config, by_group(distinct)), config, options.round_steps or config.steps)


def distinct(group: Sequence[RolloutSummary]) -> Credited:
    """The first passed answer of each path."""
    passed = [index for index, rollout in enumerate(group) if rollout.passed]
    first = dict(zip(passed, first_of_each([group[index].path for index in passed]), strict=True))
    return [
        "incorrect" if index not in first else Credit(advantage=1.0) if first[index] else "duplicate_path"
        for index in range(len(group))
    ]
