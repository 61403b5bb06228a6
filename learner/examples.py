"""From Arrow batches to training examples: one rank's rollouts, each joined with its teacher's scores.

Rollouts and scores meet by id, and only this rank's own rows are decoded. An example without usable scores (none came,
or the teacher refused) is data: it is left out of the terms that need them, and counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ..contracts.errors import LearnerError, RecordError
from ..contracts.records import Rollout, StepPlan, TeacherScores, decode
from .terms.base import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A rollout and what its teacher said; `scores` is None where nothing usable was said."""

    rollout: Rollout
    scores: TeacherScores | None

    def __post_init__(self) -> None:
        if self.scores is not None and len(self.scores.logprobs) != self.rollout.response_length:
            raise RecordError(
                "a teacher's scores align with the response",
                f"{len(self.scores.logprobs)} scores for {self.rollout.response_length} tokens of "
                f"{self.rollout.rollout_id}",
            )

    def has(self, signal: Signal) -> bool:
        """Whether its tokens can count in a term of that signal. Raises LearnerError where the teacher sent another."""
        if self.scores is None:
            return False
        array = {"sampled": self.scores.logprobs, "topk": self.scores.topk_ids, "exact": self.scores.hidden}[signal]
        if array.size or not self.rollout.response_length:
            return True
        raise LearnerError(
            f"a term of the {signal} signal needs a teacher that sends it",
            f"teacher {self.scores.teacher_id!r} sent none for {self.rollout.rollout_id}",
            f"set the teacher's signal to {signal}",
        )


def join(plan: StepPlan, batches: Sequence[pa.RecordBatch]) -> list[list[Example]]:
    """The examples of each micro-batch of `plan`. Verdicts may follow the scores; no term reads them so far."""
    if len(batches) < plan.rollout_batches + plan.score_batches:
        raise LearnerError(
            "a step gets the batches that its plan counts",
            f"{len(batches)} batches for {plan.rollout_batches} of rollouts and {plan.score_batches} of scores",
        )
    rollouts = _own_rollouts(plan, batches[: plan.rollout_batches])
    wanted = {rollout.rollout_id for rollout in rollouts.values()}
    scores = _own_scores(wanted, batches[plan.rollout_batches : plan.rollout_batches + plan.score_batches])
    return [
        [Example(rollout=rollouts[at], scores=scores.get(rollouts[at].rollout_id)) for at in micro_batch]
        for micro_batch in plan.micro_batches
    ]


def _own_rollouts(plan: StepPlan, batches: Sequence[pa.RecordBatch]) -> dict[tuple[int, int], Rollout]:
    own: dict[tuple[int, int], Rollout] = {}
    for b, batch in enumerate(batches):
        rows = [r for micro_batch in plan.micro_batches for at, r in micro_batch if at == b]
        own.update(zip([(b, r) for r in rows], decode(Rollout, batch, rows), strict=True))
    return own


def _own_scores(wanted: set[str], batches: Iterable[pa.RecordBatch]) -> dict[str, TeacherScores]:
    """Usable scores by rollout. Where a rollout was scored twice (a retry), the later ones count."""
    own: dict[str, TeacherScores] = {}
    for batch in batches:
        rows = [row for row, rollout_id in enumerate(batch.column("rollout_id").to_pylist()) if rollout_id in wanted]
        own.update(
            {scores.rollout_id: scores for scores in decode(TeacherScores, batch, rows) if not scores.error_class}
        )
    return own
