"""The command itself, as a user runs it: Ctrl-C once and twice, `--resume`, a Ray job; and what it leaves behind."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny import tiny_qwen3

TUTORLOOP = str(Path(sys.executable).parent / "tutorloop")
RAY = str(Path(sys.executable).parent / "ray")
PATIENCE = 600.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_qwen3(folder / "student")
    tiny_qwen3(folder / "teacher", seed=1)
    rows = "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8))
    (folder / "problems.jsonl").write_text(rows)
    (folder / "recipe.yaml").write_text(
        f"""
method: opd
output_dir: {folder}/unset
steps: 4
prompts_per_step: 2
student: {{model: {folder}/student}}
teacher: {{model: {folder}/teacher, signal: sampled}}
data: {{path: {folder}/problems.jsonl}}
rollout: {{samples_per_prompt: 2, max_new_tokens: 8}}
"""
    )
    return folder


class Command:
    """A `tutorloop train` in a process group of its own, as a terminal's foreground job is, and marked."""

    def __init__(self, models: Path, folder: Path, *arguments: str) -> None:
        self.mark = f"MARK={uuid.uuid4()}"
        environment = {**os.environ, "TUTORLOOP_TEST": self.mark}
        command = [TUTORLOOP, "train", str(models / "recipe.yaml"), f"output_dir={folder}", *arguments]
        self.folder = folder
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def steps(self) -> list[dict]:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [row for row in map(json.loads, lines) if row["kind"] == "step"]

    def until(self, steps: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while len(self.steps()) < steps:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the run does not get ahead"
            time.sleep(0.1)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def left_behind(self) -> list[int]:
        """Processes that carry this command's mark; a killed one may take a moment to go."""
        for _ in range(50):
            alive = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and self._ours(entry)]
            if not alive:
                return []
            time.sleep(0.2)
        return alive

    def _ours(self, entry: Path) -> bool:
        try:
            return self.mark.encode() in (entry / "environ").read_bytes()
        except OSError:
            return False


def test_interrupted_once_saves_and_resumes_and_twice_ends_at_once(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Command(models, folder, "steps=100000", "metrics.port=0")
    first.until(2)
    first.interrupt()
    code, out, err = first.end()
    assert code == 130 and "Traceback" not in out + err, out + err
    assert first.left_behind() == []
    done = json.loads((folder / "summary.json").read_text())
    assert done["interrupted"] and done["steps"] == len(first.steps()) >= 2
    assert (folder / "checkpoints" / f"step-{done['steps']:06d}" / "state.json").is_file()

    second = Command(models, folder, "steps=100000", "--resume")
    second.until(done["steps"] + 2)
    url = next(word for line in iter(second.process.stdout.readline, "") for word in line.split() if "/metrics" in word)
    families = {family.name: family for family in text_string_to_metric_families(urlopen(url).read().decode())}
    assert {"tutorloop_reverse_kl_nats", "tutorloop_pool_queue_depth", "tutorloop_staleness_max_versions"} <= set(
        families
    )
    assert families["tutorloop_step"].samples[0].value > done["steps"]
    second.interrupt()
    time.sleep(0.05)
    second.interrupt()
    code, out, err = second.end()
    assert code == 130 and "Traceback" not in out + err, out + err
    assert [row["step"] for row in second.steps()] == list(range(1, len(second.steps()) + 1))
    assert second.left_behind() == []
    assert not list(folder.glob("checkpoints/step-*/*.tmp"))


def test_of_two_starts_at_once_one_runs(models: Path, tmp_path: Path) -> None:
    """In one process each: the folder is claimed before Ray is joined."""
    folder = tmp_path / "run"
    both = [Command(models, folder, "steps=100000", "--local", *more) for more in ([], ["--resume=auto"])]
    while all(command.process.poll() is None for command in both):
        time.sleep(0.1)
    loser, winner = sorted(both, key=lambda command: command.process.poll() is None)
    code, out, err = loser.end()
    assert code == 2 and f"process {winner.process.pid} on" in err, out + err
    winner.until(len(winner.steps()) + 2)  # its metrics still reach its file
    os.killpg(winner.process.pid, signal.SIGKILL)
    winner.end()
    for pid in winner.left_behind():  # its verifiers' processes
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    last = Command(models, folder, f"steps={len(winner.steps()) + 4}", "--local", "--resume")
    code, out, err = last.end()
    assert code == 0 and "taking over" in out, out + err
    assert [row["step"] for row in last.steps()] == list(range(1, len(last.steps()) + 1))


def test_ended_while_it_starts_leaves_nothing(models: Path, tmp_path: Path) -> None:
    """By a signal to the whole group, as `timeout` or a shell's `kill %1` send it: Ray must not die of it first."""
    command = Command(models, tmp_path / "run", "steps=100000")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "metrics.jsonl").exists():  # the learner and the rollout pool stand, no step is done
        assert command.process.poll() is None and time.monotonic() < deadline, command.process.communicate()
        time.sleep(0.05)
    os.killpg(command.process.pid, signal.SIGTERM)
    code, out, err = command.end()
    assert code == 130 and "Traceback" not in out + err, out + err
    assert "stopping" in out and "Failed to connect" not in err
    assert command.left_behind() == []


