"""A run that is asked and told, over real sockets: what it answers, whom it refuses, what becomes of its live.json."""

import http.client
import json
import os
import re
import socket
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from control_runs import Scripted, address, live

from tutorloop.cluster.control import client, server
from tutorloop.cluster.control.live import LIVE, read_live
from tutorloop.cluster.control.server import ControlServer
from tutorloop.contracts.errors import ConfigError, InputError, ResourceError, TutorloopError, WeightsMismatch


@pytest.fixture
def run() -> Scripted:
    return Scripted()


@pytest.fixture
def folder(run: Scripted, tmp_path: Path) -> Iterator[Path]:
    """Of a run that listens."""
    with ControlServer(run, tmp_path):
        yield tmp_path


def request(folder: Path, command: str, path: str, body=None, **headers) -> tuple[int, bytes]:
    """As anyone may send it, with the token unless told otherwise."""
    connection = http.client.HTTPConnection(*address(folder), timeout=20)
    headers = {"Authorization": f"Bearer {live(folder)['token']}", **headers}
    connection.request(command, path, body, {name: value for name, value in headers.items() if value is not None})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data


# ---- what it answers ------------------------------------------------------------------------------------------------


def test_it_says_how_it_stands_and_does_as_it_is_told(run: Scripted, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no proxy hears the token
    code, data = request(folder, "GET", "/status")
    assert code == 200 and json.loads(data) == run.status().plain()
    assert json.loads(data)["dropped"] == {"stale": 5} and json.loads(data)["in_flight"][0]["waits_for"] == {
        "teacher": 3
    }
    assert client.scale(folder, {"teacher": 3, "rollout": 0}) == {
        "before": {"teacher": 2, "rollout": 1},
        "wanted": {"teacher": 3, "rollout": 0},
    }
    assert run.have == {"teacher": 3, "rollout": 0}
    known = client.ask(folder)
    assert known["state"] == "running" and [pool["wanted"] for pool in known["pools"]] == [0, 3]


def test_who_has_no_token_hears_nothing(run: Scripted, folder: Path) -> None:
    token = live(folder)["token"]
    assert len(token) >= 40
    wrong = (None, "", token, f"Basic {token}", f"Bearer {token[:-1]}", f"Bearer {token}x", "Bearer ü", "Bearer ")
    for authorization in wrong:
        for command, path in (("GET", "/status"), ("POST", "/scale"), ("PUT", "/x"), ("DELETE", "/"), ("GET", "/")):
            body = '{"teacher": 3}' if command == "POST" else None
            assert request(folder, command, path, body, Authorization=authorization) == (401, b"{}"), authorization
    assert run.told == []
    assert request(folder, "POST", "/scale", '{"teacher": 3}')[0] == 200 and run.told == [{"teacher": 3}]


def test_no_page_of_a_browser_may_read_it(folder: Path) -> None:
    connection = http.client.HTTPConnection(*address(folder), timeout=20)
    headers = {"Authorization": f"Bearer {live(folder)['token']}", "Origin": "http://elsewhere"}
    connection.request("GET", "/status", headers=headers)
    response = connection.getresponse()
    assert response.status == 200 and response.read()
    assert not [name for name in response.headers if name.lower().startswith("access-control")]
    connection.close()


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "{}", "3", "null", '"teacher"', "\xff", "[" * 5000),
        *('{"teacher": "3"}', '{"teacher": 3.0}', '{"teacher": true}', '{"teacher": null}', '{"teacher": -1}'),
        *('{"teacher": NaN}', '{"teacher": [3]}', '{"teacher": 1000001}', '{"teacher": 1' + "0" * 5000 + "}"),
        '{"rollout": 1, "teacher": {}}',
    ],
    ids=lambda body: body[:20],
)
def test_a_body_that_is_no_request_is_refused(run: Scripted, folder: Path, body: str) -> None:
    code, data = request(folder, "POST", "/scale", body.encode("latin-1"))
    said = json.loads(data)
    assert code == 400 and said["error"] == "InputError" and "whole number" in said["rule"] and said["found"]
    assert len(said["found"]) < 200 and run.told == []


def test_a_body_is_bounded_and_says_its_length(run: Scripted, folder: Path) -> None:
    def with_length(length: str) -> str:
        code, data = request(folder, "POST", "/scale", **{"Content-Length": length})
        assert code == 400
        return json.loads(data)["rule"]

    assert all("65536 bytes" in with_length(length) for length in ("65537", "-1", "x", "9" * 30, "1_0", ""))
    whole = '{"teacher": 3}'
    assert request(folder, "POST", "/scale", whole + " " * (2**16 - len(whole)))[0] == 200
    assert run.told == [{"teacher": 3}]


def test_what_is_not_there_is_told(run: Scripted, folder: Path) -> None:
    for command, path in (("GET", "/scale"), ("POST", "/status"), ("GET", "/status?x"), ("PUT", "/scale")):
        code, data = request(folder, command, path, "{}")
        assert code == 400 and f"{command} {path}" in json.loads(data)["found"]
    with socket.create_connection(address(folder), timeout=20) as broken:
        broken.sendall(b"no request at all\r\n\r\n")
        assert broken.recv(1000) == b"{}"
    assert run.told == []


def test_errors_come_through_as_what_they_are(run: Scripted, folder: Path) -> None:
    for fails in (
        ResourceError("room", "none", "wait"),
        InputError("a"),
        WeightsMismatch("same", "other"),
        TutorloopError("b"),
    ):
        run.fails = fails
        with pytest.raises(TutorloopError) as error:
            client.scale(folder, {"teacher": 3})
        assert type(error.value) is type(fails) and error.value.args == fails.args
    run.fails = ZeroDivisionError("deep inside")
    code, data = request(folder, "GET", "/status")
    assert code == 500 and b"Traceback" not in data and json.loads(data)["error"] == "ZeroDivisionError"
    with pytest.raises(TutorloopError, match="deep inside") as error:
        client.ask(folder)
    assert not isinstance(error.value, InputError)


