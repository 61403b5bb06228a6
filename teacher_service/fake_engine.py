"""A teacher without a model, for tests of what stands around one: its scores follow from the ids alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..contracts.errors import RecordError
from ..contracts.records import EMPTY_F, EMPTY_FF, EMPTY_II, Rollout, ScoreRequest, TeacherScores
from .requests import check_request, refusal

VOCAB, CONTEXT, HIDDEN = 256, 4096, 8


class FakeTeacher:
    """Right shapes and dtypes, and a draw decided by the rollout's token ids; strict about what it is given."""

    def __init__(
        self,
        model: str,
        *,
        teacher_id: str,
        dtype: str,
        device: str = "cpu",
        threads: int = 1,
        tokens_per_batch: int = 8192,
    ) -> None:
        if dtype not in ("fp32", "bf16") or threads < 1 or tokens_per_batch < 1 or not device:
            found = f"{dtype}, {device!r}, {threads}, {tokens_per_batch}"
            raise RecordError("a teacher is given a dtype, a device, threads and a token budget", found)
        self.model, self.teacher_id, self.dtype, self.largest_k = model, teacher_id, dtype, VOCAB
        self.context = CONTEXT

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        check_request(request, VOCAB)
        wrong = [r.rollout_id for r in rollouts if r.token_ids.dtype != np.int32]
        if wrong or len({r.rollout_id for r in rollouts}) != len(rollouts):
            raise RecordError("rollouts are int32 and have ids of their own", str(wrong))
        return [self._score(rollout, request) for rollout in rollouts]

    def _score(self, rollout: Rollout, request: ScoreRequest) -> TeacherScores:
        error = refusal(rollout, request, context=CONTEXT, vocab=VOCAB)
        scores = TeacherScores(
            rollout_id=rollout.rollout_id, teacher_id=self.teacher_id, context=request.context, error_class=error
        )
        if error:
            return scores
        rows = rollout.response_length
        random = np.random.Generator(np.random.Philox(key=int(rollout.token_ids.astype(np.int64).sum())))
        logprobs = -random.random(rows, np.float32)
        ids, id_logprobs, entropy, hidden = EMPTY_II, EMPTY_FF, EMPTY_F, EMPTY_FF
        if request.signal in ("topk", "given"):
            own = np.argsort(random.random((rows, VOCAB)), 1)[:, : request.top_k].astype(np.int32)
            ids = own if request.signal == "topk" else rollout.topk_ids
            id_logprobs = np.log(random.dirichlet(np.ones(ids.shape[1] + 1), rows)[:, 1:]).astype(np.float32)
            entropy = random.random(rows, np.float32)
        if request.signal == "hidden":
            hidden = random.standard_normal((rows, HIDDEN), np.float32)
            hidden = hidden if self.dtype == "fp32" else (hidden.view(np.uint32) >> 16).astype(np.uint16)
        return replace(
            scores, logprobs=logprobs, topk_ids=ids, topk_logprobs=id_logprobs, entropy=entropy, hidden=hidden
        )
