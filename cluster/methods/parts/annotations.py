"""What is said about a shard's rollouts, and by whom: verdicts, skills, teacher scores, reference scores.

An annotation is declared, and cluster/flow asks for it without knowing what it is: which service, which method of its
worker, which batches the call is given. A batch that another annotation makes is waited for. A new service is an
annotation here (or among a method's `own_annotations`), a record, and a worker.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ....contracts.config import REFERENCE
from ....contracts.records import ScoreRequest

ROLLOUTS, PROMPTS, ROWS = "rollouts", "prompts", "rows"  # what a shard has itself
VERDICTS, SKILLS, TEACHER, STRATEGIES = "verdicts", "skills", "teacher", "strategies"
SOURCES = ("student", "teacher", "dataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """A call of `method(**batches, **given)` for each shard of rollouts from one of `sources`.

    `reads` names the batches: the shard's own rollouts, the run's prompts, the rows of its prompts, or what another
    annotation of this shard made (left out where the shard has none). `cost` is how often a rollout's tokens are read.
    """

    name: str
    service: str  # of the pools that are asked
    method: str
    reads: tuple[str, ...] = (ROLLOUTS,)
    given: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ("student",)
    contexts: tuple[str, ...] = ()  # of the rollouts: templates that they were sampled under; (): whichever
    routed: bool = False  # of the service's pools those are asked that the rows name as their teacher; else all
    cost: int = 1
    to_learner: Literal["", "scores", "credits"] = ""  # what its batches are to the learner: TeacherScores, TokenCredit
    worker: type | None = None  # of a service that no section of the recipe starts: a replica of it is started


def verdicts() -> Annotation:
    """Of everything that a model wrote. The dataset's own solutions are given as right."""
    sources = tuple(source for source in SOURCES if source != "dataset")
    return Annotation(name=VERDICTS, service="verifier", method="judge", reads=(ROLLOUTS, PROMPTS), sources=sources)


def skills(pairs: int, sources: tuple[str, ...]) -> Annotation:
    """Skill-mistake pairs of the prompts: retrieved while they are answered, since no rollout is read."""
    return Annotation(
        name=SKILLS, service="skills", method="retrieve", reads=(PROMPTS, ROWS), given={"k": pairs}, sources=sources
    )


def teacher_scores(
    request: ScoreRequest, sources: tuple[str, ...], contexts: tuple[str, ...], after_verdicts: bool
) -> Annotation:
    """What teachers say. Only one that is shown more than the plain prompt reads what that is made of."""
    shown: tuple[str, ...] = ()
    if request.context != "plain":
        shown = (PROMPTS, *([VERDICTS] if after_verdicts else []), *([SKILLS] if request.views else []))
    return Annotation(
        name=TEACHER,
        service=TEACHER,
        method="score",
        reads=(ROLLOUTS, *shown),
        given={"request": request},
        sources=sources,
        contexts=contexts,
        routed=not request.everyone,
        cost=max(1, request.views),
        to_learner="scores",
    )


def reference_scores(sources: tuple[str, ...]) -> Annotation:
    """What the reference model says of the sampled tokens."""
    return Annotation(
        name=REFERENCE,
        service=REFERENCE,
        method="score",
        given={"request": ScoreRequest(everyone=True)},
        sources=sources,
        to_learner="scores",
    )


def strategies(given: Mapping[str, Any]) -> Annotation:
    """How the student's plain answers follow the teacher's solutions, step by step: `given` are the options of
    `StrategyWorker.align`. It needs no verdict, and is asked beside the verifier."""
    return Annotation(
        name=STRATEGIES, service=STRATEGIES, method="align", given=given, contexts=("plain",), to_learner="credits"
    )
