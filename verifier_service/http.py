"""What asking somebody else's server takes: a key in one header, answers of bounded size and time, its wish to rest."""

import email.utils
import math
import time

import requests
import urllib3
from requests.auth import AuthBase

from ..contracts.errors import ConfigError

RETRIED = frozenset({408, 425, 429, *range(500, 600)})
MOST_BYTES = 1 << 20  # of an answer
PLAIN = {"Accept-Encoding": "identity"}  # headers: what is short stays short
TIMEOUTS = (requests.Timeout, urllib3.exceptions.TimeoutError)
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError)  # the second: while the body is read


class Bearer(AuthBase):
    """The key in its header, if there is one, and so no other one from a netrc file. Raises ConfigError."""

    def __init__(self, key: str) -> None:
        if not (key.isascii() and key.isprintable()) or " " in key:
            found = f"{len(key)} characters, with others among them"
            raise ConfigError("a server's key is printable ASCII without blanks", found, "check api_key_env")
        self._key = key

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            r.headers["Authorization"] = f"Bearer {self._key}"
        return r


def read_body(reply: requests.Response, deadline: float) -> bytes:
    """The body, empty where it is longer than MOST_BYTES. Raises requests.Timeout at `deadline` (monotonic)."""
    read = bytearray()
    while chunk := reply.raw.read1(1 << 16, decode_content=False):
        read += chunk
        if len(read) > MOST_BYTES:
            return b""
        if time.monotonic() > deadline:
            raise requests.Timeout
    return bytes(read)


def retry_after(reply: requests.Response) -> float:
    """Seconds of a Retry-After header: a number of them, or a date (RFC 9110, 10.2.3); 0 where there is none."""
    header = reply.headers.get("Retry-After", "")
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
