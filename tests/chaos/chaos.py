"""What is done to a running lab job, and what must hold. `make chaos` does all of it, an hour; CI does a short part.

    .venv/bin/python tests/chaos/chaos.py                    # every part; what chaos.json holds is not done again
    .venv/bin/python tests/chaos/chaos.py --only kills --seed 3

A run is the quickstart, synchronous, so that its weights can be compared with those of one left alone, to the bit. What
is done, and when, is drawn from the seed; how long things take is the machine's.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import surroundings
from jobs import ACTORS, PATIENCE, ROLLOUTS, SLOW_TEACHER, TUTORLOOP, Job, left_alone

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STEPS = surroundings.STEPS


# ---- what is done ----------------------------------------------------------------------------------------------------


def kills(folder: Path, rng: random.Random, many: int = 50) -> str:
    """SIGKILL of a process drawn from all actors of one run, `many` times, at random times.

    What takes four replicas down is left out, and a step that takes three learners down ends the run, by design: so the
    run is let go a step on after each."""
    steps = 6 * many
    alone = left_alone(steps)
    job, killed, past = Job(folder / "killed", steps, *more_restarts()), Counter[str](), 1
    while killed.total() < many and job.process.poll() is None:
        job.until(past + 1)
        time.sleep(rng.uniform(0.0, 4.0))
        kind = rng.choice(ACTORS)
        if not (there := job.actors(kind)):
            continue
        reached = len(job.rows)
        try:
            rng.choice(there).kill()
        except psutil.Error:
            continue
        killed[kind] += 1
        past = reached + 1  # a step that was under way may still come
    job.ends()
    assert job.weights == alone, job.rows[-1]["dropped"]
    assert killed.total() == many, killed
    return f"{', '.join(f'{name} {n}' for name, n in sorted(killed.items()))}; {steps} steps, the undisturbed weights"


def more_restarts() -> list[str]:
    return [f"{pool}.max_restarts_per_minute=100" for pool in ("rollout", "teacher", "verifier")]


def driver(folder: Path, rng: random.Random, many: int = 20, steps: int = 12) -> str:
    """SIGKILL of the driver at a random moment, start and end included; then the same command with --resume auto."""
    alone = Job(folder / f"alone-{steps}-local", steps, "--local", "checkpoint.every=3")
    begun = time.monotonic()
    alone.ends()
    lasts, killed = time.monotonic() - begun, []
    for number in range(many):
        job = Job(folder / f"driver-{number}", steps, "--local", "checkpoint.every=3")
        time.sleep(rng.uniform(0.0, lasts))
        job.process.kill()
        job.process.wait()
        killed.append(len(job.rows))
        if not (job.folder / "final").is_dir():
            job.again()
            assert job.process.wait(PATIENCE) == 0, job.text[-3000:]
        job.check()
        assert job.weights == alone.weights
    return f"{many} kills after {sorted(killed)} of {steps} steps; always the undisturbed weights"


def resizes(folder: Path, rng: random.Random, many: int = 20) -> str:
    """One step ahead, teachers that sleep for each rollout: the pool goes 1 → 4 → 1 under load, `many` times."""
    steps, took = 40 * many, {1: list[float](), 4: list[float]()}
    job = Job(folder / "resized", steps, "max_staleness=1", "checkpoint.every=0", *SLOW_TEACHER)
    job.until(2)
    for number in range(2 * many):
        wanted = 1 if number % 2 else 4
        asked = subprocess.run([TUTORLOOP, "scale", str(job.folder), f"teacher={wanted}"], capture_output=True)
        assert asked.returncode == 0, asked.stdout + asked.stderr
        job.wait(lambda wanted=wanted: job.rows[-1]["pools"]["teacher"]["replicas"] == wanted)
        job.until(len(job.rows) + 4)
        took[wanted] += [row["seconds"]["total"] for row in job.rows[-2:]]
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.process.wait(PATIENCE) == 130, job.text[-3000:]
    rows = job.rows
    assert sum(row["rollouts"]["taken"] for row in rows) == ROLLOUTS * len(rows)
    one, four = (median(took[size]) for size in (1, 4))
    assert four < one / 2, took
    return f"{many} times within {len(rows)} steps of {one:.1f} s with one, {four:.1f} s with four; no rollout lost"


def stopped(folder: Path, rng: random.Random, seconds: float = 60.0) -> str:
    """SIGSTOP of one process of each kind for a while."""
    alone = left_alone(STEPS)
    job = Job(folder / "stopped", STEPS)
    for number, name in enumerate(ACTORS):
        job.until(5 + 9 * number)
        victim = rng.choice(job.actors(name))
        victim.suspend()
        time.sleep(seconds)
        victim.resume()
    job.ends()
    assert job.weights == alone
    return f"{len(ACTORS)} processes for {seconds:.0f} s each; the undisturbed weights"


def together(folder: Path, rng: random.Random) -> str:
    """Two commands on one run folder: the second is refused, and the first ends as if alone."""
    alone = left_alone(STEPS)
    job = Job(folder / "first", STEPS)
    job.until(2)
    for more in ([], ["--resume"], ["--resume", "auto"]):
        second = subprocess.run([*job.command, *more], capture_output=True, text=True)
        assert second.returncode == 2 and "Traceback" not in second.stderr, second.stderr
    job.ends()
    assert job.weights == alone
    return "three commands refused with exit code 2; the first run's weights are the undisturbed ones"


PARTS: dict[str, Callable[[Path, random.Random], str]] = {
    "kills": kills,
    "nodes": surroundings.nodes,
    "grown": surroundings.grown,
    "full_disk": surroundings.full_disk,
    "read_only": surroundings.read_only,
    "clock": surroundings.clock,
    "pressure": surroundings.pressure,
    "shared_memory": surroundings.shared_memory,
    "two_runs": surroundings.two_runs,
    "together": together,
    "stopped": stopped,
    "driver": driver,
    "resizes": resizes,
}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Chaos",
        "",
        f"`make chaos` (tests/chaos/chaos.py), {os.cpu_count()} cores, 24 GiB. The quickstart, synchronous.",
        "",
        "| what is done | seed | minutes | what was found |",
        "|---|---|---|---|",
    ]
    for found in results.values():
        lines.append(f"| {found['what']} | {found['seed']} | {found['minutes']:.1f} | {found['said']} |")
    return "\n".join(lines) + "\n"


def parts(only: str) -> Iterator[str]:
    yield from [only] if only else PARTS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", choices=["", *PARTS])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    file = RESULTS / "chaos.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in parts(options.only):
        if name in results and not options.only:
            continue
        begun = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))  # where one fails it stays
        said = PARTS[name](folder, random.Random(f"{name} {options.seed}"))
        shutil.rmtree(folder)
        minutes = (time.monotonic() - begun) / 60
        what = (PARTS[name].__doc__ or "").split("\n")[0].rstrip(".").replace("`many` times", "again and again")
        results[name] = {"what": what, "seed": options.seed, "minutes": minutes, "said": said}
        print(name, results[name], flush=True)
        file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (RESULTS / "chaos.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
