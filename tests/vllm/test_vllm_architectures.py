"""Other architectures than Qwen3 under vLLM: it samples, scores, takes what is trained here, and loads the export."""

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import (
    ARCHITECTURES,
    CONTEXT,
    WINDOW,
    Learner,
    exactly,
    reference_loss,
    response_logprobs,
    save_small,
)
from service_rows import fresh_random, random_prompts
from tiny import tiny_tokenizer

from tutorloop.actors.worker import RolloutWorker
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ModelError
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling, ScoreRequest
from tutorloop.models.vllm_support import check_vllm_architecture
from tutorloop.teacher_service.vllm_engine import VllmTeacher

LENGTHS = [1, 5, WINDOW - 1, WINDOW + 1, 40, 41, CONTEXT - 30]  # prompts; with a response less than the context


def sampled(worker: RolloutWorker, random) -> list[Rollout]:
    """Two of each of seven prompts, most of them longer than the sliding window."""
    prompts = [
        Prompt(prompt_id=str(i), text="", token_ids=ids, answer="", teacher="teacher")
        for i, ids in enumerate(random_prompts(random, LENGTHS))
    ]
    requests = tuple(
        SampleRequest(
            rollout_id=f"{row}-{i}", group_id=str(row), sample_index=i, row=row, seed=int(random.integers(2**62))
        )
        for row in range(len(prompts))
        for i in range(2)
    )
    batch, receipt = worker.generate(encode(Prompt, prompts), requests, Sampling(max_new_tokens=24))
    assert receipt.errors == {}
    return decode(Rollout, batch)


@torch.no_grad()
def check_sampled(rollouts, model) -> None:
    for rollout in rollouts:
        logprobs, ids = response_logprobs(model, rollout)
        np.testing.assert_allclose(rollout.logprobs, logprobs.gather(1, ids[:, None])[:, 0], atol=1e-4)


@torch.no_grad()
def check_scored(name: str, rollouts, model) -> None:
    engine = VllmTeacher(name, teacher_id="teacher", dtype="fp32", tokens_per_batch=400)
    try:
        for rollout, scores in zip(rollouts, engine.score(rollouts, ScoreRequest(signal="topk", top_k=8)), strict=True):
            logprobs, ids = response_logprobs(model, rollout)
            np.testing.assert_allclose(scores.logprobs, logprobs.gather(1, ids[:, None])[:, 0], atol=1e-4)
            np.testing.assert_allclose(scores.topk_logprobs, logprobs.topk(8, 1).values, atol=1e-4)
    finally:
        engine.host.close()


# The one that is left has experts, which are stored and sent in a way of their own.
SWEPT = ("llama", "mistral", "gemma3_text")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[pytest.mark.sweep] if name in SWEPT else [])
        for name in ARCHITECTURES
        if name != "qwen3"
    ],
)
def test_an_architecture_goes_the_whole_way(architecture, tmp_path):
    random = fresh_random()
    student = save_small(tmp_path / "student", architecture, seed=1)
    teacher = save_small(tmp_path / "teacher", architecture, seed=2)
    check_vllm_architecture(student)
    worker = RolloutWorker(engine="vllm", model=student, dtype="fp32")
    rollouts = sampled(worker, random)
    check_sampled(rollouts, exactly(student))

    engine = VllmTeacher(teacher, teacher_id="teacher", dtype="fp32", tokens_per_batch=400, hidden=True)
    scores = engine.score(rollouts, ScoreRequest(signal="hidden"))
    engine.host.close()
    learner = Learner(student, teacher)
    learner.train(rollouts, scores, random)
    loss = reference_loss(exactly(student), exactly(teacher), rollouts)
    np.testing.assert_allclose(learner.report.loss, loss.item(), rtol=1e-4)

    final = str(tmp_path / "final")
    learner.export(final)
    versions = learner.publish(1), Learner(student, teacher).publish(2), learner.publish(3)  # there, back, and there
    for version, (*buckets, manifest) in enumerate(versions, 1):
        worker.load_weights(manifest, *buckets)
        again = sampled(worker, random)
        check_sampled(again, exactly(student if version == 2 else final))
        assert {v for rollout in again for v in rollout.weight_versions.tolist()} == {version}
    worker.engine.host.close()
    check_scored(final, rollouts, exactly(final))


def test_heads_that_cannot_be_split_are_counted():
    check_vllm_architecture("lab:student", 3)
    with pytest.raises(ModelError, match="3 heads into 2"):
        check_vllm_architecture("lab:student", 2)


def test_what_vllm_lacks_is_refused_by_name(tmp_path):
    from transformers import BigBirdConfig, BigBirdForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = BigBirdForCausalLM(BigBirdConfig(**sizes, num_attention_heads=2, is_decoder=True))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BigBirdForCausalLM"):
        check_vllm_architecture(str(tmp_path))
    config = Path(tmp_path / "config.json")
    config.write_text(config.read_text().replace("BigBirdForCausalLM", "NopeForCausalLM"))
    with pytest.raises(ModelError, match="NopeForCausalLM"):
        check_vllm_architecture(str(tmp_path))
