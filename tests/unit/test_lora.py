"""Adapters: where they go, that they alone are published, and that merged, exported and followed they are one model.

The references are peft's own loader, and W + alpha/rank · B·A in float64 inside a plain transformers model.
"""

import json
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_cases import LORA, Unsharded, exact, published, trained
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_model, tiny_qwen3
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tutorloop.actors.worker import RolloutWorker
from tutorloop.contracts.config import Lora
from tutorloop.contracts.errors import ConfigError, WeightsMismatch
from tutorloop.learner.parameters import export_model
from tutorloop.models.loading import DTYPES, load_causal_lm
from tutorloop.models.lora import ReplicaWeights, add_adapters, check_targets, run_merged
from tutorloop.models.weights import read_bucket
from tutorloop.teacher_service.worker import TeacherWorker

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@torch.no_grad()
def logits(model, ids=None):
    ids = torch.arange(3, 43)[None] if ids is None else ids
    return model(ids, use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
def test_adapters_start_without_effect_and_alone_are_trained(architecture):
    model, plain = tiny_model(architecture), tiny_model(architecture)
    add_adapters(model, LORA, seed=1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * len(LINEAR) and all(".lora_" in name for name in names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == set(LINEAR)
    assert torch.equal(logits(model), logits(plain))
    again, other = tiny_model(architecture), tiny_model(architecture)
    torch.manual_seed(secrets.randbits(32))  # the seed alone decides
    add_adapters(again, LORA, seed=1)
    add_adapters(other, LORA, seed=2)
    mine, same, differing = (dict(m.named_parameters()) for m in (model, again, other))
    for name in names:
        bound = (1 / mine[name].shape[1]) ** 0.5  # of peft's draw: uniform in ±1/√in
        assert torch.equal(mine[name], same[name])
        if "lora_A" in name:
            assert not torch.equal(mine[name], differing[name])
            assert 0.9 * bound < float(mine[name].detach().abs().max()) <= bound
        else:
            assert not mine[name].any()


def size_of(buckets):
    return sum(array.nbytes for bucket in buckets for array in bucket.arrays)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_adapter_alone_is_published(qwen3, dtype):
    engine = Unsharded(qwen3, Lora(rank=3, alpha=6.0, targets=("q_proj", "down_proj")), dtype)
    buckets, manifest = published(engine, dtype=dtype)
    # two layers; q_proj 32 → 32, down_proj 64 → 32
    elements = 2 * (3 * (32 + 32) + 3 * (64 + 32))
    assert size_of(buckets) == elements * DTYPES[dtype].itemsize
    found = [name for bucket in buckets for name, _ in read_bucket(bucket)]
    assert found == [
        f"model.layers.{i}.{layer}.lora_{factor}.default.weight"
        for i in range(2)
        for layer in ("self_attn.q_proj", "mlp.down_proj")
        for factor in "AB"
    ]
    whole, _ = published(Unsharded(qwen3, None, dtype), dtype=dtype)
    assert size_of(whole) > 10 * size_of(buckets)
    assert manifest.buckets == 1


def with_biases(folder: Path) -> str:
    """A tiny Llama whose attention's projections have biases."""
    settings = tiny_model("llama").config
    settings.attention_bias = True
    model = LlamaForCausalLM(settings)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["untied", "tied", "biased"])
@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "up_proj")])
def test_an_export_is_merged_and_its_adapter_is_pefts(tmp_path, kind, targets):
    student = tmp_path / "student"
    name = with_biases(student) if kind == "biased" else tiny_qwen3(student, tied=kind == "tied")
    lora = Lora(rank=3, alpha=7.0, targets=targets)
    engine = Unsharded(name, lora)
    expected = logits(exact(name, trained(engine), lora))
    export_model(engine, Path(name), tmp_path / "final", 0, lora)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert not [key for key, _ in merged.named_parameters() if "lora" in key]
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (Path(name), tmp_path / "final"))
    assert before == after
    base = AutoModelForCausalLM.from_pretrained(name)
    own = load_file(tmp_path / "final" / "adapter" / "adapter_model.safetensors")
    beside = PeftModel.from_pretrained(base, str(tmp_path / "final" / "adapter"))
    found = {key for key, _ in beside.named_parameters() if "lora_" in key}
    assert {key.replace(".default.", ".") for key in found} == set(own)
    for model in (merged, beside):
        ours = logits(model.double()).log_softmax(-1)  # so that the weights' float32 alone is measured
        np.testing.assert_allclose(ours, expected.log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_canary_runs_is_what_replicas_run(tmp_path, dtype):
    name = with_biases(tmp_path / "student")
    engine = Unsharded(name, LORA, dtype)
    adapters = trained(engine)
    expected = logits(exact(name, adapters, LORA))
    model = load_causal_lm(name, dtype)
    plain = logits(model)
    weights = ReplicaWeights(model, LORA)
    assert torch.equal(logits(model), plain) and not [n for n, _ in model.named_parameters() if "lora" in n]
    for _ in range(2):  # a version is merged into the matrices as they were loaded, and not into the last one's
        for key, own in adapters.items():
            weights.parameters[key].data.copy_(own)
        weights.apply()
        if dtype == "fp32":
            np.testing.assert_allclose(logits(model), expected, atol=1e-4)
    side_by_side = engine.module.model
    side_by_side.set_attn_implementation("sdpa")
    side_by_side.lm_head = torch.nn.Identity()
    model.lm_head = torch.nn.Identity()
    with run_merged(side_by_side):
        assert torch.equal(logits(side_by_side), logits(model))
    apart = float((logits(side_by_side) - logits(model)).abs().max())
    assert apart > 0 and not any("forward" in vars(module) for module in side_by_side.modules())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_replica_takes_and_proves_adapters(tmp_path, tied, dtype):
    name = tiny_qwen3(tmp_path / "student", tied=tied)
    engine = Unsharded(name, LORA, dtype)
    worker = RolloutWorker(engine="transformers", model=name, dtype=dtype, lora=LORA)
    for version in (0, 1, 2):
        buckets, manifest = published(engine, version, dtype)
        worker.load_weights(manifest, *buckets)
        expected = logits(exact(name, trained(engine), LORA))
    buckets, manifest = published(engine, 3, dtype)
    worker.load_weights(manifest, *buckets)
    assert worker.engine.weight_version == 3
    if dtype == "fp32":
        np.testing.assert_allclose(logits(worker.engine.model), expected, atol=1e-4)
    RolloutWorker(engine="fake", model="none", dtype=dtype, lora=LORA).load_weights(manifest, *buckets)


def test_a_replica_of_another_base_or_scale_is_found(qwen3, tmp_path):
    engine = Unsharded(qwen3, LORA)
    trained(engine)
    buckets, manifest = published(engine)
    other = tiny_qwen3(tmp_path / "other", seed=1)
    halved = LORA.model_copy(update={"alpha": 3.5})
    for base, lora, rule in (
        (other, LORA, "canary"),
        (qwen3, halved, "canary"),
        (qwen3, None, "exists in the replica"),
        (qwen3, Lora(rank=4, alpha=7.0), "one shape"),
    ):
        worker = RolloutWorker(engine="transformers", model=base, dtype="fp32", lora=lora)
        with pytest.raises(WeightsMismatch, match=rule):
            worker.load_weights(manifest, *buckets)
    fewer = Lora(rank=3, alpha=7.0, targets=("q_proj",))
    buckets, manifest = published(Unsharded(qwen3, fewer))
    with pytest.raises(WeightsMismatch, match="every parameter is published"):
        RolloutWorker(engine="transformers", model=qwen3, dtype="fp32", lora=LORA).load_weights(manifest, *buckets)


@pytest.mark.parametrize("follows", ["live", "ema"])
def test_a_self_teacher_follows_the_factors(qwen3, tmp_path, follows):
    def teacher() -> TeacherWorker:
        return TeacherWorker(
            teacher_id="self",
            engine="transformers",
            model=qwen3,
            dtype="fp32",
            follows=follows,
            ema_decay=0.8,
            lora=LORA,
        )

    engine, worker = Unsharded(qwen3, LORA), teacher()
    average: dict[str, torch.Tensor] = {}
    for version in range(4):
        own = {name: p.detach().double() for name, p in trained(engine).items()}
        buckets, manifest = published(engine, version)
        worker.load_weights(manifest, *buckets)
        keep = 0.8 if follows == "ema" and average else 0.0
        average = {name: keep * average[name] + (1 - keep) * p if keep else p for name, p in own.items()}
        plain = dict(exact(qwen3, average, LORA).named_parameters())
        held = dict(worker.engine.model.named_parameters())
        assert held.keys() == plain.keys()
        for name, expected in plain.items():
            np.testing.assert_allclose(held[name].detach(), expected.detach(), atol=1e-5)
    if follows == "ema":
        worker.save_average(str(tmp_path / "average.safetensors"))
        assert set(load_file(tmp_path / "average.safetensors")) == set(average)
        resumed = teacher()
        resumed.load_average(str(tmp_path / "average.safetensors"))
        for name, held in worker.engine.model.named_parameters():
            assert torch.equal(held, resumed.engine.model.get_parameter(name))


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "input_layernorm", "self_attn", ""])
def test_targets_that_are_no_linear_layer_are_refused(qwen3, target):
    lora = Lora(targets=("q_proj", target))
    for attempt in (lambda: check_targets(qwen3, lora), lambda: add_adapters(tiny_model("qwen3"), lora, seed=0)):
        with pytest.raises(ConfigError, match="q_proj, up_proj") as refused:
            attempt()
        assert refused.value.found == target
    check_targets(qwen3, Lora(targets=("q_proj", "mlp.up_proj")))
    check_targets(qwen3, Lora())
