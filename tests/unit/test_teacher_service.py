"""Teacher scores against dense forwards of each rollout alone; a shift by one token cannot pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from service_rows import CONTEXT, SUPPORT, VOCAB, dense, fresh_random, random_rollout, random_rollouts
from tiny import save_tiny, tiny_model, tiny_qwen3, tiny_tokenizer

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ConfigError, ModelError, TeacherError
from tutorloop.contracts.records import Rollout, ScoreRequest, TeacherScores
from tutorloop.models import logits as logits_module
from tutorloop.models.checkpoint import load_lm_head
from tutorloop.models.loading import load_causal_lm
from tutorloop.models.logits import token_logprobs
from tutorloop.teacher_service.engines import make_engine
from tutorloop.teacher_service.requests import batches_of, only_numbers
from tutorloop.teacher_service.worker import TeacherWorker

SIGNALS = ("sampled", "topk", "given", "hidden")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


def teacher_of(name, kind="transformers", dtype="fp32", tokens_per_batch=100):
    return make_engine(
        kind,
        name,
        teacher_id="big",
        dtype=dtype,
        device="cpu",
        threads=1,
        tokens_per_batch=tokens_per_batch,
    )


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_scores_equal_dense_forwards(architecture, signal, tmp_path, monkeypatch):
    random = fresh_random()
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 4 * VOCAB * 7)  # many chunks, borders inside rollouts
    name = save_tiny(tmp_path, architecture, context=CONTEXT)
    rollouts, model = random_rollouts(random), load_causal_lm(name)
    request = ScoreRequest(signal=signal, top_k=SUPPORT, context="hinted")
    scores = teacher_of(name).score(rollouts, request)
    for rollout, score in zip(rollouts, scores, strict=True):
        hidden, logprobs = dense(model, rollout)
        response = rollout.token_ids[rollout.prompt_length :]
        rows = np.arange(len(response))
        assert (score.rollout_id, score.teacher_id, score.context) == (rollout.rollout_id, "big", "hinted")
        assert score.error_class == "" and score.logprobs.dtype == np.float32
        np.testing.assert_allclose(score.logprobs, logprobs[rows, response], atol=1e-4)
        assert bool(score.topk_ids.size) == (signal in ("topk", "given")) and bool(score.hidden.size) == (
            signal == "hidden"
        )
        assert bool(score.entropy.size) == (signal in ("topk", "given"))
        if score.entropy.size:
            assert score.entropy.dtype == np.float32
            np.testing.assert_allclose(score.entropy, -(logprobs.exp() * logprobs).sum(1), atol=1e-4)
        if signal == "topk":
            np.testing.assert_allclose(score.topk_logprobs, logprobs.topk(SUPPORT).values, atol=1e-4)
            np.testing.assert_allclose(score.topk_logprobs, logprobs.numpy()[rows[:, None], score.topk_ids], atol=1e-4)
        if signal == "given":
            assert np.array_equal(score.topk_ids, rollout.topk_ids)
            np.testing.assert_allclose(
                score.topk_logprobs, logprobs.numpy()[rows[:, None], rollout.topk_ids], atol=1e-4
            )
        if signal == "hidden":
            assert score.hidden.dtype == np.float32
            np.testing.assert_allclose(score.hidden, hidden, atol=1e-4)


def test_scores_do_not_depend_on_the_batching(qwen3):
    rollouts = random_rollouts(fresh_random())
    alone, packed = (
        teacher_of(qwen3, tokens_per_batch=tokens).score(rollouts, ScoreRequest()) for tokens in (1, 10_000)
    )
    for one, many in zip(alone, packed, strict=True):
        np.testing.assert_allclose(one.logprobs, many.logprobs, atol=1e-4)


def test_hidden_states_give_the_logprobs_through_the_frozen_head(qwen3):
    """What the learner does with them, from bytes that crossed a process, in fp32 and in bf16."""
    rollouts = random_rollouts(fresh_random())
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 1e-5)):
        worker = TeacherWorker(teacher_id="big", engine="transformers", model=qwen3, dtype=dtype)
        batch, _ = worker.score(encode(Rollout, rollouts), ScoreRequest(signal="hidden"))
        head = load_lm_head(qwen3, dtype)
        for rollout, score in zip(rollouts, decode(TeacherScores, batch), strict=True):
            assert score.hidden.dtype == (np.float32 if dtype == "fp32" else np.uint16)
            hidden = torch.from_numpy(score.hidden.copy()).view(head.dtype)
            targets = torch.from_numpy(rollout.token_ids[rollout.prompt_length :].astype(np.int64))
            ours = token_logprobs(hidden, head, targets)
            np.testing.assert_allclose(score.logprobs, ours, atol=tolerance)


def test_topk_probabilities_leave_a_tail(qwen3):
    """Normalised over the whole vocabulary: the top-k's mass is below one, and all of it sums to one."""
    rollouts = random_rollouts(fresh_random(), 4)
    engine = teacher_of(qwen3)
    for score in engine.score(rollouts, ScoreRequest(signal="topk", top_k=SUPPORT)):
        mass = np.exp(score.topk_logprobs.astype(np.float64)).sum(1)
        assert (mass < 1).all() and (np.diff(score.topk_logprobs) <= 0).all()
    for score in engine.score(rollouts, ScoreRequest(signal="topk", top_k=VOCAB)):
        np.testing.assert_allclose(np.exp(score.topk_logprobs.astype(np.float64)).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_what_cannot_be_scored_is_refused_alone(engine, qwen3):
    random = fresh_random()
    good = random_rollout(random, 0, 4, 6)
    good = replace(good, token_ids=good.token_ids % 256, topk_ids=good.topk_ids % 256)  # the fake has 256 ids
    bad = {
        "too_long": random_rollout(random, 1, 4000, 200),
        "empty": random_rollout(random, 2, 4, 0),
        "bad_ids": replace(good, token_ids=np.array([5, 6, 7, 8, 9, 10, 11, 12, 13, 10**6], np.int32)),
        "no_support": replace(good, topk_ids=np.zeros((0, 0), np.int32)),
    }
    negative = replace(good, topk_ids=-good.topk_ids - 1)
    rollouts = [replace(r, rollout_id=f"r{i}") for i, r in enumerate([*bad.values(), negative, good])]
    worker = TeacherWorker(teacher_id="big", engine=engine, model=qwen3, dtype="fp32")
    batch, receipt = worker.score(encode(Rollout, rollouts), ScoreRequest(signal="given"))
    scores = decode(TeacherScores, batch)
    assert [s.error_class for s in scores] == [*bad, "bad_ids", ""]
    assert not any(s.logprobs.size or s.topk_ids.size or s.hidden.size for s in scores[:-1])
    assert scores[-1].rollout_id == "r5" and receipt.rows == 6 and receipt.tokens == 10
    assert receipt.errors == {"too_long": 1, "empty": 1, "bad_ids": 2, "no_support": 1}
    assert [s.rollout_id for s in scores[:-1]] == [f"r{i}" for i in range(5)]
    assert len(scores[-1].logprobs) == 6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused_and_its_neighbours_are_not(signal, dtype, broken, qwen3):
    """A model that overflows at one word: rollouts in which it is read, packed with others, have no scores."""
    random, request = fresh_random(), ScoreRequest(signal=signal, top_k=SUPPORT)
    rollouts = [random_rollout(random, i, 4, 6) for i in range(6)]
    word = 7
    for i, rollout in enumerate(rollouts):
        rollout.token_ids[rollout.token_ids == word] = word + 1
        if i % 2:
            rollout.token_ids[random.integers(9)] = word
    worker = TeacherWorker(teacher_id="big", engine="transformers", model=qwen3, dtype=dtype)
    model = worker.engine.model
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = broken
    batch, receipt = worker.score(encode(Rollout, rollouts), request)
    scores = decode(TeacherScores, batch)
    assert [score.error_class for score in scores] == ["", "not_finite"] * 3
    assert receipt.errors == {"not_finite": 3} and receipt.tokens == 30
    assert not any(score.logprobs.size or score.hidden.size or score.topk_ids.size for score in scores[1::2])


def test_an_id_of_a_support_may_have_no_probability():
    """Ids that a model leaves out of its vocabulary; the sampled token must not be among them."""
    known = {"rollout_id": "r", "teacher_id": "t", "topk_ids": np.zeros((2, 2), np.int32)}
    logprobs, support = np.zeros(2, np.float32), np.array([[0, -np.inf], [-1, -2]], np.float32)
    assert only_numbers(TeacherScores(**known, logprobs=logprobs, topk_logprobs=support)).error_class == ""
    for wrong in (np.nan, np.inf):
        bad = np.where(np.isinf(support), np.float32(wrong), support)
        assert only_numbers(TeacherScores(**known, logprobs=logprobs, topk_logprobs=bad)).error_class == "not_finite"
    off = only_numbers(TeacherScores(**known, logprobs=logprobs - np.inf, topk_logprobs=support))
    assert (off.rollout_id, off.teacher_id, off.error_class) == ("r", "t", "not_finite")


def test_the_longest_rollout_of_the_context_is_scored(qwen3):
    random = fresh_random()
    fits, exceeds = random_rollout(random, 0, 3, CONTEXT - 3), random_rollout(random, 1, 3, CONTEXT - 2)
    scores = teacher_of(qwen3).score([fits, exceeds], ScoreRequest())
    assert [s.error_class for s in scores] == ["", "too_long"]
    assert teacher_of(qwen3).score([exceeds], ScoreRequest())[0].error_class == "too_long"


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_a_teacher_scores_its_own_rows(engine, qwen3):
    random = fresh_random()
    rollouts = [replace(random_rollout(random, i, 3, 4), teacher=t) for i, t in enumerate(["big", "other", "", "big"])]
    rollouts = [replace(r, token_ids=r.token_ids % 256) for r in rollouts]
    worker = TeacherWorker(teacher_id="big", engine=engine, model=qwen3, dtype="fp32")
    batch, receipt = worker.score(encode(Rollout, rollouts), ScoreRequest(signal="hidden"))
    scores = decode(TeacherScores, batch)
    assert [s.rollout_id for s in scores] == ["r0", "r2", "r3"]
    assert all(s.hidden.shape[0] == 4 == len(s.logprobs) for s in scores)
    assert receipt.lengths == (7, 7, 7) and receipt.response_lengths == (4, 4, 4) and receipt.tokens == 21
    everyone, _ = worker.score(encode(Rollout, rollouts), ScoreRequest(everyone=True))
    assert [s.rollout_id for s in decode(TeacherScores, everyone)] == ["r0", "r1", "r2", "r3"]
    none, receipt = worker.score(encode(Rollout, rollouts[1:2]), ScoreRequest())
    assert none.num_rows == 0 and receipt.rows == 0


def test_batches_hold_every_rollout_once_within_the_budget():
    random = fresh_random()
    for _ in range(50):
        lengths = random.integers(1, 60, random.integers(0, 20)).tolist()
        batches = batches_of(lengths, 64)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in batch) <= 64 for batch in batches)
    assert batches_of([200, 10, 64], 64) == [[1], [2], [0]]


