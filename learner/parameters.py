"""Whole parameters out of a sharded engine: those that train published as buckets, all exported as a model folder.

Every rank walks the parameters in the same order. Under ZeRO-3 that gathers them group by group, so the whole model is
never in memory at once; under the other stages each rank has them whole.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..contracts.config import Lora
from ..contracts.errors import BroadcastBroken, ModelError
from ..contracts.records import BucketEntries, WeightBucket, WeightManifest
from ..models.checkpoint_names import CheckpointNames
from ..models.loading import eos_ids, load_tokenizer
from ..models.logits import token_logprobs
from ..models.lora import merged_weights, peft_weights, run_merged
from ..models.weight_broadcast import BroadcastGroup
from ..models.weight_proof import canary_gaps
from ..models.weights import BUCKET_BYTES, NAMES, BucketWriter

CANARY_TOKENS = 32  # at least
CANARY_MOST = 2048  # tokens: a forward of that length at every publication
CANARY_LOGITS = 2**29  # bytes of float32 [C, V]: some engines hold the whole canary's logits at once
CANARY_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # nats, at least
# Or so many times what rounding moves: vLLM's kernels on CPUs were five times as far from float64 as transformers'.
CANARY_ROUNDINGS = {"fp32": 8.0, "bf16": 2.0}
MEASURED_EVERY = 8  # publications

# Fields of a student's config.json that say nothing of an export: its files, its code (which never ran), its old dtype.
NOT_EXPORTED = ("transformers_weights", "auto_map", "torch_dtype")


def whole_parameters(engine: Any, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Each parameter once, whole, by the name that the transformers model gives it. All ranks must iterate."""
    for group in _groups(_trained(engine) if trained_only else _named(engine)):
        with _gathered(engine, [p for _, p in group]):
            for name, p in group:
                yield name, p.data


def _named(engine: Any) -> list[tuple[str, Any]]:
    return [(name.removeprefix("model."), p) for name, p in engine.module.named_parameters()]


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in _named(engine) if p.requires_grad]


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


def bucket_layout(engine: Any) -> tuple[BucketEntries, ...]:
    """What `broadcast_weights` sends: the entries of each bucket. Nothing is gathered for it."""
    layout = []
    for group in _groups(_trained(engine)):
        entries, offset = [], 0
        for name, p in group:
            shape = tuple(getattr(p, "ds_shape", p.shape))
            entries.append((name, NAMES[p.dtype], shape, offset))
            offset += p.element_size() * torch.Size(shape).numel()
        layout.append(tuple(entries))
    return tuple(layout)


def broadcast_weights(engine: Any, group: BroadcastGroup | None) -> None:
    """Send every bucket of the layout through `group`, rank 0's. The other ranks take part in gathering alone, and so
    does rank 0 once the group is broken: none waits for another. Raises BroadcastBroken at the end."""
    failed: BroadcastBroken | None = None
    for parameters in _groups(_trained(engine)):
        with _gathered(engine, [p for _, p in parameters]):
            if group and not failed:
                try:
                    group.broadcast(torch.cat([p.data.reshape(-1).view(torch.uint8) for _, p in parameters]))
                except BroadcastBroken as error:
                    failed = error
    if failed:
        raise failed


class Rounding:
    """How far rounding moves a model's canary, nats: measured at one publication of MEASURED_EVERY, for weights change
    little between two, and what is allowed is several times as much."""

    def __init__(self) -> None:
        self._value, self._publications = 0.0, 0

    def of(self, measure: Callable[[], float]) -> float:
        if self._publications % MEASURED_EVERY == 0:
            self._value = measure()
        self._publications += 1
        return self._value


def announce_weights(
    engine: Any, version: int, dtype: str, longest: int = 0, rounding: Rounding | None = None
) -> WeightManifest:
    """The manifest of weights that are to be broadcast: the canary proves them alone. All ranks take part."""
    canary = _canary(engine, dtype, longest, rounding or Rounding())
    return WeightManifest(version=version, buckets=0, fingerprint="", **canary)


def publish_weights(
    engine: Any, version: int, rank: int, dtype: str, longest: int = 0, rounding: Rounding | None = None
) -> Iterator[WeightBucket | WeightManifest]:
    """Rank 0 yields buckets and then their manifest; the others take part and yield nothing. `longest`: of the run's
    sequences, in tokens. `rounding`: what the publications of one model share."""
    canary = _canary(engine, dtype, longest, rounding or Rounding())
    writer = BucketWriter(version)
    for name, parameter in whole_parameters(engine, trained_only=True):
        if rank == 0:
            yield from writer.add(name, parameter)
    if rank != 0:
        return
    yield from writer.flush()
    yield WeightManifest(version=version, buckets=writer.buckets, fingerprint=writer.fingerprint, **canary)


