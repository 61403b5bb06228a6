"""Strategy-guided policy optimisation: GRPO whose reward also says how well an answer follows the teacher's strategies.

The teacher's verified solutions were turned into strategy vectors once (`tutorloop strategies fit`). The student is
free in its wording: the strategy service segments its answer into steps, encodes them, and aligns them with the vectors
of each of the problem's solutions; the best of them counts. The reward is r + α·R_align + δ·div (parts/strategies.py),
and each step's own credit is added to its tokens' advantage. Definition: ours, docs/strategies.md, since no paper has
it; the published method of that name is sgpo_guided.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from .parts.annotations import STRATEGIES, strategies
from .parts.composition import Composition, Credit, RolloutSummary, read_options
from .parts.credit import group_relative
from .parts.group_rl import Credited, Policy, by_group, policy_gradient, policy_terms
from .parts.strategies import StrategyState, Worth, alignment_of, capped, code_shares, said_of


class SgpoOptions(Policy):
    """With DAPO's clip and a leash to the reference model."""

    clip_high: float = Field(0.28, gt=0, description="how far above 1")
    kl_weight: float = Field(0.01, ge=0, description="β of the KL to the reference (k3); 0 needs no reference")
    align_correct: float = Field(0.3, ge=0, lt=1, description="α of an answer that passed")
    align_wrong: float = Field(0.1, ge=0, lt=1, description="α of one that did not")
    diversity: float = Field(0.05, ge=0, description="δ of being unlike the group's other answers, where it passed")
    order: Literal["free", "ordered"] = Field(
        "free", description="steps in any order (optimal transport), or in the teacher's (soft-DTW)"
    )
    credit_weight: float = Field(0.2, ge=0, description="β_c of a step's own credit, less the mean of the answer's")
    shaping: bool = Field(True, description="credit steps that cover more of the strategy; sums to 0 over an answer")
    code_cap: float = Field(0.4, gt=0, le=1, description="a code's share of the step's steps above which it earns less")
    reduction: Literal["sequences", "tokens"] = Field(
        "sequences", description="mean of each answer's mean, or mean over all tokens"
    )


def compose(config: Config) -> Composition:
    options = read_options(SgpoOptions, config.method_options, config.method)
    surrogate, *leash = policy_terms(options, options.reduction, kl_weight=options.kl_weight)
    given = {"order": options.order, "credit_weight": options.credit_weight, "shaping": options.shaping}
    state = StrategyState()

    def credit(rollouts: Sequence[RolloutSummary], step: int) -> Sequence[Credit | str]:
        made = by_group(partial(_credited, options, state, code_shares(rollouts)))(rollouts, step)
        state.observe(rollouts)
        return made

    terms = (replace(surrogate, credit=STRATEGIES), *leash)
    own = {"own_annotations": (strategies(given),), "state": state}
    return replace(policy_gradient(config, credit, terms), **own)


def _credited(
    options: SgpoOptions, state: StrategyState, shares: dict[int, float], group: Sequence[RolloutSummary]
) -> Credited:
    """Each answer's reward less the group's mean. A neutral answer counts as the mean of those that are not."""
    known = [value for rollout in group if (value := alignment_of(rollout)) is not None]
    mean = sum(known) / len(known) if known else 0.0
    worth = Worth(
        correct=options.align_correct,
        wrong=0.0 if state.gated else options.align_wrong,
        diversity=options.diversity,
    )

    def reward(rollout: RolloutSummary) -> float:
        aligned, said = alignment_of(rollout), said_of(rollout)
        scale = state.scale * capped(said.get("codes", ()), shares, options.code_cap)
        strategy = mean if aligned is None else aligned
        return worth.reward(rollout.reward, rollout.passed, strategy, said.get("diversity", 0.0), scale)

    return [Credit(advantage=float(value)) for value in group_relative([reward(rollout) for rollout in group])]
