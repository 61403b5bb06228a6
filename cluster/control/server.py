"""What a running run listens with: `GET /status` and `POST /scale`, for whoever can read its `live.json`.

Each connection has a thread of its own, so a client that hangs holds up no other. The run itself is asked by one of
them at a time. What goes wrong is an answer, never a traceback: 400 for what the client can mend, 401 for a wrong
token, 500 for the rest.
"""

import hmac
import json
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...contracts.errors import ConfigError, InputError, TutorloopError
from ...contracts.status import Controlled
from .live import announced

MOST_BYTES = 1 << 16  # of a request's body
CLIENT_SECONDS = 10.0  # that a client may keep still
TURN_SECONDS = 20.0  # that a command waits for the one before it
MOST_REPLICAS = 10**6  # far beyond any cluster: what is larger is a slip
POLL_SECONDS = 0.1  # until the listener sees that it shall end

Answer = tuple[int, Mapping[str, Any]]  # an HTTP status, and what is said as JSON
Answerer = Callable[[str, str, str, bytes | None], Answer]


class ControlServer:
    """Lets a run be asked while the block lasts: `with ControlServer(source, folder) as control: …`.

    It listens on a free port of `host`; `live.json` in `folder` says where, and holds the token. At the end no new
    command is heard; one that is being obeyed is not waited for, since the run's own thread, which it may wait for, may
    be the one that closes. Raises ConfigError where it cannot listen, OSError where live.json cannot be written.
    """

    def __init__(self, source: Controlled, folder: Path, host: str = "127.0.0.1") -> None:
        self._source, self._folder, self._host = source, folder, host
        self._token = secrets.token_urlsafe(32)
        self._turn = threading.Lock()
        self._stack = ExitStack()
        self.url = ""

    def __enter__(self) -> "ControlServer":
        with ExitStack() as stack:
            try:
                listener = _Listener(self._host, self._answer)
            except OSError as error:
                found = f"{self._host}: {error.strerror or error}"
                raise ConfigError("a run listens on an address of its machine", found, "use 127.0.0.1") from error
            stack.callback(listener.server_close)
            self.url = f"http://{_reached_at(self._host)}:{listener.server_port}"
            thread = threading.Thread(target=listener.serve_forever, args=(POLL_SECONDS,), name="control", daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown)
            stack.enter_context(announced(self._folder, self.url, self._token))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _answer(self, command: str, path: str, authorization: str, body: bytes | None) -> Answer:
        said, known = authorization.encode(errors="replace"), f"Bearer {self._token}".encode()
        if not hmac.compare_digest(said, known):
            return 401, {}
        try:
            answer = self._obey(command, path, body)
            json.dumps(answer, allow_nan=False)
            return 200, answer
        except InputError as error:
            return 400, _told(error)
        except TutorloopError as error:
            return 500, _told(error)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            return 500, {**_told(TutorloopError("the run can say how it stands", found)), "error": type(error).__name__}

    def _obey(self, command: str, path: str, body: bytes | None) -> dict[str, Any]:
        if (command, path) == ("GET", "/status"):
            with self._in_turn():
                return self._source.status().plain()
        if (command, path) == ("POST", "/scale"):
            wanted = _wanted(body)
            with self._in_turn():
                return {"before": dict(self._source.scale(wanted)), "wanted": wanted}
        raise InputError("a run answers GET /status and POST /scale", f"{command} {path[:80]}", "ask one of them")

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """A block that one command is in at a time. Raises TutorloopError where the one before does not come out."""
        if not self._turn.acquire(timeout=TURN_SECONDS):
            found = f"the one before has taken more than {TURN_SECONDS:.0f} s"
            raise TutorloopError("a run obeys one command after the other", found, "try again later")
        try:
            yield
        finally:
            self._turn.release()


def _told(error: TutorloopError) -> dict[str, str]:
    return {"rule": error.rule, "found": error.found, "remedy": error.remedy, "error": type(error).__name__}


def _wanted(body: bytes | None) -> dict[str, int]:
    """pool → replicas, as a request's body says. Raises InputError."""
    rule, remedy = "a request to scale is a JSON object of pools and whole numbers", 'e.g. {"teacher": 3}'
    if body is None:
        found = f"more than {MOST_BYTES} bytes, or no Content-Length"
        raise InputError(f"a request's body has at most {MOST_BYTES} bytes and says how many", found, remedy)
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(rule, str(error)[:80], remedy) from error
    if not isinstance(wanted, dict) or not wanted:
        raise InputError(rule, repr(wanted)[:80], remedy)
    for pool, number in wanted.items():
        if type(number) is not int or not 0 <= number <= MOST_REPLICAS:
            rule = f"a pool has a whole number of replicas, at most {MOST_REPLICAS:,}"
            raise InputError(rule, f"{pool[:80]}={json.dumps(number)[:80]}", "e.g. teacher=3")
    return wanted


def _reached_at(host: str) -> str:
    """The name by which clients reach a server that listens on `host`, as a URL has it."""
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    return f"[{name}]" if ":" in name else name


class _Listener(ThreadingHTTPServer):
    daemon_threads = True  # the process can end while a client hangs

    def __init__(self, host: str, answer: Answerer) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.answer = answer
        super().__init__((host, 0), _Handler)

    def server_bind(self) -> None:
        """Without asking name servers for this machine's name, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # pyright: ignore[reportAttributeAccessIssue]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung or broke off is no event of the run's."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    server: _Listener

    def do_GET(self) -> None:
        body = self._body()
        authorization = self.headers.get("Authorization", "")
        self._send(*self.server.answer(self.command, self.path, authorization, body))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = do_GET

    def _body(self) -> bytes | None:
        """None where it is too long, or of unknown length: it is not read."""
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        known = re.fullmatch(r"[0-9]{1,9}", length, re.ASCII) and int(length) <= MOST_BYTES
        return self.rfile.read(int(length)) if known else None

    def _send(self, code: int, said: Mapping[str, Any]) -> None:
        data = json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Of what is no request that HTTP knows."""
        self.close_connection = True
        self._send(code, {})

    def version_string(self) -> str:
        return "tutorloop"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the run's terminal is not for its clients."""
