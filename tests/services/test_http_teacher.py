"""The http teacher against a real server on this machine that answers rightly, or misbehaves as it is told."""

import email.utils
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from bigram_server import KEY, NEXT, BigramServer, V, edited, hang, serving, status, table
from score_cases import keep_all
from service_rows import fresh_random, random_rollout

from tutorloop.contracts.errors import ConfigError, TeacherError
from tutorloop.contracts.records import ScoreRequest
from tutorloop.teacher_service import http_engine
from tutorloop.teacher_service.http_engine import HttpTeacher, ServerLimits
from tutorloop.teacher_service.score_cache import FROZEN, CachePlace, ScoreCache

SUPPORT = 5
LIMITS = ServerLimits(context=127, vocab=V, largest_k=V, temperature="raw")
MARGIN = 5.0  # seconds, on a busy machine


def teacher_of(urls, *, timeout=20.0, at_once=4, limits=LIMITS, key=KEY):
    return HttpTeacher(
        "big",
        teacher_id="t",
        urls=urls,
        requests_per_url=at_once,
        timeout_seconds=timeout,
        limits=limits,
        api_key=key,
    )


def rollouts_of(count=6):
    random = fresh_random()
    made = [random_rollout(random, i, *random.integers(1, 20, 2).tolist()) for i in range(count)]
    return [replace(r, token_ids=r.token_ids % V, topk_ids=r.topk_ids % V) for r in made]


def check(rollouts, scores):
    """The right logprobs of every rollout, in order."""
    for rollout, score in zip(rollouts, scores, strict=True):
        ids, first = rollout.token_ids, rollout.prompt_length
        assert (score.error_class, score.rollout_id, score.teacher_id) == ("", rollout.rollout_id, "t")
        np.testing.assert_allclose(score.logprobs, table()[ids[first - 1 : -1], ids[first:]], atol=1e-5)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_every_signal_is_what_the_server_says_at_temperature_1():
    rollouts, server = rollouts_of(), BigramServer(tempered=True)
    with serving(server) as urls:
        teacher = teacher_of(urls)
        for signal, k in (("sampled", 0), ("topk", SUPPORT), ("topk", V), ("given", 0)):
            scores = teacher.score(rollouts, ScoreRequest(signal=signal, top_k=k, context="hinted"))
            check(rollouts, scores)
            for rollout, score in zip(rollouts, scores, strict=True):
                rows = table()[rollout.token_ids[rollout.prompt_length - 1 : -1]]
                assert (score.context, score.hidden.size) == ("hinted", 0) and score.logprobs.dtype == np.float32
                assert bool(score.entropy.size) == (signal == "given" or k == V)  # only of a whole vocabulary
                if score.entropy.size:
                    np.testing.assert_allclose(score.entropy, -(np.exp(rows) * rows).sum(1), atol=1e-5)
                if signal == "sampled":
                    assert score.topk_ids.size == score.topk_logprobs.size == 0
                    continue
                given = rollout.topk_ids if signal == "given" else np.argsort(-rows, 1)[:, :k]
                assert np.array_equal(score.topk_ids, given) and score.topk_ids.dtype == np.int32
                expected = np.take_along_axis(rows, given, 1)
                np.testing.assert_allclose(score.topk_logprobs, expected, atol=1e-5)
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {("big", 1, 1)}
    assert server.keys == {f"Bearer {KEY}"}


def test_given_ids_outside_the_servers_top_k_refuse_their_row_alone():
    good, bad = rollouts_of(2)
    for rollout, worst in ((good, False), (bad, True)):
        rows = table()[rollout.token_ids[rollout.prompt_length - 1 : -1]]
        order = np.argsort(-rows, 1)[:, :20]
        rollout.topk_ids[:] = order[:, 3 : 3 + SUPPORT]
        if worst:
            rollout.topk_ids[-1, 0] = np.argmin(rows[-1])
    limits = replace(LIMITS, largest_k=20)
    with serving(BigramServer(most=20)) as urls:
        scores = teacher_of(urls, limits=limits).score([bad, good], ScoreRequest(signal="given"))
    assert [s.error_class for s in scores] == ["outside_top_k", ""] and scores[0].logprobs.size == 0
    assert scores[1].entropy.size == 0
    check([good], scores[1:])


