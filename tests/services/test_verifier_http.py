"""The http verifier against a real server on this machine that judges, or misbehaves as it is told."""

import email.utils
import gzip
import http.server
import json
import pickle
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.protocols import Judgement, Response
from tutorloop.contracts.verifier_config import Verifier as Config
from tutorloop.verifier_service.http_verifier import HttpVerifier
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.verifiers import make_verifier

KEY = "sk-kept-to-itself"
PATIENT = 30.0  # seconds
RESPONSE = Response(text="so 4", gold="4", prompt="2+2", row='{"level": 7}')


class Server(http.server.ThreadingHTTPServer):
    """`script` is called with a handler and its request's number, and answers."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.lock = script, [], threading.Lock()
        self.gone = threading.Event()  # a script that hangs waits for it

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/judge"

    def handle_error(self, request, client_address):
        """A client that has hung up."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            number = len(self.server.seen)
        self.server.script(self, number)

    def do_GET(self):
        self.server.seen.append((self.path, dict(self.headers), None))
        answer(self, b"{}")

    def log_message(self, format, *args):
        pass


def answer(handler, body, status=200, **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def serving(*scripts):
    servers = [Server(script) for script in scripts]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield servers
    finally:
        for server in servers:
            server.gone.set()
            server.shutdown()
            server.server_close()


def good(handler, number):
    answer(handler, {"score": 1.0})


def verifier_of(servers, *, seconds=PATIENT, key=KEY, pass_score=1.0):
    return HttpVerifier([server.url for server in servers], key, seconds, pass_score)


def asked(script, seconds=PATIENT, **options):
    """What one server's script makes of RESPONSE."""
    with serving(script) as servers:
        return verifier_of(servers, seconds=seconds, **options)(RESPONSE)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_server_sees_the_response_and_the_key_in_its_header_alone():
    with serving(good) as servers:
        verifier = verifier_of(servers)
        assert verifier.prepare(RESPONSE) == RESPONSE and verifier.waits and not verifier.needs_gold
        assert verifier(RESPONSE) == Judgement(True, "", 1.0)
        assert verifier(Response(text="\ud800 é\u2028")) == Judgement(True, "", 1.0)
        assert verifier_of(servers, key="")(RESPONSE).passed
        assert verifier(Response(text="4", gold="4", other_golds=("5", "6"))).passed
    (path, headers, body), (_, _, other), (_, no_key, _), (_, _, several) = servers[0].seen
    assert several == {"prompt": "", "response": "4", "gold": "4", "other_golds": ["5", "6"], "row": None}
    assert (path, body) == ("/judge", {"prompt": "2+2", "response": "so 4", "gold": "4", "row": {"level": 7}})
    assert other == {"prompt": "", "response": "\ud800 é\u2028", "gold": "", "row": None}
    assert headers.pop("Authorization") == f"Bearer {KEY}" and "Authorization" not in no_key
    assert KEY not in str(headers) + str(body) + repr(verifier)


@pytest.mark.parametrize(
    ("body", "judgement"),
    [
        ({"score": 1}, Judgement(True, "", 1.0)),
        ({"score": 0.25}, Judgement(False, "", 0.25)),
        ({"score": 0.25, "passed": True, "answer": "4"}, Judgement(True, "4", 0.25)),
        ({"score": 5, "passed": False, "answer": None, "more": []}, Judgement(False, "", 5.0)),
        ({"score": 1, "answer": "\ud800"}, Judgement(True, "?", 1.0)),
    ],
)
def test_judgements(body, judgement):
    assert asked(lambda handler, number: answer(handler, body)) == judgement


def test_pass_score_decides_where_the_server_does_not():
    assert asked(lambda handler, number: answer(handler, {"score": 0.5}), pass_score=0.5).passed


BAD = {
    "no JSON": b"so it is",
    "no UTF-8": b"\xff",
    "nothing": b"",
    "a list": b"[1]",
    "no score": b"{}",
    "NaN": b'{"score": NaN}',
    "Infinity": b'{"score": 1e999}',
    "a huge integer": b'{"score": ' + b"9" * 400 + b"}",
    "a longer integer": b'{"score": ' + b"9" * 5000 + b"}",
    "a text as score": b'{"score": "1"}',
    "true as score": b'{"score": true}',
    "a text as passed": b'{"score": 1, "passed": "yes"}',
    "a number as answer": b'{"score": 1, "answer": 4}',
    "nested without end": b"[" * 100_000,
    "huge": b'{"score": 1, "answer": "' + b"4" * (1 << 20) + b'"}',
    "packed": gzip.compress(b'{"score": 1}'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_abstains(name):
    headers = {"Content_Encoding": "gzip"} if name == "packed" else {}
    judged = asked(lambda handler, number: answer(handler, BAD[name], **headers))
    assert judged == Judgement(False, error_class="http_bad_answer")


def test_a_body_without_end_is_not_read_to_it():
    def endless(handler, number):
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        while not handler.server.gone.is_set():
            handler.wfile.write(b" " * (1 << 16))

    assert asked(endless).error_class == "http_bad_answer"


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 201, 204])
def test_a_status_that_stays_is_asked_once(status):
    with serving(lambda handler, number: answer(handler, b"", status)) as servers:
        assert verifier_of(servers)(RESPONSE) == Judgement(False, error_class=f"http_{status}")
    assert len(servers[0].seen) == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
def test_a_status_that_passes_is_asked_again(status):
    with serving(lambda handler, n: good(handler, n) if n > 2 else answer(handler, b"", status)) as servers:
        assert verifier_of(servers)(RESPONSE).passed
    assert len(servers[0].seen) == 3


def test_a_redirect_is_refused_and_the_key_stays_here():
    with serving(good) as others, serving(lambda h, n: answer(h, b"", 302, Location=others[0].url)) as servers:
        assert verifier_of(servers)(RESPONSE).error_class == "http_302"
        assert not others[0].seen


def test_retries_end_within_the_budget_under_the_last_status():
    with serving(lambda handler, number: answer(handler, b"", 500)) as servers:
        start = time.monotonic()
        assert verifier_of(servers, seconds=1.0)(RESPONSE).error_class == "http_500"
        assert time.monotonic() - start < 10
    assert 2 <= len(servers[0].seen) <= 20  # they wait longer and longer


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form):
    times = []

    def busy(handler, number):
        times.append(time.monotonic())
        after = "1.5" if form == "seconds" else email.utils.formatdate(time.time() + 3, usegmt=True)
        good(handler, number) if number > 1 else answer(handler, b"", 429, Retry_After=after)

    assert asked(busy).passed
    assert times[1] - times[0] > 1.4


