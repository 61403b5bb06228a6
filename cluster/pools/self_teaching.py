"""Self-teachers: one without a pool of its own, whose rollout replicas score too, since they hold the student's
weights; and how a new replica of one that averages comes by the average."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...actors.worker import RolloutWorker
from ...contracts.receipts import ScoreReceipt
from ...contracts.records import ScoreRequest, WeightBucket, WeightManifest
from ...contracts.sections import THINKING
from ...teacher_service.score_cache import CachePlace
from ...teacher_service.worker import TeacherWorker
from .replica import Replica
from .room import Tell


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
        cache: CachePlace | None = None,
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
        own = {"teacher_id": teacher_id, "tokens_per_batch": tokens_per_batch, "cache": cache}
        self.teacher = TeacherWorker(shared=self.engine, **own, **both)

    def load_weights(self, manifest: WeightManifest, *buckets: WeightBucket) -> float:
        """As RolloutWorker.load_weights; the teacher knows what it holds then."""
        self.teacher.shared_weights = ""
        seconds = super().load_weights(manifest, *buckets)
        self.teacher.shared_weights = manifest.fingerprint
        return seconds

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


async def adopt_average(
    newcomer: Replica, peers: Sequence[Replica], name: str, saved: Sequence[Path], tell: Tell
) -> int | None:
    """The version of the average that a new replica of the pool `name` goes on from: a peer's, else that of the last
    checkpoint that has one (`saved`, the oldest first). None where there is neither: it begins anew, which is said."""
    if peers:
        (average,), version = await peers[0].stream("share_average")
        tell(f"a new replica of the {name} pool has the average of another")
        return await newcomer.ask("adopt_average", version, average)
    if saved:
        tell(f"a new replica of the {name} pool has the average of {saved[-1].parent.name}: no other was left")
        return await newcomer.ask("load_average", str(saved[-1]))
    tell(f"a new replica of the {name} pool begins its average anew: no other and no checkpoint was left")
    return None
