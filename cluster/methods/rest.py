"""ReST (2308.08998): Grow, sample with a fixed policy; Improve, fine-tune on samples above a threshold that rises.

A round is one Grow of `round_steps` learner steps, in which the generators keep its first weights; the round is cut
into as many Improve parts as there are `thresholds`. An answer trains where its score is at least the part's threshold:
score = reward − length_cost · length / rollout.max_new_tokens. The rounds and rising thresholds are the paper's; ours
are that each step samples its own prompts, and the length cost. With 0/1 rewards and no length cost all thresholds
between 0 and 1 keep the same answers, the right ones; the cost makes higher ones keep shorter right answers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field

from ...contracts.config import Config, Section
from ...contracts.errors import ConfigError
from .parts.composition import Composition, Credit, RolloutSummary, read_options
from .parts.credit import improve_threshold
from .parts.group_rl import Credited, in_rounds, likelihood


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise ValueError(f"thresholds rise, found {values}")
    return values


class RestOptions(Section):
    """ReST's options."""

    round_steps: int = Field(20, ge=1, description="learner steps of a round, on answers of one policy")
    thresholds: Annotated[tuple[float, ...], AfterValidator(_rising)] = Field(
        (0.5,), min_length=1, description="least score of an answer that trains, one for each part of a round"
    )
    length_cost: float = Field(0.0, ge=0, description="score that an answer of max_new_tokens loses by its length")


def compose(config: Config) -> Composition:
    options = read_options(RestOptions, config.method_options, config.method)
    if len(options.thresholds) > options.round_steps:
        raise ConfigError(
            "each threshold has a step of the round",
            f"{len(options.thresholds)} method_options.thresholds for {options.round_steps} steps",
            "raise method_options.round_steps",
        )
    cost = options.length_cost / config.rollout.max_new_tokens

    def credit(rollouts: Sequence[RolloutSummary], step: int) -> Credited:
        least = improve_threshold(step, options.round_steps, options.thresholds)
        return [_judge(rollout, rollout.reward - cost * rollout.length >= least) for rollout in rollouts]

    return in_rounds(likelihood(config, credit), config, options.round_steps)


def _judge(rollout: RolloutSummary, enough: bool) -> Credit | str:
    if rollout.abstained:
        return "abstained"
    return Credit(advantage=1.0) if enough else "below_threshold"