@pytest.mark.parametrize("where", [pytest.param("ray", marks=pytest.mark.sweep), "local"])
def test_a_killed_driver_leaves_nothing_behind(where: str, models: Path, tmp_path: Path) -> None:
    """Neither actors nor what they had started; SIGKILL leaves the driver no time to end them. With Ray and an engine
    of vLLM: tests/vllm/test_vllm_runs.py."""
    command = Command(models, tmp_path / "run", "steps=100000", *(["--local"] if where == "local" else []))
    command.until(2)
    command.process.kill()
    command.process.wait()
    deadline = time.monotonic() + 30
    while left := command.left_behind():
        names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:80] for pid in left]
        assert time.monotonic() < deadline, names


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head with its job server on loopback, as an administrator starts one."""
    port, dashboard, client = free_port(), free_port(), free_port()
    token = tmp_path / "token"
    token.write_text(uuid.uuid4().hex * 2)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    arguments = ["--head", "--block", f"--port={port}", "--num-cpus=4", "--include-dashboard=true"]
    arguments += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}"]
    arguments += [f"--dashboard-agent-listen-port={free_port()}"]  # its default is taken where another head runs
    process = subprocess.Popen([RAY, "start", *arguments], env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + PATIENCE
        listed = [RAY, "job", "list", "--address", url]
        while subprocess.run(listed, env=environment, capture_output=True, check=False).returncode:
            assert process.poll() is None and time.monotonic() < deadline, "the head does not come up"
            time.sleep(1)
        yield url, environment
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def test_a_job_as_it_is_documented_and_tried_again(tmp_path: Path, head: tuple[str, dict[str, str]]) -> None:
    """By the recipe's name, in a folder of Ray's own. The first try's driver is killed; the second goes on from its
    checkpoint; once more, and the finished run is left alone. In docs/cluster.md's own words."""
    url, environment = head
    run = tmp_path / "run"
    small = ["steps=20", "prompts_per_step=2", "rollout.max_new_tokens=16", "eval.path=", "eval.ood_path="]
    entry = [TUTORLOOP, "train", "quickstart", f"output_dir={run}", *small, "checkpoint.every=2", "--resume", "auto"]
    submit = shlex.join([RAY, "job", "submit", "--address", url, "--", *entry])
    tries = ["bash", "-c", f"for try in 1 2 3; do {submit}\n[ $? -eq 0 ] && break\nsleep 1\ndone"]
    scheduler = subprocess.Popen(tries, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + PATIENCE
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert scheduler.poll() is None and time.monotonic() < deadline, scheduler.communicate()
        time.sleep(0.05)
    os.kill(json.loads((run / "live.json").read_text())["pid"], signal.SIGKILL)
    said, _ = scheduler.communicate(timeout=PATIENCE)
    assert scheduler.returncode == 0 and "failed" in said and "succeeded" in said, said
    resumed = re.search(r"resuming after step (\d+) from", said)
    assert resumed and 2 <= int(resumed[1]) < 20, said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 21))
    assert json.loads((run / "summary.json").read_text())["steps"] == 20
    assert (run / "final" / "model.safetensors").is_file()
    again = subprocess.run(tries, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert again.returncode == 0 and "finished after 20 steps" in again.stdout, again.stdout + again.stderr
