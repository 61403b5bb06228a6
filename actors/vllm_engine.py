"""Rollouts by vLLM: continuous batching over all calls at once, weights that change while requests run.

The logprobs are those of the sampler as it sampled ("processed"), a sample's random stream is its own seed's, and each
token carries the version of the weights that made it.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..contracts.config import Lora
from ..contracts.records import EMPTY_II, BucketEntries, Sampling, WeightBucket, WeightManifest
from ..contracts.sections import THINKING
from ..models.loading import eos_ids, load_tokenizer
from ..models.thinking import decode_response
from ..models.vllm_host import InFlight, VllmHost, flat_logprobs
from ..models.vllm_support import check_vllm_architecture
from .generated import REFUSED, Generated


class VllmEngine:
    """A `contracts.protocols.RolloutEngine`, called from several threads. `in_flight`: what a weight update does to
    running rollouts: "keep" them, "abort" them (they start again), or "wait" for their end; `max_running`: most at a
    time; `placement`: VllmHost's."""

    check_model = staticmethod(check_vllm_architecture)

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_running: int = 64,
        in_flight: InFlight = "keep",
        lora: Lora | None = None,
        **placement: Any,
    ) -> None:
        self.tokenizer, self._decoding = load_tokenizer(model), threading.Lock()
        self.eos_ids = eos_ids(model, self.tokenizer)
        self.in_flight: InFlight = in_flight
        self.host = VllmHost(model, dtype=dtype, concurrent=max_running, lora=lora, **placement)
        self.weight_version, self.context = 0, self.host.context

    def generate(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling) -> list[Generated]:
        """One response per prompt; a prompt with no room left, or with ids that the model lacks, ends as "error".

        The end-of-sequence token is the response's last.
        """
        responses = [REFUSED] * len(prompts)
        rows = [i for i, prompt in enumerate(prompts) if self._usable(prompt)]
        parameters = [self._parameters(len(prompts[i]), seeds[i], sampling) for i in rows]
        for i, outputs in zip(rows, self.host.sample([prompts[i] for i in rows], parameters), strict=True):
            responses[i] = _generated(outputs[-1].outputs[0], sampling.topk_support, len(outputs) - 1)
        return responses

    def close(self) -> None:
        """End vLLM's processes."""
        self.host.close()

    def _usable(self, prompt: np.ndarray) -> bool:
        known = len(prompt) > 0 and prompt.min() >= 0 and prompt.max() < self.host.vocab
        return bool(known) and len(prompt) < self.context

    def _parameters(self, prompt_length: int, seed: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=min(sampling.max_new_tokens, self.context - prompt_length),
            temperature=sampling.temperature,
            seed=seed,
            stop_token_ids=self.eos_ids,
            ignore_eos=True,  # the ids above are all there are, the model's own among them
            logprobs=sampling.topk_support,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def decode(self, token_ids: np.ndarray, thinking: tuple[str, str] = THINKING) -> str:
        with self._decoding:
            return decode_response(self.tokenizer, token_ids, thinking)

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Take a version in and prove it. After a mismatch this engine refuses to generate."""
        self.host.load_weights(buckets, manifest, self.in_flight)
        self.weight_version = manifest.version

    def join_broadcast(self, host: str, port: int, first_rank: int, size: int) -> None:
        """Meet the learner at `host`:`port`; vLLM's processes are those from `first_rank` on, of `size`."""
        self.host.join_broadcast(host, port, first_rank, size)

    def receive_weights(self, layout: Sequence[BucketEntries], manifest: WeightManifest) -> None:
        """As `load_weights`, of buckets that the learner broadcasts meanwhile (`join_broadcast` before)."""
        self.host.receive_weights(layout, manifest, self.in_flight)
        self.weight_version = manifest.version


def _generated(output: Any, topk_support: int, restarts: int) -> Generated:
    rows = len(output.token_ids)
    ids, logprobs = flat_logprobs(output.logprobs, rows)
    versions = np.zeros(rows, np.int32)
    for span in output.weight_versions:
        versions[span.start : span.end] = int(span.version)
    return Generated(
        np.array(output.token_ids, np.int32),
        logprobs[:, 0],
        ids[:, 1:] if topk_support else EMPTY_II,
        "stop" if output.finish_reason == "stop" else "length",
        versions,
        restarts,
    )
