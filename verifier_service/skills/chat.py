"""A model behind an OpenAI-compatible server, asked for one JSON object at a time.

Redirects are not followed, so that the key goes nowhere else. What a server writes is data: an answer that is late, too
long or no JSON object comes back as its error class, never as an exception.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from ...contracts.errors import ConfigError
from ..http import FAILURES, PLAIN, RETRIED, TIMEOUTS, Bearer, read_body, retry_after

FIRST_REST, LONGEST_REST = 0.25, 8.0  # seconds
AT_ONCE = 8


class ChatModel:
    """`url` is the server's address up to `/v1`. Each request is tried until `timeout_seconds`. Raises ConfigError."""

    def __init__(self, url: str, model: str, api_key: str = "", timeout_seconds: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("an extractor is lab or a server's address", url, "e.g. http://HOST:8000/v1")
        if not model:
            raise ConfigError("a server is asked for a model by name", f"no name for {url}", "name it")
        self.url, self.model, self.timeout_seconds = url.rstrip("/") + "/chat/completions", model, timeout_seconds
        self._auth = Bearer(api_key)

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
        try:
            with requests.post(
                self.url, json=body, headers=PLAIN, auth=self._auth, timeout=left, allow_redirects=False, stream=True
            ) as reply:
                if reply.status_code == 200:
                    return _object(read_body(reply, deadline)), -1.0
                rest = retry_after(reply) if reply.status_code in RETRIED else -1.0
                return f"http_{reply.status_code}", rest
        except TIMEOUTS:
            return "http_timeout", 0.0
        except FAILURES:
            return "http_unreachable", 0.0


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
