"""The http teacher on vLLM's own server of the lab's teacher, against the transformers teacher of the same weights."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_tokenizer

from tutorloop.cluster.data import load_prompts
from tutorloop.contracts.config import Data
from tutorloop.contracts.errors import ConfigError, TeacherError, TokenizerMismatch
from tutorloop.contracts.records import Rollout, ScoreRequest
from tutorloop.models.loading import load_tokenizer
from tutorloop.teacher_service.http_engine import HttpTeacher, ServerLimits, probe
from tutorloop.teacher_service.transformers_engine import TransformersTeacher

pytestmark = pytest.mark.xdist_group("http_server")

LIMITS = ServerLimits(context=511, vocab=512, largest_k=64, temperature="raw")
TOLERANCE = 1e-4  # nats
TOP, SUPPORT = 64, 8


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("lab:student")


@pytest.fixture(scope="module")
def reference():
    return TransformersTeacher(
        "lab:teacher", teacher_id="t", dtype="fp32", device="cpu", threads=1, tokens_per_batch=4096
    )


@pytest.fixture(scope="module")
def rollouts(tokenizer, reference):
    """The lab's worked solutions, and ids at random; each with a support drawn from the teacher's likeliest."""
    random = np.random.default_rng(np.random.SeedSequence())
    made = []
    for prompt in load_prompts(Data(path="lab:train"), "lab:train", "train", tokenizer, need_answer=True)[:24]:
        made.append((prompt.token_ids, prompt.solution_ids))
    for prompt, response in ((1, 1), (1, 510), (510, 1), (60, 200)):
        made.append((random.integers(0, 512, prompt), random.integers(0, 512, response)))
    plain = [
        Rollout(
            rollout_id=f"r{i}",
            prompt_id="p",
            group_id="g",
            sample_index=0,
            token_ids=np.concatenate([prompt, response]).astype(np.int32),
            prompt_length=len(prompt),
            text="",
            logprobs=np.zeros(len(response), np.float32),
            loss_mask=np.ones(len(response), bool),
        )
        for i, (prompt, response) in enumerate(made)
    ]
    likeliest = reference.score(plain, ScoreRequest(signal="topk", top_k=TOP - 4))
    drawn = [random.permuted(score.topk_ids, axis=1)[:, :SUPPORT] for score in likeliest]
    return [replace(rollout, topk_ids=ids) for rollout, ids in zip(plain, drawn, strict=True)]


def teacher_of(*servers, limits=LIMITS, key=None):
    return HttpTeacher(
        servers[0].model,
        teacher_id="t",
        urls=[served.url for served in servers],
        requests_per_url=4,
        timeout_seconds=60,
        limits=limits,
        api_key=servers[0].key if key is None else key,
    )


def compare(rollouts, scores, request, reference):
    whole = reference.score(rollouts, ScoreRequest(signal="topk", top_k=512))
    expected = reference.score(rollouts, request)
    for rollout, ours, theirs, every in zip(rollouts, scores, expected, whole, strict=True):
        assert (ours.error_class, ours.rollout_id) == ("", rollout.rollout_id) and len(ours.logprobs)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=TOLERANCE)
        assert not ours.hidden.size and ours.topk_ids.size == theirs.topk_ids.size
        if ours.topk_ids.size:
            np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=TOLERANCE)
            by_id = np.take_along_axis(every.topk_logprobs, np.argsort(every.topk_ids, 1), 1)
            of_ours = np.take_along_axis(by_id, ours.topk_ids, 1)  # ids as likely as one another may stand in any order
            np.testing.assert_allclose(ours.topk_logprobs, of_ours, atol=TOLERANCE)
            assert request.signal == "topk" or np.array_equal(ours.topk_ids, rollout.topk_ids)
            assert ours.topk_ids.dtype == theirs.topk_ids.dtype


def test_the_probe_finds_what_the_server_was_started_with(http_server, whole_http_server, tokenizer):
    for served, largest_k in ((http_server, 64), (whole_http_server, 512)):
        limits = probe(served.model, [served.url], 30, served.key, tokenizer)
        assert limits == replace(LIMITS, largest_k=largest_k)
    with pytest.raises(ConfigError, match="one model alike"):
        probe(http_server.model, [http_server.url, whole_http_server.url], 30, http_server.key, tokenizer)


@pytest.mark.parametrize(("signal", "k"), [("sampled", 0), ("topk", 1), ("topk", 16), ("topk", TOP), ("given", 0)])
def test_scores_equal_the_transformers_teachers(signal, k, http_server, reference, rollouts):
    request = ScoreRequest(signal=signal, top_k=k)
    scores = teacher_of(http_server).score(rollouts, request)
    compare(rollouts, scores, request, reference)
    assert not any(score.entropy.size for score in scores)


@pytest.mark.parametrize(("signal", "k"), [("topk", 512), ("given", 0)])
def test_a_whole_vocabulary_gives_any_id_and_the_entropy(signal, k, whole_http_server, reference, rollouts):
    random = np.random.default_rng(np.random.SeedSequence())
    some = [replace(r, topk_ids=random.integers(0, 512, r.topk_ids.shape).astype(np.int32)) for r in rollouts[20:]]
    some = [rollout for rollout in some if rollout.response_length < 300]  # an answer to 200 tokens is 6 MB
    request = ScoreRequest(signal=signal, top_k=k)
    scores = teacher_of(whole_http_server, limits=replace(LIMITS, largest_k=512)).score(some, request)
    compare(some, scores, request, reference)
    for ours, theirs in zip(scores, reference.score(some, request), strict=True):
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=TOLERANCE)


def test_two_servers_share_the_work(http_server, whole_http_server, reference, rollouts):
    scores = teacher_of(http_server, whole_http_server).score(rollouts, ScoreRequest())
    compare(rollouts, scores, ScoreRequest(), reference)


def test_what_the_server_cannot_score_is_refused_alone(http_server, reference, rollouts):
    unlikely = rollouts[0].topk_ids.copy()
    rows = reference.score(rollouts[:1], ScoreRequest(signal="topk", top_k=512))[0]
    unlikely[-1, -1] = rows.topk_ids[-1, -1]
    last = rollouts[-1]
    long = replace(last, token_ids=np.resize(last.token_ids, 600), prompt_length=400)
    foreign = replace(last, token_ids=np.where(np.arange(len(last.token_ids)) == 3, 512, last.token_ids))
    mixed = [replace(rollouts[0], topk_ids=unlikely), long, foreign, rollouts[1]]
    expected = ["outside_top_k", "too_long", "bad_ids", ""]
    blind = replace(LIMITS, context=10_000, vocab=10_000)  # then the server itself says it
    for limits in (LIMITS, blind):
        scores = teacher_of(http_server, limits=limits).score(mixed, ScoreRequest(signal="given"))
        assert [score.error_class for score in scores] == expected


def test_a_foreign_tokenizer_a_wrong_key_and_a_wrong_name_are_refused(http_server, tokenizer, rollouts):
    urls = [http_server.url]
    with pytest.raises(TokenizerMismatch, match="ours"):
        probe(http_server.model, urls, 30, http_server.key, tiny_tokenizer())
    with pytest.raises(ConfigError, match="api_key_env") as caught:
        probe(http_server.model, urls, 30, "another-key", tokenizer)
    assert "another-key" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"small; .*'lab-teacher'"):
        probe("small", urls, 30, http_server.key, tokenizer)
    with pytest.raises(TeacherError, match="status 401"):
        teacher_of(http_server, key="another-key").score(rollouts, ScoreRequest())
    with pytest.raises(TeacherError, match=r"status 400.*greater than max"):
        too_many = replace(LIMITS, largest_k=100)
        teacher_of(http_server, limits=too_many).score(rollouts, ScoreRequest(signal="topk", top_k=65))
