"""vLLM's scores against the transformers teacher's: every signal, long prompts, weights that follow the student."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from service_rows import fresh_random, published, random_rollout
from tiny import tiny_qwen3

from tutorloop.contracts.errors import ConfigError, WeightsMismatch
from tutorloop.contracts.records import ScoreRequest
from tutorloop.models import vllm_host
from tutorloop.models.loading import load_causal_lm
from tutorloop.teacher_service.transformers_engine import TransformersTeacher
from tutorloop.teacher_service.vllm_engine import VllmTeacher

CONTEXT, VOCAB = 1024, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("teacher"), hidden=128, context=CONTEXT, vocab=VOCAB)


@pytest.fixture(
    scope="module", params=[pytest.param(of, marks=pytest.mark.xdist_group(of)) for of in ("logprobs", "hidden")]
)
def teachers(request, folder):
    """vLLM's, in steps of 256 tokens, and the slow one."""
    hidden = request.param == "hidden"
    patch = pytest.MonkeyPatch()
    patch.setattr(vllm_host, "LOGITS_BYTES", 256 * 4 * VOCAB)
    vllm = VllmTeacher(folder, teacher_id="t", dtype="fp32", tokens_per_batch=1500, hidden=hidden)
    patch.undo()
    yield vllm, TransformersTeacher(folder, teacher_id="t", dtype="fp32")
    vllm.host.close()


def rollouts_of(random):
    """Short ones, one that is longer than a step of the engine, and those that are refused."""
    lengths = [(1, 1), (3, 30), (200, 5), (500, 500), (1, 1022), *random.integers(1, 40, (12, 2)).tolist()]
    rollouts = [random_rollout(random, i, *pair) for i, pair in enumerate(lengths)]
    rollouts += [random_rollout(random, 90, 5, 0), random_rollout(random, 91, 1000, 30)]
    stranger = random_rollout(random, 92, 5, 5)
    stranger.token_ids[-1] = VOCAB
    return [*rollouts, stranger, replace(random_rollout(random, 93, 4, 4), topk_ids=np.zeros((0, 0), np.int32))]


def requests_of(vllm):
    if vllm.head is not None:
        return [ScoreRequest(signal="hidden", context="somewhere")]
    topk = [ScoreRequest(signal="topk", top_k=k) for k in (1, 16, vllm.largest_k)]
    return [ScoreRequest(), ScoreRequest(signal="given"), *topk]


def compare(vllm, slow, rollouts, request):
    for ours, wanted in zip(vllm.score(rollouts, request), slow.score(rollouts, request), strict=True):
        for name in ("rollout_id", "teacher_id", "context", "error_class"):
            assert getattr(ours, name) == getattr(wanted, name)
        for name in ("logprobs", "topk_logprobs", "hidden"):
            assert getattr(ours, name).size == getattr(wanted, name).size
            assert getattr(ours, name).dtype == getattr(wanted, name).dtype
            if getattr(ours, name).size:
                np.testing.assert_allclose(getattr(ours, name), getattr(wanted, name), atol=1e-4)
        if request.signal == "given":
            assert ours.topk_ids.tolist() == wanted.topk_ids.tolist()
        elif ours.topk_ids.size:  # two ids may change places where they are equal to rounding
            assert (ours.topk_ids != wanted.topk_ids).mean() < 0.01
        whole = request.signal == "given" or request.top_k == VOCAB
        assert bool(ours.entropy.size) == (whole and not ours.error_class)
        if ours.entropy.size:
            np.testing.assert_allclose(ours.entropy, wanted.entropy, atol=1e-4)


def test_every_signal_agrees_with_transformers(teachers):
    vllm, slow = teachers
    rollouts = rollouts_of(fresh_random())
    for request in requests_of(vllm):
        compare(vllm, slow, rollouts, request)
        errors = {s.rollout_id: s.error_class for s in vllm.score(rollouts, request) if s.error_class}
        wanted = {"r90": "empty", "r91": "too_long", "r92": "bad_ids"}
        assert errors == wanted | ({"r93": "no_support"} if request.signal == "given" else {})


def test_a_live_teacher_takes_ten_versions(teachers, folder):
    vllm, slow = teachers
    random, student = fresh_random(), load_causal_lm(folder)
    if vllm.head is not None:
        with pytest.raises(ConfigError, match="frozen"):
            vllm.load_weights(*published(student, 1))
        return
    for version in range(1, 11):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.01 * torch.randn(parameter.shape)
        for teacher in teachers:
            teacher.load_weights(*published(student, version))
        compare(vllm, slow, rollouts_of(random)[:4], ScoreRequest(signal="topk", top_k=4))
    buckets, manifest = published(student, 11)
    with pytest.raises(WeightsMismatch, match="canary"):
        vllm.load_weights(buckets, replace(manifest, canary_logprobs=manifest.canary_logprobs - 1))
    with pytest.raises(WeightsMismatch, match="proven"):
        vllm.score(rollouts_of(random)[:1], ScoreRequest())
    vllm.load_weights(*published(student, 12))
    compare(vllm, slow, rollouts_of(random)[:1], ScoreRequest())


def test_a_signal_that_it_was_not_started_for_is_refused(teachers):
    vllm, _ = teachers
    with pytest.raises(ConfigError, match="exact signal"):
        vllm.score([], ScoreRequest(signal="sampled" if vllm.head is not None else "hidden"))
