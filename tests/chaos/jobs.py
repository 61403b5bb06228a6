"""Runs by the command line, to which things are done, and what must hold of them at their end."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from safetensors.numpy import load_file

TUTORLOOP = str(Path(sys.executable).with_name("tutorloop"))
ACTORS = ("RolloutWorker", "TeacherWorker", "VerifierWorker", "LearnerWorker")
ALONE = ["max_staleness=0", "eval.path=", "eval.ood_path=", "checkpoint.every=5", "checkpoint.keep=3"]
ROLLOUTS = 96  # a step
PATIENCE = 1800.0  # seconds, for a run
SLOW_TEACHER = [f"teacher.engine={Path(__file__).with_name('slow_teacher.py')}:SlowTeacher", "rollout.batch_size=8"]


class Job:
    """A run by the command line, in a process group of its own. `within`: the command that starts it."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        *overrides: str,
        within: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.steps, self.within, self.env = folder, steps, within, {**os.environ, **(env or {})}
        self.command = [TUTORLOOP, "train", "quickstart", f"output_dir={folder}", f"steps={steps}", *ALONE, *overrides]
        self.log = folder.with_suffix(".log").open("a", encoding="utf-8")
        self.process = self._start()

    def _start(self, *more: str) -> subprocess.Popen[bytes]:
        command, own = [*self.within, *self.command, *more], self.folder.parent
        return subprocess.Popen(
            command, stdout=self.log, stderr=self.log, start_new_session=True, env=self.env, cwd=own
        )

    def again(self) -> None:
        """Once more, from its checkpoint, or from the beginning where it has none."""
        self.process = self._start("--resume", "auto")

    @property
    def text(self) -> str:
        return self.folder.with_suffix(".log").read_text(encoding="utf-8")

    @property
    def rows(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == "step"]

    def actors(self, name: str = "") -> list[psutil.Process]:
        return actors_of(self.process.pid, name)

    def until(self, steps: int) -> None:
        self.wait(lambda: len(self.rows) >= steps)

    def wait(self, there: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not there():
            assert self.process.poll() is None, self.text[-3000:]
            assert time.monotonic() < end, "too long"
            time.sleep(0.05)

    def ends(self) -> None:
        """By itself, with every step trained once and every rollout accounted for."""
        assert self.process.wait(PATIENCE) == 0, self.text[-3000:]
        self.check()

    def fails(self) -> str:
        """By itself, with an error in words: the last lines that it said."""
        code = self.process.wait(PATIENCE)
        said = self.text
        assert code not in (0, 130) and code > 0 and "Traceback" not in said, said[-3000:]
        return " ".join(said[said.rindex("error") :].split())

    def check(self) -> None:
        rows = self.rows
        assert [row["step"] for row in rows] == list(range(1, self.steps + 1)), [row["step"] for row in rows]
        assert sum(row["rollouts"]["taken"] for row in rows) == ROLLOUTS * self.steps
        trained, dropped = sum(row["rollouts"]["trained"] for row in rows), Counter(rows[-1]["dropped"])
        dropped.pop("learner_restarted", None)  # generated for a step, and once more
        assert ROLLOUTS * self.steps == trained + dropped.total(), dropped

    @property
    def weights(self) -> dict[str, bytes]:
        tensors = load_file(self.folder / "final" / "model.safetensors")
        return {name: tensor.tobytes() for name, tensor in tensors.items()}


def actors_of(pid: int, name: str = "") -> list[psutil.Process]:
    """Processes of actors that `pid` has started, of one kind where it is named."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if title.startswith("ray::") and any(title.startswith(f"ray::{own}") for own in ACTORS if name in own):
            found.append(process)
    return found


@cache
def left_alone(steps: int) -> dict[str, bytes]:
    """The weights of a run that nobody disturbs."""
    with TemporaryDirectory(prefix="chaos-alone-") as folder:
        job = Job(Path(folder) / "alone", steps)
        job.ends()
        return job.weights
