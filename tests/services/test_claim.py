"""One process at a time in a run's folder: real processes that want it at once, that hold it, and that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tutorloop.cluster.recording import claim
from tutorloop.cluster.recording.claim import Claim, holder_of
from tutorloop.contracts.errors import RunFolderError, StorageError

# Takes each folder that it is told of, says what came of it, and holds on to it until it is told to go on.
HOLDER = """
import sys
from pathlib import Path
from tutorloop.cluster.recording.claim import Claim
from tutorloop.contracts.errors import RunFolderError

for line in sys.stdin:
    try:
        held = Claim.take(Path(line.strip()), lambda _: None)
    except RunFolderError as error:
        print("refused", *str(error).split(), flush=True)
        sys.stdin.readline()
        continue
    print("held", flush=True)
    sys.stdin.readline()
    held.release()
"""


class Other:
    """Another process, that claims folders."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def kill(self, reap: bool = True) -> None:
        self.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | (0 if reap else os.WNOWAIT))


@pytest.fixture
def two() -> Iterator[tuple[Other, Other]]:
    others = Other(), Other()
    yield others
    for other in others:
        other.process.kill()
        other.process.communicate()


def test_of_two_at_once_one_wins_each_time(two: tuple[Other, Other], tmp_path: Path) -> None:
    for number in range(50):
        folder = tmp_path / "runs" / f"{number % 7}"
        for other in two:
            other.say(str(folder))
        answers = [other.hear() for other in two]
        winner, loser = two if answers[0] == "held\n" else two[::-1]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "refused"], answers
        assert f"process {winner.process.pid} on" in max(answers), answers
        loser.say("")
        winner.say("")
        while holder_of(folder):
            time.sleep(0.001)
    assert not list((tmp_path / "runs").rglob("claim-*"))


@pytest.mark.parametrize("reap", [True, False])
def test_a_killed_ones_folder_is_taken_over_by_one(two: tuple[Other, Other], tmp_path: Path, reap: bool) -> None:
    first, second = two
    told: list[str] = []
    for number in range(1, 4):
        holder = Other()
        holder.say(str(tmp_path / "run"))
        assert holder.hear() == "held\n"
        holder.kill(reap)  # one that nobody has reaped is gone as well
        for other in two:
            other.say(str(tmp_path / "run"))
        answers = [other.hear() for other in two]
        assert sorted(answer.split()[0] for answer in answers) == ["held", "refused"], answers
        for other in two:
            other.say("")
        while holder_of(tmp_path / "run"):
            time.sleep(0.001)
        claims = list((tmp_path / "run").iterdir())
        assert len(claims) == 1 and claims[0].name == f"claim-{2 * number}"
        holder.process.communicate()
    assert first.process.poll() is None and second.process.poll() is None
    held = Claim.take(tmp_path / "run", told.append)
    assert told == []  # the last one left it as it should
    held.release()


def test_whoever_holds_it_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    held = Claim.take(tmp_path / "runs" / "one", lambda _: None)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"):
        Claim.take(tmp_path / "runs" / "one", lambda _: None)
    held.check()
    held.release()
    assert not (tmp_path / "runs").exists()


def elsewhere(folder: Path, **changes: str) -> Path:
    """The claim of a process of another machine, or of this one with `changes`."""
    held = Claim.take(folder, lambda _: None)
    path = folder / "claim-1"
    text = path.read_text()
    held.release()
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({**json.loads(text), "machine": "other", **changes}))
    return path


def test_one_with_the_id_of_a_dead_one_is_not_it(tmp_path: Path) -> None:
    told: list[str] = []
    elsewhere(tmp_path / "run", machine=claim.machine(), started="12")
    Claim.take(tmp_path / "run", told.append).release()
    assert "taking over" in told[0] and f"process {os.getpid()}" in told[0]


def test_another_machines_is_watched_for_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "DEAD_SECONDS", 0.3)
    told: list[str] = []
    path = elsewhere(tmp_path / "dead", host="far")
    Claim.take(path.parent, told.append).release()
    assert "far" in told[-1] and "is gone" in told[-1]

    path = elsewhere(tmp_path / "torn")
    path.write_text("{")  # its holder died while it wrote it
    Claim.take(path.parent, told.append).release()

    monkeypatch.setattr(claim, "DEAD_SECONDS", 60.0)
    path = elsewhere(tmp_path / "old")
    os.utime(path, (0, 0))
    Claim.take(path.parent, told.append).release()

    path = elsewhere(tmp_path / "alive", host="far")
    touches = f"import os, time\nfor _ in range(600): time.sleep(0.05); os.utime({str(path)!r})"
    with subprocess.Popen([sys.executable, "-c", touches]) as holder:
        with pytest.raises(RunFolderError, match="far"):
            Claim.take(path.parent, told.append)
        holder.kill()


def test_a_holder_touches_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)
    held = Claim.take(tmp_path / "run", lambda _: None)
    os.utime(tmp_path / "run" / "claim-1", (0, 0))
    for _ in range(3000):
        if touched := (tmp_path / "run" / "claim-1").stat().st_mtime:
            break
        time.sleep(0.01)
    held.release()
    assert touched > 0


def test_one_that_stood_still_hears_that_it_was_followed(tmp_path: Path) -> None:
    held = Claim.take(tmp_path / "run", lambda _: None)
    text = (tmp_path / "run" / "claim-1").read_text()
    (tmp_path / "run" / "claim-1").unlink()
    held.check()
    (tmp_path / "run" / "claim-2").write_text(text)
    with pytest.raises(RunFolderError, match="taken over"):
        held.check()
    held.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["claim-2"]


def test_an_old_look_makes_none_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw claim-1 of a dead one, and slept while others came and went."""
    elsewhere(tmp_path / "run", machine=claim.machine(), started="12")
    real, looks = claim._numbers, iter([[1]])
    monkeypatch.setattr(claim, "_numbers", lambda folder: next(looks, None) or real(folder))
    monkeypatch.setattr(claim, "_wait_for_the_end", lambda path, tell: None)
    living = {**json.loads((tmp_path / "run" / "claim-1").read_text()), "started": claim.began(os.getpid())}
    (tmp_path / "run" / "claim-3").write_text(json.dumps(living))
    (tmp_path / "run" / "claim-1").unlink()
    held = Claim.take(tmp_path / "run", lambda _: None)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["claim-4"]
    held.release()


@pytest.mark.parametrize("place", ["/proc/nope", "FILE/run", "FILE", "LONG", "LINK"])
def test_a_place_that_cannot_be_a_folder(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("absent")
    names = {"FILE": str(tmp_path / "file"), "LONG": str(tmp_path / ("x" * 300)), "LINK": str(tmp_path / "link")}
    for mark, name in names.items():
        place = place.replace(mark, name)
    with pytest.raises(RunFolderError, match="output_dir can be written"):
        Claim.take(Path(place), lambda _: None)


def test_a_full_disk_is_the_machines(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from tutorloop.cluster.recording.claim import Claim
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    Claim.take(Path({str(tmp_path / "run")!r}), print)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(StorageError.__name__) and "make room" in done.stdout, done
    assert not (tmp_path / "run").exists()
