"""A verifier that a server runs: POST {prompt, response, gold, other_golds?, row}, answer {score, passed?, answer?}.

Without `passed` a response passes from `pass_score` on. The servers are tried in turn, from a random one on: no
connection, no answer in time, 408, 425, 429 and 5xx lead to the next, and send a server to rest for a time that doubles
with each round, or that its Retry-After asks for. All tries together have four fifths of the sample's budget; what was
wrong with the last one is the error class: http_STATUS, http_unreachable, http_timeout or http_bad_answer. Redirects
are not followed (http_302), so that the key goes nowhere else; it is in the Authorization header alone.
"""

import contextlib
import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import requests

from ..contracts.errors import ConfigError
from ..contracts.protocols import Judgement, Response
from .http import FAILURES, PLAIN, RETRIED, TIMEOUTS, Bearer, read_body, retry_after

FIRST_REST, LONGEST_REST = 0.1, 2.0  # seconds
SHARE = 0.8  # of a sample's budget: what is left tells why, before the process is killed
BAD_ANSWER = "http_bad_answer"


class HttpVerifier:
    """Asks servers. `timeout_seconds` is a sample's whole budget. Raises ConfigError for a bad URL or key."""

    needs_gold, waits, harmless = False, True, ""

    def __init__(self, urls: Sequence[str], api_key: str, timeout_seconds: float, pass_score: float) -> None:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError("verifier.urls are http:// or https:// addresses", url, "e.g. http://HOST:8000/judge")
        self.urls, self.timeout_seconds, self.pass_score = tuple(urls), timeout_seconds, pass_score
        self._auth = Bearer(api_key)

    def prepare(self, response: Response) -> Judgement | Response:
        """A server decides everything."""
        return response

    def __call__(self, response: Response) -> Judgement:
        deadline = time.monotonic() + SHARE * self.timeout_seconds
        row = json.loads(response.row, parse_constant=lambda _: None) if response.row else None
        body = {"prompt": response.prompt, "response": response.text, "gold": response.gold, "row": row}
        if response.other_golds:
            body["other_golds"] = list(response.other_golds)
        awake = dict.fromkeys(random.sample(self.urls, len(self.urls)), -math.inf)  # from when on
        for tries in itertools.count():
            url = min(awake, key=awake.__getitem__)
            time.sleep(max(awake[url] - time.monotonic(), 0.0))
            judged, rest = self._ask(url, body, deadline)
            if rest is None:
                return judged
            doubled = min(LONGEST_REST, FIRST_REST * 2 ** (tries // len(awake))) * random.uniform(0.5, 1)
            awake[url] = time.monotonic() + max(rest, doubled)
            if min(awake.values()) >= deadline:
                return judged
        raise AssertionError

    def _ask(self, url: str, body: Mapping[str, Any], deadline: float) -> tuple[Judgement, float | None]:
        """One try: what it says, and where another is worth it the seconds that the server wants to rest."""
        left = max(deadline - time.monotonic(), 0.001)
        if len(self.urls) > 1:
            left /= 2  # so that another server can still take over
        ends = time.monotonic() + left
        try:
            with _session().post(
                url, json=body, headers=PLAIN, auth=self._auth, timeout=left, allow_redirects=False, stream=True
            ) as reply:
                if reply.status_code == 200:
                    return self._judgement(read_body(reply, ends)), None
                rest = retry_after(reply) if reply.status_code in RETRIED else None
                return _error(f"http_{reply.status_code}"), rest
        except requests.ConnectTimeout:
            return _error("http_unreachable"), 0.0
        except TIMEOUTS:
            return _error("http_timeout"), 0.0
        except FAILURES:
            return _error("http_unreachable"), 0.0

    def _judgement(self, body: bytes) -> Judgement:
        """Of a body, empty where it was too long."""
        try:
            found = json.loads(body or b"null")
        except (ValueError, RecursionError):
            return _error(BAD_ANSWER)
        if not isinstance(found, Mapping):
            return _error(BAD_ANSWER)
        score, passed, answer = _finite(found.get("score")), found.get("passed"), found.get("answer")
        if score is None or not isinstance(passed, bool | None) or not isinstance(answer, str | None):
            return _error(BAD_ANSWER)
        answer = (answer or "").encode("utf-8", "replace").decode()  # JSON can hold half a character
        return Judgement(score >= self.pass_score if passed is None else passed, answer, score)


@cache
def _session() -> requests.Session:
    """This process's connections, kept from sample to sample."""
    return requests.Session()


def _finite(value: object) -> float | None:
    """The value as a float, if it is a finite number."""
    with contextlib.suppress(OverflowError):  # an integer beyond floats
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def _error(name: str) -> Judgement:
    return Judgement(False, error_class=name)
