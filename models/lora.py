"""Low-rank adapters (LoRA, Hu et al. 2106.09685) on a causal language model: W is run as W + (alpha / rank) · B · A.

The learner trains base and adapter side by side. Everyone else runs them merged, since an adapter beside each matrix
slows decoding (by a third on the lab, docs/methods.md). In bfloat16 the two differ by the rounding of merged matrices,
and are equally near to the exact model; the canary that proves a replica is therefore computed merged on both sides.
peft makes the adapters and names them, and its format is the one they are exported in.

Shapes: a matrix W `[out, in]`, its factors A `[rank, in]` and B `[out, rank]`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..contracts.config import Lora
from ..contracts.errors import ConfigError
from .loading import load_config

LORA_A, LORA_B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
PEFT_PREFIX = "base_model.model."


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Put adapters into `model`, in place, and freeze everything else. They change nothing yet: B is zero.

    A is drawn from `seed` on the CPU, as peft draws it, so that all ranks hold the same on whatever device. Raises
    ConfigError as `check_targets` does.
    """
    from peft import LoraConfig, inject_adapter_in_model  # imported here: only a run with adapters pays for it

    _check_targets(model, lora)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    inject_adapter_in_model(settings, model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LORA_A):
                drawn = torch.empty(parameter.shape)
                torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)


def check_targets(model: str, lora: Lora) -> None:
    """Refuse targets that the model at `model` does not have, without loading it. Raises ConfigError, ModelError."""
    with torch.device("meta"):
        _check_targets(AutoModelForCausalLM.from_config(load_config(model)), lora)


def _check_targets(model: PreTrainedModel, lora: Lora) -> None:
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    known = f"{type(model).__name__} has {', '.join(sorted(linear)) or 'none'}"
    if not linear:
        raise ConfigError("student.lora needs Linear layers besides the head", known, "train without student.lora")
    for target in [] if isinstance(lora.targets, str) else lora.targets:
        found = [m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not found or not all(isinstance(module, torch.nn.Linear) and module is not head for module in found):
            raise ConfigError("student.lora.targets are names of Linear layers, the head's left out", target, known)


def merged_weights(tensors: Mapping[str, torch.Tensor], lora: Lora) -> dict[str, torch.Tensor]:
    """The plain model's parameters from those of a model with adapters, both by name; computed in float32 or wider."""
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, base, kind = name.rpartition(BASE)
        if base and layer + LORA_A in tensors and kind == "weight":
            tensor = _merge(tensor, tensors[layer + LORA_A], tensors[layer + LORA_B], lora.alpha / lora.rank)
        if not name.endswith((LORA_A, LORA_B)):
            merged[name.replace(BASE, ".")] = tensor
    return merged


def merge_adapters(
    base: Iterable[tuple[str, torch.Tensor]], adapters: Mapping[str, torch.Tensor], lora: Lora
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a plain checkpoint, those that have an adapter merged with it, on the adapter's terms."""
    for name, tensor in base:
        layer = name.removesuffix(".weight")
        if layer + LORA_A in adapters:
            tensor = _merge(tensor, adapters[layer + LORA_A], adapters[layer + LORA_B], lora.alpha / lora.rank)
        yield name, tensor


def _merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scaling * (b.to(wide) @ a.to(wide))).to(weight.dtype)


@contextmanager
def run_merged(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` runs its adapters, if it has any, as `ReplicaWeights` does: merged. Not for gradients.

    The three matrices of a layer come out of their own modules' calls, where ZeRO-3 gathers them.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    patched: list[Any] = []
    try:
        for layer in layers:
            parts = [layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]]
            for part in parts:
                part.forward = partial(_lend_weight, part)
            layer.forward = partial(_run_layer_merged, parts, layer.scaling["default"])
            patched += [*parts, layer]
        yield
    finally:
        for module in patched:
            del module.forward  # the class's own shows again


def _lend_weight(part: torch.nn.Linear, _: torch.Tensor) -> torch.Tensor:
    return part.weight.clone()


def _run_layer_merged(parts: list[torch.nn.Linear], scaling: float, x: torch.Tensor) -> torch.Tensor:
    weight, a, b = (part(x) for part in parts)
    return F.linear(x, _merge(weight, a, b, scaling), parts[0].bias)


def peft_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters among `tensors` under the names of peft's own files."""
    return {
        PEFT_PREFIX + name.replace(".default.", "."): tensor
        for name, tensor in tensors.items()
        if name.endswith((LORA_A, LORA_B))
    }


class ReplicaWeights:
    """What a replica takes from the learner: `parameters` by published name, and `apply` to bring them into effect.

    Without adapters these are the model's own parameters, which leave out a head tied to the embedding, as the learner
    does. With adapters they are A and B, the model stays plain, and `apply` merges them into it; the matrices as they
    were loaded are kept beside it, so that every version is merged into the same ones.
    """

    def __init__(self, model: PreTrainedModel, lora: Lora | None) -> None:
        self.scaling = lora.alpha / lora.rank if lora else 0.0
        self.parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        self._layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # name → as it runs, as it was loaded
        if lora:
            self._take_out_adapters(model, lora)

    def _take_out_adapters(self, model: Any, lora: Lora) -> None:
        """Have peft name and shape the adapters, then leave the model as it was."""
        add_adapters(model, lora, seed=0)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name in [name.removesuffix(LORA_A) for name in self.parameters if name.endswith(LORA_A)]:
            base = model.get_submodule(name).base_layer
            model.set_submodule(name, base)
            self._layers[name] = base.weight, base.weight.detach().clone()
        model.requires_grad_(False)

    @torch.no_grad()
    def apply(self) -> None:
        """The model runs `parameters` from now on."""
        for name, (weight, loaded) in self._layers.items():
            a, b = self.parameters[name + LORA_A], self.parameters[name + LORA_B]
            weight.copy_(_merge(loaded, a, b, self.scaling))
