"""The strategy worker: what a Ray actor of the strategy pool runs. Rollouts in, a credit for each token out.

A rollout is segmented into steps, which the extractor encodes in the rollout's own context, and aligned with each of
the teacher's solutions of its prompt; the best one counts, since a problem may be solved in several ways. A rollout of
fewer than three steps, or of a prompt without a solution, is neutral: no alignment, and no credit.
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ...contracts.arrow import decode, encode
from ...contracts.receipts import StrategyReceipt
from ...contracts.records import Rollout, TokenCredit
from ...models.loading import load_tokenizer
from .alignment import Best, Order, best_of, coverage, diversity, shaping, token_credit
from .extractor import Encoded, Extractor
from .segments import Step, pieces_of, segment
from .solutions import Solutions

SERVICE = "strategies"


class StrategyWorker:
    """One replica with the extractor in `path`. `tokenizer`: the student's, whose tokens it reads. Raises
    StrategyError."""

    def __init__(self, *, path: str, tokenizer: str, device: str = "cpu", threads: int = 1) -> None:
        self.extractor = Extractor.load(path, device=device, threads=threads)
        self.solutions = Solutions.load(path)
        self.tokenizer = load_tokenizer(tokenizer)

    def align(
        self,
        rollouts: pa.RecordBatch,
        order: Order = "free",
        credit_weight: float = 0.2,
        shaping: bool = True,
        counted: bool = True,
    ) -> tuple[pa.RecordBatch, StrategyReceipt]:
        """TokenCredits in the order of `rollouts`. `order`: of alignment.align; `credit_weight`: β_c of
        alignment.token_credit; `counted` says nothing here."""
        started = time.perf_counter()
        own = decode(Rollout, rollouts)
        steps = [segment(pieces_of(self.tokenizer, response_of(one)), self.extractor.limits) for one in own]
        encoded = self.extractor.encode([[step.text for step in part] for part in steps])
        taught = [self.solutions.of(one.prompt_id) for one in own]
        best = best_of([(one.vectors, solutions) for one, solutions in zip(encoded, taught, strict=True)], order)
        credits = [
            _credit(one, part, found, vectors, solutions, credit_weight, shaping)
            for one, part, found, vectors, solutions in zip(own, steps, best, encoded, taught, strict=True)
        ]
        receipt = StrategyReceipt(
            rows=len(own),
            tokens=sum(one.response_length for one in own),
            seconds=time.perf_counter() - started,
            alignments=tuple(one.found.alignment if one else None for one in best),
            diversities=tuple(_diversities([one.group_id for one in own], encoded)),
            codes=tuple(tuple(map(int, vectors.codes)) for vectors in encoded),
            version=self.extractor.version,
        )
        return encode(TokenCredit, credits), receipt


def _credit(
    rollout: Rollout,
    steps: Sequence[Step],
    best: Best | None,
    encoded: Encoded,
    solutions: Sequence[np.ndarray],
    credit_weight: float,
    shaped: bool,
) -> TokenCredit:
    values = np.zeros(rollout.response_length, np.float32)
    if best:
        taught = solutions[best.solution]
        moved = shaping(coverage(encoded.vectors, taught)) if shaped else np.zeros(len(steps))
        spans = [(step.start, step.end) for step in steps]
        values = token_credit(spans, rollout.response_length, best.found.credit, moved, beta=credit_weight)
    return TokenCredit(rollout_id=rollout.rollout_id, service=SERVICE, values=values)


def response_of(rollout: Rollout) -> np.ndarray:
    """Its response's token ids `[R]`."""
    return rollout.token_ids[rollout.prompt_length :]


def _diversities(groups: Sequence[str], encoded: Sequence[Encoded]) -> list[float]:
    """1 − the mean cosine of each rollout's mean vector to the others of its group; 0 where there are none."""
    found = [0.0] * len(groups)
    rows_of: dict[str, list[int]] = {}
    for row, (group, own) in enumerate(zip(groups, encoded, strict=True)):
        if len(own.vectors):
            rows_of.setdefault(group, []).append(row)
    for rows in rows_of.values():
        if len(rows) > 1:
            means = np.stack([encoded[row].vectors.mean(0) for row in rows])
            for row, value in zip(rows, diversity(means), strict=True):
                found[row] = float(value)
    return found
