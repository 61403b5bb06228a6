"""The rollout worker, what an actor of the rollout pool runs: prompts and requests in, rollouts and a receipt out."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from ..contracts.arrow import decode, encode
from ..contracts.data_config import GIVEN, REPLAY
from ..contracts.protocols import BroadcastEngine, Generation
from ..contracts.receipts import RolloutReceipt
from ..contracts.records import (
    EMPTY_I,
    EMPTY_II,
    BucketEntries,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    WeightBucket,
    WeightManifest,
)
from ..contracts.sections import THINKING
from ..models.chat import special_ids
from ..models.contexts import PLAIN, Prompter
from ..models.loading import load_tokenizer
from .engines import make_engine
from .generated import REFUSED, Generated


class RolloutWorker:
    """One replica: an engine, by its name or the class of one's own, with its model. `max_batch` is the most rollouts
    sampled in one call of it.

    `templates` are the recipe's own (models/contexts.py), `suffix` its words after every problem, `template_kwargs` the
    chat template's, `thinking` the marks around the model's reasoning, `options` the engine's (with `lora` the
    published weights are adapters of `model` alone).
    """

    def __init__(
        self,
        *,
        engine: str | type,
        model: str,
        max_batch: int = 64,
        templates: Mapping[str, str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        suffix: str = "",
        thinking: tuple[str, str] = THINKING,
        **options: Any,
    ) -> None:
        self.engine = make_engine(engine, model, **options)
        self.model, self.max_batch = model, max_batch
        self.templates, self.template_kwargs, self.suffix, self.thinking = templates, template_kwargs, suffix, thinking
        self._prompting = Lock()  # a tokenizer serves one thread at a time

    @cached_property
    def prompter(self) -> Prompter:
        """Builds the prompts of contexts; its tokenizer is loaded at the first one. Raises ConfigError, ModelError."""
        tokenizer = load_tokenizer(self.model)
        return Prompter(tokenizer, self.template_kwargs, self.templates, self.suffix, self.thinking)

    def load_weights(self, manifest: WeightManifest, *buckets: WeightBucket) -> float:
        """Load a published version and prove it; the seconds it took. Raises WeightsMismatch."""
        start = time.perf_counter()
        self.engine.load_weights(buckets, manifest)
        return time.perf_counter() - start

    def join_broadcast(self, host: str, port: int, first_rank: int, size: int) -> None:
        """Meet the learner at `host`:`port`; the engine's processes are those from `first_rank` on, of `size`. In
        place of a group that it was in before. Raises BroadcastBroken."""
        assert isinstance(self.engine, BroadcastEngine), "rollout.transfer=broadcast is refused for other engines"
        self.engine.join_broadcast(host, port, first_rank, size)

    def receive_weights(self, manifest: WeightManifest, layout: Sequence[BucketEntries]) -> float:
        """Take in a version that the learner broadcasts, and prove it; the seconds it took. Raises WeightsMismatch; or
        BroadcastBroken, and then it holds no version until it has taken one in."""
        assert isinstance(self.engine, BroadcastEngine)
        start = time.perf_counter()
        self.engine.receive_weights(layout, manifest)
        return time.perf_counter() - start

    def generate(
        self, prompts: pa.RecordBatch, requests: tuple[SampleRequest, ...], sampling: Sampling
    ) -> tuple[pa.RecordBatch, RolloutReceipt]:
        """Rollouts in the order of `requests`. One that could not be made is a row too: "error", no response.

        That is a prompt without room for a response, a context whose fields the row lacks, or a row without a solution
        where the dataset answers. A rollout holds the plain prompt, whatever its generator was shown. Of a replayed
        answer every token trains, whatever `sampling` masks.
        """
        started = time.perf_counter()
        rows = sorted({request.row for request in requests})
        by_row = dict(zip(rows, decode(Prompt, prompts, rows), strict=True))
        responses = self._respond([by_row[request.row] for request in requests], requests, sampling)
        untrained = self._special_ids if sampling.mask_special else EMPTY_I
        rollouts = [
            self._rollout(by_row[request.row], request, response, EMPTY_I if request.source == REPLAY else untrained)
            for request, response in zip(requests, responses, strict=True)
        ]
        batch = encode(Rollout, rollouts)
        reasons = Counter(rollout.finish_reason for rollout in rollouts)
        sampled = [rollout.oldest_version for rollout in rollouts if rollout.weight_versions.size]
        errors = {"prompt": reasons["error"], "restarted": sum(response.restarts for response in responses)}
        receipt = RolloutReceipt(
            rows=len(rollouts),
            tokens=sum(rollout.response_length for rollout in rollouts if rollout.source not in GIVEN),
            seconds=time.perf_counter() - started,
            lengths=tuple(len(rollout.token_ids) for rollout in rollouts),
            response_lengths=tuple(rollout.response_length for rollout in rollouts),
            weight_version=min(sampled, default=self.engine.weight_version),
            surprisal=-sum(float(rollout.logprobs.sum(dtype=np.float64)) for rollout in rollouts),
            finish_reasons=tuple(rollout.finish_reason for rollout in rollouts),
            truncated=reasons["length"],
            errors={name: number for name, number in errors.items() if number},
        )
        return batch, receipt

    def close(self) -> None:
        """End what the engine runs in other processes, if it runs any."""
        close = getattr(self.engine, "close", None)
        if close:
            close()

    def _respond(
        self, prompts: Sequence[Prompt], requests: Sequence[SampleRequest], sampling: Sampling
    ) -> list[Generation]:
        """Prompts of like length go together: less padding, and the samples of one prompt share its reading."""
        responses: list[Generation] = [REFUSED] * len(requests)
        shown: dict[int, np.ndarray] = {}
        for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            if request.source in GIVEN:
                responses[i] = _given(prompt, sampling)
                continue
            with self._prompting:
                ids = prompt.token_ids if request.context == PLAIN else self.prompter.ids(request.context, prompt)
            if ids is not None:
                shown[i] = ids
        order = sorted(shown, key=lambda i: (len(shown[i]), requests[i].row))
        for at in range(0, len(order), self.max_batch):
            part = order[at : at + self.max_batch]
            generated = self.engine.generate([shown[i] for i in part], [requests[i].seed for i in part], sampling)
            for i, response in zip(part, generated, strict=True):
                responses[i] = response
        return responses

    @cached_property
    def _special_ids(self) -> np.ndarray:
        with self._prompting:
            return special_ids(self.prompter.tokenizer, self.thinking)

    def _rollout(self, prompt: Prompt, request: SampleRequest, response: Generation, untrained: np.ndarray) -> Rollout:
        return Rollout(
            rollout_id=request.rollout_id,
            prompt_id=prompt.prompt_id,
            group_id=request.group_id,
            sample_index=request.sample_index,
            source=request.source,
            context=request.context,
            token_ids=np.concatenate([prompt.token_ids, response.token_ids]),
            prompt_length=len(prompt.token_ids),
            text=self.engine.decode(response.token_ids, self.thinking),
            logprobs=response.logprobs,
            loss_mask=~np.isin(response.token_ids, untrained),
            topk_ids=response.topk_ids,
            weight_versions=response.weight_versions,
            finish_reason=response.finish_reason,
            answer=prompt.answer,
            teacher=prompt.teacher,
        )


def _given(prompt: Prompt, sampling: Sampling) -> Generation:
    """The dataset's own solution as a response, cut off where a sampled one would be; nobody sampled its logprobs."""
    if not len(prompt.solution_ids):
        return REFUSED
    ids = prompt.solution_ids[: sampling.max_new_tokens]
    whole = len(ids) == len(prompt.solution_ids)
    return Generated(ids, np.zeros(len(ids), np.float32), EMPTY_II, "stop" if whole else "length")
