"""The verifier worker: what a Ray actor of the verifier pool runs. Rollouts in, verdicts and a receipt out."""

import time
from collections import Counter

import pyarrow as pa

from ..contracts.arrow import encode
from ..contracts.records import Receipt, Verdict
from .paths import reasoning_path
from .pool import Outcome, VerifierPool
from .verifiers import make_verifier

ANSWER_CHARACTERS = 256  # of an answer, kept: it goes into the receipt, which the driver reads


class VerifierWorker:
    """One replica with its own killable processes. `timeout_seconds` is each sample's budget."""

    def __init__(self, *, kind: str, timeout_seconds: float) -> None:
        self.pool = VerifierPool(make_verifier(kind), timeout_seconds)

    def judge(self, rollouts: pa.RecordBatch) -> tuple[pa.RecordBatch, Receipt]:
        """A verdict for every rollout, in order: passed (score 1), failed (0), or abstained (0, with the reason)."""
        start = time.perf_counter()
        ids = rollouts.column("rollout_id").to_pylist()
        texts = rollouts.column("text").to_pylist()
        outcomes = self.pool.judge(texts, rollouts.column("answer").to_pylist())
        verdicts = [_verdict(*row) for row in zip(ids, texts, outcomes, strict=True)]
        receipt = Receipt(
            rows=len(verdicts),
            tokens=0,
            seconds=time.perf_counter() - start,
            rewards=tuple(verdict.score for verdict in verdicts),
            answers=tuple(verdict.answer for verdict in verdicts),
            paths=tuple(verdict.path for verdict in verdicts),
            abstained=tuple(verdict.abstained for verdict in verdicts),
            passed=tuple(verdict.passed for verdict in verdicts),
            errors=dict(Counter(verdict.error_class for verdict in verdicts if verdict.abstained)),
        )
        return encode(Verdict, verdicts), receipt

    def close(self) -> None:
        """End the verifier's processes."""
        self.pool.close()


def _verdict(rollout_id: str, text: str, outcome: Outcome) -> Verdict:
    return Verdict(
        rollout_id=rollout_id,
        score=float(outcome.passed),
        passed=outcome.passed,
        answer=outcome.answer[:ANSWER_CHARACTERS],
        path=reasoning_path(text),
        abstained=bool(outcome.error_class),
        error_class=outcome.error_class,
        seconds=outcome.seconds,
    )
