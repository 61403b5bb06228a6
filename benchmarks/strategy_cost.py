"""What strategies cost: seconds a step of SGPO over the same GRPO run, interleaved, on the lab.

    .venv/bin/python benchmarks/strategy_cost.py            # a quarter of an hour on two cores

Both runs are recipes/sgpo_lab.yaml, one of them with `method=grpo` and no strategies: the same reference, replay, seeds
and rollouts, since the learning rate is next to nothing. The student is the lab's, which mostly guesses, or its
teacher, each of whose answers is segmented, encoded and aligned.
"""

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path

from methods import QUIET, machine
from rich.console import Console
from strategies import FITTED, fit

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "strategy_cost.md"
STEPS, WARM = 12, 2  # steps of a run, and how many of them are not counted
GRPO = ["method=grpo", "method_options.kl_weight=0.01", "method_options.clip_high=0.28", "strategies="]
STUDENTS = {"its teacher": "lab:strategies-teacher", "the lab's student": "lab:strategies-student"}
WAYS = {"one process": (True, 0), "Ray, synchronous": (False, 0), "Ray, one step ahead": (False, 1)}


def seconds_of(method: str, student: str, way: str) -> list[float]:
    """Of each counted step."""
    local, staleness = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        given = [f"student.model={student}", f"steps={STEPS}", f"max_staleness={staleness}", f"output_dir={folder}/run"]
        rate = ["learner.learning_rate=1e-9", "learner.min_learning_rate=1e-9", "learner.warmup_steps=0"]
        own = GRPO if method == "grpo" else [f"strategies.path={FITTED}"]
        config = load_config(ROOT / "recipes" / "sgpo_lab.yaml", [*QUIET, *given, *rate, *own])
        assert run.train(config, False, None, Console(file=io.StringIO(), width=100), local=local)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["kind"] == "step"]
    return [row["seconds"]["total"] for row in steps[WARM:]]


def main() -> None:
    parser = argparse.ArgumentParser(description="SGPO over GRPO, in seconds a step.")
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    FITTED.parent.mkdir(parents=True, exist_ok=True)
    fit(FITTED)
    lines = [
        "# What strategies cost",
        "",
        f"`python benchmarks/strategy_cost.py`; {machine()}.",
        f"Seconds a step, medians of {pairs} interleaved runs of {STEPS - WARM} counted steps of 96 rollouts.",
        "",
        "| student | way | GRPO | SGPO | ratio | of each pair |",
        "|---|---|---|---|---|---|",
    ]
    for name, student in STUDENTS.items():
        for way in WAYS:
            found: dict[str, list[float]] = {"grpo": [], "sgpo": []}
            for pair in range(pairs):
                for method in ("grpo", "sgpo") if pair % 2 else ("sgpo", "grpo"):
                    found[method].append(statistics.median(seconds_of(method, student, way)))
            ratios = [ours / theirs for ours, theirs in zip(found["sgpo"], found["grpo"], strict=True)]
            grpo, sgpo = (statistics.median(found[method]) for method in ("grpo", "sgpo"))
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {name} | {way} | {grpo:.2f} | {sgpo:.2f} | {statistics.median(ratios):.2f} | {each} |")
            print(lines[-1], flush=True)
            TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
