"""The published SGPO (2606.24064): GRPO on plain answers, and distillation of answers under a strategy where it helps.

A row has a strategy in words, without its answer. The student answers the plain prompt `rollout.samples_per_prompt`
times, and `guided` times under a template that shows the strategy. GRPO trains the plain answers. Of a prompt's guided
answers that passed one is the target, the likeliest without guidance; the plain student is pulled to what the same
student says of each of its tokens when it is shown the strategy:

    L(q) = L_GRPO(q) + α(q) · mean_t min(δ, KL(sg π(·|q, s, y_<t) ‖ π(·|q, y_<t)))
    α(q) = min(α_max, α0 · max(0, p_guided − p_plain) / (γ + p_plain)), p the pass rates of a prompt's judged answers

Second-hand, as others report the paper: 8 plain and 4 guided answers, clip 0.2/0.28, the choice of the target, the form
of L with a sum over tokens, δ 1, α0 0.5, γ 0.1, α_max 0.8. Inferred: α(q) as a function; likelihood as the mean over
tokens; the clip as a clamp, without a gradient beyond δ. Ours: the mean over tokens in place of the sum, and over a
step's targets (a prompt without one counts in GRPO's mean alone); the KL on the guided student's `top_k` ids and a
bucket for the rest, a lower bound; the template's wording; and that the guided student and the unguided likelihood are
those of a teacher that follows the student live: of the weights that were published when it was asked, which in a
synchronous run are those that the step begins with, and not those between the updates of a step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from ...contracts.errors import ConfigError
from ...contracts.records import ScoreRequest, Term
from ...models.contexts import PLAIN, fields_of
from .grpo import GrpoOptions, credited
from .parts.annotations import TEACHER, Annotation
from .parts.composition import Composition, Credit, RolloutSummary, SampleSpec, read_options
from .parts.distil import check_self_teacher, signal_of
from .parts.group_rl import Credited, by_group, policy_gradient, policy_terms

UNGUIDED = "unguided"


class SgpoGuidedOptions(GrpoOptions):
    """GRPO's options, of the plain answers, and those of the guided ones."""

    clip_high: float = Field(0.28, gt=0, description="how far above 1")
    guided: int = Field(4, ge=1, description="answers to a prompt under its strategy")
    template: str = Field("strategy@1", min_length=1, description="prompt template that shows the strategy")
    alpha0: float = Field(0.5, gt=0, description="α₀ of the weight α₀ · (p_guided − p_plain)/(γ + p_plain)")
    gamma: float = Field(0.1, gt=0, description="γ of that weight")
    alpha_max: float = Field(0.8, gt=0, description="the largest weight")
    delta: float = Field(1.0, ge=0, description="δ: most that a token's KL counts, in nats; 0: no bound")
    top_k: int = Field(64, ge=1, description="ids for each token")
    rest: Literal["tail", "renormalise"] = Field(
        "tail", description="all other ids are one more bucket, or are left out and the ids sum to one"
    )

    def weight(self, p_guided: float, p_plain: float) -> float:
        """α(q), from the pass rates of one prompt's answers."""
        gain = max(0.0, p_guided - p_plain)
        return min(self.alpha_max, self.alpha0 * gain / (self.gamma + p_plain))


def compose(config: Config) -> Composition:
    options = read_options(SgpoGuidedOptions, config.method_options, config.method)
    _check(config, options)
    contexts = (options.template,)
    reward = policy_terms(options, options.reduction, kl_weight=options.kl_weight)
    divergence = {"direction": "forward", "rest": options.rest, "token_clip": options.delta}
    distilled = Term(name="topk_divergence", options=divergence, contexts=contexts, reduction="sequences")
    terms = (*(replace(term, contexts=(PLAIN,)) for term in reward), distilled)
    both = (
        SampleSpec(samples=config.rollout.samples_per_prompt),
        SampleSpec(samples=options.guided, context=options.template),
    )
    unguided = Annotation(
        name=UNGUIDED,
        service=TEACHER,
        method="score",
        given={"request": ScoreRequest(signal="sampled")},
        contexts=contexts,
        routed=True,
    )
    return replace(
        policy_gradient(config, by_group(partial(_credited, options)), terms),
        samples=lambda step, position: both,
        scoring=ScoreRequest(signal="topk", top_k=options.top_k, context=options.template),
        scored_contexts=contexts,
        own_annotations=(unguided,),
    )


def _check(config: Config, options: SgpoGuidedOptions) -> None:
    """Raises ConfigError where the teacher or the template is another than the method's."""
    signal_of(config, config.method, ("topk",))
    check_self_teacher(config, config.method)
    for name, teacher in config.named_teachers.items():
        if teacher.follows != "live":
            rule = f"the teacher of {config.method} is the student as it stands"
            found = f"{name}: follows {teacher.follows or 'nothing'}"
            raise ConfigError(rule, found, "set teacher.follows: live; with shared: true it needs no pool of its own")
    shown = fields_of(options.template, config.templates)
    if "strategy" not in shown or not shown <= {"problem", "strategy"}:
        rule = f"the template of {config.method} shows the strategy, and nothing that would give the answer away"
        found = f"method_options.template {options.template} shows {', '.join(sorted(shown)) or 'the problem alone'}"
        raise ConfigError(rule, found, "use strategy@1")


def _credited(options: SgpoGuidedOptions, group: Sequence[RolloutSummary]) -> Credited:
    """Of one prompt's judged answers: GRPO's credit of the plain ones, and the target among the others."""
    plain = [rollout for rollout in group if rollout.context == PLAIN]
    guided = [rollout for rollout in group if rollout.context != PLAIN]
    of_plain = iter(credited(options, plain) if plain else [])
    of_guided = iter(_targets(options, plain, guided))
    return [next(of_plain if rollout.context == PLAIN else of_guided) for rollout in group]


def _targets(
    options: SgpoGuidedOptions, plain: Sequence[RolloutSummary], guided: Sequence[RolloutSummary]
) -> list[Credit | str]:
    """The likeliest unguided of those that passed, with the weight α(q); the others' reasons. Of equals the first.

    Where no plain answer was judged there is no pass rate to compare with, and the guided ones are left out as
    abstained on.
    """
    if not plain or not guided:
        return ["abstained"] * len(guided)
    weight = options.weight(_pass_rate(guided), _pass_rate(plain))
    likely = [rollout.said.get(UNGUIDED, {}).get("mean_logprob") for rollout in guided]
    known = [value for rollout, value in zip(guided, likely, strict=True) if rollout.passed and value is not None]
    made: list[Credit | str] = []
    chosen = False
    for rollout, value in zip(guided, likely, strict=True):
        if not rollout.passed:
            made.append("incorrect")
        elif not weight:
            made.append("no_guidance_needed")
        elif value is None:
            made.append("teacher_refused")
        elif value == max(known) and not chosen:
            chosen = True
            made.append(Credit(weight=weight))
        else:
            made.append("not_chosen")
    return made


def _pass_rate(rollouts: Sequence[RolloutSummary]) -> float:
    return sum(rollout.passed for rollout in rollouts) / len(rollouts)
