"""Receipts: what a service says about one batch that it has made. The driver reads these and never the batch.

A base with what every service says, and one record for each service that says more. The tuples that PER_ROW names
hold a value a row, in the batch's order.
"""

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import RecordError


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Of any service. `seconds` go from the call's begin to its end."""

    rows: int
    tokens: int = 0  # generated, or read by a teacher (prompt included)
    spared: int = 0  # tokens that would have been, but for what a cache held: such a call says nothing of the pace
    seconds: float
    ended: float = field(default_factory=time.time, compare=False)  # when that was, by the clock on the wall
    errors: dict[str, int] = field(default_factory=dict)  # what the service could not do: error class → count

    PER_ROW: ClassVar[tuple[str, ...]] = ()

    def check_rows(self, rows: int) -> None:
        """Raises RecordError where it does not speak of `rows` rollouts, one by one."""
        wrong = [f"{name} of {len(getattr(self, name))}" for name in self.PER_ROW if len(getattr(self, name)) != rows]
        if wrong:
            found = f"{', '.join(wrong)}; {rows} rollouts were sent"
            raise RecordError(f"a {type(self).__name__} has a value for each rollout", found)

    def of_row(self, row: int, rollout_id: str) -> dict[str, Any]:
        """What it says of one of its rollouts."""
        return {name: getattr(self, name)[row] for name in self.PER_ROW}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReceipt(Receipt):
    """Of a batch of rollouts."""

    lengths: tuple[int, ...] = ()  # tokens of each rollout, prompt included
    response_lengths: tuple[int, ...] = ()
    weight_version: int = 0  # the oldest in the batch
    finish_reasons: tuple[str, ...] = ()
    surprisal: float = 0.0  # −Σ log μ of the tokens that were sampled, nats
    truncated: int = 0  # rollouts that the token limit ended

    PER_ROW: ClassVar[tuple[str, ...]] = ("lengths", "response_lengths", "finish_reasons")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReceipt(Receipt):
    """Of a teacher's scores. The lengths are those of the rows really scored, as they were scored. Where scores are
    kept, `hits` counts the rollouts (with views: views) that were known, and `misses` those that were not."""

    lengths: tuple[int, ...] = ()
    response_lengths: tuple[int, ...] = ()
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    note: str = ""  # what a person should know of the cache, said once
    mean_logprobs: dict[str, float] = field(default_factory=dict)  # rollout id → over its response, of those scored

    def of_row(self, row: int, rollout_id: str) -> dict[str, Any]:
        known = self.mean_logprobs.get(rollout_id)
        return {} if known is None else {"mean_logprob": known}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictReceipt(Receipt):
    """Of the verifier's verdicts."""

    rewards: tuple[float, ...] = ()
    passed: tuple[bool, ...] = ()
    abstained: tuple[bool, ...] = ()
    answers: tuple[str, ...] = ()  # as they were parsed
    paths: tuple[str, ...] = ()  # digests of the reasoning paths
    parts: dict[str, float] = field(default_factory=dict)  # of a composite reward: Σ of each part's scores
    faults: dict[str, int] = field(default_factory=dict)  # incorrect by a fault of the response, by error class

    PER_ROW: ClassVar[tuple[str, ...]] = ("rewards", "passed", "abstained", "answers", "paths")


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyReceipt(Receipt):
    """Of the strategies that rollouts followed. A rollout of too few steps, or of a prompt without a teacher's
    solution, is neutral: its alignment is None."""

    alignments: tuple[float | None, ...] = ()  # in [0, 1], with the best of the prompt's teacher solutions
    diversities: tuple[float, ...] = ()  # 1 − the mean cosine to the other rollouts of its group; 0 without any
    codes: tuple[tuple[int, ...], ...] = ()  # of its steps, in the extractor's codebook
    version: str = ""  # of the extractor

    PER_ROW: ClassVar[tuple[str, ...]] = ("alignments", "diversities", "codes")

    def of_row(self, row: int, rollout_id: str) -> dict[str, Any]:
        return {"alignment": self.alignments[row], "diversity": self.diversities[row], "codes": self.codes[row]}
