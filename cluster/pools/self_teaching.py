"""A live self-teacher without a pool of its own: the rollout replicas, which hold the student's weights, score too."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ...actors.worker import RolloutWorker
from ...contracts.receipts import ScoreReceipt
from ...contracts.records import ScoreRequest
from ...contracts.sections import THINKING
from ...teacher_service.worker import TeacherWorker


class SelfTeachingWorker(RolloutWorker):
    """A rollout replica whose model is also the teacher `teacher_id`."""

    def __init__(
        self,
        *,
        teacher_id: str,
        tokens_per_batch: int,
        engine: str,
        model: str,
        dtype: str,
        device: str = "cpu",
        threads: int = 1,
        templates: Mapping[str, str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        suffix: str = "",
        thinking: tuple[str, str] = THINKING,
        **options: Any,
    ) -> None:
        both: dict[str, Any] = {
            "engine": engine,
            "model": model,
            "dtype": dtype,
            "device": device,
            "threads": threads,
            "templates": templates,
            "template_kwargs": template_kwargs,
            "suffix": suffix,
            "thinking": thinking,
        }
        super().__init__(**both, **options)
        own = {"teacher_id": teacher_id, "tokens_per_batch": tokens_per_batch}
        self.teacher = TeacherWorker(shared=self.engine, **own, **both)

    def score(
        self,
        rollouts: pa.RecordBatch,
        request: ScoreRequest,
        prompts: pa.RecordBatch | None = None,
        verdicts: pa.RecordBatch | None = None,
        skills: pa.RecordBatch | None = None,
    ) -> tuple[pa.RecordBatch, ScoreReceipt]:
        """As teacher_service.worker.TeacherWorker.score, by the weights that this replica holds."""
        return self.teacher.score(rollouts, request, prompts, verdicts, skills)
