"""The teacher worker: what a Ray actor of a teacher pool runs. Rollouts in, scores and a receipt out."""

import time
from collections import Counter

import pyarrow as pa

from ..contracts.records import Receipt, Rollout, ScoreRequest, TeacherScores, decode, encode
from .engines import make_engine


class TeacherWorker:
    """One replica of the teacher `teacher_id`."""

    def __init__(
        self,
        *,
        teacher_id: str,
        engine: str,
        model: str,
        dtype: str,
        device: str = "cpu",
        threads: int = 1,
        tokens_per_batch: int = 8192,
    ) -> None:
        self.teacher_id = teacher_id
        self.engine = make_engine(
            engine,
            model,
            teacher_id=teacher_id,
            dtype=dtype,
            device=device,
            threads=threads,
            tokens_per_batch=tokens_per_batch,
        )

    def score(self, rollouts: pa.RecordBatch, request: ScoreRequest) -> tuple[pa.RecordBatch, Receipt]:
        """Scores of the rows that ask for this teacher or for none by name, in their order; a refused one is a row too.

        The receipt's ids, lengths and tokens are those of the rows really scored.
        """
        start = time.perf_counter()
        asked = rollouts.column("teacher").to_pylist()
        mine = decode(Rollout, rollouts, [i for i, name in enumerate(asked) if name in ("", self.teacher_id)])
        scores = self.engine.score(mine, request)
        batch = encode(TeacherScores, scores)
        served = [rollout for rollout, score in zip(mine, scores, strict=True) if not score.error_class]
        receipt = Receipt(
            rows=len(mine),
            tokens=sum(len(rollout.token_ids) for rollout in served),
            seconds=time.perf_counter() - start,
            lengths=tuple(len(rollout.token_ids) for rollout in served),
            response_lengths=tuple(rollout.response_length for rollout in served),
            rollout_ids=tuple(rollout.rollout_id for rollout in served),
            weight_version=min((rollout.weight_version_min for rollout in served), default=0),
            errors=dict(Counter(score.error_class for score in scores if score.error_class)),
        )
        return batch, receipt
