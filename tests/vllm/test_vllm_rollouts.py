"""vLLM's rollouts against the transformers model: logprobs before and after updates, seeds, versions, proofs."""

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from service_rows import fresh_random, published, random_prompts
from tiny import EOS, tiny_qwen3

from tutorloop.actors.vllm_engine import VllmEngine
from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster.pools.ports import free_port
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import BroadcastBroken, WeightsMismatch
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling
from tutorloop.models.loading import load_causal_lm
from tutorloop.models.weight_broadcast import BroadcastGroup

pytestmark = pytest.mark.xdist_group("rollout_engine")

CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("vllm"), hidden=128, context=CONTEXT)


@pytest.fixture(scope="module")
def engine(folder):
    engine = VllmEngine(folder, dtype="fp32", max_running=64)
    yield engine
    engine.host.close()


def moved(model, random, scale=0.02):
    """The model, in place, a random step away."""
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logprobs_of(model, prompt, response, temperature=1.0):
    """Log-probability of each response token by one plain forward, and of every id there."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    logprobs = (logits / (temperature or 1)).log_softmax(-1)
    return logprobs.gather(1, ids[len(prompt) :, None])[:, 0].numpy(), logprobs.numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_the_samplers_before_and_after_ten_updates(engine, folder, temperature):
    random = fresh_random()
    model = load_causal_lm(folder)
    sampling = Sampling(max_new_tokens=12, temperature=temperature, topk_support=3)
    first = engine.weight_version
    for update in range(11):
        if update:
            engine.load_weights(*published(moved(model, random), version=first + update))
        else:
            engine.load_weights(*published(model, version=first))
        prompts = random_prompts(random, [1, 30, 7])
        for prompt, ours in zip(prompts, engine.generate(prompts, [3, 1, 2], sampling), strict=True):
            wanted, by_id = logprobs_of(model, prompt, ours.token_ids, temperature)
            best = -np.sort(-by_id, 1)
            np.testing.assert_allclose(ours.logprobs, wanted, atol=1e-4)
            likely = np.take_along_axis(by_id, ours.topk_ids, 1)  # ids as likely as one another may stand in any order
            np.testing.assert_allclose(likely, best[:, :3], atol=1e-4)
            assert all(len(set(ids)) == 3 for ids in ours.topk_ids.tolist())
            assert set(ours.weight_versions.tolist()) == {first + update}
            if not temperature:
                np.testing.assert_allclose(wanted, best[:, 0], atol=1e-4)


def test_a_draw_is_its_seeds_alone(engine):
    random = fresh_random()
    prompts = random_prompts(random, random.integers(1, 40, 12))
    seeds = random.integers(0, 2**63, 12).tolist()
    sampling = Sampling(max_new_tokens=20)
    together = engine.generate(prompts, seeds, sampling)
    assert len({tuple(g.token_ids.tolist()) for g in together}) == 12
    for i in random.permutation(12)[:4]:
        (alone,) = engine.generate([prompts[i]], [seeds[i]], sampling)
        assert alone.token_ids.tolist() == together[i].token_ids.tolist()
    # the samples of a prompt, and those of another seed, differ
    a, b = engine.generate([prompts[0]] * 2, [1, 2], sampling)
    assert a.token_ids.tolist() != b.token_ids.tolist()


def test_responses_end_with_the_eos_or_at_their_limit(engine):
    random = fresh_random()
    engine.eos_ids = list(range(0, 300, 12))
    prompts = random_prompts(random, [4] * 30 + [CONTEXT - 3, CONTEXT, CONTEXT - 1])
    ours = engine.generate(prompts, list(range(33)), Sampling(max_new_tokens=20))
    engine.eos_ids = [EOS]
    for generated in ours[:30]:
        *body, last = generated.token_ids.tolist()
        assert all(token % 12 for token in body)
        assert generated.finish_reason == ("stop" if last % 12 == 0 else "length")
        assert generated.finish_reason == "stop" or len(body) == 19
    assert any(g.finish_reason == "stop" for g in ours[:30])
    assert len(ours[30].token_ids) <= 3 and ours[31].finish_reason == "error" and len(ours[31].token_ids) == 0
    assert len(ours[32].token_ids) == 1


@pytest.mark.parametrize("in_flight", ["keep", "abort", "wait"])
def test_an_update_with_64_requests_in_flight_loses_none(engine, folder, in_flight, monkeypatch):
    """Every token's logprob is that of the weights whose version it carries."""
    random = fresh_random()
    first = engine.weight_version + 1
    models = {first: load_causal_lm(folder)}
    engine.load_weights(*published(models[first], version=first))
    engine.in_flight, engine.eos_ids = in_flight, []
    prompts = random_prompts(random, random.integers(1, 30, 64))
    found, begun = [], Counter()
    sampling, add = Sampling(max_new_tokens=150), engine.host._llm.add_request

    async def counted(*args, **options):
        added = await add(*args, **options)
        begun["requests"] += 1
        return added

    monkeypatch.setattr(engine.host._llm, "add_request", counted)
    thread = threading.Thread(target=lambda: found.extend(engine.generate(prompts, list(range(64)), sampling)))
    thread.start()
    while begun["requests"] < 64:  # all are on their way, and then run
        time.sleep(0.01)
    time.sleep(0.3)
    for version in (first + 1, first + 2):
        models[version] = moved(load_causal_lm(folder), random)
        engine.load_weights(*published(models[version], version=version))
    thread.join()
    engine.in_flight, engine.eos_ids = "keep", [EOS]
    assert len(found) == 64
    seen = set()
    for prompt, ours in zip(prompts, found, strict=True):
        assert len(ours.token_ids) == len(ours.weight_versions) == 150
        assert (np.diff(ours.weight_versions) >= 0).all()
        for version in set(ours.weight_versions.tolist()):
            seen.add(version)
            mine = ours.weight_versions == version
            wanted, _ = logprobs_of(models[version], prompt, ours.token_ids)
            np.testing.assert_allclose(ours.logprobs[mine], wanted[mine], atol=1e-4)
    if in_flight == "keep":
        assert len(seen) > 1 and not any(g.restarts for g in found), "no update fell into the requests"
    elif in_flight == "wait":
        assert seen == {first}, "an update waits for what runs"
    else:
        assert all(g.restarts for g in found) and first not in seen
        assert all(len(set(g.weight_versions.tolist())) == 1 for g in found)


