"""Other architectures than Qwen3, each by the whole way: sampled, scored, trained, published, proven and exported.

The reference is a plain transformers model in float64 that reads one sequence at a time.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import (
    ARCHITECTURES,
    CONTEXT,
    EXPERTS,
    SIZES,
    VOCAB,
    WINDOW,
    Learner,
    exactly,
    reference_loss,
    response_logprobs,
    save_small,
    small_model,
)
from safetensors.torch import load_file
from service_rows import fresh_random, random_prompts
from transformers import AutoConfig, AutoModelForCausalLM

from tutorloop.actors.worker import RolloutWorker
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ModelError
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling, ScoreRequest
from tutorloop.models.checkpoint import check_weights, load_lm_head
from tutorloop.models.checkpoint_names import CheckpointNames
from tutorloop.models.loading import check_architecture, load_causal_lm
from tutorloop.models.vllm_support import check_vllm_architecture
from tutorloop.teacher_service.transformers_engine import TransformersTeacher

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def student(architecture, tmp_path_factory) -> str:
    return save_small(tmp_path_factory.mktemp("student"), architecture, seed=1)


@pytest.fixture(scope="module")
def teacher(architecture, tmp_path_factory) -> str:
    return save_small(tmp_path_factory.mktemp("teacher"), architecture, seed=2)


@pytest.fixture(scope="module")
def worker(student) -> RolloutWorker:
    return RolloutWorker(engine="transformers", model=student, dtype="fp32")


@pytest.fixture(scope="module")
def rollouts(worker) -> list[Rollout]:
    """Three of each of seven prompts, in one left-padded batch; most are longer than the sliding window."""
    random = fresh_random()
    ids = random_prompts(random, [1, 5, WINDOW - 1, WINDOW + 1, 40, 41, CONTEXT - 8])
    prompts = [
        Prompt(prompt_id=str(i), text="", token_ids=own, answer="", teacher="teacher") for i, own in enumerate(ids)
    ]
    requests = tuple(
        SampleRequest(
            rollout_id=f"{row}-{i}", group_id=str(row), sample_index=i, row=row, seed=int(random.integers(2**62))
        )
        for row in range(len(prompts))
        for i in range(3)
    )
    batch, receipt = worker.generate(encode(Prompt, prompts), requests, Sampling(max_new_tokens=32))
    assert receipt.errors == {}
    return decode(Rollout, batch)


def scored(teacher, rollouts, signal):
    engine = TransformersTeacher(
        teacher, teacher_id="teacher", dtype="fp32", device="cpu", threads=1, tokens_per_batch=400
    )
    return engine.score(rollouts, ScoreRequest(signal=signal, top_k=8 if signal == "topk" else 0))


@torch.no_grad()
def test_what_is_sampled_has_the_models_logprobs(student, rollouts):
    model = exactly(student)
    assert sum(len(rollout.token_ids) > 2 * WINDOW for rollout in rollouts) >= 9
    for rollout in rollouts:
        logprobs, ids = response_logprobs(model, rollout)
        np.testing.assert_allclose(rollout.logprobs, logprobs.gather(1, ids[:, None])[:, 0], atol=1e-4)


@pytest.mark.parametrize("signal", ["topk", "hidden"])
@torch.no_grad()
def test_a_teacher_scores_as_the_plain_model(teacher, rollouts, signal):
    model, head = exactly(teacher), load_lm_head(teacher)
    for rollout, scores in zip(rollouts, scored(teacher, rollouts, signal), strict=True):
        logprobs, ids = response_logprobs(model, rollout)
        np.testing.assert_allclose(scores.logprobs, logprobs.gather(1, ids[:, None])[:, 0], atol=1e-4)
        if signal == "topk":
            np.testing.assert_allclose(scores.topk_logprobs, logprobs.topk(8, 1).values, atol=1e-4)
            np.testing.assert_allclose(scores.entropy, -(logprobs.exp() * logprobs).sum(1), atol=1e-4)
        else:
            ours = (torch.from_numpy(scores.hidden) @ head.T).log_softmax(1)
            np.testing.assert_allclose(ours, logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def learner(student, teacher, rollouts) -> Learner:
    """After one step."""
    learner = Learner(student, teacher)
    learner.train(rollouts, scored(teacher, rollouts, "hidden"), fresh_random())
    return learner


def test_a_step_has_the_gradients_of_a_dense_loss(student, teacher, rollouts, learner):
    model = exactly(student)
    loss = reference_loss(model, exactly(teacher), rollouts)
    loss.backward()
    assert learner.report.tokens == sum(rollout.response_length for rollout in rollouts)
    np.testing.assert_allclose(learner.report.loss, loss.item(), rtol=1e-5)
    found = dict(zip(learner.parameters, learner.engine.gradients[0], strict=True))
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        off = (found[name].double() - gradient).abs().max() / gradient.abs().max()
        assert off < 1e-4, (name, off)


def test_a_published_version_is_taken_and_proven(student, learner, rollouts):
    fresh = RolloutWorker(engine="transformers", model=student, dtype="fp32")
    *buckets, manifest = learner.publish(3)
    fresh.load_weights(manifest, *buckets)
    assert fresh.engine.weight_version == 3
    own = dict(fresh.engine.model.named_parameters())
    assert own.keys() == learner.parameters.keys()
    before = dict(load_causal_lm(student).named_parameters())
    for name, p in learner.parameters.items():
        assert torch.equal(own[name], p) and not torch.equal(own[name], before[name]), name


@torch.no_grad()
def test_an_export_is_the_trained_model_under_its_checkpoints_names(student, learner, tmp_path):
    learner.export(str(tmp_path / "final"))
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = dict(model.named_parameters())
    assert own.keys() == learner.parameters.keys()
    for name, p in learner.parameters.items():
        assert torch.equal(own[name], p), name
    stored, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "final", Path(student)))
    assert {name: t.shape for name, t in stored.items()} == {name: t.shape for name, t in first.items()}


# ---- names -----------------------------------------------------------------------------------------------------------


def renamed(name: str, model) -> list[tuple[str, torch.Tensor]]:
    names = CheckpointNames(name)
    return [stored for own, p in model.named_parameters() for stored in names.of(own, p.data)]


def test_parameters_become_what_transformers_saves(architecture, student, tmp_path):
    model = load_causal_lm(student)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = renamed(student, model)
    assert len(found) == len(saved) and dict(found).keys() == saved.keys()
    for name, tensor in found:
        assert tensor.dtype == saved[name].dtype and torch.equal(tensor, saved[name]), name
    held = {p.data_ptr() for p in model.parameters()}
    copied = [name for name, tensor in found if tensor.data_ptr() not in held and ".experts." not in name]
    assert copied == []
    if architecture == "qwen3_moe":
        assert "model.layers.1.mlp.experts.5.gate_proj.weight" in saved
        assert len(found) == len(list(model.parameters())) - 2 * 2 + 2 * 3 * EXPERTS


def test_a_folder_that_holds_the_modules_names_keeps_them(tmp_path):
    small_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    saved = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in saved
    model = load_causal_lm(str(tmp_path))
    assert {name: t.data_ptr() for name, t in renamed(str(tmp_path), model)} == {
        name: p.data_ptr() for name, p in model.named_parameters()
    }


def test_parameters_that_are_stored_as_one_wait_for_each_other(tmp_path):
    """HRM's checkpoints hold the gate and the projections of attention as one tensor, and so those of its MLP."""
    config = AutoConfig.for_model("hrm_text", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    model = load_causal_lm(str(tmp_path))
    parameters = list(model.named_parameters())
    assert len(saved) < len(parameters)
    names, found = CheckpointNames(str(tmp_path)), {}
    for i in fresh_random().permutation(len(parameters)).tolist():
        name, p = parameters[i]
        found |= names.of(name, p.data)
    assert found.keys() == saved.keys() and all(torch.equal(t, saved[name]) for name, t in found.items())


@torch.no_grad()
def test_an_export_holds_what_is_no_parameter(tmp_path):
    """GLM-4's router adds a bias that balances the experts and that no gradient reaches."""
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **SIZES, **own))
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(key).copy_(torch.tensor([0.1, -0.3, 0.2, 0.5]))
    model.save_pretrained(tmp_path / "student")
    student = str(tmp_path / "student")
    Learner(student, student).export(str(tmp_path / "final"))
    stored, first = (load_file(tmp_path / folder / "model.safetensors") for folder in ("final", "student"))
    assert key in stored and stored.keys() == first.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in first.items())