def canary_tokens(longest: int, vocab: int) -> int:
    """The canary's length of a run whose longest sequence has `longest` tokens."""
    return max(CANARY_TOKENS, min(longest, CANARY_MOST, CANARY_LOGITS // (4 * vocab)))


@torch.no_grad()
def _canary(engine: Any, dtype: str, longest: int, rounding: Rounding) -> dict[str, Any]:
    """Of a manifest: a fixed prompt, spread over the vocabulary, the log-probability of each of its next tokens, and
    how far another engine's may be from it.

    It is as long as the longest sequence of the run, as far as the two bounds above allow: angles of far positions, a
    window, a second set of frequencies show there alone. How much rounding moves its logprobs is a matter of the model
    (a deep or a sharp one makes more of it), so that is measured: the prompt is read a second time with each matrix's
    product off by one unit in the last place.
    """
    config = engine.module.model.config
    vocab, tokens = config.vocab_size, canary_tokens(longest, config.vocab_size)
    ids = torch.arange(tokens, device=engine.device) * 7919 % vocab
    rows = torch.arange(tokens - 1, device=engine.device)
    lengths = torch.tensor([tokens], device=engine.device)

    def read() -> np.ndarray:
        with run_merged(engine.module):
            logprobs = engine(ids, lengths, rows, lambda hidden, head: token_logprobs(hidden, head, ids[1:]))
        return logprobs.float().cpu().numpy()

    logprobs = read()

    def moved() -> float:
        with _rounded_otherwise(engine.module):
            return float(canary_gaps(read(), logprobs).max())

    return {
        "canary_ids": ids.int().cpu().numpy(),
        "canary_logprobs": logprobs,
        "tolerance": max(CANARY_TOLERANCE[dtype], CANARY_ROUNDINGS[dtype] * rounding.of(moved)),
    }


@contextmanager
def _rounded_otherwise(model: torch.nn.Module) -> Iterator[None]:
    """Inside, what each linear layer gives is off by one unit in the last place, up or down by a fixed draw."""
    generators: dict[torch.device, torch.Generator] = {}

    def shift(_layer: Any, _inputs: Any, out: Tensor) -> Tensor:
        random = generators.setdefault(out.device, torch.Generator(out.device).manual_seed(0))
        signs = 2 * torch.randint(0, 2, out.shape, generator=random, device=out.device) - 1
        return out * (1 + torch.finfo(out.dtype).eps * signs).to(out.dtype)

    hooks = [layer.register_forward_hook(shift) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def export_model(engine: Any, student: Path, folder: Path, rank: int, lora: Lora | None) -> None:
    """A folder that transformers loads as it is; configuration, tokenizer and tensors' names are those of `student`.

    With adapters they are merged into it, and `folder`/adapter holds them alone, as peft loads them on `student`.
    """
    gathered = engine.zero_optimization_stage() == 3  # and gone after their turn
    whole = whole_parameters(engine, trained_only=False)
    tensors = {name: p.detach().to("cpu", copy=gathered) for name, p in whole if rank == 0}
    if rank != 0:
        return
    buffers = {name for name, _ in engine.module.named_buffers()}  # those that are saved stand in the state too
    state = engine.module.state_dict().items()
    tensors |= {name.removeprefix("model."): b.detach().cpu() for name, b in state if name in buffers}
    folder.mkdir(parents=True, exist_ok=True)
    if lora:
        _export_adapter(engine.module.model.peft_config["default"], tensors, folder / "adapter")
        tensors = merged_weights(tensors, lora)
    names = CheckpointNames(str(student))
    tensors = dict(stored for name, tensor in tensors.items() for stored in names.of(name, tensor))
    _save(tensors, folder / "model.safetensors")
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"):
        for source in student.glob(pattern):
            if not source.name.endswith(".index.json"):
                shutil.copyfile(source, folder / source.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for field in NOT_EXPORTED:
        config.pop(field, None)
    export_ends(student, folder)
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """As any new file is written; safetensors gives its files to their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def export_ends(student: Path, folder: Path) -> None:
    """transformers' own `generate` stops where the run's responses stopped. A student without a tokenizer has none."""
    try:
        ends = eos_ids(str(student), load_tokenizer(str(student)))
    except ModelError:
        return
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = settings.get("eos_token_id")
    if ends and set(own if isinstance(own, list) else [own]) != set(ends):
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _export_adapter(settings: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    _save(peft_weights(tensors), folder / "adapter_model.safetensors")
    written = copy.copy(settings)
    written.inference_mode = True
    written.save_pretrained(str(folder))
