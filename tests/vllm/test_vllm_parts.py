"""One engine for what may come together: a model split in two, adapters as its weights, a teacher that shares it."""

import re

import numpy as np
import psutil
import pytest
import torch
from lora_cases import LORA, Unsharded, exact, published, trained
from service_rows import dense, fresh_random, random_prompts, random_rollouts
from service_rows import published as whole
from tiny import tiny_qwen3

from tutorloop.actors.vllm_engine import VllmEngine
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ModelError, WeightsMismatch
from tutorloop.contracts.records import Rollout, Sampling, ScoreRequest, TeacherScores
from tutorloop.models import vllm_host
from tutorloop.models.loading import load_causal_lm
from tutorloop.teacher_service.worker import TeacherWorker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("split"), hidden=128)


@pytest.fixture(scope="module")
def engine(folder):
    engine = VllmEngine(folder, dtype="fp32", tensor_parallel=2, lora=LORA)
    yield engine
    engine.host.close()


def test_a_split_model_takes_adapters_and_scores_for_a_teacher_that_shares_it(engine, folder):
    random = fresh_random()
    teacher = TeacherWorker(teacher_id="self", engine="vllm", model=folder, dtype="fp32", shared=engine)
    student = Unsharded(folder, LORA)
    for version in range(3):
        buckets, manifest = published(student, version)
        assert {".lora_" in entry[0] for bucket in buckets for entry in bucket.entries} == {True}
        engine.load_weights(buckets, manifest)
        adapters = {name: own.detach().clone() for name, own in student.module.named_parameters() if own.requires_grad}
        plain = exact(folder, {name.removeprefix("model."): own for name, own in adapters.items()}, LORA)
        prompts = random_prompts(random, [1, 20, 7])
        for prompt, ours in zip(prompts, engine.generate(prompts, [1, 2, 3], Sampling(max_new_tokens=9)), strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, ours.token_ids]).astype(np.int64))
            with torch.no_grad():
                logprobs = plain(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            wanted = logprobs.gather(1, ids[len(prompt) :, None])[:, 0]
            np.testing.assert_allclose(ours.logprobs, wanted, atol=1e-4)
            assert set(ours.weight_versions.tolist()) == {version}
        rollouts = [r for r in random_rollouts(random, 5) if len(r.token_ids) < 127]
        batch, receipt = teacher.score(encode(Rollout, rollouts), ScoreRequest(signal="topk", top_k=3))
        for rollout, scores in zip(rollouts, decode(TeacherScores, batch), strict=True):
            top = dense(plain, rollout)[1].topk(3)
            np.testing.assert_allclose(scores.topk_logprobs, top.values, atol=1e-4)
            assert scores.teacher_version == version and scores.teacher_id == "self"
        assert receipt.rows == len(rollouts) and not receipt.errors
        trained(student)


@pytest.mark.parametrize("mended", [False, True])
def test_the_canary_finds_the_stale_head_of_a_tied_model(tmp_path, monkeypatch, mended):
    """Of vLLM's CPU build; ours renews it, and without that no rollout comes of it."""
    if not mended:
        monkeypatch.setattr(vllm_host, "TRANSFER", ("stale", "stale_transfer.Extension"))
    engine = VllmEngine(tiny_qwen3(tmp_path, hidden=128, tied=True), dtype="fp32")
    try:
        model = load_causal_lm(str(tmp_path))
        engine.load_weights(*whole(model, version=0))  # nothing has changed yet
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        if mended:
            engine.load_weights(*whole(model, version=1))
            return
        with pytest.raises(WeightsMismatch, match="canary"):
            engine.load_weights(*whole(model, version=1))
        with pytest.raises(WeightsMismatch, match="proven"):
            engine.generate(random_prompts(fresh_random(), [3]), [1], Sampling(max_new_tokens=2))
    finally:
        engine.host.close()


def test_an_engine_of_which_a_process_ended_by_itself_is_closed(tmp_path):
    """vLLM's shutdown lists what it kills, and raises where one of these has ended meanwhile: then it kills no more."""

    def shutdown():
        raise psutil.NoSuchProcess(1)

    host = VllmEngine(tiny_qwen3(tmp_path, hidden=128), dtype="fp32").host
    processes = host._llm.engine_core.resources.engine_manager.processes
    own = [psutil.Process(process.pid) for process in processes]
    assert own and all(process.is_running() for process in own)
    host._llm.shutdown = shutdown
    host.close()
    _, alive = psutil.wait_procs(own, timeout=60)  # whoever else has waited for them
    assert not alive


def test_a_model_that_vllm_cannot_load_is_named(tmp_path):
    tiny_qwen3(tmp_path, hidden=128)  # it has 4 heads
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        VllmEngine(str(tmp_path), dtype="fp32", tensor_parallel=3)