def broadcast(engine, buckets, manifest, many):
    """Into an engine that joins for it, by a sender that leaves after so many buckets."""

    def send(port):
        group = BroadcastGroup("127.0.0.1", port, 0, 2, "cpu")
        for bucket in buckets[:many]:
            group.broadcast(torch.from_numpy(np.concatenate(bucket.arrays)))
        if many == len(buckets):
            received.wait()
        group.leave()

    port, received = free_port(), threading.Event()
    sender = threading.Thread(target=send, args=(port,))
    sender.start()
    try:
        engine.join_broadcast("127.0.0.1", port, 1, 2)
        engine.receive_weights([bucket.entries for bucket in buckets], replace(manifest, fingerprint=""))
    finally:
        received.set()
        sender.join()


@pytest.mark.parametrize("in_flight", ["keep", "abort", "wait"])
def test_a_broadcast_that_breaks_is_made_good_by_the_next_version(engine, folder, in_flight):
    """By either way. What runs stands still meanwhile: no token is of half a version."""
    random = fresh_random()
    first = engine.weight_version + 1
    models = {first: load_causal_lm(folder)}
    engine.load_weights(*published(models[first], version=first))
    engine.in_flight, engine.eos_ids = in_flight, []
    prompts, sampling = random_prompts(random, random.integers(1, 30, 8)), Sampling(max_new_tokens=150)
    for version, again in ((first + 1, broadcast), (first + 2, None)):
        models[version] = moved(load_causal_lm(folder), random)
        buckets, manifest = published(models[version], version=version)
        found = []
        thread = threading.Thread(target=lambda found=found: found.extend(engine.generate(prompts, range(8), sampling)))
        thread.start()
        for _ in range(2):
            with pytest.raises(BroadcastBroken):
                broadcast(engine, buckets, manifest, int(random.integers(1, len(buckets))))
        assert engine.weight_version == version - 1
        if again:
            again(engine, buckets, manifest, len(buckets))
        else:
            engine.load_weights(buckets, manifest)
        thread.join()
        assert len(found) == 8 and engine.weight_version == version
        found += engine.generate(prompts[:2], range(2), sampling)
        assert set(found[-1].weight_versions.tolist()) == {version}
        for prompt, ours in zip([*prompts, *prompts[:2]], found, strict=True):
            for of in set(ours.weight_versions.tolist()):
                mine = ours.weight_versions == of
                wanted, _ = logprobs_of(models[of], prompt, ours.token_ids)
                np.testing.assert_allclose(ours.logprobs[mine], wanted[mine], atol=1e-4)
    engine.in_flight, engine.eos_ids = "keep", [EOS]


def test_unproven_weights_generate_nothing(engine, folder):
    random = fresh_random()
    version = engine.weight_version + 1
    model = load_causal_lm(folder)
    engine.load_weights(*published(model, version=version))
    buckets, manifest = published(moved(model, random), version=version + 1)
    other = published(moved(model, random), version=version + 1)[1]
    with pytest.raises(WeightsMismatch, match="fingerprint"):
        engine.load_weights(buckets, other)
    prompts, sampling = random_prompts(random, [3]), Sampling(max_new_tokens=4)
    engine.generate(prompts, [1], sampling)  # bytes that were refused have changed nothing
    with pytest.raises(WeightsMismatch, match="canary"):
        engine.load_weights(buckets, replace(manifest, canary_logprobs=other.canary_logprobs))
    with pytest.raises(WeightsMismatch, match="proven"):
        engine.generate(prompts, [1], sampling)
    with pytest.raises(WeightsMismatch, match="take the published"):
        stranger = load_causal_lm(folder)
        stranger.stranger = torch.nn.Parameter(torch.ones(3))
        engine.load_weights(*published(stranger, version=version + 2))
    engine.load_weights(*published(model, version=version + 3))
    (healed,) = engine.generate(prompts, [1], sampling)
    np.testing.assert_allclose(healed.logprobs, logprobs_of(model, prompts[0], healed.token_ids)[0], atol=1e-4)


def test_the_worker_runs_it(folder, engine, monkeypatch):
    monkeypatch.setattr("tutorloop.actors.worker.make_engine", lambda *_, **__: engine)
    worker = RolloutWorker(engine="vllm", model=folder)
    random = fresh_random()
    prompts = [
        Prompt(prompt_id=f"p{i}", text="", token_ids=ids, answer="")
        for i, ids in enumerate(random_prompts(random, [4, 9, CONTEXT]))
    ]
    requests = tuple(
        SampleRequest(rollout_id=f"r{i}", group_id="g", sample_index=i, row=i % 3, seed=i) for i in range(9)
    )
    batch, receipt = worker.generate(encode(Prompt, prompts), requests, Sampling(max_new_tokens=5))
    rollouts = decode(Rollout, batch)
    assert [r.rollout_id for r in rollouts] == [f"r{i}" for i in range(9)]
    assert receipt.errors == {"prompt": 3} and receipt.weight_version == engine.weight_version
    assert all(len(r.weight_versions) == r.response_length for r in rollouts)
