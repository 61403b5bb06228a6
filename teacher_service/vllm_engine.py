"""A teacher under vLLM: the logprobs of a prompt's tokens, or, for the exact signal, its last hidden states.

A rollout is one request that reads it whole. vLLM reads the batch in steps whose logits fit the memory kept for them
(models/vllm_host.py), and the logprobs of at most `tokens_per_batch` tokens are in this process at a time.

Shapes: L tokens, R response tokens, K ids, D hidden size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..contracts.config import Lora
from ..contracts.errors import ConfigError
from ..contracts.records import (
    Rollout,
    ScoreRequest,
    TeacherScores,
    WeightBucket,
    WeightManifest,
)
from ..models.checkpoint import load_lm_head
from ..models.loading import DTYPES
from ..models.vllm_host import VllmHost, embedding_parameters, prompt_logprobs, prompt_parameters
from ..models.vllm_support import check_vllm_architecture
from .requests import batches_of, check_request, refusal
from .transformers_engine import read_logprobs, to_numpy

WHOLE_VOCABULARY = 4096  # up to here ids of somebody else's choice are picked out of the whole distribution


class VllmTeacher:
    """A `contracts.protocols.TeacherEngine`. `hidden` starts it for the exact signal, and for that one alone;
    `shared` is a rollout engine on vLLM, whose model it scores with; `placement` is VllmHost's."""

    check_model = staticmethod(check_vllm_architecture)

    def __init__(
        self,
        model: str,
        *,
        teacher_id: str,
        dtype: str,
        tokens_per_batch: int = 8192,
        hidden: bool = False,
        lora: Lora | None = None,
        shared: Any = None,
        **placement: Any,
    ) -> None:
        self.teacher_id, self.tokens_per_batch = teacher_id, tokens_per_batch
        self.device = placement.get("device", "cpu")
        task = "embed" if hidden else "score"
        self.host: VllmHost = shared.host if shared else VllmHost(model, dtype=dtype, task=task, lora=lora, **placement)
        self.head = load_lm_head(model, dtype).to(self.device) if hidden else None
        self.dtype = DTYPES[dtype]
        self.context = self.host.context - 1  # vLLM wants room for a token after what it reads
        self.vocab = self.host.vocab
        self.largest_k = 0 if hidden else self.vocab

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        """Scores in the order of `rollouts`; a refused one has an error class and no arrays.

        The entropy is there where the request covers the whole vocabulary. Raises ConfigError for a signal that this
        engine was not started for, or that vLLM cannot give.
        """
        check_request(request, self.host.vocab)
        self._check_signal(request)
        errors = [refusal(r, request, context=self.context, vocab=self.host.vocab) for r in rollouts]
        scores = [
            TeacherScores(rollout_id=r.rollout_id, teacher_id=self.teacher_id, context=request.context, error_class=e)
            for r, e in zip(rollouts, errors, strict=True)
        ]
        sound = [i for i, error in enumerate(errors) if not error]
        for batch in batches_of([len(rollouts[i].token_ids) for i in sound], self.tokens_per_batch):
            rows = [sound[i] for i in batch]
            outputs = self.host.score(
                [rollouts[i].token_ids for i in rows], [self._parameters(rollouts[i], request) for i in rows]
            )
            for i, output in zip(rows, outputs, strict=True):
                scores[i] = replace(scores[i], **self._columns(output, rollouts[i], request))
        return scores

    def close(self) -> None:
        """End vLLM's processes."""
        self.host.close()

    def _check_signal(self, request: ScoreRequest) -> None:
        if (request.signal == "hidden") != (self.head is not None):
            found = f"{request.signal}; hidden={self.head is not None}"
            raise ConfigError("a vllm teacher is started for the exact signal, or for all others", found)
        exact_ids = self.host.exact_ids or self.host.vocab <= WHOLE_VOCABULARY
        if request.signal == "given" and not exact_ids:
            raise ConfigError(
                "vLLM scores given ids by its second model runner, which needs Triton",
                f"the first one runs, and a vocabulary of {self.host.vocab}",
                "use method_options.support=teacher, or teacher.engine=transformers",
            )

    def _parameters(self, rollout: Rollout, request: ScoreRequest) -> Any:
        if request.signal == "hidden":
            return embedding_parameters()
        if request.signal != "given":
            return prompt_parameters(request.top_k if request.signal == "topk" else 0)
        if not self.host.exact_ids:
            return prompt_parameters(-1)
        parameters = prompt_parameters(0)
        parameters.prompt_logprob_token_ids = rollout.topk_ids
        parameters.prompt_logprob_start = rollout.prompt_length - 1
        return parameters

    def _columns(self, output: Any, rollout: Rollout, request: ScoreRequest) -> dict[str, np.ndarray]:
        """The arrays of a rollout's scores."""
        if self.head is not None:
            return self._hidden(output, rollout, self.head)
        ids, logprobs = prompt_logprobs(output, rollout.prompt_length)
        ids, logprobs, own = ids[:, 1:], logprobs[:, 1:], logprobs[:, 0]
        columns = {"logprobs": own}
        if request.signal == "given":
            if self.host.exact_ids:
                chosen = np.asarray(output.prompt_token_id_logprobs, np.float32)
            else:
                everything = np.empty_like(logprobs)
                np.put_along_axis(everything, ids, logprobs, 1)
                chosen = np.take_along_axis(everything, rollout.topk_ids, 1)
            columns |= {"topk_ids": rollout.topk_ids, "topk_logprobs": chosen}
        elif request.signal == "topk":
            columns |= {"topk_ids": ids, "topk_logprobs": logprobs}
        if logprobs.shape[1] == self.host.vocab:
            wide = logprobs.astype(np.float64)
            mass = np.exp(wide)
            columns["entropy"] = -(mass * np.where(mass > 0, wide, 0.0)).sum(1).astype(np.float32)
        return columns

    def _hidden(self, output: Any, rollout: Rollout, head: torch.Tensor) -> dict[str, np.ndarray]:
        states = output.outputs.data[rollout.prompt_length - 1 : -1].to(self.device, self.dtype)
        targets = torch.from_numpy(rollout.token_ids[rollout.prompt_length :].astype(np.int64)).to(self.device)
        logprobs = read_logprobs(states, head, targets, None, 0)[0]
        return {"logprobs": logprobs.cpu().numpy(), "hidden": to_numpy(states)}

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Take a version of the student in and prove it, between scores. Raises WeightsMismatch, ConfigError."""
        if self.head is not None:
            raise ConfigError("a teacher of the exact signal is frozen, as its head is at the learner", self.teacher_id)
        self.host.load_weights(buckets, manifest, "wait")
