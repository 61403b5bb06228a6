"""Whole parameters out of a sharded engine: published as buckets, or exported as a model folder.

Every rank walks the parameters in the same order. Under ZeRO-3 that gathers them group by group, so the whole model is
never in memory at once; under the other stages each rank has them whole.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..contracts.records import WeightBucket, WeightManifest
from ..models.logits import token_logprobs
from ..models.weights import BUCKET_BYTES, BucketWriter

CANARY_TOKENS = 32
CANARY_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # nats


def whole_parameters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Each parameter once, whole, by the name that the plain transformers model gives it. All ranks must iterate."""
    named = [(name.removeprefix("model."), p) for name, p in engine.module.named_parameters()]
    for group in _groups(named):
        with _gathered(engine, [p for _, p in group]):
            for name, p in group:
                yield name, p.data


def _groups(named: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Neighbours of together about a bucket's bytes."""
    group, size = [], 0
    for name, p in named:
        group.append((name, p))
        size += getattr(p, "ds_numel", p.numel()) * p.element_size()
        if size >= BUCKET_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _gathered(engine: Any, parameters: list[Any]) -> Any:
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def publish_weights(engine: Any, version: int, rank: int, dtype: str) -> Iterator[WeightBucket | WeightManifest]:
    """Rank 0 yields buckets and then their manifest; the others take part and yield nothing."""
    canary_ids, canary_logprobs = _canary(engine)
    writer = BucketWriter(version)
    for name, parameter in whole_parameters(engine):
        if rank == 0:
            yield from writer.add(name, parameter)
    if rank != 0:
        return
    yield from writer.flush()
    yield WeightManifest(
        version=version,
        buckets=writer.buckets,
        fingerprint=writer.fingerprint,
        canary_ids=canary_ids,
        canary_logprobs=canary_logprobs,
        tolerance=CANARY_TOLERANCE[dtype],
    )


@torch.no_grad()
def _canary(engine: Any) -> tuple[np.ndarray, np.ndarray]:
    """A fixed prompt, spread over the vocabulary, and the log-probability of each of its next tokens."""
    vocab = engine.module.model.config.vocab_size
    ids = torch.arange(CANARY_TOKENS, device=engine.device) * 7919 % vocab
    rows = torch.arange(CANARY_TOKENS - 1, device=engine.device)
    lengths = torch.tensor([CANARY_TOKENS], device=engine.device)
    logprobs = engine(ids, lengths, rows, lambda hidden, head: token_logprobs(hidden, head, ids[1:]))
    return ids.int().cpu().numpy(), logprobs.float().cpu().numpy()


def export_model(engine: Any, student: Path, folder: Path, rank: int) -> None:
    """A folder that transformers loads as it is; the configuration and the tokenizer come from `student`."""
    tensors = {name: p.detach().cpu().clone() for name, p in whole_parameters(engine) if rank == 0}
    if rank != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model"):
        for source in student.glob(pattern):
            if not source.name.endswith(".index.json"):
                shutil.copyfile(source, folder / source.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
