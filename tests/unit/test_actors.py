"""Rollouts against the slow way (one row, one token, no cache), and weights that are proven before they are used."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from service_rows import CONTEXT, VOCAB, fresh_random, published, random_prompts, slow_rollout
from tiny import EOS, save_tiny, tiny_model, tiny_qwen3

from tutorloop.actors.engines import make_engine
from tutorloop.actors.sampling import draw, uniforms
from tutorloop.actors.transformers_engine import TransformersEngine
from tutorloop.actors.worker import RolloutWorker
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ConfigError, RecordError, WeightsMismatch
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling
from tutorloop.models.loading import load_causal_lm

ENDS = set(range(0, VOCAB, 12))  # often: rows leave the batch all along


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


def engine_of(name, kind="transformers", dtype="fp32"):
    return make_engine(kind, name, dtype=dtype, device="cpu", threads=1)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_rollouts_equal_the_slow_way(architecture, temperature, tmp_path):
    random = fresh_random()
    engine = engine_of(save_tiny(tmp_path, architecture, context=CONTEXT))
    slow_model = load_causal_lm(str(tmp_path))
    engine.eos_ids = torch.tensor(sorted(ENDS))
    prompts = random_prompts(random, [1, 30, 7, 7, 2, CONTEXT - 3, 11, 19])
    prompts[3] = prompts[2].copy()  # two samples of one prompt
    seeds = random.integers(0, 2**63, len(prompts)).tolist()
    sampling = Sampling(max_new_tokens=16, temperature=temperature, topk_support=4)
    for prompt, seed, ours in zip(prompts, seeds, engine.generate(prompts, seeds, sampling), strict=True):
        ids, logprobs, support = slow_rollout(slow_model, prompt, seed, sampling, ENDS, ours.token_ids.tolist())
        assert ours.token_ids.tolist() == ids and ours.token_ids.dtype == np.int32
        np.testing.assert_allclose(ours.logprobs, logprobs, atol=1e-4)
        assert ours.topk_ids.tolist() == np.array(support).tolist()
        assert ours.finish_reason == ("stop" if ids[-1] % 12 == 0 else "length")


def test_a_draw_does_not_depend_on_the_batch(qwen3):
    random = fresh_random()
    engine = engine_of(qwen3)
    prompts = random_prompts(random, random.integers(1, 40, 12))
    seeds = random.integers(0, 2**63, 12).tolist()
    sampling = Sampling(max_new_tokens=20)
    together = engine.generate(prompts, seeds, sampling)
    for i in random.permutation(12):
        (alone,) = engine.generate([prompts[i]], [seeds[i]], sampling)
        assert alone.token_ids.tolist() == together[i].token_ids.tolist()
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-4)
    short = engine.generate(prompts, seeds, replace(sampling, max_new_tokens=5))
    assert all(s.token_ids.tolist() == t.token_ids.tolist()[:5] for s, t in zip(short, together, strict=True))


def test_draws_have_the_distribution_of_the_logits():
    random = fresh_random()
    logits = torch.from_numpy(random.normal(0, 2, 40)).float()
    logits[[0, 17, 39]] = -float("inf")
    count = 40_000
    uniform = torch.from_numpy(random.random(count))
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for temperature in (1.0, 0.5):
        tokens, logprobs = draw(logits.expand(count, -1), uniform, temperature)
        expected = (logits.double() / temperature).softmax(0)
        torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)
        seen = torch.bincount(tokens, minlength=40)
        assert not seen[[0, 17, 39]].any()
        likely = expected * count > 5
        chi = ((seen - expected * count) ** 2 / (expected * count))[likely].sum() / likely.sum()
        assert chi < 2.2  # per degree of freedom, over about 30: chance of more is below 1e-4


def test_uniforms_are_each_seeds_own_stream():
    rows = uniforms([5, 2**63 - 1, 5], 8)
    assert np.array_equal(rows[0], rows[2]) and not np.array_equal(rows[0], rows[1])
    assert np.array_equal(uniforms([5], 3)[0], rows[0, :3])


def test_the_end_token_belongs_to_the_response(qwen3):
    engine = engine_of(qwen3)
    assert EOS in engine.eos_ids.tolist()
    random = fresh_random()
    prompts = random_prompts(random, [4] * 64)
    engine.eos_ids = torch.arange(0, VOCAB, 8)
    for response in engine.generate(prompts, range(64), Sampling(max_new_tokens=30)):
        ends = response.token_ids % 8 == 0
        assert not ends[:-1].any() and ends[-1] == (response.finish_reason == "stop")
        assert len(response.token_ids) == len(response.logprobs) <= 30
        assert ends[-1] or len(response.token_ids) == 30


def test_every_end_token_of_the_model_ends_a_response(tmp_path):
    name = tiny_qwen3(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))
    assert engine_of(name).eos_ids.tolist() == [EOS, 7, 9]


def test_prompts_without_room_are_errors_and_harm_no_other(qwen3):
    engine = engine_of(qwen3)
    random = fresh_random()
    prompts = random_prompts(random, [CONTEXT, CONTEXT - 1, CONTEXT + 9, 3, 0, 3, 3])
    prompts[5][1], prompts[6][0] = VOCAB, -1
    responses = engine.generate(prompts, range(7), Sampling(max_new_tokens=8, temperature=1))
    assert [r.finish_reason == "error" for r in responses] == [True, False, True, False, True, True, True]
    assert len(responses[1].token_ids) == 1
    alone = engine.generate(prompts[3:4], [3], Sampling(max_new_tokens=8))
    assert alone[0].token_ids.tolist() == responses[3].token_ids.tolist()
    assert [r.finish_reason for r in engine.generate(prompts[:1], [0], Sampling(max_new_tokens=8))] == ["error"]


def test_bf16_samples_what_it_reports(tmp_path):
    engine = engine_of(tiny_qwen3(tmp_path), dtype="bf16")
    prompts = random_prompts(fresh_random(), [5, 9])
    for response in engine.generate(prompts, [1, 2], Sampling(max_new_tokens=6)):
        assert response.logprobs.dtype == np.float32 and np.isfinite(response.logprobs).all()


# ---- weights ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loaded_weights_are_the_published_model(tied, dtype, tmp_path):
    engine = engine_of(tiny_qwen3(tmp_path / "old", tied=tied), dtype=dtype)
    new = tiny_qwen3(tmp_path / "new", tied=tied, seed=7)
    buckets, manifest = published(load_causal_lm(new, dtype), version=5)
    names = {entry[0] for bucket in buckets for entry in bucket.entries}
    assert len(buckets) > 1 and ("lm_head.weight" in names) != tied
    prompts, sampling = random_prompts(fresh_random(), [6, 3]), Sampling(max_new_tokens=10)
    before = engine.generate(prompts, [1, 2], sampling)
    engine.load_weights(buckets, manifest)
    after, expected = (
        engine.generate(prompts, [1, 2], sampling),
        engine_of(new, dtype=dtype).generate(prompts, [1, 2], sampling),
    )
    assert engine.weight_version == 5
    for old, own, other in zip(before, after, expected, strict=True):
        assert own.token_ids.tolist() == other.token_ids.tolist() != old.token_ids.tolist()
        assert np.array_equal(own.logprobs, other.logprobs)


def rename(buckets, old, new):
    return [
        replace(bucket, entries=tuple((new if entry[0] == old else entry[0], *entry[1:]) for entry in bucket.entries))
        for bucket in buckets
    ]


def flip_a_bit(buckets, manifest):
    data = buckets[1].arrays[0].copy()
    data[123] ^= 1
    return [buckets[0], replace(buckets[1], arrays=(data, *buckets[1].arrays[1:])), *buckets[2:]], manifest


MISMATCHES = {
    "unknown name": (
        lambda b, m: (rename(b, "model.norm.weight", "model.nrom.weight"), m),
        r"unknown model\.nrom\.weight",
    ),
    "a name twice": (lambda b, m: (rename(b, "model.norm.weight", "lm_head.weight"), m), "shape"),
    "bucket lost": (lambda b, m: (b[:-1], m), "all its buckets"),
    "parameter lost": (
        lambda b, m: (b[:-1], replace(m, buckets=m.buckets - 1)),
        r"missing .*lm_head\.weight",
    ),
    "other version": (lambda b, m: (b, replace(m, version=2)), "one version"),
    "flipped bit": (flip_a_bit, "fingerprint"),
    "canary": (lambda b, m: (b, replace(m, canary_logprobs=m.canary_logprobs + 2e-4)), "canary"),
    "canary not a number": (lambda b, m: (b, replace(m, canary_logprobs=m.canary_logprobs * np.nan)), "canary"),
    "canary length": (lambda b, m: (b, replace(m, canary_logprobs=m.canary_logprobs[:-1])), "canary"),
}


@pytest.mark.parametrize("fault", MISMATCHES)
def test_a_replica_that_does_not_match_refuses_to_generate(fault, qwen3):
    engine = engine_of(qwen3)
    spoil, message = MISMATCHES[fault]
    buckets, manifest = published(load_causal_lm(qwen3))
    with pytest.raises(WeightsMismatch, match=message):
        engine.load_weights(*spoil(buckets, manifest))
    with pytest.raises(WeightsMismatch, match="proven"):
        engine.generate([np.array([5], np.int32)], [1], Sampling(max_new_tokens=2))
    engine.load_weights(buckets, manifest)  # a good version heals it
    assert engine.generate([np.array([5], np.int32)], [1], Sampling(max_new_tokens=2))[0].finish_reason != "error"


def test_a_stale_head_is_found_by_the_canary_alone(qwen3):
    """As where an engine keeps its own copy of the head: the parameters' bytes are right, the forward is not."""
    engine = engine_of(qwen3)
    stale = engine.model.lm_head.weight.detach().clone()
    engine.model.lm_head.register_forward_hook(lambda _m, inputs, _o: inputs[0] @ stale.T)
    with pytest.raises(WeightsMismatch, match="canary"):
        engine.load_weights(*published(tiny_model("qwen3", seed=8, context=CONTEXT)))


