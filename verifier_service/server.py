"""The owner's side of the fork server: what starts verifier processes and says how they ended (fork_server.py)."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time


class Server:
    """The owner's side of a fork server."""

    def __init__(self, verifier: bytes) -> None:
        self.ready, self.since = False, time.monotonic()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = os.memfd_create("stderr")
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__package__}.fork_server import serve; "
        with theirs, tempfile.TemporaryFile() as stdin:
            stdin.write(verifier)
            stdin.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"{code}serve({theirs.fileno()}, {os.getpid()})"],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # no Ctrl-C of the owner's terminal reaches it
            )

    def kill(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it is gone, and its end is heard of
            self.control.send(f"kill {number}".encode(), socket.MSG_NOSIGNAL)

    def spawn(self, number: int, connection: socket.socket) -> None:
        socket.send_fds(self.control, [f"spawn {number}".encode()], [connection.fileno()], socket.MSG_NOSIGNAL)

    def receive(self) -> str:
        """The next message; "" when it has ended."""
        try:
            return self.control.recv(8192).decode("utf-8", "replace")
        except OSError:
            return ""

    def close(self) -> str:
        """End it, and say how it ended."""
        self.control.close()
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        said = os.pread(self._errors, 500, max(0, os.fstat(self._errors).st_size - 500))
        os.close(self._errors)
        return f"exit code {code}, {said.decode('utf-8', 'replace')!a}"
