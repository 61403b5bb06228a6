"""What the distillation methods share: `teacher.signal` decides what a teacher is asked and which term is summed.

- `sampled`: log π_T(y_t) of the sampled token alone; a policy gradient on the reverse KL;
- `topk`: the teacher's distribution on K ids, its own or the sampler's; a divergence on them, differentiated;
- `exact`: the teacher's last hidden states; a divergence over the whole vocabulary, differentiated.

Formulas and sources: learner/terms/. A divergence trained on stale rollouts needs no importance weight by default: its
teacher-weighted (forward) form tolerates them, and its student-weighted (reverse) form is recomputed under the current
student. The policy gradient of a sampled token gets a truncated one.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ....contracts.config import Config, Section
from ....contracts.errors import ConfigError
from ....contracts.records import ScoreRequest, Term
from .composition import Composition, correction_of, sampling_of, student_group

# Options that do nothing with a signal. Where a user gives one, it is refused instead of ignored.
UNUSED = {
    "sampled": {"direction", "beta", "top_k", "support", "rest", "temperature", "entry_clip"},
    "topk": {"temperature"},
    "exact": {"top_k", "support", "rest"},
}
Direction = Literal["reverse", "forward", "jsd", "skew_reverse", "skew_forward"]
SKEW = 0.1  # DistiLLM's α, arXiv:2402.03898
JSD = 0.5  # the symmetric one


class SignalOptions(Section):
    """How teachers are asked, and how the distributions that they return are compared."""

    top_k: int = Field(16, ge=1, description="topk only: ids for each token")
    rest: Literal["tail", "renormalise"] = Field(
        "tail", description="topk only: all other ids are one more bucket, or are left out and the ids sum to one"
    )
    temperature: float = Field(1.0, gt=0, description="exact only: divides the logits of both before they are compared")
    teachers: Literal["routed", "combined"] = Field(
        "routed", description="the teacher that a row names scores it, or all do and teacher.weight mixes their losses"
    )


class DistilOptions(SignalOptions):
    """And the divergence."""

    direction: Direction = Field(
        "reverse", description="topk, exact: reverse is KL(student‖teacher), forward KL(teacher‖student)"
    )
    beta: float | None = Field(
        None, ge=0, le=1, description=f"of jsd and the skews: the mixture; none is {JSD} for jsd, {SKEW} for a skew"
    )
    support: Literal["teacher", "student"] = Field(
        "teacher", description="topk only: whose ids, the teacher's best or the sampler's"
    )

    def divergence(self) -> dict[str, Any]:
        """As a term's options. Raises ConfigError for a beta that the direction does not use."""
        if self.direction in ("reverse", "forward"):
            refuse(self, {"beta"}, f"direction={self.direction} has no beta", "use jsd or a skew, or leave beta out")
            return {"direction": self.direction}
        beta = self.beta if self.beta is not None else JSD if self.direction == "jsd" else SKEW
        if beta == 1 and self.direction != "jsd":
            rule = f"direction={self.direction} mixes less than all of the other model in"
            raise ConfigError(rule, "method_options.beta: 1, with which the loss is always 0", f"e.g. {SKEW}")
        return {"direction": self.direction, "beta": beta}


def refuse(options: Section, names: Collection[str], rule: str, remedy: str) -> None:
    """Raises ConfigError where the user gave any of `names`."""
    given = sorted(options.model_fields_set & set(names))
    if given:
        raise ConfigError(rule, ", ".join(f"method_options.{name}" for name in given), remedy)


def signal_of(config: Config, method: str, allowed: Sequence[str] = ("sampled", "topk", "exact")) -> str:
    """The one signal of all teachers; where none is given and the default is not allowed, the first that is.

    Raises ConfigError for no teacher, for two signals, and for one that `method` cannot use.
    """
    teachers = config.named_teachers.values()
    signals = sorted(
        {t.signal if t.signal in allowed or "signal" in t.model_fields_set else allowed[0] for t in teachers}
    )
    if not signals:
        raise ConfigError(f"{method} needs a teacher", "none is given", "give teacher.model, or teachers.NAME.model")
    if len(signals) > 1:
        raise ConfigError(f"all teachers of {method} return one signal", ", ".join(signals), "give all the same signal")
    if signals[0] not in allowed:
        rule = f"{method} needs teacher.signal={' or '.join(allowed)}"
        raise ConfigError(rule, f"teacher.signal: {signals[0]}", "change teacher.signal")
    return signals[0]


def check_self_teacher(config: Config, method: str) -> None:
    """Raises ConfigError unless every teacher is the student's own model: it only sees more of the problem."""
    for name, teacher in config.named_teachers.items():
        if teacher.model != config.student.model:
            rule = f"the teacher of {method} is the student's own model, in another context"
            found = f"{name}: {teacher.model}; student: {config.student.model}"
            raise ConfigError(rule, found, "give both the same model, or use method: opd")


def distil(
    config: Config,
    options: SignalOptions,
    divergence: Mapping[str, Any],
    *,
    context: str = "plain",
    support: str = "teacher",
    sources: tuple[str, ...] = ("student",),
) -> Composition:
    """The student answers, and the teachers score rollouts of `sources` after the prompt that `context` names.

    `divergence` holds options of the divergence terms; the sampled signal has one form only. `combined` teachers each
    score every rollout, and have a term each that weighs teacher.weight / Σ weights. Raises ConfigError.
    """
    signal = signal_of(config, config.method)
    used = sorted(type(options).model_fields.keys() - UNUSED[signal])
    rule = f"method_options hold what {config.method} uses with teacher.signal={signal}: {', '.join(used)}"
    refuse(options, UNUSED[signal], rule, "remove it, or change teacher.signal")
    student_support = options.top_k if signal == "topk" and support == "student" else 0
    if signal == "sampled":
        request, name, own = ScoreRequest(signal="sampled"), "policy_gradient", {}
    elif signal == "topk":
        request = ScoreRequest(signal="given" if student_support else "topk", top_k=options.top_k)
        name, own = "topk_divergence", {**divergence, "rest": options.rest}
    else:
        request = ScoreRequest(signal="hidden")
        name, own = "exact_divergence", {**divergence, "temperature": options.temperature}
    combined = options.teachers == "combined"
    terms = _each_teacher(config, name, own, sources) if combined else (Term(name=name, options=own, sources=sources),)
    return Composition(
        terms=terms,
        samples=student_group(config),
        sampling=sampling_of(config, student_support),
        scoring=ScoreRequest(signal=request.signal, top_k=request.top_k, context=context, everyone=combined),
        scored=sources,
        correction=correction_of(config, "truncated" if signal == "sampled" else "none"),
    )


def _each_teacher(config: Config, name: str, own: dict[str, Any], sources: tuple[str, ...]) -> tuple[Term, ...]:
    teachers = config.named_teachers
    if len(teachers) < 2:
        raise ConfigError(
            "combined teachers are several", f"{len(teachers)} teacher", "give teachers.NAME.model of two"
        )
    total = sum(teacher.weight for teacher in teachers.values())
    return tuple(
        Term(name=name, options=own, sources=sources, teacher=teacher, weight=section.weight / total)
        for teacher, section in teachers.items()
    )