def test_weights_of_another_dtype_are_refused(qwen3):
    engine = engine_of(qwen3)
    with pytest.raises(WeightsMismatch, match="dtype"):
        engine.load_weights(*published(load_causal_lm(qwen3, "bf16")))


# ---- the worker -----------------------------------------------------------------------------------------------------


def prompts_and_requests(random, lengths, samples):
    prompts = [
        Prompt(prompt_id=f"p{i}", text="", token_ids=ids, answer=str(i), teacher=f"t{i % 2}")
        for i, ids in enumerate(random_prompts(random, lengths))
    ]
    requests = [
        SampleRequest(rollout_id=f"p{i}-{s}", group_id=f"g{i}", sample_index=s, row=i, seed=100 * i + s)
        for i in range(len(prompts))
        for s in range(samples)
    ]
    random.shuffle(requests)
    return prompts, tuple(requests)


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_the_worker_answers_every_request_in_order(engine, qwen3):
    random = fresh_random()
    prompts, requests = prompts_and_requests(random, [3, 9, 5000, 3, 20], 3)
    batch, sampling = encode(Prompt, prompts), Sampling(max_new_tokens=12)
    results = []
    for max_batch in (64, 4):
        worker = RolloutWorker(engine=engine, model=qwen3, dtype="fp32", max_batch=max_batch)
        results.append(worker.generate(batch, requests, sampling))
    (rollouts, receipt), (again, _) = [(decode(Rollout, b), r) for b, r in results]
    for request, rollout, other in zip(requests, rollouts, again, strict=True):
        prompt = prompts[request.row]
        assert rollout.token_ids.tolist() == other.token_ids.tolist()  # whatever the sub-batches
        assert rollout.token_ids[: rollout.prompt_length].tolist() == prompt.token_ids.tolist()
        assert (rollout.rollout_id, rollout.group_id) == (request.rollout_id, request.group_id)
        assert (rollout.prompt_id, rollout.answer, rollout.teacher) == (
            prompt.prompt_id,
            prompt.answer,
            prompt.teacher,
        )
        assert (rollout.finish_reason == "error") == (request.row == 2) == (rollout.response_length == 0)
        assert rollout.loss_mask.all() and rollout.source == "student"
        assert rollout.text == worker.engine.decode(rollout.token_ids[rollout.prompt_length :])
    assert [r.rollout_id for r in rollouts] == [r.rollout_id for r in requests] and receipt.rows == 15
    assert receipt.errors == {"prompt": 3}
    assert receipt.finish_reasons == tuple(r.finish_reason for r in rollouts)
    assert receipt.truncated == sum(r.finish_reason == "length" for r in rollouts)
    assert receipt.tokens == sum(receipt.response_lengths) == sum(r.response_length for r in rollouts)
    assert receipt.lengths == tuple(len(r.token_ids) for r in rollouts)


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_the_worker_stamps_the_version_it_ran(engine, qwen3):
    worker = RolloutWorker(engine=engine, model=qwen3, dtype="fp32")
    buckets, manifest = published(load_causal_lm(qwen3), version=9)
    assert worker.load_weights(manifest, *buckets) > 0
    prompts, requests = prompts_and_requests(fresh_random(), [4], 2)
    batch, receipt = worker.generate(encode(Prompt, prompts), requests, Sampling(max_new_tokens=3, topk_support=2))
    for rollout in decode(Rollout, batch):
        assert set(rollout.weight_versions.tolist()) == {9}
        assert rollout.topk_ids.shape == (rollout.response_length, 2)
    assert receipt.weight_version == 9
    with pytest.raises(WeightsMismatch, match="buckets"):
        worker.load_weights(manifest, *buckets[:-1])


def test_text_has_no_special_tokens(qwen3):
    engine = engine_of(qwen3)
    assert isinstance(engine, TransformersEngine)
    ids = engine.tokenizer("a \\boxed{½}")["input_ids"]
    assert engine.decode(np.array([*ids, EOS], np.int32)) == "a \\boxed{½}"


def test_the_fake_engine_is_strict(qwen3):
    engine = engine_of(qwen3, "fake")
    prompt, sampling = np.array([5, 6], np.int32), Sampling(max_new_tokens=4)
    with pytest.raises(RecordError, match="seed"):
        engine.generate([prompt, prompt], [1, 1], sampling)
    with pytest.raises(RecordError, match="int32"):
        engine.generate([prompt.astype(np.int64)], [1], sampling)
    with pytest.raises(RecordError, match="possible"):
        engine.generate([prompt], [1], Sampling(max_new_tokens=0))


def test_an_unknown_engine_names_the_known():
    with pytest.raises(ConfigError, match="fake, transformers"):
        engine_of("nothing", "vlllm")
