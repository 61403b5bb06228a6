"""The rollout worker, what an actor of the rollout pool runs: prompts and requests in, rollouts and a receipt out."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ..contracts.protocols import Generation
from ..contracts.records import (
    Prompt,
    Receipt,
    Rollout,
    SampleRequest,
    Sampling,
    WeightBucket,
    WeightManifest,
    decode,
    encode,
)
from .engines import make_engine


class RolloutWorker:
    """One replica: an engine with its model. `max_batch` is the most rollouts sampled at once."""

    def __init__(
        self, *, engine: str, model: str, dtype: str, device: str = "cpu", threads: int = 1, max_batch: int = 64
    ) -> None:
        self.engine = make_engine(engine, model, dtype=dtype, device=device, threads=threads)
        self.max_batch = max_batch

    def load_weights(self, manifest: WeightManifest, *buckets: WeightBucket) -> float:
        """Load a published version and prove it; the seconds it took. Raises WeightsMismatch."""
        start = time.perf_counter()
        self.engine.load_weights(buckets, manifest)
        return time.perf_counter() - start

    def generate(
        self, prompts: pa.RecordBatch, requests: tuple[SampleRequest, ...], sampling: Sampling
    ) -> tuple[pa.RecordBatch, Receipt]:
        """Rollouts in the order of `requests`. One that could not be sampled is a row too: "error", no response."""
        start = time.perf_counter()
        rows = sorted({request.row for request in requests})
        by_row = dict(zip(rows, decode(Prompt, prompts, rows), strict=True))
        responses = self._respond(by_row, requests, sampling)
        rollouts = [
            self._rollout(by_row[request.row], request, response)
            for request, response in zip(requests, responses, strict=True)
        ]
        batch = encode(Rollout, rollouts)
        reasons = Counter(rollout.finish_reason for rollout in rollouts)
        receipt = Receipt(
            rows=len(rollouts),
            tokens=sum(rollout.response_length for rollout in rollouts),
            seconds=time.perf_counter() - start,
            lengths=tuple(len(rollout.token_ids) for rollout in rollouts),
            response_lengths=tuple(rollout.response_length for rollout in rollouts),
            rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
            weight_version=self.engine.weight_version,
            truncated=reasons["length"],
            errors={"prompt": reasons["error"]} if reasons["error"] else {},
        )
        return batch, receipt

    def _respond(
        self, by_row: Mapping[int, Prompt], requests: Sequence[SampleRequest], sampling: Sampling
    ) -> list[Generation]:
        """Prompts of like length go together: less padding, and the samples of one prompt share its reading."""
        order = sorted(range(len(requests)), key=lambda i: (len(by_row[requests[i].row].token_ids), requests[i].row))
        responses: dict[int, Generation] = {}
        for at in range(0, len(order), self.max_batch):
            part = order[at : at + self.max_batch]
            token_ids = [by_row[requests[i].row].token_ids for i in part]
            generated = self.engine.generate(token_ids, [requests[i].seed for i in part], sampling)
            responses.update(zip(part, generated, strict=True))
        return [responses[i] for i in range(len(requests))]

    def _rollout(self, prompt: Prompt, request: SampleRequest, response: Generation) -> Rollout:
        return Rollout(
            rollout_id=request.rollout_id,
            prompt_id=prompt.prompt_id,
            group_id=request.group_id,
            sample_index=request.sample_index,
            token_ids=np.concatenate([prompt.token_ids, response.token_ids]),
            prompt_length=len(prompt.token_ids),
            text=self.engine.decode(response.token_ids),
            logprobs=response.logprobs,
            loss_mask=np.ones(len(response.token_ids), bool),
            topk_ids=response.topk_ids,
            weight_version_min=self.engine.weight_version,
            weight_version_max=self.engine.weight_version,
            finish_reason=response.finish_reason,
            answer=prompt.answer,
            teacher=prompt.teacher,
        )
