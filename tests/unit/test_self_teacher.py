"""Self-teachers: the student's versions taken as they are, or averaged as a loop in float64 does, and proven."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from service_rows import CONTEXT, VOCAB, dense, fresh_random, random_rollouts, sent_buckets
from tiny import tiny_model, tiny_qwen3

from tutorloop.cluster.pools.in_process import InProcessReplica
from tutorloop.cluster.pools.self_teaching import adopt_average
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import CheckpointError, TeacherError, WeightsMismatch
from tutorloop.contracts.records import Rollout, ScoreRequest, TeacherScores, WeightManifest
from tutorloop.models.loading import DTYPES
from tutorloop.models.logits import token_logprobs
from tutorloop.models.packing import packed_hidden_states
from tutorloop.models.weights import BucketWriter
from tutorloop.teacher_service.worker import TeacherWorker


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


@torch.no_grad()
def published(model, version):
    writer = BucketWriter(version, 20_000)
    buckets = sent_buckets(model, writer)
    canary = np.arange(5, 21, dtype=np.int32)
    ids = torch.from_numpy(canary).long()
    model.set_attn_implementation("packed")  # as the learner has it
    hidden = packed_hidden_states(model, ids[:-1], torch.tensor([len(ids) - 1]))
    logprobs = token_logprobs(hidden, model.get_output_embeddings().weight, ids[1:])
    manifest = WeightManifest(
        version=version,
        buckets=len(buckets),
        fingerprint=writer.fingerprint,
        canary_ids=canary,
        canary_logprobs=logprobs.float().numpy(),
        tolerance=1e-4,
    )
    return buckets, manifest


def tiny_of(dtype, seed, tied=False):
    """A tiny model in `dtype`, its rotary frequencies in float32 as transformers loads them."""
    model = tiny_model("qwen3", seed=seed, tied=tied)
    for tensor in model.parameters():
        tensor.data = tensor.data.to(DTYPES[dtype])
    return model


def take(worker, model, version):
    buckets, manifest = published(model, version)
    assert worker.load_weights(manifest, *buckets) >= 0


def student_weights_of(name, follows, dtype="fp32", decay=0.9):
    return TeacherWorker(
        teacher_id="self", engine="transformers", model=name, dtype=dtype, follows=follows, ema_decay=decay
    )


def weights_of(worker):
    return {name: tensor.detach().double().numpy() for name, tensor in worker.engine.model.named_parameters()}


def test_a_live_teacher_scores_as_the_student_it_took(qwen3):
    rollouts = random_rollouts(fresh_random())
    worker = student_weights_of(qwen3, "live")
    batch, _ = worker.score(encode(Rollout, rollouts), ScoreRequest())
    assert {s.teacher_version for s in decode(TeacherScores, batch)} == {0}
    for version, seed in ((0, 3), (4, 4), (6, 5)):
        model = tiny_model("qwen3", seed=seed)
        take(worker, model, version)
        batch, _ = worker.score(encode(Rollout, rollouts), ScoreRequest())
        for rollout, score in zip(rollouts, decode(TeacherScores, batch), strict=True):
            response = rollout.token_ids[rollout.prompt_length :]
            assert score.teacher_version == version
            expected = dense(tiny_model("qwen3", seed=seed), rollout)[1][np.arange(len(response)), response]
            np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
    before = weights_of(worker)
    take(worker, tiny_model("qwen3", seed=8), 6)  # not newer
    assert all(np.array_equal(before[name], own) for name, own in weights_of(worker).items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_averaging_teacher_equals_the_loop_in_float64(dtype, tied, tmp_path):
    random = fresh_random()
    worker = student_weights_of(tiny_qwen3(tmp_path / "m", tied=tied), "ema", dtype, decay=0.97)
    versions = [3, 4, 4, 7, 6, 9]  # a version that is not newer is ignored
    seeds = random.integers(0, 1000, len(versions)).tolist()
    average, newest = {}, -1
    for version, seed in zip(versions, seeds, strict=True):
        model = tiny_of(dtype, seed, tied)
        take(worker, model, version)
        if version > newest:
            newest = version
            for name, tensor in model.named_parameters():
                new = tensor.detach().double().numpy()
                average[name] = 0.97 * average[name] + 0.03 * new if name in average else new
        held = weights_of(worker)
        assert set(held) == set(average) and ("lm_head.weight" in held) != tied
        for name, expected in average.items():
            rounding = 2**-8 * np.abs(expected) if dtype == "bf16" else 0  # half a step of bfloat16's 8 bits
            assert (np.abs(held[name] - expected) <= rounding + 1e-6).all(), name
            kept = worker.student_weights.average[name]
            assert kept.dtype == torch.float32
            np.testing.assert_allclose(kept.numpy(), expected, atol=1e-6)
    rollouts = random_rollouts(random, 3)
    batch, _ = worker.score(encode(Rollout, rollouts), ScoreRequest())
    assert {s.teacher_version for s in decode(TeacherScores, batch)} == {9}


@pytest.mark.parametrize(
    ("file", "key", "decay"), [("opsd", "ema_decay_0_999", 0.999), ("sdpo", "ema_rate_0_05", 0.95)]
)
def test_the_average_of_the_papers_examples(file, key, decay, qwen3):
    golden = json.loads((Path(__file__).parents[1] / "golden" / f"{file}.json").read_text())["expected"][key]
    worker, model = student_weights_of(qwen3, "ema", decay=decay), tiny_model("qwen3")
    for version, value in ((1, 1.5), (2, 2.0)):
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.fill_(value)
        take(worker, model, version)
    assert all(np.abs(own - golden).max() < 1e-6 for own in weights_of(worker).values())


def test_small_changes_are_not_lost_in_bfloat16(tmp_path):
    """A share of 0.001 a version is below bfloat16's rounding; the float32 average moves on."""
    worker = student_weights_of(tiny_qwen3(tmp_path), "ema", "bf16", decay=0.999)
    model = tiny_of("bf16", 0)
    with torch.no_grad():
        for version in range(40):
            for tensor in model.parameters():
                tensor.fill_(2.0 if version else 1.0)
            take(worker, model, version)
    expected = 2 - 0.999**39
    assert all(abs(own - expected).max() < 2**-8 for own in weights_of(worker).values())


