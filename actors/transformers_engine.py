"""Batched sampling with a key-value cache, on any causal language model of transformers.

Why not `model.generate`: here every row has its own random stream (a rollout does not depend on the batch it ran in),
the logprobs are those of the sampler, a prompt sampled several times is read once, and finished rows leave the batch,
so that no time goes to padding. Prompts stand left-padded, so that all rows grow at the same end.

Shapes: B rows still in the batch, P longest prompt, T new tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..contracts.config import Lora
from ..contracts.errors import WeightsMismatch
from ..contracts.records import EMPTY_II, Sampling, WeightBucket, WeightManifest
from ..contracts.sections import THINKING
from ..models.loading import context_length, eos_ids, load_causal_lm, load_tokenizer, use_threads
from ..models.lora import ReplicaWeights
from ..models.thinking import decode_response
from ..models.weight_proof import check_canary, copy_buckets
from .decoding import roomy_cache
from .generated import REFUSED, Generated
from .sampling import draw, uniforms

DONE_SHARE = 0.125  # of the batch: once so many rows have ended, they are taken out (a copy of the cache)


class TransformersEngine:
    """A `contracts.protocols.RolloutEngine` on one device. `threads`: models.loading.use_threads.

    With `lora` it takes adapters alone, and runs them merged.
    """

    def __init__(
        self, model: str, *, dtype: str, device: str = "cpu", threads: int = 1, lora: Lora | None = None
    ) -> None:
        self.model = load_causal_lm(model, dtype, attention="grouped", device=device)
        use_threads(self.model, threads)
        self.weights = ReplicaWeights(self.model, lora)
        self.tokenizer = load_tokenizer(model)
        self.device = device
        self.context = context_length(self.model.config)
        self.eos_ids = torch.tensor(eos_ids(model, self.tokenizer), device=device)
        self.weight_version = 0
        self._proven = True

    def generate(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling) -> list[Generated]:
        """One response per prompt; a prompt with no room left, or with ids that the model lacks, ends as "error".

        The end-of-sequence token is the response's last. A batch too big for the memory is the caller's concern.
        """
        if not self._proven:
            raise WeightsMismatch("a replica generates with proven weights only", "its last load failed")
        responses = [REFUSED] * len(prompts)
        rows = [i for i, prompt in enumerate(prompts) if self._usable(prompt)]
        if rows:
            batch = _Batch(self, [prompts[i] for i in rows], [seeds[i] for i in rows], sampling)
            for i, response in zip(rows, batch.run(), strict=True):
                responses[i] = response
        return responses

    def _usable(self, prompt: np.ndarray) -> bool:
        known = len(prompt) > 0 and prompt.min() >= 0 and prompt.max() < self.model.config.vocab_size
        return bool(known) and len(prompt) < self.context

    def decode(self, token_ids: np.ndarray, thinking: tuple[str, str] = THINKING) -> str:
        return decode_response(self.tokenizer, token_ids, thinking)

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Copy a version in and prove it. After a mismatch this engine refuses to generate."""
        self._proven = False
        copy_buckets(self.weights.parameters, buckets, manifest)
        self.weights.apply()
        check_canary(self._score(manifest.canary_ids), manifest)
        self.weight_version, self._proven = manifest.version, True

    @torch.inference_mode()
    def _score(self, token_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self.device)
        logprobs = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, ids[1:, None]).squeeze(1).cpu().numpy()


class _Batch:
    """One call of `generate`: the rows still running, their cache, and what has been drawn."""

    def __init__(
        self, engine: TransformersEngine, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling
    ) -> None:
        self.engine, self.sampling, self.prompts = engine, sampling, prompts
        device = engine.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.limits = (engine.context - lengths).clamp(max=sampling.max_new_tokens).to(device)
        self.longest = int(self.limits.max())
        self.uniforms = torch.from_numpy(uniforms(seeds, self.longest)).to(device)
        size = (len(prompts), self.longest)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(size, device=device)
        self.support = torch.zeros((*size, sampling.topk_support), dtype=torch.int32, device=device)
        self.ends = self.limits.clone()  # response lengths
        self.stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.rows = torch.arange(len(prompts), device=device)  # of `prompts`, still in the batch
        self.cache = roomy_cache(engine.model.config, int(lengths.max()) + self.longest)

    @torch.inference_mode()
    def run(self) -> list[Generated]:
        logits, mask, positions = self._prefill()
        running = torch.ones(len(self.rows), dtype=torch.bool, device=mask.device)
        for step in range(self.longest):
            tokens = self._draw(logits, step, running)
            count = int(running.sum())
            if count == 0:
                break
            if count <= (1 - DONE_SHARE) * len(running):
                keep = running.nonzero().squeeze(1)
                self.cache.batch_select_indices(keep)
                self.rows, tokens, mask, positions = self.rows[keep], tokens[keep], mask[keep], positions[keep]
                running = running[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions + 1
            logits = self._forward(tokens[:, None], mask, positions[:, None])
        return self._responses()

    def _prefill(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `[B, V]` after each prompt, mask `[B, P]`, last positions `[B]`. Equal prompts are read once."""
        first: dict[bytes, int] = {}
        sources = [first.setdefault(prompt.tobytes(), len(first)) for prompt in self.prompts]
        distinct = [np.frombuffer(key, self.prompts[0].dtype) for key in first]
        width = max(map(len, distinct))
        ids = np.zeros((len(distinct), width), np.int64)
        real = np.zeros((len(distinct), width), np.int64)
        for i, prompt in enumerate(distinct):
            ids[i, width - len(prompt) :], real[i, width - len(prompt) :] = prompt, 1
        mask = torch.from_numpy(real).to(self.engine.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._forward(torch.from_numpy(ids).to(self.engine.device), mask, positions)
        index = torch.tensor(sources, device=self.engine.device)
        self.cache.batch_select_indices(index)
        return logits[index], mask[index], positions[index, -1]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.engine.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _draw(self, logits: torch.Tensor, step: int, running: torch.Tensor) -> torch.Tensor:
        """Draw and note one token a row; `running` loses the rows that end with it. Ended rows draw in vain."""
        rows, sampling = self.rows, self.sampling
        tokens, logprobs = draw(logits, self.uniforms[rows, step], sampling.temperature)
        self.tokens[rows, step], self.logprobs[rows, step] = tokens, logprobs
        if sampling.topk_support:
            self.support[rows, step] = logits.topk(sampling.topk_support, -1).indices.int()
        stops = running & torch.isin(tokens, self.engine.eos_ids)
        self.stopped[rows] |= stops
        self.ends[rows] = torch.where(stops, step + 1, self.ends[rows])
        running &= self.ends[rows] > step + 1
        return tokens

    def _responses(self) -> list[Generated]:
        tokens, logprobs = self.tokens.int().cpu().numpy(), self.logprobs.cpu().numpy()
        support, stopped = self.support.cpu().numpy(), self.stopped.tolist()
        return [
            Generated(
                tokens[i, :end],
                logprobs[i, :end],
                support[i, :end] if self.sampling.topk_support else EMPTY_II,
                "stop" if stopped[i] else "length",
                np.full(end, self.engine.weight_version, np.int32),
            )
            for i, end in enumerate(self.ends.tolist())
        ]
