"""A rollout engine without a model, for tests of what stands around one. It is strict about what it is given."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..contracts.config import Lora
from ..contracts.errors import RecordError, WeightsMismatch
from ..contracts.records import EMPTY_II, Sampling, WeightBucket, WeightManifest
from ..contracts.sections import THINKING
from ..models.weight_proof import check_canary, copy_buckets
from ..models.weights import read_bucket
from .generated import REFUSED, Generated

VOCAB, EOS, CONTEXT = 256, 2, 4096


class FakeEngine:
    """Tokens, logprobs and length follow from the seed alone; the text is the ids, separated by spaces."""

    def __init__(
        self, model: str, *, dtype: str, device: str = "cpu", threads: int = 1, lora: Lora | None = None
    ) -> None:
        if dtype not in ("fp32", "bf16") or threads < 1 or not device:
            raise RecordError("an engine is given a dtype, a device and threads", f"{dtype}, {device!r}, {threads}")
        self.model = model
        self.weight_version, self.context = 0, CONTEXT
        self._names: set[str] = set()

    def generate(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling) -> list[Generated]:
        if len(seeds) != len(prompts) or len(set(seeds)) != len(seeds):
            raise RecordError("every prompt has a seed of its own", f"{len(prompts)} prompts, seeds {list(seeds)}")
        if any(prompt.dtype != np.int32 or prompt.ndim != 1 for prompt in prompts):
            raise RecordError("prompts are int32 [P]", str([(p.dtype, p.shape) for p in prompts]))
        if sampling.max_new_tokens < 1 or sampling.temperature < 0 or sampling.topk_support < 0:
            raise RecordError("sampling is possible", str(sampling))
        return [self._respond(p, seed, sampling) for p, seed in zip(prompts, seeds, strict=True)]

    def decode(self, token_ids: np.ndarray, thinking: tuple[str, str] = THINKING) -> str:
        return " ".join(str(i) for i in token_ids.tolist() if i != EOS)

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Every check of a real engine but the canary's forward: there is no model to run."""
        received = list(buckets)
        parameters = {name: tensor.clone() for bucket in received for name, tensor in read_bucket(bucket)}
        copy_buckets(parameters, received, manifest)
        if self._names and set(parameters) != self._names:
            raise WeightsMismatch("versions have one set of names", str(sorted(set(parameters) ^ self._names)))
        if len(manifest.canary_ids) != len(manifest.canary_logprobs) + 1 or manifest.canary_ids.dtype != np.int32:
            raise WeightsMismatch("a canary is int32 [C] with C-1 logprobs", str(manifest.canary_ids.shape))
        check_canary(manifest.canary_logprobs, manifest)
        self._names, self.weight_version = set(parameters), manifest.version

    def _respond(self, prompt: np.ndarray, seed: int, sampling: Sampling) -> Generated:
        room = min(sampling.max_new_tokens, CONTEXT - len(prompt))
        if room < 1 or not len(prompt):
            return REFUSED
        random = np.random.Generator(np.random.Philox(key=seed))
        length = int(random.integers(1, room + 2))  # one more than the room: cut off
        tokens = random.integers(EOS + 1, VOCAB, min(length, room), dtype=np.int32)
        if length <= room:
            tokens[-1] = EOS
        logprobs = -random.random(len(tokens), np.float32)
        support = EMPTY_II
        if sampling.topk_support:
            support = np.stack([random.permutation(VOCAB)[: sampling.topk_support] for _ in tokens]).astype(np.int32)
        versions = np.full(len(tokens), self.weight_version, np.int32)
        return Generated(tokens, logprobs, support, "stop" if length <= room else "length", versions)
