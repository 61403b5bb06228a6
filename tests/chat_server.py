"""A server of this machine that speaks as OpenAI's chat does, and answers or misbehaves as it is told."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[str, object], "str | tuple[int, bytes]"]  # instruction and data: the message, or status and body


class ChatServer(ThreadingHTTPServer):
    """Keeps what it was sent: (headers, body)."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked = answer, []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((dict(self.headers), body))
        system, user = body["messages"]
        answer = self.server.answer(system["content"], json.loads(user["content"]))
        if isinstance(answer, str):
            answer = 200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        status, payload = answer
        self.send_response(status)
        if status == 302:
            self.send_header("Location", payload.decode())
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format, *args):
        """Quiet."""


@contextmanager
def serving(answer: Answer) -> Iterator[ChatServer]:
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
