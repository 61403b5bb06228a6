"""Before Ray: addresses read and proved against real sockets, the machine's surroundings, signals, texts of a death."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tutorloop.cluster.interrupt import Interrupt, Interrupted, unbroken
from tutorloop.cluster.pools import address as addresses
from tutorloop.cluster.pools.address import Address, find, prove, read
from tutorloop.cluster.pools.deaths import cause_of, first_line, last_lines, oom_kills, tail_of
from tutorloop.cluster.pools.ray_cluster import cluster
from tutorloop.cluster.pools.surroundings import SOCKET, SOCKET_PATH_BYTES, check_shared_memory, give_token, temp_dir
from tutorloop.cluster.startup import Startup
from tutorloop.contracts.errors import ResourceError

# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1:6380", "10.0.0.1", 6380),
        ("head", "head", 6379),
        ("head.example.org:7000", "head.example.org", 7000),
        ("[::1]:6380", "::1", 6380),
        ("[::1]", "::1", 6379),
        ("::1", "::1", 6379),
        ("fd00::2", "fd00::2", 6379),
    ],
)
def test_an_address_is_read(text: str, host: str, port: int) -> None:
    assert read(text, "--address") == Address(host, port, "--address")
    assert read(str(read(text, "x")), "x") == Address(host, port, "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://10.0.0.1:8265", "use 10.0.0.1:6379 on a machine of it, or `ray job submit`"),
        ("https://head/x", "the jobs' and dashboard's address"),
        ("http://[::1]:8265", r"use \[::1\]:6379"),
        ("ray://head:10001", "Ray's client mode.*use head:6379"),
        ("redis://head:6379", "no scheme"),
        ("head:port", "e.g. 10.0.0.1:6379"),
        ("head:0", "e.g."),
        ("head:70000", "e.g."),
        ("head: 6379", "e.g."),
        (":6379", "e.g."),
        ("[::1]:x", "e.g."),
    ],
)
def test_what_is_no_address_is_refused_with_a_remedy(text: str, said: str) -> None:
    for source in ("--address", "RAY_ADDRESS"):
        with pytest.raises(ResourceError, match=rf"(?s)^{source} is the HOST:PORT.*{said}"):
            find(text if source == "--address" else None, {"RAY_ADDRESS": text})


def test_where_an_address_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(None, {}) is find(None, {"RAY_ADDRESS": " "}) is find("local", {"RAY_ADDRESS": "head:1"}) is None
    assert find("a:1", {"RAY_ADDRESS": "b:2"}) == Address("a", 1, "--address")
    assert find(None, {"RAY_ADDRESS": "b:2"}) == Address("b", 2, "RAY_ADDRESS")
    monkeypatch.setattr(addresses.services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(addresses.services, "find_gcs_addresses", lambda: {"10.0.0.9:6379"})
    assert find("auto", {}) == Address("10.0.0.9", 6379, "--address=auto")
    monkeypatch.setattr(addresses.services, "find_gcs_addresses", set)
    with pytest.raises(ResourceError, match=r"(?s)RAY_ADDRESS=auto.*none runs here.*ray start --head"):
        find(None, {"RAY_ADDRESS": "auto"})


class Refuses(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def http_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def answering() -> Iterator[Callable[[bytes | None], int]]:
    """A port that answers every connection with some bytes and hangs up; None: that says nothing."""
    open_sockets: list[socket.socket] = []

    def serve(said: bytes | None) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        open_sockets.append(server)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return  # the test is over
                open_sockets.append(connection)
                if said is not None:
                    connection.recv(1024)
                    connection.sendall(said)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        return server.getsockname()[1]

    yield serve
    for one in open_sockets:
        with suppress(OSError):  # what ends a wait in `accept`
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def test_an_http_server_is_not_ray(http_server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=rf"127.0.0.1:{http_server}: an HTTP server, and not Ray\n.*8265"):
        prove(Address("127.0.0.1", http_server, "--address"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{http_server}")
    with pytest.raises(ResourceError, match="RAY_ADDRESS is"), cluster(None):
        pass


def test_what_ray_cannot_start_with_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def starts(**options: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because\nit is busy")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", starts)
    with (
        pytest.raises(ResourceError, match=r"Ray starts on this machine\n.*timed out.*\n.*session_latest"),
        cluster(None),
    ):
        pass


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "it accepts a connection and says nothing for 0.3 s"),
        (b"", "it ends the connection without a word"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "something else than Ray answers"),
        (b"-ERR unknown command\r\n", "something else than Ray answers"),
    ],
)
def test_a_port_of_something_else_is_not_ray(
    answering: Callable[[bytes | None], int], monkeypatch: pytest.MonkeyPatch, answer: bytes | None, said: str
) -> None:
    monkeypatch.setattr(addresses, "ANSWER_SECONDS", 0.3)
    with pytest.raises(ResourceError, match=said):
        prove(Address("127.0.0.1", answering(answer), "--address"))


def test_nothing_listens_or_no_such_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(ResourceError, match=rf"{host}:{port}: nothing listens there"):
            prove(Address(host, port, "--address"))
    with pytest.raises(ResourceError, match=r"the name no-such-host.invalid is not known here"):
        prove(Address("no-such-host.invalid", 6379, "--address"))


# ---- surroundings ----------------------------------------------------------------------------------------------------


def usable(folder: str) -> bool:
    return len(os.fsencode(folder + SOCKET)) <= SOCKET_PATH_BYTES


@pytest.fixture
def short() -> Iterator[Path]:
    folder = Path("/tmp") / f"t{os.getpid()}"
    folder.mkdir()
    yield folder
    for below in sorted(folder.rglob("*"), reverse=True):
        below.chmod(0o700)
        below.rmdir() if below.is_dir() else below.unlink()
    folder.rmdir()


def test_a_tmpdir_that_ray_can_use_is_used(short: Path) -> None:
    told: list[str] = []
    assert temp_dir({"TMPDIR": str(short)}, told.append) == f"{short}/ray"
    assert temp_dir({"TMPDIR": "/nonexistent", "RAY_TMPDIR": str(short)}, told.append) == f"{short}/ray"
    assert temp_dir({}, told.append, short) == f"{short}/ray"
    assert not told


@pytest.mark.parametrize(
    ("tmpdir", "why"), [("/tmp/" + 60 * "x", "bytes too long"), ("/nonexistent", "does not exist")]
)
def test_a_tmpdir_that_ray_cannot_use_is_said_and_left(short: Path, tmpdir: str, why: str) -> None:
    told: list[str] = []
    assert temp_dir({"TMPDIR": tmpdir}, told.append, short) == f"{short}/ray"
    (said,) = told
    assert why in said and "TMPDIR" in said and f"{short}/ray" in said
    with pytest.raises(ResourceError, match=rf"(?s)RAY_TMPDIR is.*{why}"):
        temp_dir({"RAY_TMPDIR": tmpdir}, told.append, short)


def test_another_users_folder_is_left_for_ones_own(short: Path) -> None:
    (short / "ray").write_text("not a folder")
    assert temp_dir({}, print, short) == f"{short}/ray-{os.getuid()}"
    (short / f"ray-{os.getuid()}").write_text("nor this")
    with pytest.raises(ResourceError, match=r"(?s)is no folder.*RAY_TMPDIR"):
        temp_dir({}, print, short)


def test_a_token_is_given_where_home_keeps_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for home in ({}, {"HOME": "/"}, {"HOME": "/nonexistent"}, {"HOME": str(tmp_path / "file")}, {"HOME": "/proc"}):
        environment = dict(home)
        give_token(environment)
        assert len(environment["RAY_AUTH_TOKEN"]) == 64
    named = (
        {"RAY_AUTH_TOKEN": "x"},
        {"RAY_AUTH_TOKEN_PATH": "x"},
        {"RAY_AUTH_MODE": "disabled"},
        {"HOME": str(tmp_path)},
    )
    for environment in named:
        before = dict(environment)
        give_token(environment)
        assert environment == before


def test_small_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from tutorloop.cluster.pools import surroundings

    told: list[str] = []
    for room, said in ((64 * 2**20, True), (1 << 40, False)):
        monkeypatch.setattr(surroundings, "get_shared_memory_bytes", lambda room=room: room)
        told.clear()
        check_shared_memory({}, told.append, "/tmp/ray")
        assert bool(told) == said
        assert all("0.06 GiB" in text and "--shm-size" in text for text in told)


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_or_is_a_request_where_there_is_something_to_save(number: signal.Signals) -> None:
    before, told = signal.getsignal(number), []
    heard = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        heard.set()

    with pytest.raises(KeyboardInterrupt), Interrupt(tell):
        signal.raise_signal(number)
    heard.wait()
    assert told == ["stopping"] and signal.getsignal(number) is before

    async def stop_twice() -> None:
        with interrupt.saving():
            interrupt.check()
            waiting = asyncio.ensure_future(interrupt.beside(asyncio.sleep(3600)))
            await asyncio.sleep(0)
            signal.raise_signal(number)
            with pytest.raises(Interrupted):
                await waiting
            with pytest.raises(Interrupted):
                interrupt.check()
            heard.wait()
            assert told[1:] == ["stopping: a checkpoint is saved first (again to stop at once)"]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)

    heard.clear()
    with Interrupt(tell) as interrupt:
        asyncio.run(stop_twice())


def test_a_request_leaves_what_is_saved_whole_and_later_ones_stop() -> None:
    async def stop() -> None:
        with interrupt.saving():
            signal.raise_signal(signal.SIGINT)

    with Interrupt(lambda _: None) as interrupt:
        asyncio.run(stop())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_rays_start_is_not_broken_off() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Interrupt(lambda _: None):
        with unbroken():
            signal.raise_signal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does
            done.append(True)
        done.append(False)
    assert done == [True]


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (
            "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error",
            "SIGKILL",
        ),
        ("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed", "out of memory"),
        ("The actor died because its node has died. Node Id: 12", "left the cluster"),
        ("The actor is dead because it was killed by `ray.kill`.", "ended by Ray"),
        ("Worker exit type: INTENDED_USER_EXIT Worker exit detail: exit_actor", "left by itself"),
        ("\x1b[36mA new way\x1b[0m\tto die\nmore", "A new way to die"),
    ],
)
def test_the_cause_of_a_death(text: str, meaning: str) -> None:
    assert meaning in cause_of(text)


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_bytes(b":actor_name:W\nfirst\n\nsecond\tline\n\x1b[31mthird\x1b[0m \xff\nlast" + 500 * b"x" + b"\n\n")
    second, third, last = last_lines(log) or []
    assert (second, third) == ("second  line", "third \ufffd") and last == "last" + 196 * "x"
    assert last_lines(tmp_path / "none") is None
    assert tail_of("") == [] and first_line("\n \n") == "no reason is known"


def test_the_kernels_word(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills([str(tmp_path / "none"), str(events)]) == 2
    assert oom_kills([]) is None


def test_the_phases_of_a_start_add_up() -> None:
    shown: list[str] = []
    startup = Startup(shown.append)
    for name in ("learner", "teachers", "learner"):
        startup.phase(name, f"loading {name}")
    startup.end()
    startup.end()
    assert list(startup.seconds) == ["learner", "teachers"] and min(startup.seconds.values()) >= 0
    assert shown == ["loading learner", "loading teachers", "loading learner"]
