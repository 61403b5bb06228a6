"""Verifier processes: started when needed, replaced when they die, and gone when their owner is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from misbehaving import PATIENCE, Behaving, Unloadable, Unpicklable, ask, errors

from tutorloop.contracts.errors import VerifierError
from tutorloop.contracts.protocols import Response
from tutorloop.verifier_service.pool import VerifierPool


@pytest.fixture
def strict():
    """For samples that hang."""
    pool = VerifierPool(Behaving(), timeout_seconds=1.0, memory_gib=0.25)
    yield pool
    pool.close()


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def below(pid):
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_what_can_be_decided_needs_no_process():
    pool = VerifierPool(Behaving())
    assert errors(pool.judge(ask("decided", ""))) == ["", "no_gold"]
    assert pool.submit(Response("", "decided")).result().judgement.answer == "at once"
    assert pool._processes is None


def test_closing_leaves_no_process_and_can_be_undone(strict):
    before = set(below(os.getpid()))
    strict.judge(ask("fine"))
    until(lambda: len(set(below(os.getpid())) - before) >= 3)  # the server, one that worked, and a spare
    pids = set(below(os.getpid())) - before
    strict.close()
    until(lambda: all(gone(pid) for pid in pids))
    assert errors(strict.judge(ask("fine"))) == [""]


def test_processes_that_were_killed_while_idle_are_replaced(strict):
    strict.judge(ask("fine 1", "fine 2"))
    (server,) = [pid for pid in below(os.getpid()) if pid == strict._processes._server._process.pid]
    for pid in below(server):
        os.kill(pid, signal.SIGKILL)
    assert errors(strict.judge(ask("fine 3", "fine 4"))) == ["", ""]


def test_the_server_may_die(strict):
    for i in range(3):
        future = strict.submit(Response("text", f"sleep {PATIENCE * 1000:.0f}{i}"))
        until(lambda: not strict._processes._queue and strict._processes._server.ready)
        strict._processes._server._process.kill()
        assert future.result().judgement.error_class == "crash"
    assert errors(strict.judge(ask("kill_server", "fine"))) in (["crash", ""], ["crash", "crash"])
    assert errors(strict.judge(ask("fine 2"))) == [""]


def test_what_a_sample_started_dies_with_it(strict, tmp_path):
    path = tmp_path / "pid"
    assert errors(strict.judge([Response("text", "start_another", row=str(path))])) == ["timeout"]
    until(lambda: gone(int(path.read_text())))


def test_a_verifier_that_cannot_travel_is_refused():
    with pytest.raises(VerifierError, match="Unpicklable: TypeError: it holds a lock"):
        VerifierPool(Unpicklable())
    pool = VerifierPool(Unloadable())
    for _ in range(2):
        with pytest.raises(VerifierError, match="ImportError: no module named sphinx"):
            pool.judge(ask("fine", "fine 2"))
    assert pool.judge(ask("decided"))[0].judgement.passed


def test_processes_that_cannot_be_started_are_an_error_and_no_wait_for_ever(strict, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(VerifierError, match=r"(?s)can be started.*exit code 1"):
        strict.judge(ask("fine"))
    monkeypatch.undo()
    assert errors(strict.judge(ask("fine"))) == [""]


OWNER = """
import os, signal, sys
import psutil
from misbehaving import Behaving, Response
from tutorloop.verifier_service.pool import VerifierPool

signal.signal(signal.SIGINT, signal.default_int_handler)
pool = VerifierPool(Behaving(), timeout_seconds=1000)
pool.judge([Response("text", "fine")])
futures = [pool.submit(Response("text", f"hang {i}")) for i in range(3)]
futures.append(pool.submit(Response("text", "start_another", row=sys.argv[1])))
while not os.path.exists(sys.argv[1]) or not os.path.getsize(sys.argv[1]):
    pass
try:
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    futures[0].result()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_owner(end, tmp_path):
    """As Ctrl-C does it: the signal goes to the whole process group."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "pid")],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) >= 6  # the server, four at work, what one of them started
    os.killpg(owner.pid, end)
    output, errors = owner.communicate(timeout=PATIENCE)
    assert (output, errors) == ("interrupted\n" if end == signal.SIGINT else "", "")
    until(lambda: all(gone(pid) for pid in pids))
