"""Whole runs whose alarms and end reach a command and a server, and that go on with other keys than they began with."""

import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest
from loop_cases import make_models, recipe, steps_of, train
from rich.console import Console

from tutorloop.cluster import run
from tutorloop.cluster.control import client
from tutorloop.contracts.errors import RunFolderError, TutorloopError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def hook(monkeypatch) -> Iterator[list[dict]]:
    """What a server was sent."""
    sent: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("TUTORLOOP_TEST_HOOK", f"http://127.0.0.1:{server.server_port}/secret-part")
    yield sent
    server.shutdown()
    server.server_close()
    thread.join()


def notified(tmp_path: Path) -> dict[str, str]:
    """Keys of `notify`; the command writes what it is told into told.jsonl."""
    script = tmp_path / "told.py"
    script.write_text(f"import sys\nopen({str(tmp_path / 'told.jsonl')!r}, 'a').write(sys.stdin.read() + '\\n')")
    return {"command": f"{sys.executable} -I -S {script}", "webhook_env": "TUTORLOOP_TEST_HOOK"}


def told(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]


def test_people_hear_of_a_run(models: Path, tmp_path: Path, hook: list[dict]) -> None:
    """One that cuts off every response, to its end; then it goes on, and fails."""
    folder = tmp_path / "run"
    keys = {"notify": notified(tmp_path), "rollout": {"max_new_tokens": 1}, "checkpoint": {"every": 1}}
    config = recipe(models, folder, steps=2, **keys)
    said = io.StringIO()
    assert run.train(config, False, None, Console(file=said, width=100), local=True)
    rows = told(tmp_path)
    assert rows == hook and [row["kind"] for row in rows if row["kind"] != "no_answer"] == ["truncated", "done"]
    assert all(row["run"] == str(folder) and row["method"] == "opd" for row in rows)
    assert rows[0]["text"] in json.loads((folder / "summary.json").read_text())["warnings"]
    known = client.ask(folder)
    assert known["state"] == "ended"
    assert [alarm["text"] for alarm in known["alarms"]] == [row["text"] for row in rows]
    assert "not told" not in said.getvalue()
    assert not any("policy_shift" in row["learner"] for row in steps_of(folder)), "of so few tokens it is noise"

    longer = recipe(models, folder, steps=6, **{**keys, "learner": {"learning_rate": 1e19, "max_grad_norm": 1e10}})
    with pytest.raises(TutorloopError) as failed:
        run.train(longer, True, None, Console(file=said, width=100), local=True, allow=["learner"])
    assert not isinstance(failed.value, RunFolderError)
    assert told(tmp_path) == hook and len(hook) == len(rows) + 1, "what was told before is not told again"
    assert (hook[-1]["kind"], hook[-1]["text"]) == ("failed", str(failed.value))
    known = client.ask(folder)
    assert known["state"] == "died" and known["alarms"][-1]["text"] == str(failed.value)
    kept = [path for path in folder.rglob("*") if path.is_file() and b"secret-part" in path.read_bytes()]
    assert kept == [] and "secret-part" not in said.getvalue()


def test_alarms_are_on_the_endpoint_while_the_run_goes_on(models: Path, tmp_path: Path, monkeypatch) -> None:
    """Seen by the command, and before the last step's line, once it has failed."""
    script = tmp_path / "ask.py"
    script.write_text(
        f"import sys, json, urllib.request\nurl = open({str(tmp_path / 'url')!r}).read()\n"
        f"open({str(tmp_path / 'seen')!r}, 'a').write(urllib.request.urlopen(url).read().decode())\nsys.exit(3)"
    )
    seen: list[str] = []
    printed = io.StringIO()

    class Spy(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("metrics at "):
                (tmp_path / "url").write_text(text.removeprefix("metrics at ").strip())
            if text.startswith("step 3/3"):
                seen.append(urlopen((tmp_path / "url").read_text()).read().decode())
            return printed.write(text)

    keys = {"notify": {"command": f"{sys.executable} -I -S {script}"}, "rollout": {"max_new_tokens": 1}}
    config = recipe(models, tmp_path / "run", steps=3, **keys)
    assert run.train(config, False, None, Console(file=Spy(), width=200), local=True)
    assert 'tutorloop_alarms_total{kind="truncated"} 1.0' in seen[0]
    assert 'tutorloop_alarms_total{kind="entropy"} 0.0' in seen[0]
    assert "an alarm was not told (command): it ends with code 3" in printed.getvalue()
    assert "tutorloop_step" in (tmp_path / "seen").read_text()


def test_a_run_that_goes_on_with_other_keys_says_which(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(recipe(models, folder, steps=2), None)
    before = steps_of(folder)
    other = recipe(models, folder, steps=4, learner={"learning_rate": 5e-3, "tokens_per_batch": 64})
    with pytest.raises(RunFolderError, match=r"--allow-change learner\.learning_rate"):
        train(other, None, resume=True)
    assert steps_of(folder) == before and not (folder / "changes.jsonl").exists()
    said = io.StringIO()
    for _ in range(2):  # a scheduler's second try says the same
        assert run.train(other, True, None, Console(file=said, width=200), local=True, allow=["learner.learning_rate"])
    assert "learner.learning_rate: 0.01 before, 0.005 now: another result from here on" in said.getvalue()
    rates = [row["learner"]["learning_rate"] for row in steps_of(folder)]
    assert rates == [0.01, 0.01, 0.005, 0.005] and steps_of(folder)[:2] == before
    (line,) = (folder / "changes.jsonl").read_text().splitlines()
    change = {"step": 2, "key": "learner.learning_rate", "kind": "result", "before": 0.01, "now": 0.005}
    assert json.loads(line) == change
    page = (folder / "report.html").read_text()
    assert "Changed while it ran" in page and "<td>learner.learning_rate</td><td>0.01</td><td>0.005</td>" in page
