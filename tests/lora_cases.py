"""A student with adapters for tests, without DeepSpeed: what it publishes, and the exact model that it stands for."""

import secrets
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tutorloop.contracts.config import Lora
from tutorloop.contracts.records import WeightManifest
from tutorloop.learner.loss_head import PackedStudent
from tutorloop.learner.parameters import publish_weights
from tutorloop.models.loading import load_causal_lm
from tutorloop.models.lora import add_adapters

LORA = Lora(rank=3, alpha=7.0)


class Unsharded:
    """What publishing and exporting use of a DeepSpeed engine that shards nothing (tests/ray has the real ones)."""

    def __init__(self, name: str, lora: Lora | None, dtype: str = "fp32") -> None:
        model = load_causal_lm(name, dtype, attention="packed")
        if lora:
            add_adapters(model, lora, seed=5)
        self.module, self.device = PackedStudent(model), "cpu"

    def __call__(self, *inputs):
        return self.module(*inputs)

    def zero_optimization_stage(self) -> int:
        return 0


def trained(engine: Unsharded, size: float = 0.2) -> dict[str, torch.Tensor]:
    """Draw all adapters anew, as if they had been trained; they, by name."""
    seed = secrets.randbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    own = {name.removeprefix("model."): p for name, p in engine.module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in own.values():
            p.copy_(torch.randn(p.shape, generator=generator) * size)
    return own


def published(engine: Unsharded, version: int = 1, dtype: str = "fp32"):
    *buckets, manifest = publish_weights(engine, version, 0, dtype)
    assert isinstance(manifest, WeightManifest)
    return buckets, manifest


def exact(name: str, adapters: dict[str, torch.Tensor], lora: Lora):
    """The plain model in float64 with W + alpha/rank · B·A written into it."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
    weights = dict(model.named_parameters())
    for key in [key for key in adapters if ".lora_A." in key]:
        a, b = adapters[key].double(), adapters[key.replace(".lora_A.", ".lora_B.")].double()
        layer = key.split(".lora_A.")[0]
        weights[f"{layer}.weight"].data += lora.alpha / lora.rank * (b @ a)
    return model


@torch.no_grad()
def check_export(base: Path, final: Path) -> None:
    """The merged model and peft's own reading of the adapter are one model, unlike the base."""
    ids = torch.arange(5, 45)[None]
    plain, merged = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).double() for f in (base, final))
    before = plain(ids).logits.log_softmax(-1)
    beside = PeftModel.from_pretrained(plain, str(final / "adapter")).double()
    with_adapter, after = (model(ids).logits.log_softmax(-1) for model in (beside, merged))
    np.testing.assert_allclose(after, with_adapter, atol=1e-5)
    assert float((after - before).abs().max()) > 1e-3
