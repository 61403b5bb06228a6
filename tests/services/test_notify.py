"""Who is told of a run's alarms: real commands and a real server, the bad ones too."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_rows import eval_row, fresh_rng, step_row

from tutorloop.cluster.recording import notify
from tutorloop.cluster.recording.metrics import MetricsLog
from tutorloop.cluster.recording.notify import ALARMS, Notifier, kept, ways_of
from tutorloop.cluster.recording.prometheus import KNOWN_ALARMS
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import ConfigError, InputError, LearnerError, RunFolderError
from tutorloop.contracts.recipe import parse_config

VARIABLE = "TUTORLOOP_TEST_HOOK"
SECRET = "s3cr3t-path"
KEYS = {"run", "method", "kind", "step", "text", "time"}


def config(**told: str) -> Config:
    tree = {"output_dir": "x", "steps": 1, "prompts_per_step": 1, "student": {"model": "s"}, "data": {"path": "d"}}
    return parse_config({**tree, "method": "opd", "teacher": {"model": "t"}, "notify": told})


def python(folder: Path, code: str) -> str:
    """A command line that runs `code`, in whose folder it may leave files."""
    file = folder / "told.py"
    file.write_text(f"import json, os, subprocess, sys, time\nos.chdir({str(folder)!r})\n{code}")
    return f"{sys.executable} -I -S {file}"


WRITES = "open('told.jsonl', 'a').write(sys.stdin.read() + '\\n')"


def told(folder: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


class Said(list[str]):
    """The log. `kinds`: text → kind."""

    def __init__(self, **kinds: str) -> None:
        self.kinds = {text: kind for kind, text in kinds.items()}

    def notifier(self, folder: Path, **ways: str) -> Notifier:
        (folder / "config.yaml").touch()
        return Notifier(config(**ways), folder, lambda text: self.kinds.get(text, "other"), self.append)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- a command -------------------------------------------------------------------------------------------------------


def test_a_command_is_given_each_alarm_once_and_the_end(tmp_path: Path) -> None:
    rng, said = fresh_rng(), Said(truncated="all cut off", stale="too old")
    with said.notifier(tmp_path, command=python(tmp_path, WRITES)) as notifier:
        assert notifier.row(step_row(rng, 3, warnings=["all cut off", "too old"])) == ["truncated", "stale"]
        assert notifier.row(step_row(rng, 4, warnings=["all cut off"])) == []
        row = eval_row(rng, 4)
        assert notifier.row(row) == []
        until(lambda: len(told(tmp_path)) == 2)
        notifier.over(True, {"steps": 9, "wall_seconds": 75.2, "accuracy": {"before": 0.25, "after": 0.5}})
    rows = told(tmp_path)
    assert all(set(row) == KEYS and row["run"] == str(tmp_path) and row["method"] == "opd" for row in rows)
    assert [(row["kind"], row["step"], row["text"]) for row in rows] == [
        ("truncated", 3, "all cut off"),
        ("stale", 3, "too old"),
        ("done", 9, "9 steps in 1:15, accuracy 25.0 % → 50.0 %"),
    ]
    assert all(time.strptime(row["time"], "%Y-%m-%dT%H:%M:%SZ") for row in rows)
    assert [(alarm["kind"], alarm["step"]) for alarm in kept(tmp_path)] == [("truncated", 3), ("stale", 3), ("done", 9)]
    assert not said and not notifier.untold
    again = said.notifier(tmp_path)
    assert again.row(step_row(rng, 3, warnings=["all cut off"])) == [], "told before the run was resumed"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LearnerError("the learner lives", "it died"), "failed"),
        (RunFolderError("one process works in a folder", "another does"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_run_that_ends_by_an_error_says_so(error: BaseException, kind: str, tmp_path: Path) -> None:
    said = Said()
    with pytest.raises(type(error)), said.notifier(tmp_path, command=python(tmp_path, WRITES)) as notifier:
        notifier.row(step_row(fresh_rng(), 5))
        raise error
    (row,) = told(tmp_path)
    assert (row["kind"], row["step"]) == (kind, 5) and not said
    assert row["text"] == (str(error) or "KeyboardInterrupt")
    assert [alarm["text"] for alarm in kept(tmp_path)] == ([] if isinstance(error, InputError) else [row["text"]])


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    command = python(tmp_path, "open('argv', 'w').write(json.dumps(sys.argv[1:]))")
    with Said().notifier(tmp_path, command=f"{command} 'a b' $HOME '`id`' ; | >x") as notifier:
        notifier.over(False, {"steps": 1, "wall_seconds": 1.0, "accuracy": {}})
    assert json.loads((tmp_path / "argv").read_text()) == ["a b", "$HOME", "`id`", ";", "|", ">x"]
    assert not (tmp_path / "x").exists() and kept(tmp_path)[0]["kind"] == "interrupted"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("sys.exit(3)", "it ends with code 3"),
        ("os.kill(os.getpid(), 9)", "it ends with code -9"),
        ("sys.stdin.close(); print('x' * 10**7); sys.exit(4)", "code 4"),
    ],
)
def test_a_command_that_fails_is_told_of_once_and_counted(code: str, why: str, tmp_path: Path) -> None:
    rng, said = fresh_rng(), Said()
    with said.notifier(tmp_path, command=python(tmp_path, code)) as notifier:
        for step in range(3):
            notifier.row(step_row(rng, step, warnings=[f"warning {step} " + "y" * 10**5]))
        until(lambda: notifier.untold["command"] == 3)
    assert len(said) == 1 and why in said[0] and "x" * 10 not in said[0]
    assert dict(notifier.untold) == {"command": 3}


def test_a_command_that_prints_without_end_holds_nothing_up(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    code = "[print('x' * 10**6, file=f) for f in (sys.stdout, sys.stderr) for _ in range(20)];" + WRITES
    row = step_row(fresh_rng(), 1, warnings=["w"])
    capfd.readouterr()
    with Said().notifier(tmp_path, command=python(tmp_path, code)) as notifier:
        notifier.row(row)
    assert len(told(tmp_path)) == 1 and capfd.readouterr() == ("", "")


def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(notify, "DEADLINE_SECONDS", 3.0)
    code = """
