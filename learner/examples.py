"""From Arrow batches to training examples: one rank's rollouts, each joined with its teachers' scores.

Rollouts and scores meet by id, and only this rank's own rows are decoded. An example without usable scores (none came,
or the teacher refused) is data: it is left out of the terms that need them, and counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ..contracts.arrow import decode
from ..contracts.config import REFERENCE
from ..contracts.errors import LearnerError, RecordError
from ..contracts.records import Rollout, StepPlan, TeacherScores, TrainRow
from .terms.base import BoundTerm, Gated, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A rollout, what it trains with, and what each teacher (and the reference) said, by name."""

    rollout: Rollout
    advantage: float = 0.0
    weight: float = 1.0
    scores: dict[str, TeacherScores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for scores in self.scores.values():
            if len(scores.logprobs) != self.rollout.response_length:
                raise RecordError(
                    "a teacher's scores align with the response",
                    f"{len(scores.logprobs)} scores for {self.rollout.response_length} tokens of "
                    f"{self.rollout.rollout_id}",
                )

    @property
    def sampled(self) -> bool:
        """The student sampled it: its logprobs are those of a policy, which a correction can compare with."""
        return self.rollout.source == "student"

    def of(self, teacher: str) -> TeacherScores | None:
        """The scores of `teacher`; "" is the one that the rollout names, or its only one."""
        name = teacher or self.rollout.teacher
        if name:
            return self.scores.get(name)
        return next((scores for teacher_id, scores in self.scores.items() if teacher_id != REFERENCE), None)

    def asked_by(self, term: BoundTerm) -> bool:
        """Whether the term trains on rollouts of this one's source."""
        return self.rollout.source in term.sources

    def has(self, term: BoundTerm) -> bool:
        """Whether it has the scores that the term reads."""
        if term.reference and REFERENCE not in self.scores:
            return False
        return term.loss.signal == "none" or self._has(self.of(term.teacher), term.loss.signal)

    def _has(self, scores: TeacherScores | None, signal: Signal) -> bool:
        """Raises LearnerError where the teacher sent another signal."""
        if scores is None:
            return False
        arrays = {"sampled": "logprobs", "views": "views", "topk": "topk_ids", "exact": "hidden"}
        array = getattr(scores, arrays[signal])
        if array.size or not self.rollout.response_length:
            return True
        raise LearnerError(
            f"a term of the {signal} signal needs a teacher that sends it",
            f"teacher {scores.teacher_id!r} sent none for {self.rollout.rollout_id}",
            f"set the teacher's signal to {signal}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What one pass over a whole rollout, before any gradient, found out about its tokens; arrays `[R]`."""

    old: np.ndarray  # log π_old
    weights: np.ndarray  # of the off-policy correction
    keep: np.ndarray  # bool: not rejected by it
    gates: dict[str, Gated]  # by term


Updates = list[list[list[Example]]]  # update → micro-batch → examples


def join(plan: StepPlan, batches: Sequence[pa.RecordBatch]) -> Updates:
    """The examples of each micro-batch of `plan`, over `batches` of rollouts and then of scores."""
    if len(batches) != plan.rollout_batches + plan.score_batches:
        raise LearnerError(
            "a step gets the batches that its plan counts",
            f"{len(batches)} batches for {plan.rollout_batches} of rollouts and {plan.score_batches} of scores",
        )
    rows = [row for update in plan.updates for micro_batch in update for row in micro_batch]
    rollouts = _own_rollouts(rows, batches[: plan.rollout_batches])
    scores = _own_scores({rollout.rollout_id for rollout in rollouts.values()}, batches[plan.rollout_batches :])

    def example(row: TrainRow) -> Example:
        rollout = rollouts[row.batch, row.row]
        own = scores.get(rollout.rollout_id, {})
        return Example(rollout=rollout, advantage=row.advantage, weight=row.weight, scores=own)

    return [[[example(row) for row in micro_batch] for micro_batch in update] for update in plan.updates]


def _own_rollouts(rows: Sequence[TrainRow], batches: Sequence[pa.RecordBatch]) -> dict[tuple[int, int], Rollout]:
    own: dict[tuple[int, int], Rollout] = {}
    for b, batch in enumerate(batches):
        wanted = [row.row for row in rows if row.batch == b]
        own.update(zip([(b, r) for r in wanted], decode(Rollout, batch, wanted), strict=True))
    return own


def _own_scores(wanted: set[str], batches: Iterable[pa.RecordBatch]) -> dict[str, dict[str, TeacherScores]]:
    """Usable scores by rollout and teacher. Where one teacher scored twice (a retry), the later ones count."""
    own: dict[str, dict[str, TeacherScores]] = {}
    for batch in batches:
        rows = [row for row, rollout_id in enumerate(batch.column("rollout_id").to_pylist()) if rollout_id in wanted]
        for scores in decode(TeacherScores, batch, rows):
            if not scores.error_class:
                own.setdefault(scores.rollout_id, {})[scores.teacher_id] = scores
    return own
