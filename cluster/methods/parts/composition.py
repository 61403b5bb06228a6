"""What a method is made of, and how its options are read.

A method says, in plain functions of a step, who answers a prompt, what the teachers are shown and asked, what the
verdicts make of each rollout, and which loss terms the learner sums. The driver, the services and the learner know
these parts and no method's name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from ....contracts.config import Config, Section
from ....contracts.data_config import REPLAY
from ....contracts.errors import ConfigError
from ....contracts.recipe import explain
from ....contracts.records import Correction, Sampling, ScoreRequest, Term
from .annotations import Annotation, reference_scores, skills, teacher_scores, verdicts

Options = TypeVar("Options", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """`samples` answers to one prompt, by `source` (student, teacher, dataset), shown it in the template `context`.
    `fresh`, of what is asked on top: not the group's own prompt, but another one in its place."""

    source: str = "student"
    samples: int = 1
    context: str = "plain"
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSummary:
    """What the driver knows of one rollout: counts and the verifier's decision, never tokens."""

    rollout_id: str
    group_id: str
    source: str
    context: str
    length: int  # response tokens
    truncated: bool  # the token limit ended it
    reward: float = 1.0  # without a verdict (given responses) a rollout counts as right
    passed: bool = True
    abstained: bool = False
    answer: str = ""
    path: str = ""  # a digest of its reasoning path
    said: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by the method's own annotations, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What a rollout trains with. A rollout that does not train has a reason (a word) instead."""

    advantage: float = 0.0
    weight: float = 1.0  # multiplies its token losses, not what they are divided by


def natural(rollout_id: str) -> list[str | int]:
    """A key that orders rollouts by their ids, numbers as numbers, and so by nothing that timing decides."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", rollout_id)]


Samples = Callable[[int, int], Sequence[SampleSpec]]  # (step, position) → who answers that prompt
Crediting = Callable[[Sequence[RolloutSummary], int], Sequence[Credit | str]]  # all rollouts of a step, and the step
FollowUp = Callable[[Sequence[RolloutSummary], int], Sequence[tuple[str, SampleSpec]]]


class MethodState(Protocol):
    """What a method remembers from one step to the next, beyond what it is composed of. `credit` changes it."""

    figures: dict[str, float]  # of the last step, for the metrics
    alarm: str  # what a person should be told, once a run; "" nothing

    def evaluated(self, accuracy: float) -> None:
        """The student's avg@k in distribution, at each evaluation."""
        ...

    def save(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        ...

    def load(self, values: dict[str, Any]) -> None:
        """Go on from a checkpoint's; from {} as it began."""
        ...


def train_all(rollouts: Sequence[RolloutSummary], step: int) -> list[Credit | str]:
    """Every rollout trains."""
    return [Credit() for _ in rollouts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """One method, ready to run. Steps count from 0 inside the method's stage."""

    terms: tuple[Term, ...]
    samples: Samples
    sampling: Sampling
    generators: tuple[str, ...] = ("student",)  # the sources that `samples` and `follow_up` may name, and the replay
    scoring: ScoreRequest | None = None  # what every teacher is asked; None: no teacher
    scored: tuple[str, ...] = ("student",)  # sources of the rollouts that teachers and reference score
    scored_contexts: tuple[str, ...] = ()  # and templates of those that teachers do; (): whichever
    after_verdicts: bool = False  # teachers are asked once a group is judged: their prompt shows what passed
    reference: bool = False  # the reference model scores the sampled tokens too
    needs_verdicts: bool = False
    min_samples: int = 1  # of rollout.samples_per_prompt
    credit: Crediting = train_all
    # (judged rollouts of some groups, all of one source and context; attempts so far, from 1) → what to ask on top, by
    # group id. The answers join the same step.
    follow_up: FollowUp | None = None
    correction: Correction = field(default_factory=Correction)
    state: MethodState | None = None  # what `credit` remembers
    own_annotations: tuple[Annotation, ...] = ()  # by services of its own, beside the teachers and the verifier
    round_steps: int = 1  # the generators get new weights every so many steps
    restart: bool = False  # and the learner starts each round from the stage's first weights

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """Everything that is said about its rollouts, where there is a service for it."""
        said = [verdicts()]
        if self.scoring:
            said += [skills(self.scoring.views, self.scored)] if self.scoring.views else []
            said.append(teacher_scores(self.scoring, self.scored, self.scored_contexts, self.after_verdicts))
        if self.reference:
            said.append(reference_scores(self.scored))
        return (*said, *self.own_annotations)

    @property
    def services(self) -> frozenset[str]:
        """That are asked for annotations, where they are there."""
        return frozenset(annotation.service for annotation in self.annotations)


def with_replay(config: Config, composition: Composition) -> Composition:
    """A method's composition, and the loss of the recipe's replayed answers beside its own."""
    if not config.replay:
        return composition
    replayed = Term(name="nll", label=REPLAY, weight=config.replay.weight, sources=(REPLAY,))
    generators = (*composition.generators, REPLAY)
    return replace(composition, terms=(*composition.terms, replayed), generators=generators)


def student_group(config: Config) -> Samples:
    """The student answers every prompt `rollout.samples_per_prompt` times."""
    spec = SampleSpec(samples=config.rollout.samples_per_prompt)
    return lambda step, position: (spec,)


def sampling_of(config: Config, topk_support: int = 0) -> Sampling:
    """How the student samples, from the recipe's `rollout`."""
    rollout = config.rollout
    return Sampling(max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, topk_support=topk_support)


def correction_of(config: Config, kind: str, high: float = 2.0) -> Correction:
    """The recipe's `off_policy`; where that is auto, `kind`, this method's default."""
    settings = config.off_policy
    if settings.kind != "auto":
        return Correction(**settings.model_dump())
    own = settings.model_dump(exclude={"kind"})
    if "high" not in settings.model_fields_set:
        own["high"] = high
    return Correction(kind=kind, **own)


def read_options(model: type[Options], options: dict[str, Any], method: str) -> Options:
    """`method_options` as the method's own model. Raises ConfigError."""
    try:
        return model.model_validate(options)
    except ValidationError as error:
        known = tuple(model.model_fields)
        faults = [explain(fault, lambda place: known, ["method_options"]) for fault in error.errors()]
        remedy = f"{method} knows: {', '.join(known)}"
        raise ConfigError("method_options are those of the method", "\n  ".join(faults), remedy) from None