# ---- what is refused -------------------------------------------------------------------------------------------------


def write_config(folder: Path, architecture: str, **fields) -> str:
    """A folder whose model would be refused before a weight is read: it holds none."""
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, **fields)
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return str(folder)


def test_the_small_models_are_let_through(student):
    check_architecture(student)
    check_weights(student)


@pytest.mark.parametrize(
    ("architecture", "fields", "reason"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "Gemma3ForCausalLM with final_logit_softcapping=30.0"),
        ("cohere", {"logit_scale": 0.0625}, "CohereForCausalLM with logit_scale=0.0625"),
        ("granite", {"logits_scaling": 8.0}, "GraniteForCausalLM with logits_scaling=8.0"),
        ("gemma2", {}, "Gemma2ForCausalLM .*attn_logit_softcapping"),
        ("phi", {}, "PhiForCausalLM has Linear.*bias=True"),
        ("gpt_oss", {}, "GptOssForCausalLM has attention sinks"),
        ("qwen3_next", {}, "Qwen3NextForCausalLM keeps a state"),
        ("llama4_text", {}, "Llama4ForCausalLM has layers of chunked_attention"),
        ("bloom", {}, "BloomForCausalLM does not let its attention be replaced"),
        ("t5", {}, "t5.*Unrecognized configuration class"),
    ],
)
def test_what_would_run_otherwise_than_it_was_made_is_refused_by_name(architecture, fields, reason, tmp_path):
    with pytest.raises(ModelError, match=f"(?s){reason}"):
        check_architecture(write_config(tmp_path, architecture, **fields))


def test_an_architecture_that_nobody_has_is_refused_by_name(tmp_path):
    write_config(tmp_path, "llama")
    (tmp_path / "config.json").write_text('{"model_type": "nope", "architectures": ["NopeForCausalLM"]}')
    with pytest.raises(ModelError, match="NopeForCausalLM"):
        check_architecture(str(tmp_path))


def test_a_scale_of_one_changes_nothing(tmp_path):
    check_architecture(write_config(tmp_path, "granite", logits_scaling=1.0))


def test_without_vllm_its_engine_is_refused(tmp_path, monkeypatch):
    name = "vllm.model_executor.models.registry"
    monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(ModelError, match="install vllm"):
        check_vllm_architecture(write_config(tmp_path, "llama"))
