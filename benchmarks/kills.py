"""What ten deaths cost: the quickstart with SIGKILL of a generator and of the teacher in turn, beside one left alone.

    .venv/bin/python benchmarks/kills.py            # writes benchmarks/results/kills.md

60 steps without evaluations, one replica a pool; every five steps one process dies. Rounds are interleaved. The time
lost is that of all steps together; a private Ray's start is left out.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kills.md"
STEPS, EVERY, KILLS, ROUNDS = 60, 5, 10, 2
ACTORS = ("RolloutWorker", "TeacherWorker")


def rows(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def kill(driver: int, actor: str) -> None:
    """The pool's one process, once it is there again."""
    while True:
        for process in psutil.Process(driver).children(recursive=True):
            try:
                if (process.cmdline() or [""])[0].startswith(f"ray::{actor}"):
                    os.kill(process.pid, signal.SIGKILL)
                    return
            except psutil.Error:
                continue
        time.sleep(0.05)


def seconds_of(folder: Path, kills: int) -> float:
    """From the first step's end to the last one's, of a run that ends by itself with every step trained."""
    command = [str(Path(sys.executable).with_name("tutorloop")), "train", str(ROOT / "recipes" / "quickstart.yaml")]
    command += [f"output_dir={folder}", f"steps={STEPS}", "eval.path=", "eval.ood_path=", "checkpoint.every=0"]
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        for number in range(kills):
            while len(rows(folder)) < EVERY * (number + 1):
                assert driver.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
                time.sleep(0.05)
            kill(driver.pid, ACTORS[number % 2])
        assert driver.wait() == 0, folder.with_suffix(".log").read_text()[-3000:]
    steps = [row for row in rows(folder) if row["kind"] == "step"]
    taken, trained = (sum(row["rollouts"][key] for row in steps) for key in ("taken", "trained"))
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)) and taken == 96 * STEPS
    assert taken == trained + sum(steps[-1]["dropped"].values())
    return steps[-1]["wall_seconds"] - steps[0]["wall_seconds"]


def main() -> None:
    alone, killed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            alone.append(seconds_of(Path(folder) / f"alone-{number}", 0))
            killed.append(seconds_of(Path(folder) / f"killed-{number}", KILLS))
            print(f"round {number}: {alone[-1]:.1f} s alone, {killed[-1]:.1f} s with {KILLS} kills", flush=True)
    lost = [(with_kills - without) / KILLS for with_kills, without in zip(killed, alone, strict=True)]
    lines = [
        "# What ten deaths cost",
        "",
        f"`.venv/bin/python benchmarks/kills.py`, {os.cpu_count()} cores. {STEPS} steps of the quickstart, {KILLS}",
        "kills of generator and teacher in turn: every run ended by itself, all steps trained. Seconds of the steps.",
        "",
        "| | median | least – most |",
        "|---|---|---|",
        *(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} – {max(values):.1f} |"
            for name, values in (("left alone", alone), (f"{KILLS} kills", killed), ("lost by a kill", lost))
        ),
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