def test_a_model_with_more_than_a_head_is_refused(tmp_path):
    """A bias after the head would be lost by everything that multiplies hidden states with the head."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="head"):
        teacher_of(str(tmp_path))


def test_requests_that_make_no_sense_are_refused(qwen3):
    for engine in (teacher_of(qwen3), teacher_of(qwen3, "fake")):
        with pytest.raises(TeacherError, match="signal"):
            engine.score([], ScoreRequest(signal="logits"))
        for top_k in (0, VOCAB + 1):
            with pytest.raises(TeacherError, match="top_k"):
                engine.score([], ScoreRequest(signal="topk", top_k=top_k))
    with pytest.raises(ConfigError, match="fake, http, transformers, vllm"):
        teacher_of(qwen3, "sglang")


def test_a_greedy_path_has_the_likeliest_token_at_every_step(tmp_path):
    name = tiny_qwen3(tmp_path)
    model = tiny_model("qwen3")
    ids = [7, 9, 11]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    rollout = replace(random_rollout(fresh_random(), 0, 3, 6), token_ids=np.array(ids, np.int32))
    (score,) = teacher_of(name).score([rollout], ScoreRequest(signal="topk", top_k=1))
    assert score.topk_ids[:, 0].tolist() == ids[3:]
    np.testing.assert_allclose(score.topk_logprobs[:, 0], score.logprobs, atol=1e-6)