sleeps = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(1000)"]
pids = [os.getpid(), *(subprocess.Popen(sleeps, start_new_session=own).pid for own in (False, True))]
open("pids", "w").write(" ".join(map(str, pids)))
time.sleep(1000)
"""
    said = Said()
    with said.notifier(tmp_path, command=python(tmp_path, code)) as notifier:
        notifier.row(step_row(fresh_rng(), 1, warnings=["w"]))
        until(lambda: notifier.untold["command"] == 1)
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 3
        until(lambda: not any(map(psutil.pid_exists, pids)))
    assert said == ["an alarm was not told (command): not done within 3 s, and killed. Later ones are counted only"]


def test_the_runs_loop_never_waits_and_its_end_not_long(tmp_path: Path, monkeypatch) -> None:
    """What the run does meanwhile is done in no time, while the first alarm's command hangs; most are dropped."""
    monkeypatch.setattr(notify, "END_SECONDS", 1.0)
    rng, said = fresh_rng(), Said()
    code = "open('pid', 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    with said.notifier(tmp_path, command=python(tmp_path, code)) as notifier:
        notifier.row(step_row(rng, 0, warnings=["the first"]))
        until((tmp_path / "pid").exists)
        for step in range(1, 100):
            notifier.row(step_row(rng, step, warnings=[f"warning {step}"]))
        assert notifier.untold["dropped"] == 99 - notify.MOST_WAITING and not notifier.untold["command"]
        notifier.over(True, {"steps": 99, "wall_seconds": 1.0, "accuracy": {}})
    # the end's own was not told either, nor those that waited; the one that hung was killed
    assert notifier.untold == {"dropped": 100, "command": 1}
    assert len(said) == 2 and "8 others wait" in said[0]
    until(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text() or -1)))
    assert len(kept(tmp_path)) == notify.LAST and kept(tmp_path)[-1]["kind"] == "done", "status shows it all the same"
    assert threading.active_count() < 50


