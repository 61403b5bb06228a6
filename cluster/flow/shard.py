"""A shard: some rollouts of one step, source and context, by reference, and what is known about them.

A batch is a reference (into Ray's object store; in one process the batch itself); the driver never reads it. What it
does read are the receipts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...contracts.data_config import REPLAY
from ...contracts.receipts import Receipt, RolloutReceipt, VerdictReceipt
from ...contracts.records import SampleRequest
from ..methods.parts.annotations import ROLLOUTS, SKILLS, VERDICTS, Annotation
from ..methods.parts.composition import Credit, RolloutSummary, SampleSpec

ALONE = 0
MOST_BEGINNINGS = 3  # of a shard whose batches are lost
OF_VERDICTS = {"rewards": "reward", "passed": "passed", "abstained": "abstained", "answers": "answer", "paths": "path"}


@dataclass(slots=True, eq=False)
class Shard:
    """`batches` and `receipts` by what made them: "rollouts", or the annotation; and, of a service with several pools,
    the pool (teacher.math)."""

    step: int
    requests: tuple[SampleRequest, ...]
    attempt: int = 1  # 2 and more: a follow-up; ALONE: one rollout of a shard that has taken replicas down
    begun: int = 1  # times that it was begun: more where a batch was lost
    followed: bool = False  # what its verdicts ask for on top is asked for
    batches: dict[str, Any] = field(default_factory=dict)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    to_learner: dict[str, str] = field(default_factory=dict)  # which of the batches the learner reads, as what
    ready: bool = False
    quarantined: bool = False  # it took replicas down, and is dropped
    outcomes: list[Credit | str] = field(default_factory=list)  # what each rollout trains with, or why it does not

    @property
    def alone(self) -> bool:
        return self.attempt == ALONE

    def begin_again(self) -> None:
        """What was made of it is lost."""
        self.begun += 1
        for known in (self.batches, self.receipts, self.to_learner):
            known.clear()

    @property
    def source(self) -> str:
        return self.requests[0].source

    @property
    def context(self) -> str:
        return self.requests[0].context

    def asks(self, annotation: Annotation) -> bool:
        """Whether the annotation is about rollouts like its own."""
        return self.source in annotation.sources and (not annotation.contexts or self.context in annotation.contexts)

    def add(self, name: str, batch: Any, receipt: Receipt, annotation: Annotation | None = None) -> None:
        """Take in what a service has made. Raises RecordError for one that does not fit its rollouts."""
        receipt.check_rows(len(self.requests))
        self.batches[name], self.receipts[name] = batch, receipt
        if annotation and annotation.to_learner:
            self.to_learner[name] = annotation.to_learner

    def for_learner(self, kind: str) -> list[Any]:
        """Its batches of `kind` (scores, credits), in an order that is not that of the answers."""
        return [self.batches[name] for name in sorted(self.to_learner) if self.to_learner[name] == kind]

    @property
    def rollouts(self) -> Any:
        return self.batches.get(ROLLOUTS)

    @property
    def verdicts(self) -> Any:
        return self.batches.get(VERDICTS)

    @property
    def skills(self) -> Any:
        """The skill-mistake pairs of its prompts."""
        return self.batches.get(SKILLS)

    @property
    def generated(self) -> RolloutReceipt | None:
        receipt = self.receipts.get(ROLLOUTS)
        return receipt if isinstance(receipt, RolloutReceipt) else None

    @property
    def judged(self) -> VerdictReceipt | None:
        receipt = self.receipts.get(VERDICTS)
        return receipt if isinstance(receipt, VerdictReceipt) else None

    def staleness(self, step: int) -> int:
        """Weight versions between its sampling and `step`; 0 for what the student did not sample."""
        assert self.generated is not None
        return step - self.generated.weight_version if self.source == "student" else 0

    def summaries(self) -> list[RolloutSummary]:
        """What the receipts say about each rollout."""
        assert self.generated is not None
        counts = zip(self.requests, self.generated.response_lengths, self.generated.finish_reasons, strict=True)
        known: list[dict[str, Any]] = [
            {
                "rollout_id": request.rollout_id,
                "group_id": request.group_id,
                "source": request.source,
                "context": request.context,
                "length": length,
                "truncated": reason == "length",
            }
            for request, length, reason in counts
        ]
        if self.judged:
            verdicts = zip(*(getattr(self.judged, column) for column in OF_VERDICTS), strict=True)
            for own, verdict in zip(known, verdicts, strict=True):
                own.update(zip(OF_VERDICTS.values(), verdict, strict=True))
        for own, said in zip(known, self._said(), strict=True):
            own["said"] = said
        return [RolloutSummary(**own) for own in known]

    def _said(self) -> list[dict[str, dict[str, Any]]]:
        """What the receipts of other services say of each rollout, by annotation."""
        said: list[dict[str, dict[str, Any]]] = [{} for _ in self.requests]
        for name, receipt in self.receipts.items():
            if name not in (ROLLOUTS, VERDICTS):
                for row, (own, request) in enumerate(zip(said, self.requests, strict=True)):
                    own.setdefault(name.split(".")[0], {}).update(receipt.of_row(row, request.rollout_id))
        return said


def summaries_of(shards: Sequence[Shard]) -> list[RolloutSummary]:
    return [one for shard in shards for one in shard.summaries()]


def mark_of(source: str) -> str:
    """Of a source in the ids of what it answers."""
    return "" if source == "student" else source[0]


def replay_of(position: int, row: int) -> SampleRequest:
    """A replayed answer's, under an id that no rollout of a method has."""
    group = f"r{position}"
    return SampleRequest(rollout_id=f"{group}-0", group_id=group, sample_index=0, row=row, seed=0, source=REPLAY)


def request_of(rollout_id: str, group: str, sample: int, row: int, seed: int, spec: SampleSpec) -> SampleRequest:
    return SampleRequest(
        rollout_id=rollout_id,
        group_id=group,
        sample_index=sample,
        row=row,
        seed=seed,
        source=spec.source,
        context=spec.context,
    )