@pytest.mark.parametrize("follows", ["live", "ema"])
def test_a_teacher_whose_weights_do_not_match_refuses_to_score(follows, qwen3):
    worker, batch = student_weights_of(qwen3, follows), encode(Rollout, random_rollouts(fresh_random(), 1))
    models = [tiny_model("qwen3", seed=seed) for seed in (1, 2)]
    take(worker, models[0], 1)
    buckets, manifest = published(models[1], 2)
    flipped = buckets[1].arrays[0].copy()
    flipped[123] ^= 1
    shifted = replace(manifest, canary_logprobs=manifest.canary_logprobs + 0.1)
    for spoilt, message in (
        (
            (manifest, buckets[0], replace(buckets[1], arrays=(flipped, *buckets[1].arrays[1:])), *buckets[2:]),
            "fingerprint",
        ),
        ((shifted, *buckets), "canary"),
        ((manifest, *buckets[:-1]), "all its buckets"),
    ):
        with pytest.raises(WeightsMismatch, match=message):
            worker.load_weights(*spoilt)
        with pytest.raises(WeightsMismatch, match="proven"):
            worker.score(batch, ScoreRequest())
    worker.load_weights(manifest, *buckets)  # a good version heals it, and the average lost nothing
    one, two = (dict(model.named_parameters()) for model in models)
    for name, own in weights_of(worker).items():
        mixed = two[name] if follows == "live" else 0.9 * one[name].double() + 0.1 * two[name].double()
        np.testing.assert_allclose(own, mixed.detach(), atol=1e-6)
    worker.score(batch, ScoreRequest())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("from_peer", [False, True])
def test_an_average_goes_on_in_another_replica_as_if_never_stopped(dtype, from_peer, tmp_path):
    """From a checkpoint, or from a replica that still has it: a new one takes it before its first call."""
    name = tiny_qwen3(tmp_path / "m")
    models = [tiny_of(dtype, seed) for seed in (1, 2, 3)]
    one, two = student_weights_of(name, "ema", dtype), student_weights_of(name, "ema", dtype)
    for version, model in enumerate(models[:2]):
        take(one, model, version)
    saved = tmp_path / "step-1" / "self.safetensors"
    saved.parent.mkdir()
    one.save_average(str(saved))
    said = []
    peers = [InProcessReplica(one)] if from_peer else []

    async def adopt():
        return await adopt_average(InProcessReplica(two), peers, "self", [saved], said.append)

    assert asyncio.run(adopt()) == 1 == two.student_weights.version
    assert said[0].endswith("of another" if from_peer else "of step-1: no other was left")
    take(two, models[2], 1)  # the learner publishes the resumed version anew
    for worker in (one, two):
        take(worker, models[2], 2)
    for key, own in weights_of(one).items():
        assert np.array_equal(own, weights_of(two)[key])
        assert torch.equal(one.student_weights.average[key], two.student_weights.average[key])


def test_averages_that_cannot_be_used_are_named(tmp_path, qwen3):
    ema, live, frozen = (
        student_weights_of(qwen3, "ema"),
        student_weights_of(qwen3, "live"),
        student_weights_of(qwen3, ""),
    )
    path = str(tmp_path / "average.safetensors")
    with pytest.raises(TeacherError, match="none yet"):
        ema.save_average(path)
    take(ema, tiny_model("qwen3"), 1)
    ema.save_average(path)
    with pytest.raises(TeacherError, match="average is kept"):
        live.load_average(path)
    for refused in (lambda: take(frozen, tiny_model("qwen3"), 1), lambda: frozen.save_average(path)):
        with pytest.raises(TeacherError, match="follow"):
            refused()
    other = student_weights_of(tiny_qwen3(tmp_path / "other", hidden=64), "ema")
    with pytest.raises(CheckpointError, match="parameters"):
        other.load_average(path)
    (tmp_path / "broken").write_bytes(b"nothing")
    for bad in (tmp_path / "broken", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="readable"):
            ema.load_average(str(bad))
    with pytest.raises(TeacherError, match="live, or as an ema"):
        student_weights_of(qwen3, "both")
    with pytest.raises(TeacherError, match="FakeTeacher"):
        TeacherWorker(teacher_id="t", engine="fake", model=qwen3, dtype="fp32", follows="live")
