"""Where Ray is: what `--address` or RAY_ADDRESS names, read, and proved to be a Ray cluster before it is joined.

Ray itself waits for minutes at a port that is not its own, and says so in gRPC's words.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from ray._private import services

from ...contracts.errors import ResourceError

RAY_PORT = 6379  # where `ray start --head` listens by default
ANSWER_SECONDS = 5.0  # for a connection and for the first bytes
JOIN_SECONDS = 10  # for Ray's own answer
# What a client of HTTP/2, and so of gRPC, says first: its preface and empty settings. A server answers with its own.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
SETTINGS = 4  # the type of that answer, at its fourth byte
ASK_RAY = (
    "import signal, sys; from ray._raylet import GcsClient; "
    f"signal.alarm({JOIN_SECONDS}); GcsClient(address=sys.argv[1]).internal_kv_get(b'', None)"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A running cluster's. `source`: the setting that named it."""

    host: str
    port: int
    source: str

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def refuse(self, found: str, remedy: str = "") -> NoReturn:
        rule = f"{self.source} is the HOST:PORT of a running Ray cluster, or auto"
        raise ResourceError(rule, f"{self}: {found}", remedy or "start one with: ray start --head")


def find(option: str | None, environment: Mapping[str, str] = os.environ) -> Address | None:
    """The cluster to join; None: start a private one. Raises ResourceError."""
    source, text = ("--address", option) if option is not None else ("RAY_ADDRESS", environment.get("RAY_ADDRESS", ""))
    text = text.strip()
    if text == "auto":
        return _of_this_machine(source)
    return None if text in ("", "local") else read(text, source)


def read(text: str, source: str) -> Address:
    """HOST:PORT, HOST (at Ray's usual port), or the same of an IPv6 address. Raises ResourceError."""
    rule = f"{source} is the HOST:PORT of a running Ray cluster, or auto"
    scheme, mark, rest = text.partition("://")
    if mark:
        host = rest.partition("/")[0].rpartition("@")[2].rpartition(":")[0] or rest.partition("/")[0] or "HOST"
        if scheme == "ray":
            found, why = f"{text}, the address of Ray's client mode", "which has no part of Ray in this process"
        elif scheme in ("http", "https"):
            found, why = f"{text}, the jobs' and dashboard's address", "which takes `ray job submit --address …`"
        else:
            found, why = text, "it has no scheme"
        raise ResourceError(rule, f"{found} ({why})", f"use {host}:{RAY_PORT} on a machine of it, or `ray job submit`")
    host, port = text, ""
    if text.startswith("["):
        host, _, after = text[1:].partition("]")
        port = after.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    number = int(port) if port.isascii() and port.isdigit() else RAY_PORT if not port else 0
    if not host or any(map(str.isspace, text)) or not 0 < number < 2**16:
        raise ResourceError(rule, repr(text), f"e.g. 10.0.0.1:{RAY_PORT} or [::1]:{RAY_PORT}")
    return Address(host, number, source)


def _of_this_machine(source: str) -> Address:
    """The cluster that runs here, as `auto` means it."""
    named = services.find_bootstrap_address(None)
    found = named or next(iter(sorted(services.find_gcs_addresses())), None)
    if found is None:
        rule, remedy = f"{source}=auto joins the Ray cluster of this machine", "start one with: ray start --head"
        raise ResourceError(rule, "none runs here", remedy)
    return read(found, f"{source}=auto")


def prove(address: Address) -> str:
    """The address as Ray takes it, once a Ray cluster has answered there, seconds from now. Raises ResourceError."""
    for_ray = services.canonicalize_bootstrap_address(str(address)) or str(address)  # never a loopback one
    if os.environ.get("RAY_USE_TLS", "0") not in ("1", "true", "True"):
        _shake_hands(address, read(for_ray, address.source))
    asked = [sys.executable, "-c", ASK_RAY, for_ray]
    answer = subprocess.run(
        asked, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, start_new_session=True
    )
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if line.strip() and "rpc_client.h" not in line]
        if answer.returncode > 0 and said:
            address.refuse(said[-1].strip(), "it must be a Ray cluster of this version, and RAY_AUTH_TOKEN its token")
        remedy = f"give the port of Ray's head ({RAY_PORT} by default); 10001 is Ray's client mode, 8265 the dashboard"
        address.refuse(f"it speaks gRPC, but not as Ray's head, for {JOIN_SECONDS} s", remedy)
    return for_ray


def _shake_hands(address: Address, for_ray: Address) -> None:
    """A server of HTTP/2 must answer, at the address or where Ray looks for a loopback one."""
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        address.refuse(f"the name {address.host} is not known here", "use its IP address")
    targets = [(str(place[4][0]), address.port) for place in places] + [(for_ray.host, for_ray.port)]
    failure: OSError | None = None
    for target in dict.fromkeys(targets):
        try:
            said = _answer(target, HELLO)
        except OSError as error:
            failure = failure or error
            continue
        if said is None or len(said) < 9 or said[3] != SETTINGS:
            _refuse_stranger(address, target, said)
        return
    if isinstance(failure, TimeoutError):
        address.refuse(f"no answer within {ANSWER_SECONDS:g} s", "is a firewall between? Is the head running?")
    address.refuse(f"nothing listens there ({failure and failure.strerror})")


def _answer(target: tuple[str, int], hello: bytes) -> bytes | None:
    """The first nine bytes that come back, fewer if it hangs up; None: it says nothing. Raises OSError unconnected."""
    said = b""
    with socket.create_connection(target, timeout=ANSWER_SECONDS) as connection:
        try:
            connection.sendall(hello)
            while len(said) < 9 and (more := connection.recv(9 - len(said))):
                said += more
        except TimeoutError:
            return said or None
        except OSError:
            pass  # it hung up: judged by what it said
    return said


def _refuse_stranger(address: Address, target: tuple[str, int], said: bytes | None) -> NoReturn:
    """It is not Ray: what is it?"""
    with suppress(OSError):
        if (_answer(target, b"GET / HTTP/1.0\r\n\r\n") or b"").startswith(b"HTTP/"):
            remedy = f"use the port of Ray's head ({RAY_PORT} by default); 8265 is the dashboard, for `ray job submit`"
            address.refuse("an HTTP server, and not Ray", remedy)
    if said is None:
        address.refuse(f"it accepts a connection and says nothing for {ANSWER_SECONDS:g} s", "is it Ray's port?")
    found = "something else than Ray answers" if said else "it ends the connection without a word"
    address.refuse(found, f"use the port of Ray's head ({RAY_PORT} by default)")
