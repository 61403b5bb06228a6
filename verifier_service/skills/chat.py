"""A model behind an OpenAI-compatible server, asked for one JSON object at a time.

Redirects are not followed, so that the key goes nowhere else. What a server writes is data: an answer that is late, too
long or no JSON object comes back as its error class, never as an exception.
"""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import urllib3
from requests.auth import AuthBase

from ...contracts.errors import ConfigError

RETRIED = frozenset({408, 425, 429, *range(500, 600)})
FIRST_REST, LONGEST_REST = 0.25, 8.0  # seconds
MOST_BYTES = 1 << 20  # of an answer
AT_ONCE = 8
TIMEOUTS = (requests.Timeout, urllib3.exceptions.TimeoutError)
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError)  # the second: while the body is read


class ChatModel:
    """`url` is the server's address up to `/v1`. Each request is tried until `timeout_seconds`. Raises ConfigError."""

    def __init__(self, url: str, model: str, api_key: str = "", timeout_seconds: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("an extractor is lab or a server's address", url, "e.g. http://HOST:8000/v1")
        if not model:
            raise ConfigError("a server is asked for a model by name", f"no name for {url}", "name it")
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            found = f"{len(api_key)} characters, with others among them"
            raise ConfigError("a server's key is printable ASCII without blanks", found, "check its variable")
        self.url, self.model, self.timeout_seconds = url.rstrip("/") + "/chat/completions", model, timeout_seconds
        self._auth = _Bearer(api_key)

    def ask(self, instruction: str, data: Sequence[object]) -> list[dict[str, Any] | str]:
        """For each of `data`, sent as JSON beside the instruction: the object answered, or the error class.

        After AT_ONCE failures in a row the server is asked no more: the rest is "http_not_asked".
        """
        failures, lock = 0, threading.Lock()

        def ask(item: object) -> dict[str, Any] | str:
            nonlocal failures
            if failures >= AT_ONCE:
                return "http_not_asked"
            answer = self._ask(instruction, item)
            with lock:
                failures = failures + 1 if isinstance(answer, str) and answer.startswith("http_") else 0
            return answer

        threads = ThreadPoolExecutor(AT_ONCE)
        try:
            return list(threads.map(ask, data))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # one who interrupts does not wait for a server

    def _ask(self, instruction: str, item: object) -> dict[str, Any] | str:
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": instruction},
                {"role": "user", "content": json.dumps(item)},
            ],
        }
        deadline, rest = time.monotonic() + self.timeout_seconds, FIRST_REST
        while True:
            answer, asked_rest = self._try(body, deadline)
            rest = max(rest, asked_rest)
            if not isinstance(answer, str) or asked_rest < 0 or time.monotonic() + rest >= deadline:
                return answer
            time.sleep(rest)
            rest = min(2 * rest, LONGEST_REST)

    def _try(self, body: Mapping[str, Any], deadline: float) -> tuple[dict[str, Any] | str, float]:
        """The object or the error class, and the seconds that the server wants to rest; negative: ask no more."""
        left = max(deadline - time.monotonic(), 0.001)
        headers = {"Accept-Encoding": "identity"}  # what is short stays short
        try:
            with requests.post(
                self.url, json=body, headers=headers, auth=self._auth, timeout=left, allow_redirects=False, stream=True
            ) as reply:
                if reply.status_code == 200:
                    return _object(_read(reply, deadline)), -1.0
                rest = _seconds(reply.headers.get("Retry-After", "")) if reply.status_code in RETRIED else -1.0
                return f"http_{reply.status_code}", rest
        except TIMEOUTS:
            return "http_timeout", 0.0
        except FAILURES:
            return "http_unreachable", 0.0


class _Bearer(AuthBase):
    """The key in its header, if there is one, and so no other one from a netrc file."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            r.headers["Authorization"] = f"Bearer {self._key}"
        return r


def _read(reply: requests.Response, deadline: float) -> bytes:
    """The body, empty where it is longer than MOST_BYTES. Raises requests.Timeout at the deadline."""
    read = bytearray()
    while chunk := reply.raw.read1(1 << 16, decode_content=False):
        read += chunk
        if len(read) > MOST_BYTES:
            return b""
        if time.monotonic() > deadline:
            raise requests.Timeout
    return bytes(read)


def _seconds(header: str) -> float:
    """A Retry-After header's seconds; 0 for a date or none."""
    try:
        seconds = float(header)
    except ValueError:
        return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _object(body: bytes) -> dict[str, Any] | str:
    """The JSON object that the message is, thoughts before it and a code fence around it left out; else "bad_json"."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"].rpartition("</think>")[2].strip()
        if text.startswith("```") and text.endswith("```"):
            text = text.strip("`").removeprefix("json")
        found = json.loads(text)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return "bad_json"
    return found if isinstance(found, dict) else "bad_json"
