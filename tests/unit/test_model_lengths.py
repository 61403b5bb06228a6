"""What shows only at a length: frequencies that depend on the batch, and a canary that reaches as far as the run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CONTEXT, Learner, exactly, response_logprobs, save_small
from learner_cases import make_example
from service_rows import fresh_random, random_prompts, random_rollout, random_rollouts

from tutorloop.actors.worker import RolloutWorker
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ModelError, WeightsMismatch
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling, ScoreRequest, TeacherScores
from tutorloop.learner.head_proof import prove_heads
from tutorloop.learner.parameters import (
    CANARY_LOGITS,
    CANARY_MOST,
    CANARY_TOKENS,
    CANARY_TOLERANCE,
    MEASURED_EVERY,
    canary_tokens,
)
from tutorloop.models.checkpoint import check_weights, load_lm_head
from tutorloop.models.loading import (
    DTYPES,
    check_architecture,
    context_length,
    load_config,
    varying_frequencies,
)
from tutorloop.models.weight_proof import canary_gaps, check_canary
from tutorloop.teacher_service.transformers_engine import TransformersTeacher
from tutorloop.teacher_service.worker import TeacherWorker

torch.set_num_threads(1)

ORIGINAL = 64


def longrope(long_factor: float) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [long_factor] * 16,
        "original_max_position_embeddings": ORIGINAL,
    }


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> str:
    return save_small(tmp_path_factory.mktemp("long"), "llama", rope_parameters=longrope(4.0))


# ---- frequencies -----------------------------------------------------------------------------------------------------


def rewritten(folder: Path, **fields: object) -> str:
    settings = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: own for key, own in settings.items() if own is not None}))
    return str(folder)


NESTED = {
    "full_attention": longrope(8.0) | {"original_max_position_embeddings": 80},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
OLD = {key: own for key, own in longrope(4.0).items() if key not in ("rope_type", "rope_theta")} | {"type": "longrope"}
KINDS = {
    "longrope": ("llama", {"rope_parameters": longrope(4.0)}, ("longrope", ORIGINAL)),
    "longrope as older folders have it": (
        "llama",
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": OLD},
        ("longrope", ORIGINAL),
    ),
    "longrope in some layers": ("gemma3_text", {"rope_parameters": NESTED}, ("longrope", 80)),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        ("dynamic", CONTEXT),
    ),
    "one set": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, None),
    "none said": ("qwen3", {}, None),
}


@pytest.mark.parametrize("case", KINDS)
def test_frequencies_that_depend_on_the_batch_bound_the_length(case, tmp_path):
    architecture, fields, expected = KINDS[case]
    save_small(tmp_path, architecture)
    name = rewritten(tmp_path, **fields)
    assert varying_frequencies(load_config(name)) == expected
    assert context_length(load_config(name)) == (expected[1] if expected else CONTEXT)


@torch.no_grad()
def test_within_its_original_length_such_a_model_is_one_in_every_batch(long):
    """Sampled side by side, scored packed, read alone: one logprob. What would go beyond is not generated."""
    check_architecture(long)
    check_weights(long)
    random, model = fresh_random(), exactly(long)
    worker = RolloutWorker(engine="transformers", model=long, dtype="fp32")
    ids = random_prompts(random, [3, 20, 50, ORIGINAL - 1, ORIGINAL, ORIGINAL + 9])
    prompts = [Prompt(prompt_id=str(i), text="", token_ids=own, answer="") for i, own in enumerate(ids)]
    requests = [
        SampleRequest(rollout_id=f"{i}", group_id=f"{i}", sample_index=0, row=i, seed=i) for i in range(len(ids))
    ]
    batch, receipt = worker.generate(encode(Prompt, prompts), tuple(requests), Sampling(max_new_tokens=40))
    assert receipt.errors == {"prompt": 2}
    rollouts = [rollout for rollout in decode(Rollout, batch) if rollout.response_length]
    assert max(len(rollout.token_ids) for rollout in rollouts) == ORIGINAL
    teacher = TransformersTeacher(long, teacher_id="t", dtype="fp32", tokens_per_batch=1000)
    for rollout, scores in zip(rollouts, teacher.score(rollouts, ScoreRequest()), strict=True):
        logprobs, own = response_logprobs(model, rollout)
        exact = logprobs.gather(1, own[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, exact, atol=1e-4)
        np.testing.assert_allclose(scores.logprobs, exact, atol=1e-4)
    beyond = random_rollout(random, 0, ORIGINAL, 1)
    assert teacher.score([beyond], ScoreRequest())[0].error_class == "too_long"


# ---- the canary ------------------------------------------------------------------------------------------------------


def test_the_canary_is_as_long_as_the_run_and_no_longer_than_its_logits_allow():
    assert canary_tokens(0, 300) == canary_tokens(20, 300) == CANARY_TOKENS
    assert canary_tokens(500, 300) == 500 and canary_tokens(10**6, 300) == CANARY_MOST
    for vocab in (32_000, 151_936, 262_144, 10**9):
        assert canary_tokens(10**6, vocab) == max(CANARY_TOKENS, min(CANARY_MOST, CANARY_LOGITS // (4 * vocab)))


def test_a_canarys_tolerance_is_what_rounding_moves_in_this_model(tmp_path):
    """Of logits thirty times as large the same rounding is thirty times as large."""
    name = save_small(tmp_path, "llama", seed=int(fresh_random().integers(2**31)), num_hidden_layers=8)
    model, tolerances = exactly(name), []
    for sharpness in (1, 30):
        model.get_output_embeddings().weight.data.mul_(sharpness)
        model.to(torch.float32).save_pretrained(name)
        learner = Learner(name, name)
        first, again = (list(learner.publish(1))[-1] for _ in range(2))
        ids = torch.from_numpy(first.canary_ids).long()
        with torch.no_grad():
            truth = exactly(name)(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        error = canary_gaps(truth.numpy(), first.canary_logprobs).max()
        assert error < first.tolerance <= max(CANARY_TOLERANCE["fp32"], 100 * error)
        assert again.tolerance == first.tolerance
        learner.engine.module.model.get_output_embeddings().weight.data.mul_(50)  # between two publications
        later = [list(learner.publish(1))[-1].tolerance for _ in range(MEASURED_EVERY)]
        assert later[:-2] == [first.tolerance] * (MEASURED_EVERY - 2) and later[-1] == later[-2] > 5 * first.tolerance
        tolerances.append(first.tolerance)
    assert tolerances[1] > 5 * tolerances[0]


@pytest.mark.parametrize("longest", [0, ORIGINAL, CONTEXT])
def test_a_replica_that_is_wrong_beyond_some_length_is_found_by_a_canary_of_that_length(longest, long, tmp_path):
    """The replica's second set of frequencies is another; up to the first one's length it is the same model."""
    other = save_small(tmp_path, "llama", rope_parameters=longrope(9.0))
    learner = Learner(long, long)
    learner.longest = longest
    *buckets, manifest = learner.publish(1)
    assert len(manifest.canary_ids) == max(longest, CANARY_TOKENS) == len(manifest.canary_logprobs) + 1
    RolloutWorker(engine="transformers", model=long, dtype="fp32").load_weights(manifest, *buckets)
    replica = RolloutWorker(engine="transformers", model=other, dtype="fp32")
    if longest <= ORIGINAL:
        replica.load_weights(manifest, *buckets)
        return
    with pytest.raises(WeightsMismatch, match=f"canary token .* of {longest}"):
        replica.load_weights(manifest, *buckets)


def test_a_self_teacher_proves_a_long_canary_too(tmp_path):
    student = save_small(tmp_path, "qwen3")
    learner = Learner(student, student)
    learner.longest = CONTEXT
    *buckets, manifest = learner.publish(1)
    teacher = TeacherWorker(
        teacher_id="t", engine="transformers", model=student, dtype="fp32", follows="live", tokens_per_batch=50
    )
    teacher.load_weights(manifest, *buckets)
    assert teacher.version == 1
    *buckets, manifest = learner.publish(2)
    shifted = manifest.canary_logprobs + np.where(np.arange(CONTEXT - 1) < CONTEXT - 40, 0, 1e-3).astype(np.float32)
    with pytest.raises(WeightsMismatch, match="canary"):
        teacher.load_weights(replace(manifest, canary_logprobs=shifted), *buckets)


@pytest.mark.parametrize("at", [0, 30, 31, 100, 149])
def test_of_the_far_tokens_the_mean_of_a_block_counts(at, long):
    learner = Learner(long, long)
    learner.longest = 150 + 1
    *_, manifest = learner.publish(1)
    manifest = replace(manifest, tolerance=0.01)
    apart = np.zeros(150, np.float32)
    apart[at] = 0.05  # one token: a rounding error that is allowed beyond the first block
    if at < 31:
        with pytest.raises(WeightsMismatch):
            check_canary(manifest.canary_logprobs + apart, manifest)
        return
    check_canary(manifest.canary_logprobs + apart, manifest)
    apart[max(31, at - 40) :] = 0.05
    with pytest.raises(WeightsMismatch):
        check_canary(manifest.canary_logprobs + apart, manifest)
    apart[:] = 0
    apart[at] = np.nan
    with pytest.raises(WeightsMismatch):
        check_canary(manifest.canary_logprobs + apart, manifest)


# ---- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_head_is_proved_on_what_the_teacher_says(dtype, tmp_path):
    name = save_small(tmp_path, "qwen3", vocab_size=300)
    rollouts = random_rollouts(fresh_random())
    worker = TeacherWorker(teacher_id="t", engine="transformers", model=name, dtype=dtype)
    batch, _ = worker.score(encode(Rollout, rollouts), ScoreRequest(signal="hidden"))
    scores = {score.rollout_id: score for score in decode(TeacherScores, batch)}
    examples = [
        make_example(r.rollout_id, r.token_ids, r.logprobs, prompt=r.prompt_length, scores=[scores[r.rollout_id]])
        for r in rollouts
        if r.response_length > 3
    ]
    updates, head, all_of = [[examples]], load_lm_head(name, dtype), frozenset({"t", "silent"})
    assert prove_heads(all_of, {"t": head, "silent": head}, updates) == {"silent"}
    assert prove_heads(frozenset(), {}, updates) == set()
    assert prove_heads(all_of, {"t": head, "silent": head}, [[[replace(e, scores={}) for e in examples]]]) == all_of
    for wrong in (head.flip(0), head * 1.5, head + torch.nan, torch.randn(300, 64).to(DTYPES[dtype])):
        with pytest.raises(ModelError, match=r"teacher 't'.*nats apart"):
            prove_heads(all_of, {"t": wrong, "silent": head}, updates)