# ---- several at once ------------------------------------------------------------------------------------------------


def test_clients_that_hang_hold_up_nobody_and_are_left(folder: Path, run: Scripted, monkeypatch) -> None:
    begun = (b"", b"GET /sta", b"POST /scale HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
    hung = [socket.create_connection(address(folder), timeout=20) for _ in range(12)]
    for number, one in enumerate(hung):
        one.sendall(begun[number % 3])
    assert client.ask(folder)["step"] == 7
    assert client.scale(folder, {"teacher": 3})["before"] == {"teacher": 2}
    assert 0 < server._Handler.timeout <= 60
    monkeypatch.setattr(server._Handler, "timeout", 0.05)
    for text in begun:
        with socket.create_connection(address(folder), timeout=20) as one:
            one.sendall(text)
            assert one.recv(1) == b""  # the server hangs up
    for one in hung:
        one.close()
    assert run.told == [{"teacher": 3}]


def test_commands_come_to_the_run_one_at_a_time(run: Scripted, folder: Path, monkeypatch) -> None:
    both, met = threading.Barrier(2), []

    def scale(wanted: Mapping[str, int]) -> dict[str, int]:
        try:
            met.append(both.wait(timeout=1))
        except threading.BrokenBarrierError:
            run.told.append(wanted)
        return {"teacher": 2}

    monkeypatch.setattr(run, "scale", scale)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda n: client.scale(folder, {"teacher": n}), (3, 4)))
    assert [answer["wanted"]["teacher"] for answer in answers] == [3, 4]
    assert met == [] and len(run.told) == 2


@pytest.fixture
def stuck(run: Scripted, folder: Path, monkeypatch) -> Iterator[threading.Event]:
    """A command is in the run and does not come out before the end."""
    inside, out = threading.Event(), threading.Event()

    def scale(wanted: Mapping[str, int]) -> dict[str, int]:
        inside.set()
        assert out.wait(60)
        return {}

    monkeypatch.setattr(run, "scale", scale)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(request, folder, "POST", "/scale", '{"teacher": 3}')
        assert inside.wait(20)
        yield out
        out.set()


def test_one_that_waits_too_long_for_its_turn_is_told(folder: Path, stuck: threading.Event, monkeypatch) -> None:
    monkeypatch.setattr(server, "TURN_SECONDS", 0.05)
    with pytest.raises(TutorloopError, match="one command after the other") as error:
        client.ask(folder)
    assert not isinstance(error.value, InputError)
    monkeypatch.undo()
    stuck.set()
    assert client.ask(folder)["step"] == 7


def test_the_end_of_a_run_waits_for_no_command(run: Scripted, tmp_path: Path, monkeypatch) -> None:
    inside, out = threading.Event(), threading.Event()
    monkeypatch.setattr(run, "scale", lambda wanted: inside.set() or (out.wait(60) and {}))
    with ThreadPoolExecutor(2) as threads:
        control = ControlServer(run, tmp_path).__enter__()
        asked = threads.submit(request, tmp_path, "POST", "/scale", '{"teacher": 3}')
        assert inside.wait(20)
        threads.submit(control.__exit__, None, None, None).result(timeout=20)
        assert not (tmp_path / LIVE).exists() and not asked.done()
        out.set()
        assert asked.result(timeout=20)[0] in (200, 500)


# ---- live.json ------------------------------------------------------------------------------------------------------


def test_the_token_is_its_owners_alone_and_goes_with_the_run(run: Scripted, tmp_path: Path, monkeypatch) -> None:
    modes, replace = [], Path.replace

    def seen(path: Path, target: Path) -> Path:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", seen)
    (tmp_path / f".{LIVE}.tmp").write_text("of one that was killed")
    (tmp_path / f".{LIVE}.tmp").chmod(0o666)
    umask = os.umask(0)
    try:
        with ControlServer(run, tmp_path) as control:
            assert modes == [0o600] and stat.S_IMODE((tmp_path / LIVE).stat().st_mode) == 0o600
            said, held = live(tmp_path), read_live(tmp_path)
            assert held and said["url"] == control.url and said["pid"] == os.getpid()
            assert said["host"] == socket.gethostname() and said["started"] and said["token"] not in repr(held)
            where = address(tmp_path)
    finally:
        os.umask(umask)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where, timeout=20)


def test_two_runs_have_two_tokens_and_each_removes_its_own(run: Scripted, tmp_path: Path) -> None:
    with ControlServer(run, tmp_path):
        first = live(tmp_path)
        with ControlServer(run, tmp_path):
            assert live(tmp_path)["token"] != first["token"]
            of_second = (tmp_path / LIVE).read_text()
        (tmp_path / LIVE).write_text(of_second)
    assert (tmp_path / LIVE).read_text() == of_second


def test_it_listens_where_it_is_told(run: Scripted, tmp_path: Path) -> None:
    with ControlServer(run, tmp_path, "0.0.0.0") as control:
        assert re.fullmatch(rf"http://{re.escape(socket.gethostname())}:\d+", control.url)
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1"), ControlServer(run, tmp_path, "203.0.113.1"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_leaves_nothing_open(run: Scripted, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(FileNotFoundError), ControlServer(run, tmp_path / "gone"):
        pass
    assert threading.active_count() == before
