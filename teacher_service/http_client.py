"""HTTP to the servers of one model: kept connections, few requests at each, and retries until a deadline.

A request goes to the least busy server that is awake. One that fails (no connection, no answer in time, 408, 425, 429,
5xx) puts its server to rest, for as long as its Retry-After says or for a time that doubles with each failure in a row,
and goes to another server, or to the same one after its rest.
"""

import email.utils
import json
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from ..contracts.errors import ConfigError, TeacherError

RETRIED = frozenset({408, 425, 429, *range(500, 600)})
FIRST_REST, LONGEST_REST = 0.25, 15.0  # seconds
CONNECT_SECONDS = 10.0
SHOWN = 200  # characters of what a server wrote, in an error
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError)  # the second: while the body is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A server's last word on a request: 200, or a status that asking again would not change."""

    url: str
    status: int
    body: bytes = field(repr=False)
    key: str = field(repr=False)

    def json(self) -> Any:
        """Raises TeacherError where the body is no JSON. NaN and Infinity are read as such."""
        try:
            return json.loads(self.body)
        except ValueError:
            found = f"{self.url}: {len(self.body)} bytes"
            raise TeacherError("a teacher's server answers in JSON", found, "check what teacher.urls name") from None

    def shown(self, part: object = None) -> str:
        """A part of it, or all, fit for an error."""
        return _shown(self.body if part is None else part, self.key)


class _Bearer(AuthBase):
    """The key in its header, and so no other one from a netrc file."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        r.headers["Authorization"] = f"Bearer {self.key}"
        return r


class _Server:
    """One URL: its connections, and how it does. Guarded by the client's lock, but for the session."""

    def __init__(self, url: str, connections: int, api_key: str) -> None:
        self.url, self.busy, self.failures, self.reason = url, 0, 0, "busy"
        self.failed_at, self.rests_until = -math.inf, -math.inf  # of time.monotonic()
        self.session = requests.Session()
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=connections)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        if api_key:
            self.session.auth = _Bearer(api_key)

    def rest(self, began: float, seconds: float | None) -> None:
        """After a failure of a request that `began` then. Those that ran beside a counted failure count as one."""
        now = time.monotonic()
        if began >= self.failed_at:
            self.failures, self.failed_at = self.failures + 1, now
        if seconds is None:
            seconds = min(LONGEST_REST, FIRST_REST * 2 ** (self.failures - 1)) * random.uniform(0.5, 1)
        self.rests_until = max(self.rests_until, now + seconds)


class HttpClient:
    """Asks servers of one model; may be called from many threads. `most_tries` 0 tries until the deadline."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        requests_per_url: int,
        timeout_seconds: float,
        api_key: str = "",
        most_tries: int = 0,
    ) -> None:
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            found = f"{len(api_key)} characters, with others among them"
            raise ConfigError("a server's key is printable ASCII without blanks", found, "check teacher.api_key_env")
        self.urls, self.requests_per_url, self.timeout_seconds = tuple(urls), requests_per_url, timeout_seconds
        self.most_tries, self._key = most_tries, api_key
        self._servers = [_Server(url, requests_per_url, api_key) for url in urls]
        self._changed = threading.Condition()

    def close(self) -> None:
        for server in self._servers:
            server.session.close()

    def send(self, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """POST `body` to `path` beside the URL (GET without one). Raises TeacherError where no server answers in time.

        A status of 408, 425, 429 or 5xx is no answer; any other is, and the caller's to judge.
        """
        start = time.monotonic()
        deadline = start + self.timeout_seconds
        tries = 0
        while not self.most_tries or tries < self.most_tries:
            server = self._take(deadline)
            if server is None:
                break
            tries, began, rest, failed = tries + 1, time.monotonic(), None, True
            try:
                reply, rest = self._ask(server, path, body, deadline)
                failed = reply.status in RETRIED
                if not failed:
                    return reply
                server.reason = f"status {reply.status}: {reply.shown()}"
            except FAILURES as error:
                server.reason = _shown(_root(error), self._key)
            finally:
                self._give_back(server, failed, began, rest)
        said = "; ".join(f"{server.url}: {server.reason}" for server in self._servers)
        raise TeacherError(
            "a teacher's server answers within the deadline",
            f"{said} ({tries} tries in {time.monotonic() - start:.1f} of {self.timeout_seconds:g} s)",
            "start the servers of teacher.urls, or raise teacher.timeout_seconds",
        )

    def _take(self, deadline: float) -> _Server | None:
        """A place at the least busy server that is awake; none where there will be none before the deadline."""
        with self._changed:
            while (now := time.monotonic()) < deadline:
                awake = [server for server in self._servers if server.rests_until <= now]
                free = [server for server in awake if server.busy < self.requests_per_url]
                if free:
                    server = min(free, key=lambda server: server.busy)
                    server.busy += 1
                    return server
                wakes = min((server.rests_until for server in self._servers if server not in awake), default=deadline)
                if not awake and wakes >= deadline:
                    return None
                self._changed.wait(min(wakes, deadline) - now)
        return None

    def _give_back(self, server: _Server, failed: bool, began: float, rest: float | None) -> None:
        with self._changed:
            server.busy -= 1
            if failed:
                server.rest(began, rest)
            else:
                server.failures = 0
            self._changed.notify_all()

    def _ask(
        self, server: _Server, path: str, body: Mapping[str, Any] | None, deadline: float
    ) -> tuple[Reply, float | None]:
        """One try, and how long its server asks to be left alone. Raises one of FAILURES."""
        left = max(deadline - time.monotonic(), 0.001)
        if len(self._servers) > 1:
            left /= 2  # so that another server can still take over
        ends = time.monotonic() + left
        with server.session.request(
            "GET" if body is None else "POST",
            urljoin(server.url.rstrip("/") + "/", path),
            json=body,
            timeout=(min(left, CONNECT_SECONDS), left),
            allow_redirects=False,
            stream=True,
        ) as response:
            read = bytearray()
            while chunk := response.raw.read1(1 << 20, decode_content=True):
                read += chunk
                if time.monotonic() > ends:
                    raise requests.Timeout(f"the answer was still coming after {left:.1f} s")
            reply = Reply(url=server.url, status=response.status_code, body=bytes(read), key=self._key)
            return reply, _retry_after(response.headers.get("Retry-After", ""))


def _retry_after(header: str) -> float | None:
    """Seconds of a Retry-After header: a number of them, or a date (RFC 9110, 10.2.3); none where there is none."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _shown(part: object, key: str) -> str:
    """What a server wrote, without the key, escaped, and cut."""
    text = part.decode("utf-8", "replace") if isinstance(part, bytes) else str(part)
    return repr(text.replace(key, "[key]") if key else text)[:SHOWN]


def _root(error: BaseException) -> str:
    """Type and text of the error that began it: requests wraps urllib3, which wraps the socket's."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"
