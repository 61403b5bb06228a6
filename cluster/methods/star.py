"""STaR (2203.14465): fine-tune on one's own right reasoning, and on reasoning found with the answer as a hint.

Each prompt is answered (the paper: once, greedily: temperature 0, samples_per_prompt 1). Where no answer passed, the
student is shown the gold answer in a template and answers once more; a right one trains as the answer to the plain
prompt: the hint is stripped. A round takes `round_steps` steps: its answers are of the policy that the last round made,
and the learner starts each round from the stage's first weights. All that is the paper's. Ours: rounds are equally long
(the paper's grow by a fifth), and a prompt that the verifier abstained on is not rationalised.
"""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.errors import ConfigError
from ...contracts.records import Correction
from ...models.contexts import fields_of
from .parts.composition import Composition, RolloutSummary, SampleSpec, read_options
from .parts.credit import group_rows
from .parts.group_rl import by_group, in_rounds, likelihood
from .raft import positives

GOLD = {"answer", "solution"}


class StarOptions(Section):
    """STaR's options."""

    round_steps: int = Field(20, ge=1, description="steps of a round, after which the learner starts anew")
    template: str = Field("answer@1", min_length=1, description="prompt template that shows the gold answer")


def compose(config: Config) -> Composition:
    options = read_options(StarOptions, config.method_options, config.method)
    composition = likelihood(config, by_group(positives))
    if composition.correction != Correction():
        raise ConfigError(
            "star trains likelihoods: an answer under a hint has log-probabilities of another prompt",
            "off_policy settings",
            "remove them",
        )
    shown = fields_of(options.template, config.templates)
    if not shown & GOLD or not shown <= {"problem", *GOLD}:
        raise ConfigError(
            "star's template shows the gold answer or solution, and nothing that a verdict would say",
            f"method_options.template {options.template} shows {', '.join(sorted(shown)) or 'the problem alone'}",
            "use answer@1 or solution@1",
        )
    hinted = SampleSpec(context=options.template)
    composition = replace(composition, follow_up=lambda rollouts, attempt: rationalise(rollouts, attempt, hinted))
    return in_rounds(composition, config, options.round_steps, restart=True)


def rationalise(rollouts: Sequence[RolloutSummary], attempt: int, hinted: SampleSpec) -> list[tuple[str, SampleSpec]]:
    """After the first attempt: the hinted question, for each group that was judged and where nothing passed."""
    if attempt > 1:
        return []
    judged = [rollout for rollout in rollouts if not rollout.abstained]
    groups = [[judged[row] for row in rows] for rows in group_rows([rollout.group_id for rollout in judged])]
    return [(group[0].group_id, hinted) for group in groups if not any(rollout.passed for rollout in group)]