def test_retry_after_beyond_the_budget_ends_it():
    start = time.monotonic()
    assert asked(lambda handler, n: answer(handler, b"", 503, Retry_After="3600")).error_class == "http_503"
    assert time.monotonic() - start < PATIENT / 2


def hang(handler, number):
    handler.server.gone.wait(PATIENT)


def drip(handler, number):
    """A byte now and then: no single read times out."""
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    while not handler.server.gone.wait(0.1):
        handler.wfile.write(b" ")


@pytest.mark.parametrize("script", [hang, drip])
def test_a_slow_server_abstains_within_the_budget(script):
    start = time.monotonic()
    assert asked(script, seconds=1.0).error_class == "http_timeout"
    assert time.monotonic() - start < 10


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_no_server_abstains():
    verifier = HttpVerifier([f"http://127.0.0.1:{free_port()}/"], KEY, 1.0, 1.0)
    assert verifier(RESPONSE).error_class == "http_unreachable"
    assert HttpVerifier(["http://"], KEY, 1.0, 1.0)(RESPONSE).error_class == "http_unreachable"


@pytest.mark.parametrize("other", [hang, lambda h, n: answer(h, b"", 500), lambda h, n: h.connection.close()])
def test_the_next_server_takes_over(other):
    with serving(other, good) as servers:
        absent = f"http://127.0.0.1:{free_port()}/"
        verifier = HttpVerifier([absent, *(server.url for server in servers)], KEY, 4.0, 1.0)
        assert all(verifier(RESPONSE).passed for _ in range(2))


@pytest.mark.parametrize(
    ("urls", "key"), [(["ftp://a"], ""), (["a:80"], ""), (["http://a"], "ké"), (["http://a"], "k\n")]
)
def test_urls_and_keys_are_checked_and_keys_not_shown(urls, key):
    with pytest.raises(ConfigError) as error:
        HttpVerifier(urls, key, 1.0, 1.0)
    assert not key or key not in str(error.value)


# ---- in the pool ----------------------------------------------------------------------------------------------------


def test_many_wait_side_by_side_in_processes():
    together = threading.Barrier(6)

    def slow(handler, number):
        together.wait(PATIENT)  # six at once, or none
        good(handler, number)

    with serving(slow) as servers:
        config = Config(kind="http", urls=(servers[0].url,), timeout_seconds=PATIENT)
        verifier = pickle.loads(pickle.dumps(make_verifier(config, api_key=KEY)))
        pool = VerifierPool(verifier, timeout_seconds=PATIENT)
        outcomes = pool.judge([Response(text=str(i)) for i in range(12)])
        pool.close()
    assert all(outcome.judgement.passed for outcome in outcomes)
    assert {headers["Authorization"] for _, headers, _ in servers[0].seen} == {f"Bearer {KEY}"}


def test_a_hung_server_is_told_from_a_killed_sample():
    with serving(hang) as servers:
        pool = VerifierPool(verifier_of(servers, seconds=3.0), timeout_seconds=3.0)
        outcome = pool.judge([RESPONSE])[0]
        pool.close()
    assert outcome.judgement.error_class == "http_timeout"
