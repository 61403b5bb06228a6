"""On-policy distillation: the student generates, the teacher scores, the student moves toward the teacher.

Three strengths, chosen by `teacher.signal` (formulas and sources: learner/terms/):
- `sampled`: reverse KL on the sampled token as a policy gradient, advantage from the student's current logprobs;
- `topk`: divergence over the teacher's or the sampler's top-k ids and a tail bucket for the rest;
- `exact`: divergence over the whole vocabulary, from the teacher's last hidden states and its frozen head.
"""

from typing import Literal

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.errors import ConfigError
from ...contracts.records import Sampling, ScoreRequest, Term
from .composition import Composition, read_options


class OpdOptions(Section):
    """`direction` reverse is KL(student‖teacher). `importance_clip` truncates π_now/μ from above."""

    direction: Literal["reverse", "forward"] = "reverse"
    top_k: int = Field(16, ge=1)
    support: Literal["teacher", "student"] = "teacher"
    importance_clip: float = Field(2.0, gt=0)


USED = {"sampled": {"importance_clip"}, "topk": {"direction", "top_k", "support"}, "exact": {"direction"}}


def compose(config: Config) -> Composition:
    options = read_options(OpdOptions, config.method_options, "opd")
    signals = {teacher.signal for teacher in config.named_teachers.values()}
    if len(signals) > 1:
        raise ConfigError("all teachers of opd return one signal", f"{sorted(signals)}", "give all the same signal")
    signal = signals.pop()
    unused = options.model_fields_set - USED[signal]
    if unused:
        rule = f"method_options hold what opd with teacher.signal={signal} uses: {', '.join(sorted(USED[signal]))}"
        raise ConfigError(rule, ", ".join(sorted(unused)), "remove it, or change teacher.signal")

    student_support = options.top_k if signal == "topk" and options.support == "student" else 0
    sampling = Sampling(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        topk_support=student_support,
    )
    if signal == "sampled":
        term = Term(name="policy_gradient", options={"importance_clip": options.importance_clip})
        return Composition(sampling=sampling, scoring=ScoreRequest(signal="sampled"), terms=(term,))
    if signal == "topk":
        request = ScoreRequest(signal="given" if student_support else "topk", top_k=options.top_k)
        term = Term(name="topk_divergence", options={"direction": options.direction})
        return Composition(sampling=sampling, scoring=request, terms=(term,))
    term = Term(name="exact_divergence", options={"direction": options.direction})
    return Composition(sampling=sampling, scoring=ScoreRequest(signal="hidden"), terms=(term,))
