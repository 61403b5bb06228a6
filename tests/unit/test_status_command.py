"""`tutorloop status` and `scale`, as a person types them: at a run that listens, and at what a run has left."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from run_rows import eval_row, fresh_rng, step_row, summary_of
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.cluster.control import client
from tutorloop.cluster.control.live import LIVE
from tutorloop.cluster.control.server import ControlServer
from tutorloop.cluster.recording.claim import Claim
from tutorloop.contracts.errors import InputError, ResourceError
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.status import PoolStatus, ReplicaStatus, RunStatus, ScaleDecision, StepStatus

HOSTILE = "[red]x[/] \x1b[31m\x07\u202e y"
SHOWN = r"[red]x[/] \x1b[31m\x07\u202e y"
KEYS = {
    *("state", "method", "phase", "step", "steps", "version", "seconds", "pools", "in_flight", "dropped"),
    *("learner_ranks", "learner_restarts", "notes", "alarms", "decisions", "figures", "checkpoint", "go_on"),
}


class Scripted:
    """A run of three pools, one of which has trouble. It knows the bounds of two."""

    def __init__(self) -> None:
        self.bounds = {"rollout": (1, 8), "teacher": (1, None), "verifier": (1, 1)}
        self.have = {"rollout": 2, "teacher": 1, "verifier": 1}

    def status(self) -> RunStatus:
        return RunStatus(
            method="kd → opd",
            phase="training",
            step=12,
            steps=200,
            version=11,
            seconds=3754.2,
            pools=[self.pool(name) for name in self.have],
            in_flight=[
                StepStatus(step=13, seconds=14.0, shards=8, ready=5, waits_for=Counter(teacher=2, verifier=1)),
                StepStatus(step=14, seconds=2.0, shards=6, ready=6, waits_for={"rollout": 0}),
            ],
            dropped=Counter(stale=12345, off_policy=0),
            learner_ranks=4,
            learner_restarts=1,
            notes=[f"note {n}" for n in range(9)] + [f"two\n{HOSTILE}"],
            decisions=[
                ScaleDecision(
                    step=n,
                    seconds=60.0 * n,
                    what="rollout 1 → 5",
                    why="slow",
                    step_seconds=8.0,
                    expected_seconds=2.013,
                )
                for n in range(1, 6)
            ],
        )

    def pool(self, name: str) -> PoolStatus:
        least, most = self.bounds[name]
        troubled = name == "rollout"
        replicas = [
            ReplicaStatus(number=3, state="serving", seconds=61.0, version=11, calls=2, where=f"here {HOSTILE}")
        ]
        if name == "teacher":
            replicas += [ReplicaStatus(number=4, state="loading", seconds=5.0, version=None, calls=0)]
        return PoolStatus(
            name=name,
            wanted=self.have[name],
            least=least,
            most=most,
            replicas=replicas,
            waiting=7 * troubled,
            oldest_seconds=125.0 * troubled,
            restarts=2 * troubled,
            retries=3 * troubled,
        )

    def scale(self, wanted: Mapping[str, int]) -> dict[str, int]:
        for pool, number in wanted.items():
            if pool not in self.bounds:
                raise InputError(
                    "only a pool of the run is scaled", f"{pool} {HOSTILE}", f"its pools: {', '.join(self.have)}"
                )
            least, most = self.bounds[pool]
            if number < least or (most and number > most):
                raise ResourceError(f"{pool} has {least} to {most} replicas", f"{number}", "choose one of those")
        before = {pool: self.have[pool] for pool in wanted}
        self.have |= wanted
        return before


def tutorloop(*arguments, code: int = 0, columns: int = 120) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": f"{columns}"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def run() -> Scripted:
    return Scripted()


@pytest.fixture
def alive(run: Scripted, tmp_path: Path) -> Iterator[Path]:
    with ControlServer(run, tmp_path):
        yield tmp_path


# ---- a run that listens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screen_says_how_a_run_stands(alive: Path, columns: int) -> None:
    lines = tutorloop("status", alive, columns=columns).splitlines()
    assert lines[0].split("  ") == [
        "kd → opd",
        "step 12 of 200",
        "version 11",
        "training",
        "4 learner ranks",
        "1:02:34",
    ]
    assert all(len(line) <= columns for line in lines)
    words = [" ".join(line.split()) for line in lines]
    assert words[1] == "pool replica state version calls for where"
    at = words.index("rollout 1 of 2 7 waiting 2 may have 1 to 8")
    assert words[at + 1].startswith("3 serving 11 2 1:01 here [red]x[/]")
    assert "teacher 2 of 1 2 may have 1 or more" in words and "4 loading 0 0:05" in words
    assert "verifier 1 2 may have 1 to 1" in words
    facts = words[words.index("4 loading 0 0:05") + 1 :]
    assert facts[facts.index("step 13 5 of 8 shards ready, 0:14, waits for teacher 2, verifier 1") :] == [
        "step 13 5 of 8 shards ready, 0:14, waits for teacher 2, verifier 1",
        "step 14 6 of 6 shards ready, 0:02",
        "oldest call rollout 2:05",
        "failures rollout: replicas replaced 2, calls made again 3",
        "failures learner: restarts 1",
        "dropped stale 12,345",
        *(f"autoscaler {n}:00 step {n}: rollout 1 → 5: slow; 8 s a step, 2.01 s expected" for n in (3, 4, 5)),
        *(f"note note {n}" for n in range(5, 9)),
        rf"note two\n{SHOWN}",
    ]


def test_one_object_says_the_same(alive: Path, run: Scripted) -> None:
    known = json.loads(tutorloop("status", alive, "--json"))
    assert set(known) == KEYS and known["state"] == "running"
    assert {key: known[key] for key in run.status().plain()} == run.status().plain()


def test_a_run_that_listens_has_its_figures_beside(alive: Path) -> None:
    rows = [step_row(fresh_rng(), 3, loss=0.25)]
    (alive / "metrics.jsonl").write_text("".join(json.dumps({"kind": "step", **asdict(row)}) + "\n" for row in rows))
    known = json.loads(tutorloop("status", alive, "--json"))
    assert known["figures"]["loss"] == 0.25 and known["step"] == 12 and known["dropped"]["stale"] == 12345


def test_pools_go_to_other_numbers(alive: Path, run: Scripted) -> None:
    assert tutorloop("scale", alive, "teacher=3", "rollout=1") == "teacher: 1 → 3 replicas\nrollout: 2 → 1 replica\n"
    assert run.have == {"rollout": 1, "teacher": 3, "verifier": 1}
    said = json.loads(tutorloop("scale", alive, "--json", "teacher=2"))
    assert said == {"before": {"teacher": 3}, "wanted": {"teacher": 2}} and run.have["teacher"] == 2


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([], "at least one POOL=N"),
        (["teacher"], "written POOL=N"),
        (["=3"], "found: =3"),
        (["teacher="], "found: teacher="),
        (["teacher=x"], "found: teacher=x"),
        (["teacher=-1"], "found: teacher=-1"),
        (["teacher=1.5"], "found: teacher=1.5"),
        (["teacher=٣"], "found: teacher=٣"),
        (["teacher=" + "9" * 5000], "written POOL=N"),
        (["teacher=2000000"], "at most 1,000,000"),
        (["teacher=2", "teacher=2"], "named once"),
        (["rollout=0"], "rollout has 1 to 8 replicas"),
        (["teacher=2", "rollout=9"], "found: 9"),
        (["judge=2"], "its pools: rollout, teacher, verifier"),
        (["judge=2"], f"found: judge {SHOWN}"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_clear_error(alive: Path, run: Scripted, pairs: list[str], told: str) -> None:
    error = tutorloop("scale", alive, *pairs, code=2)
    assert error.startswith("error: ") and told in error and len(error.splitlines()) == 3
    assert "\x1b" not in error and "Traceback" not in error
    assert run.have == {"rollout": 2, "teacher": 1, "verifier": 1}


def test_a_wrong_token_is_one_clear_error(alive: Path, run: Scripted) -> None:
    spoilt = {**json.loads((alive / LIVE).read_text()), "token": "z" * 43}
    (alive / LIVE).write_text(json.dumps(spoilt))
    for arguments in (["status", alive], ["scale", alive, "teacher=3"]):
        error = tutorloop(*arguments, code=2)
        assert "holds the run's token" in error and len(error.splitlines()) == 3 and "zz" not in error
    assert run.have["teacher"] == 1


# ---- a run that does not --------------------------------------------------------------------------------------------


class Left:
    """What a run of four steps has left: its configuration, its rows, checkpoints of the steps 2 and 10."""

    def __init__(self, folder: Path) -> None:
        self.folder, rng = folder, fresh_rng()
        config = load_config(Path("quickstart"), ["steps=40", "output_dir=somewhere/else"])
        self.write("config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
        self.method, self.last = config.method, step_row(rng, 12, wall_seconds=754.2, reward=None)
        self.evaluated = eval_row(rng, 8)
        rows = [
            *(("step", step_row(rng, step)) for step in range(1, 9)),
            *(("eval", self.evaluated), ("eval", eval_row(rng, 8, model="teacher")), ("step", step_row(rng, 11))),
            *(("step", self.last), ("eval", eval_row(rng, 12, split="out_of_distribution"))),
        ]
        self.rows = [json.dumps({"kind": kind, **asdict(row)}) for kind, row in rows]
        self.write("metrics.jsonl", "\n".join(self.rows) + '\n{"kind": "step", "step": 13, "lo')
        for name in ("step-000002", "step-000010", ".step-000099.tmp", "step-x"):
            (folder / "checkpoints" / name).mkdir(parents=True)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def summary(self, **changes) -> None:
        evals = [self.evaluated]
        self.write("summary.json", json.dumps(summary_of(evals, method=self.method, steps=12, **changes)))

    def claim(self, **changes) -> None:
        """One that was not given up."""
        (self.folder / "claim-1").unlink(missing_ok=True)
        held = Claim.take(self.folder, print)
        text = (self.folder / "claim-1").read_text()
        held.release()
        self.write("claim-1", json.dumps({**json.loads(text), **changes}))

    def asked(self) -> dict:
        known = json.loads(tutorloop("status", self.folder, "--json"))
        assert set(known) == KEYS
        return known

    def continued(self) -> str:
        return f"tutorloop train {self.folder}/config.yaml output_dir={self.folder} --resume"


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return Left(tmp_path)


def test_what_its_files_say_of_a_run_that_failed(left: Left) -> None:
    known = left.asked()
    row = left.last
    assert (known["state"], known["phase"], known["step"], known["steps"]) == ("died", "died at step 12", 12, 40)
    assert (known["method"], known["version"], known["seconds"]) == (left.method, 12, 754.2)
    assert known["dropped"] == row.dropped and known["checkpoint"] == str(left.folder / "checkpoints" / "step-000010")
    figures = known["figures"]
    assert (figures["loss"], figures["reverse_kl"]) == (row.loss, row.learner["reverse_kl"]) and "reward" not in figures
    assert (figures["accuracy"], figures["accuracy_step"]) == (left.evaluated.stats["avg_at_k"]["value"], 8)
    assert known["go_on"] == f"continue after step 10: {left.continued()}"
    wrapped = tutorloop("status", left.folder, columns=80)
    lines = wrapped.replace("\n" + " " * 12, " ").splitlines()
    assert lines[0] == f"{left.method}  step 12 of 40  version 12  died at step 12  12:34"
    assert [line.split()[0] for line in lines[1:]] == ["dropped", "figures", "checkpoint", "next"]
    assert all(len(line) <= 80 for line in wrapped.splitlines()[:4]) and len(lines[2]) > 80
    assert (
        f"loss {row.loss:.4g}" in lines[2] and "pass rate" in lines[2] and lines[4].endswith(left.continued())
    )  # whole, to be copied


def test_alarms_and_how_a_run_ended(left: Left, run: Scripted) -> None:
    """Of a run that listens and of one that is gone, from one file."""
    assert left.asked()["alarms"] == []
    told = {"text": HOSTILE, "time": "2026-01-31T12:00:00Z"}
    alarms = [{"kind": f"k{n}", "step": n, **told} for n in range(random.randint(6, 30))]
    left.write("alarms.jsonl", "".join(json.dumps(alarm) + "\n" for alarm in alarms))
    assert left.asked()["alarms"] == alarms[-20:]
    lines = [" ".join(line.split()) for line in tutorloop("status", left.folder, columns=200).splitlines()]
    shown = [f"alarm {a['kind']} at step {a['step']}, {a['time']}: {SHOWN}" for a in alarms[-5:]]
    assert [line for line in lines if line.startswith("alarm")] == shown
    with ControlServer(run, left.folder):
        assert left.asked()["state"] == "running" and left.asked()["alarms"] == alarms[-20:]


def test_states_of_a_run_that_does_not_listen(left: Left) -> None:
    left.claim(started="1")  # of a process that is gone, whose id another has
    assert left.asked()["state"] == "died"
    left.summary(interrupted=True)
    known = left.asked()
    assert known["state"] == "interrupted" and left.continued() in known["go_on"] and known["seconds"] == 75.4
    left.summary()
    known = left.asked()
    assert known["state"] == known["phase"] == "ended" and known["go_on"].endswith("/final")
    left.claim()  # of this process
    known = left.asked()
    assert known["state"] == "starting or ending" and f"process {os.getpid()} on" in known["go_on"]
    left.claim(machine="another kernel", host=f"node-7 {HOSTILE}")
    assert left.asked()["state"] == "running elsewhere"
    assert f"on node-7 {SHOWN}" in tutorloop("status", left.folder)
    old = time.time() - client.LONG_SECONDS - 60
    os.utime(left.folder / "claim-1", (old, old))
    assert left.asked()["state"] == "ended"


def test_whoever_is_not_alive_cannot_be_scaled(left: Left) -> None:
    for summary, state in ((None, "died"), ({"interrupted": True}, "was interrupted"), ({}, "ended")):
        if summary is not None:
            left.summary(**summary)
        error = tutorloop("scale", left.folder, "teacher=3", code=2).splitlines()
        assert error[:2] == ["error: the run is alive", f"  found: run {state} at step 12 of 40"] and len(error) == 3


def test_how_to_go_on_without_a_checkpoint(left: Left) -> None:
    for folder in (left.folder / "checkpoints").iterdir():
        folder.rmdir()
    known = left.asked()
    assert known["checkpoint"] is None and known["go_on"] == f"continue from its beginning: {left.continued()}"


def test_a_run_of_which_little_is_left(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    known = json.loads(tutorloop("status", tmp_path, "--json"))
    assert (known["state"], known["step"], known["steps"], known["version"]) == ("died", 0, None, None)
    assert tutorloop("status", tmp_path) == "step 0  died at step 0\nnext        it wrote nothing: start it again\n"
    (tmp_path / "config.yaml").write_text("of: another release\n")
    assert json.loads(tutorloop("status", tmp_path, "--json"))["steps"] is None
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json is as it was written" in tutorloop("status", tmp_path, code=2)


def test_the_last_row_is_found_however_long_the_file_is(left: Left, monkeypatch) -> None:
    lines = left.rows[:10] + [json.dumps({"kind": "eval", **asdict(eval_row(fresh_rng(), 10))})] * random.randint(1, 40)
    left.write("metrics.jsonl", "\n".join(lines) + "\n")
    for tail in (10, 1000, 5000, 10**6):
        monkeypatch.setattr(client, "TAIL_BYTES", tail)
        assert client.of_files(left.folder)["step"] == 8


def test_a_folder_that_holds_no_run_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no run")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "notes.txt", tmp_path / f"x{HOSTILE}"):
        for arguments in (["status", folder], ["status", folder, "--json"], ["scale", folder, "teacher=3"]):
            error = tutorloop(*arguments, code=2)
            assert error.startswith("error: RUN is the folder of a run") and len(error.splitlines()) == 3
            assert "\x1b" not in error


def test_neither_command_loads_torch_or_ray(left: Left) -> None:
    code = """
import sys
from tutorloop.cli.main import app
ended = []
for arguments in (["status", sys.argv[1]], ["scale", sys.argv[1], "teacher=3"]):
    try:
        app(arguments)
    except SystemExit as end:
        ended.append(end.code)
print(ended, [name for name in ("torch", "ray", "transformers") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code, str(left.folder)], capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "[0, 2] []", ended.stderr
