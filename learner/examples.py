"""From Arrow batches to training examples: one rank's rollouts, each joined with its teachers' scores and its credits.

They meet by the rollout's id, and only this rank's own rows are decoded. An example without usable scores or credit
(none came, or the service refused) is data: it is left out of the terms that need them, and counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa

from ..contracts.arrow import decode
from ..contracts.config import REFERENCE
from ..contracts.errors import LearnerError, RecordError
from ..contracts.records import Rollout, StepPlan, TeacherScores, TokenCredit, TrainRow
from ..models.contexts import PLAIN
from .terms.base import BoundTerm, Gated, Signal

Answer = TypeVar("Answer", TeacherScores, TokenCredit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A rollout, what it trains with, and by name what each teacher (the reference too) and credit service said."""

    rollout: Rollout
    advantage: float = 0.0
    weight: float = 1.0
    scores: dict[str, TeacherScores] = field(default_factory=dict)
    credits: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [R]

    def __post_init__(self) -> None:
        said = [("a teacher's scores align", scores.logprobs) for scores in self.scores.values()]
        said += [("a service's credit aligns", values) for values in self.credits.values()]
        for what, values in said:
            if len(values) != self.rollout.response_length:
                tokens = f"{self.rollout.response_length} tokens of {self.rollout.rollout_id}"
                raise RecordError(f"{what} with the response", f"{len(values)} values for {tokens}")

    @property
    def sampled(self) -> bool:
        """The student sampled it from the prompt that it trains on: its logprobs are those of a policy, which a
        correction, a ratio or a metric can compare with the student. Those of an answer that was sampled under another
        template are of another prompt: it counts as given."""
        return self.rollout.source == "student" and self.rollout.context == PLAIN

    def of(self, teacher: str) -> TeacherScores | None:
        """The scores of `teacher`; "" is the one that the rollout names, or its only one."""
        name = teacher or self.rollout.teacher
        if name:
            return self.scores.get(name)
        return next((scores for teacher_id, scores in self.scores.items() if teacher_id != REFERENCE), None)

    def asked_by(self, term: BoundTerm) -> bool:
        """Whether the term trains on rollouts of this one's source and template."""
        rollout = self.rollout
        return rollout.source in term.sources and (not term.contexts or rollout.context in term.contexts)

    def has(self, term: BoundTerm) -> bool:
        """Whether it has the scores and the credit that the term reads."""
        return not self.lacks(term)

    def lacks(self, term: BoundTerm) -> str:
        """Why the term cannot train on it: "teacher_refused" or "credit_missing"; "" where it can."""
        if not self._has_scores(term):
            return "teacher_refused"
        return "credit_missing" if term.credit and term.credit not in self.credits else ""

    def _has_scores(self, term: BoundTerm) -> bool:
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
class OldPolicy:
    """What one pass over a whole rollout, before any gradient, found out about its tokens; arrays `[R]`."""

    logprobs: np.ndarray  # log π_old
    weights: np.ndarray  # of the off-policy correction
    keep: np.ndarray  # bool: not rejected by it
    gates: dict[str, Gated]  # by term


Updates = list[list[list[Example]]]  # update → micro-batch → examples


def join(plan: StepPlan, batches: Sequence[pa.RecordBatch]) -> Updates:
    """The examples of each micro-batch of `plan`, over `batches` of rollouts, then of scores, then of credits."""
    counts = {"rollouts": plan.rollout_batches, "scores": plan.score_batches, "credits": plan.credit_batches}
    if len(batches) != sum(counts.values()):
        planned = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
        found = f"{len(batches)} batches, where the plan counts {planned}"
        raise LearnerError("a step gets the batches that its plan counts", found)
    rows = [row for update in plan.updates for micro_batch in update for row in micro_batch]
    rollouts = _own_rollouts(rows, batches[: plan.rollout_batches])
    wanted = {rollout.rollout_id for rollout in rollouts.values()}
    credits_from = plan.rollout_batches + plan.score_batches
    scores = _own(TeacherScores, "teacher_id", wanted, batches[plan.rollout_batches : credits_from])
    credits = _own(TokenCredit, "service", wanted, batches[credits_from:])

    def example(row: TrainRow) -> Example:
        rollout = rollouts[row.batch, row.row]
        return Example(
            rollout=rollout,
            advantage=row.advantage,
            weight=row.weight,
            scores=scores.get(rollout.rollout_id, {}),
            credits={name: own.values for name, own in credits.get(rollout.rollout_id, {}).items()},
        )

    return [[[example(row) for row in micro_batch] for micro_batch in update] for update in plan.updates]


def _own_rollouts(rows: Sequence[TrainRow], batches: Sequence[pa.RecordBatch]) -> dict[tuple[int, int], Rollout]:
    own: dict[tuple[int, int], Rollout] = {}
    for b, batch in enumerate(batches):
        wanted = [row.row for row in rows if row.batch == b]
        own.update(zip([(b, r) for r in wanted], decode(Rollout, batch, wanted), strict=True))
    return own


def _own(
    kind: type[Answer], sender: str, wanted: set[str], batches: Iterable[pa.RecordBatch]
) -> dict[str, dict[str, Answer]]:
    """Usable answers by rollout and sender (`sender`: the field that names it). Where one sender answered twice (a
    retry), the later answer counts."""
    own: dict[str, dict[str, Answer]] = {}
    for batch in batches:
        rows = [row for row, rollout_id in enumerate(batch.column("rollout_id").to_pylist()) if rollout_id in wanted]
        for answer in decode(kind, batch, rows):
            if not answer.error_class:
                own.setdefault(answer.rollout_id, {})[getattr(answer, sender)] = answer
    return own
