"""DAPO (2503.14476): GRPO with a higher upper clip, dynamic sampling, a token mean and a soft penalty on length.

The paper's: clip 0.2/0.28; groups that are all right or all wrong are dropped, and fresh prompts are sampled in their
place; mean over all tokens; reward ±1 plus a penalty that falls to −1 over the last tokens of the limit (a fifth of it:
4,096 of 20,480); no KL. The deviation and ε are verl's (grpo.py). Ours: a refill asks for exactly as many prompts as
were dropped, where the paper's code samples three times as many prompts as it trains; and after `max_refills` the step
trains with what it has, where that code stops after 10 generation batches, the first included.
"""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from ...contracts.config import Config
from ...contracts.errors import ConfigError
from .parts.composition import Composition, Credit, RolloutSummary, SampleSpec, read_options
from .parts.credit import all_equal, group_relative, group_rows, overlong_penalty
from .parts.group_rl import Clip, Credited, by_group, policy_gradient, policy_terms


class DapoOptions(Clip):
    """DAPO's options."""

    clip_high: float = Field(0.28, gt=0, description="how far above 1")
    max_refills: int = Field(10, ge=0, description="times that a dropped group may be replaced by a fresh prompt's")
    overlong_buffer: int | None = Field(
        None, ge=0, description="last tokens of the limit, which cost; 0: none do, empty: a fifth of max_new_tokens"
    )
    penalty_factor: float = Field(1.0, ge=0, description="what the last of them costs; rewards are ±1")


def compose(config: Config) -> Composition:
    options = read_options(DapoOptions, config.method_options, config.method)
    limit = config.rollout.max_new_tokens
    buffer = limit // 5 if options.overlong_buffer is None else options.overlong_buffer
    if buffer > limit:
        raise ConfigError(
            "the tokens that cost are among those of the limit",
            f"method_options.overlong_buffer {buffer}, and rollout.max_new_tokens {limit}",
            "lower method_options.overlong_buffer",
        )

    def rule(group: Sequence[RolloutSummary]) -> Credited:
        if all_equal([rollout.reward for rollout in group]):
            return ["zero_variance"] * len(group)
        signs = [2 * rollout.reward - 1 for rollout in group]
        shaped = signs + overlong_penalty([rollout.length for rollout in group], limit, buffer, options.penalty_factor)
        return [Credit(advantage=float(advantage)) for advantage in group_relative(shaped, "sample")]

    composition = policy_gradient(config, by_group(rule), policy_terms(options, "tokens"))
    samples = config.rollout.samples_per_prompt
    return replace(
        composition, follow_up=lambda rollouts, attempt: refill(rollouts, attempt, samples, options.max_refills)
    )


def refill(
    rollouts: Sequence[RolloutSummary], attempt: int, samples: int, max_refills: int
) -> list[tuple[str, SampleSpec]]:
    """A fresh prompt for each group that will be dropped: its judged rewards are equal, or nothing was judged."""
    if attempt > max_refills:
        return []
    groups = group_rows([rollout.group_id for rollout in rollouts])
    judged = [[rollouts[row].reward for row in rows if not rollouts[row].abstained] for rows in groups]
    spec = SampleSpec(samples=samples, fresh=True)
    return [
        (rollouts[rows[0]].group_id, spec) for rows, rewards in zip(groups, judged, strict=True) if all_equal(rewards)
    ]