def test_the_end_goes_before_what_still_waits(tmp_path: Path) -> None:
    """Which is told nonetheless, since there is time."""
    rng = fresh_rng()
    code = f"while not os.path.exists('go'): time.sleep(0.01)\n{WRITES}"
    with Said().notifier(tmp_path, command=python(tmp_path, code)) as notifier:
        notifier.row(step_row(rng, 1, warnings=["a"]))
        until(lambda: not notifier._waiting)
        notifier.row(step_row(rng, 2, warnings=["b", "c"]))
        notifier.over(True, {"steps": 2, "wall_seconds": 1.0, "accuracy": {}})
        (tmp_path / "go").touch()
    assert [row["text"][:7] for row in told(tmp_path)] == ["a", "2 steps", "b", "c"]


# ---- a server --------------------------------------------------------------------------------------------------------


@dataclass
class Hook:
    """A server that does as `behaves` says, and what it was sent."""

    address: str
    sent: list[tuple[str, str | None, dict]] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)


@contextmanager
def hook(monkeypatch, behaves: str = "takes") -> Iterator[Hook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.sent.append((self.path, self.headers["Content-Type"], body))
            if behaves == "hangs":
                server.free.wait(60)
            if behaves == "drips":  # each byte is a sign of life
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while not server.free.wait(0.1):
                    self.wfile.write(b"X")
            if behaves == "is slow":
                time.sleep(0.5)
            code = {"fails": 500, "sends elsewhere": 302}.get(behaves, 204)
            self.send_response(code)
            self.send_header("Location", f"/{SECRET}/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    listener.handle_error = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    server = Hook(f"http://127.0.0.1:{listener.server_port}/{SECRET}?token={SECRET}")
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv(VARIABLE, server.address)
    try:
        yield server
    finally:
        server.free.set()
        listener.shutdown()
        listener.server_close()
        thread.join()


@pytest.mark.parametrize("behaves", ["takes", "is slow"])
def test_a_server_is_sent_each_alarm(behaves: str, tmp_path: Path, monkeypatch) -> None:
    said = Said(entropy="it collapses — ünï")
    with hook(monkeypatch, behaves) as server, said.notifier(tmp_path, webhook_env=VARIABLE) as notifier:
        notifier.row(step_row(fresh_rng(), 7, warnings=["it collapses — ünï"]))
        until(lambda: server.sent)
        notifier.over(True, {"steps": 8, "wall_seconds": 1.0, "accuracy": {}})
    assert [path for path, _, _ in server.sent] == [f"/{SECRET}?token={SECRET}"] * 2
    assert {kind for _, kind, _ in server.sent} == {"application/json"}
    bodies = [body for _, _, body in server.sent]
    assert all(set(body) == KEYS for body in bodies) and [body["kind"] for body in bodies] == ["entropy", "done"]
    assert bodies[0]["text"] == "it collapses — ünï" and not said and not notifier.untold


@pytest.mark.parametrize(
    ("behaves", "why"),
    [
        ("fails", "the server answers 500"),
        ("sends elsewhere", "the server answers 302"),
        ("hangs", "not done within 2 s, and killed"),
        ("drips", "not done within 2 s, and killed"),
        ("refuses", "does not answer (ConnectionError)"),
    ],
)
def test_a_server_that_does_not_take_it(behaves: str, why: str, tmp_path: Path, monkeypatch) -> None:
    """Nothing that is said or kept holds the address."""
    monkeypatch.setattr(notify, "DEADLINE_SECONDS", 2.0 if "killed" in why else 60.0)
    said = Said()
    with hook(monkeypatch, behaves) as server:
        if behaves == "refuses":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{probe.getsockname()[1]}/{SECRET}")
        with said.notifier(tmp_path, webhook_env=VARIABLE) as notifier:
            notifier.row(step_row(fresh_rng(), 1, warnings=["w"]))
            until(lambda: notifier.untold["webhook"] == 1)
        assert len(server.sent) == (behaves != "refuses")
    assert len(said) == 1 and why in said[0] and SECRET not in said[0]
    assert not any(SECRET in file.read_text() for file in tmp_path.iterdir())


def test_both_are_told_though_one_fails(tmp_path: Path, monkeypatch) -> None:
    said = Said()
    ways = {"webhook_env": VARIABLE, "command": python(tmp_path, WRITES)}
    with hook(monkeypatch, "fails") as server, said.notifier(tmp_path, **ways) as notifier:
        notifier.row(step_row(fresh_rng(), 1, warnings=["w"]))
    assert len(server.sent) == len(told(tmp_path)) == 1 and len(said) == 1 and notifier.untold == {"webhook": 1}


# ---- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ways", "told"),
    [
        ({"command": "/absent/program x"}, "/absent/program: none such"),
        ({"webhook_env": VARIABLE}, f"{VARIABLE} is not set"),
        ({"webhook_env": VARIABLE, "address": f"hooks.example/{SECRET}"}, "holds something else"),
        ({"webhook_env": VARIABLE, "address": f"ftp://host/{SECRET}"}, "holds something else"),
        ({"webhook_env": VARIABLE, "address": f"http://[{SECRET}/"}, "holds something else"),
        ({"webhook_env": f"https://hooks.example/{SECRET}"}, "names a variable"),
        ({"command": "say 'no end"}, "No closing quotation"),
        ({"webhook": f"https://hooks.example/{SECRET}"}, "did you mean notify.webhook_env?"),
    ],
)
def test_nobody_could_be_told(ways: dict[str, str], told: str, monkeypatch) -> None:
    """Said before the run begins, without the secret."""
    monkeypatch.delenv(VARIABLE, raising=False)
    if address := ways.pop("address", ""):
        monkeypatch.setenv(VARIABLE, address)
    with pytest.raises(ConfigError) as caught:
        ways_of(config(**ways).notify)
    assert told in str(caught.value) and SECRET not in str(caught.value)


def test_alarms_are_counted_by_kind_and_from_zero(tmp_path: Path) -> None:
    rng, said = fresh_rng(), Said(truncated="a", entropy="b")

    def counted(log: MetricsLog, name: str) -> dict[str, float]:
        text = log._prometheus.registry
        from prometheus_client import generate_latest

        families = text_string_to_metric_families(generate_latest(text).decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {next(iter(sample.labels.values())): sample.value for sample in samples}

    with said.notifier(tmp_path, command=python(tmp_path, "sys.exit(1)")) as notifier:
        log = MetricsLog(tmp_path, "127.0.0.1", 0, notifier=notifier)
        assert counted(log, "tutorloop_alarms_total") == dict.fromkeys(KNOWN_ALARMS, 0.0)
        log.log_step(step_row(rng, 1, warnings=["a", "b"]))
        log.log_eval(eval_row(rng, 1))
        log.log_step(step_row(rng, 2, warnings=["a", "c"]))
        until(lambda: notifier.untold["command"] == 3)
        log.log_step(step_row(rng, 3))
        found = {kind: count for kind, count in counted(log, "tutorloop_alarms_total").items() if count}
        assert found == {"truncated": 1, "entropy": 1, "other": 1}
        assert counted(log, "tutorloop_alarms_untold_total") == {"command": 3}
        log.close()


def test_a_folder_that_takes_no_file_is_counted_too(tmp_path: Path) -> None:
    said = Said()
    (tmp_path / ALARMS).mkdir()
    with said.notifier(tmp_path) as notifier:
        notifier.row(step_row(fresh_rng(), 1, warnings=["a", "b"]))
    assert notifier.untold == {"file": 2} and len(said) == 1 and kept(tmp_path) == []


def test_another_runs_folder_is_not_written_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    with Notifier(config(), tmp_path / "absent", str, print) as notifier:
        notifier.row(step_row(fresh_rng(), 1, warnings=["a"]))
    assert not (tmp_path / "absent").exists()
    with Said().notifier(tmp_path) as notifier:
        for step in range(3):
            notifier.row(step_row(fresh_rng(), step, warnings=[f"{step}"]))
    whole = (tmp_path / ALARMS).read_bytes()
    (tmp_path / ALARMS).write_bytes(whole[:-9] + b'\n[1]\n{"kind": 1}\n{"a": ')
    assert [alarm["text"] for alarm in kept(tmp_path)] == ["0", "1"]
    (tmp_path / ALARMS).write_bytes(os.urandom(notify.TAIL_BYTES) + b"\n" + whole)
    assert [alarm["text"] for alarm in kept(tmp_path)] == ["0", "1", "2"]