def test_given_asks_for_no_more_than_an_answer_may_hold(monkeypatch):
    monkeypatch.setattr(http_engine, "MOST_ENTRIES", 200)
    rollout, server = rollouts_of(1)[0], BigramServer()
    with serving(server) as urls:
        teacher_of(urls).score([rollout], ScoreRequest(signal="given"))
    assert server.bodies[0]["prompt_logprobs"] == max(SUPPORT, 200 // len(rollout.token_ids)) < V


def test_ids_that_the_tokenizer_lacks_refuse_their_row_alone():
    """A model's vocabulary may be padded; a padded id among the likeliest is no student's."""
    padded = np.concatenate([NEXT, np.full((V, 11), -40.0)], 1)
    padded[3, V + 2] = 40.0
    first, second = (
        replace(random_rollout(fresh_random(), i, 1, 2), token_ids=np.array(ids, np.int32))
        for i, ids in enumerate(([3, 4, 5], [6, 4, 5]))
    )
    with serving(BigramServer(logits=padded, most=20)) as urls:
        scores = teacher_of(urls).score([first, second], ScoreRequest(signal="topk", top_k=SUPPORT))
    assert [score.error_class for score in scores] == ["outside_vocabulary", ""]
    check([second], scores[1:])


def test_what_cannot_be_scored_is_refused_without_asking():
    good = rollouts_of(1)[0]
    random = fresh_random()
    bad = {
        "too_long": random_rollout(random, 1, 100, 28),
        "empty": random_rollout(random, 2, 4, 0),
        "bad_ids": replace(good, token_ids=good.token_ids + V),
        "no_support": replace(good, topk_ids=np.zeros((0, 0), np.int32)),
    }
    server = BigramServer()
    with serving(server) as urls:
        scores = teacher_of(urls).score([*bad.values(), good], ScoreRequest(signal="given"))
        assert teacher_of(urls).score([], ScoreRequest()) == []
    assert [s.error_class for s in scores] == [*bad, ""] and len(server.bodies) == 1


def test_what_the_servers_cannot_give_is_refused_before_a_request():
    server = BigramServer()
    with serving(server) as urls:
        teacher = teacher_of(urls, limits=replace(LIMITS, largest_k=20))
        with pytest.raises(ConfigError, match="hidden states"):
            teacher.score(rollouts_of(), ScoreRequest(signal="hidden"))
        with pytest.raises(ConfigError, match="21 asked of t, whose servers give 20"):
            teacher.score(rollouts_of(), ScoreRequest(signal="topk", top_k=21))
        with pytest.raises(ConfigError):
            teacher_of(urls, limits=replace(LIMITS, largest_k=0)).score(rollouts_of(), ScoreRequest(signal="given"))
    assert not server.bodies and teacher.largest_k == 20


# ---- transport ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [408, 425, 429, 500, 503])
def test_a_passing_failure_is_tried_again(code):
    rollouts, server = rollouts_of(1), BigramServer(script=[status(code), status(code)])
    with serving(server) as urls:
        check(rollouts, teacher_of(urls).score(rollouts, ScoreRequest()))
    assert len(server.times) == 3 and server.connections == 1


def test_retry_after_is_honoured():
    for header_in in (str, lambda seconds: email.utils.formatdate(time.time() + 1 + seconds, usegmt=True)):
        header = header_in(1.5)
        rollouts, server = rollouts_of(1), BigramServer(script=[status(503, ("Retry-After", header))])
        with serving(server) as urls:
            check(rollouts, teacher_of(urls).score(rollouts, ScoreRequest()))
        assert server.times[1] - server.times[0] >= 1.5


def test_a_retry_after_beyond_the_deadline_ends_at_once():
    start = time.monotonic()
    later = BigramServer(always=status(503, ("Retry-After", "3600")))
    with serving(later) as urls, pytest.raises(TeacherError, match="status 503"):
        teacher_of(urls, timeout=60).score(rollouts_of(), ScoreRequest())
    assert time.monotonic() - start < 2 * MARGIN


def test_a_server_that_hangs_ends_in_an_error_that_names_it():
    start = time.monotonic()
    with serving(BigramServer(always=hang)) as urls:
        with pytest.raises(TeacherError) as caught:
            teacher_of(urls, timeout=1.0).score(rollouts_of(), ScoreRequest())
        assert time.monotonic() - start < 1 + MARGIN
    assert urls[0] in str(caught.value) and "timed out" in str(caught.value)


def test_an_answer_that_trickles_ends_with_the_deadline():
    def trickle(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.1)
        return True

    start = time.monotonic()
    with serving(BigramServer(always=trickle)) as urls, pytest.raises(TeacherError, match="still coming"):
        teacher_of(urls, timeout=1.0).score(rollouts_of(1), ScoreRequest())
    assert time.monotonic() - start < 1 + MARGIN


def test_another_server_takes_over_from_one_that_hangs_refuses_or_dies_in_its_answer():
    def dies(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"model"')
        handler.close_connection = True
        return True

    rollouts = rollouts_of(12)
    refused = f"http://127.0.0.1:{free_port()}/v1"
    for bad in (BigramServer(always=hang), BigramServer(always=dies), None):
        with serving(*filter(None, [bad, good := BigramServer()])) as urls:
            scores = teacher_of([refused] * (bad is None) + urls, timeout=6.0).score(rollouts, ScoreRequest())
        check(rollouts, scores)
        assert len(good.times) == 12 and (bad is None or bad.times)


def test_no_server_is_an_error_that_names_all():
    urls = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(2)]
    start = time.monotonic()
    with pytest.raises(TeacherError, match="refused") as caught:
        teacher_of(urls, timeout=1.0).score(rollouts_of(), ScoreRequest())
    assert all(url in str(caught.value) for url in urls) and time.monotonic() - start < 1 + MARGIN


def test_a_server_that_takes_two_at_once_serves_all():
    def crowded(handler, body):
        if handler.server.running <= 2:
            time.sleep(0.02)
            return False
        return status(429)(handler, body)

    rollouts, server = rollouts_of(30), BigramServer(always=crowded)
    with serving(server) as urls:
        check(rollouts, teacher_of(urls, at_once=8, timeout=60).score(rollouts, ScoreRequest()))
    assert len(server.times) > 30


def test_each_server_has_few_requests_at_once_on_kept_connections():
    def slow(handler, body):
        time.sleep(0.02)

    rollouts, servers = rollouts_of(60), [BigramServer(always=slow), BigramServer(always=slow)]
    with serving(*servers) as urls:
        teacher = teacher_of(urls, at_once=3)
        for _ in range(2):
            check(rollouts, teacher.score(rollouts, ScoreRequest()))
    for server in servers:
        assert 1 < server.most_running <= 3 and server.connections <= 3 and len(server.times) > 30
    assert sum(len(server.times) for server in servers) == 120


def test_the_limit_holds_where_one_server_does_the_work_of_two():
    def slow(handler, body):
        time.sleep(0.02)

    rollouts, server = rollouts_of(30), BigramServer(always=slow)
    with serving(server) as urls:
        teacher = teacher_of([f"http://127.0.0.1:{free_port()}/v1", *urls], at_once=3)
        check(rollouts, teacher.score(rollouts, ScoreRequest()))
    assert 1 < server.most_running <= 3


def test_failures_side_by_side_count_as_one():
    """Eight in a row would put the server to rest for longer than the deadline."""
    together = threading.Barrier(8)

    def fails(handler, body):
        together.wait(MARGIN)
        return status(503)(handler, body)

    rollouts, server = rollouts_of(8), BigramServer(script=[fails] * 8)
    with serving(server) as urls:
        check(rollouts, teacher_of(urls, at_once=8, timeout=6).score(rollouts, ScoreRequest()))
    assert len(server.times) == 16


def test_no_redirect_is_followed():
    elsewhere = BigramServer()
    moved = BigramServer(always=status(307, ("Location", f"{elsewhere.url}/completions")))
    with serving(moved, elsewhere) as urls, pytest.raises(TeacherError, match="status 307"):
        teacher_of(urls[:1]).score(rollouts_of(1), ScoreRequest())
    assert not elsewhere.bodies


# ---- answers that break the contract --------------------------------------------------------------------------------


def of_last(what):
    """The last token's logprob becomes `what`."""
    return lambda rows, body: rows[-1][str(body["prompt"][-1])].update(logprob=what)


@pytest.mark.parametrize(
    ("rule", "edit"),
    [
        ("3 for 4", lambda rows, body: rows.pop()),
        ("5 for 4", lambda rows, body: rows.append(rows[-1])),
        ("are finite", of_last(float("nan"))),
        ("are finite", of_last(float("-inf"))),
        ("are finite", of_last(0.5)),
        ("maps ids to their logprobs", of_last(None)),
        ("maps ids to their logprobs", lambda rows, body: rows[-1].update({str(body["prompt"][-1]): -1.0})),
        ("holds its own token", lambda rows, body: rows.__setitem__(-1, {"260": {"logprob": -1.0}})),
        ("as many ids as were asked", lambda rows, body: rows[-1].clear()),
        ("as many ids as were asked", lambda rows, body: rows.__setitem__(-1, None)),
        ("as many ids as were asked", lambda rows, body: rows[-1].update({"7": {"logprob": -9.0}, "8": {}})),
    ],
)
def test_a_broken_answer_is_an_error_and_no_score(rule, edit):
    rollout = replace(random_rollout(fresh_random(), 0, 2, 2), token_ids=np.array([3, 4, 5, 6], np.int32))
    with serving(BigramServer(always=edited(edit))) as urls, pytest.raises(TeacherError, match=rule) as caught:
        teacher_of(urls).score([rollout], ScoreRequest())
    assert urls[0] in str(caught.value)


def test_probabilities_above_one_are_an_error():
    rollouts = rollouts_of(1)
    likelier = edited(lambda rows, body: [entry.update(logprob=-0.1) for entry in rows[-1].values()])
    with serving(BigramServer(always=likelier)) as urls, pytest.raises(TeacherError, match="sum to at most 1"):
        teacher_of(urls).score(rollouts, ScoreRequest(signal="topk", top_k=SUPPORT))


def test_another_model_no_logprobs_and_no_json_are_errors():
    def answering(made):
        return lambda handler, body: handler.answer(200, made) or True

    for made, rule in (
        ({"model": f"small {KEY}", "choices": [{}]}, "the model that was asked"),
        ({"model": "big", "choices": [{"prompt_logprobs": None}]}, "holds prompt_logprobs"),
        ({"model": "big", "choices": []}, "one choice"),
        ([], "one choice"),
        (b"<html>", "in JSON"),
    ):
        with serving(BigramServer(always=answering(made))) as urls, pytest.raises(TeacherError, match=rule) as caught:
            teacher_of(urls).score(rollouts_of(1), ScoreRequest())
        assert KEY not in str(caught.value)


def test_a_refusal_of_one_prompt_is_its_rows_and_any_other_the_servers():
    def saying(code, message):
        return lambda handler, body: handler.answer(code, {"error": {"message": message}}) or True

    rollouts = rollouts_of(3)
    long = saying(400, "This model's maximum context length is 12 tokens. However, your prompt contains 13")
    with serving(BigramServer(script=[long, saying(400, "Token id 7 is out of vocabulary")])) as urls:
        scores = teacher_of(urls, at_once=1).score(rollouts, ScoreRequest())
    assert [s.error_class for s in scores] == ["too_long", "bad_ids", ""]
    for code in (400, 401, 404, 302):
        with serving(BigramServer(script=[status(code)])) as urls, pytest.raises(TeacherError, match=f"status {code}"):
            teacher_of(urls).score(rollouts, ScoreRequest())


def test_the_key_is_in_no_text_and_what_a_server_writes_is_escaped_and_cut():
    def shouts(handler, body):
        return handler.answer(403, (f"{KEY}\n\x1b[31m" + "x" * 5000).encode()) or True

    for behave in (shouts, status(503, ("Retry-After", "99"))):
        with serving(BigramServer(always=behave)) as urls:
            teacher = teacher_of(urls)
            with pytest.raises(TeacherError) as caught:
                teacher.score(rollouts_of(1), ScoreRequest())
        text = str(caught.value) + repr(caught.value) + repr(teacher) + repr(teacher.client)
        assert KEY not in text and "[key]" in text and "\x1b" not in text and len(str(caught.value)) < 600
    for key in ("sk-\nx", "sk-é", "sk x"):
        with pytest.raises(ConfigError) as refused:
            teacher_of(["http://127.0.0.1:1/v1"], key=key)
        assert key not in str(refused.value)


def test_what_servers_answered_before_one_failed_is_not_paid_twice(tmp_path, monkeypatch):
    """The fifth request of six is refused; the call that comes next asks for the first four no more."""
    keep_all(monkeypatch)
    rollouts, request = rollouts_of(), ScoreRequest(signal="topk", top_k=SUPPORT)
    place = CachePlace(run=str(tmp_path), teacher_id="t", most_bytes=2**30, scorer="big")
    with serving(BigramServer()) as urls:
        expected = teacher_of(urls).score(rollouts, request)
    server = BigramServer(script=[None] * 4 + [status(400)])
    with serving(server) as urls:
        for failing in (True, False, False):
            cache = ScoreCache(place, teacher_of(urls, at_once=1))  # a replica that comes in place of another
            if failing:
                with pytest.raises(TeacherError, match="status 400"):
                    cache.score(rollouts, request, FROZEN)
                assert len(server.bodies) >= 5
            else:
                scores, _ = cache.score(rollouts, request, FROZEN)
                check(rollouts, scores)
                for one, other in zip(scores, expected, strict=True):
                    assert one.topk_logprobs.tobytes() == other.topk_logprobs.tobytes()
    asked = [tuple(body["prompt"]) for body in server.bodies]
    assert (
        7 <= len(asked) <= 8 and len(set(asked)) == 6
    )  # the one that failed twice, and at most one in flight beside it
