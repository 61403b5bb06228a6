"""Whom a command asks: a run that lives, and none that died, runs elsewhere, or is another server by now."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from control_runs import Scripted, live, rewrite

from tutorloop.cluster.control import client
from tutorloop.cluster.control.live import LIVE
from tutorloop.cluster.control.server import ControlServer
from tutorloop.cluster.recording.claim import Claim
from tutorloop.contracts.errors import InputError, RunFolderError, TutorloopError

# A run that listens, holds its folder, says so and waits to be killed.
RUN = """
import sys
from pathlib import Path
from tutorloop.cluster.control.server import ControlServer
from tutorloop.cluster.recording.claim import Claim

folder = Path(sys.argv[1])
claim = Claim.take(folder, print)
with ControlServer(None, folder):
    print("up", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run() -> Scripted:
    return Scripted()


@pytest.fixture
def folder(run: Scripted, tmp_path: Path) -> Iterator[Path]:
    """Of a run that listens."""
    with ControlServer(run, tmp_path):
        yield tmp_path


def test_a_run_that_was_killed_has_died(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", RUN, str(tmp_path)]
    with subprocess.Popen(arguments, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == "up\n"
        with pytest.raises(TutorloopError, match="NoneType"):  # it is alive and answers, if nothing useful
            client.ask(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert live(tmp_path)["pid"] == process.pid
    assert client.ask(tmp_path)["state"] == "died"
    with pytest.raises(RunFolderError, match="run died at step 0") as error:
        client.scale(tmp_path, {"teacher": 3})
    assert error.value.rule == "the run is alive" and error.value.remedy


def test_a_later_process_with_its_id_is_not_the_run(folder: Path, run: Scripted) -> None:
    rewrite(folder, started="1")
    assert client.ask(folder)["state"] == "died"
    with pytest.raises(RunFolderError, match="the run is alive"):
        client.scale(folder, {"teacher": 3})
    assert run.told == []


def test_a_run_that_lives_and_does_not_listen(tmp_path: Path, run: Scripted) -> None:
    claim = Claim.take(tmp_path, print)
    try:
        assert client.ask(tmp_path)["state"] == "starting or ending"
        with ControlServer(run, tmp_path):
            text = (tmp_path / LIVE).read_text()
            assert client.ask(tmp_path)["state"] == "running"
        (tmp_path / LIVE).write_text(text)  # its port is closed already
        known = client.ask(tmp_path)
        assert known["state"] == "starting or ending" and f"process {os.getpid()} on" in known["go_on"]
        with pytest.raises(RunFolderError, match="run is starting or ending at step 0"):
            client.scale(tmp_path, {"teacher": 3})
    finally:
        claim.release()


@pytest.mark.parametrize("reached", ["loopback", "refused"])
def test_a_run_of_another_machine_is_named_and_its_token_kept(folder: Path, run: Scripted, reached: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        host = "127.0.0.1" if reached == "loopback" else socket.gethostname()
        if reached == "refused":
            other.close()
        rewrite(folder, machine="of another kernel", host="node-7", pid=1, url=f"http://{host}:{port}")
        known = client.ask(folder)
        assert known["state"] == "running elsewhere" and "process 1 on node-7" in known["go_on"]
        with pytest.raises(RunFolderError, match="node-7"):
            client.scale(folder, {"teacher": 3})
        if reached == "loopback":
            other.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody came
                other.accept()


def test_another_token_is_refused(folder: Path, run: Scripted) -> None:
    rewrite(folder, token="x" * 43)
    for asking in (lambda: client.ask(folder), lambda: client.scale(folder, {"teacher": 3})):
        with pytest.raises(RunFolderError, match="holds the run's token"):
            asking()
    assert run.told == []


@pytest.mark.parametrize(
    "change",
    [
        {"token": None},
        {"token": "a\nb"},
        {"url": "file:///etc"},
        {"url": 3},
        {"pid": "1"},
        {"pid": True},
        {"more": 1},
        None,
    ],
    ids=str,
)
def test_a_spoilt_live_file_is_told(folder: Path, change: dict | None) -> None:
    if change is None:
        (folder / LIVE).write_text("{")
    else:
        rewrite(folder, **change)
    with pytest.raises(RunFolderError, match=r"live\.json is as it was written"):
        client.ask(folder)


@pytest.mark.parametrize(
    "said", [b"hello\n", b"HTTP/1.0 200 OK\r\n\r\n<p>", b"HTTP/1.0 500 no\r\n\r\n[]", b"HTTP/1.0 400 no\r\n\r\n{}"]
)
def test_another_server_at_its_port_is_told(folder: Path, said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as threads:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(said)

        threads.submit(answer)
        rewrite(folder, url=f"http://127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(TutorloopError, match="answers in JSON"):
            client.ask(folder)


def test_a_run_that_lives_and_says_nothing_is_told(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rewrite(folder, url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(TutorloopError, match=f"process {os.getpid()} on .* has not") as error:
            client.ask(folder)
    assert not isinstance(error.value, InputError)
