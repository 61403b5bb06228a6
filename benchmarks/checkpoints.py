"""What a checkpoint costs the step after it: the lab's quickstart and SmolLM2-135M, a checkpoint every few steps.

    .venv/bin/python benchmarks/checkpoints.py       # writes benchmarks/results/checkpoints.md; ten minutes

The seconds of a step hold those in which the checkpoint before it was taken; its files are written beside the step.
Steps after a checkpoint and the others are of one run, so they alternate. The real model must be there (`make real`).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tutorloop.lab.real import real_models

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "checkpoints.md"
QUIET = ["eval.path=", "eval.ood_path=", "checkpoint.keep=1", "checkpoint.minutes=1000"]


def lab(folder: Path) -> list[str]:
    return ["quickstart", "steps=80", "checkpoint.every=4", *QUIET]


def real(folder: Path) -> list[str]:
    models, prompts = real_models(), folder / "prompts.jsonl"
    rows = [{"prompt": f"Tell me something about the number {i}."} for i in range(64)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        str(ROOT / "recipes" / "smollm2_opd.yaml"),
        *(f"student.model={models.student}", f"teacher.model={models.teacher}", f"data.path={prompts}"),
        *("steps=14", "checkpoint.every=2", "prompts_per_step=16", "rollout.max_new_tokens=48", "verifier.kind=none"),
        *QUIET,
    ]


RUNS = {
    "the lab, synchronous": (lab, ["max_staleness=0"]),
    "the lab, one step ahead": (lab, ["max_staleness=1"]),
    "SmolLM2-135M, one process": (real, ["--local", "max_staleness=0", "learner.tokens_per_batch=1024"]),
    "SmolLM2-135M, synchronous": (real, ["max_staleness=0"]),
}


def measure(name: str) -> str:
    """A row of the table."""
    recipe, more = RUNS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [sys.executable, "-m", "tutorloop.cli.main", "train", *recipe(folder), *more]
        subprocess.run([*command, f"output_dir={folder / 'run'}"], check=True, stdout=subprocess.DEVNULL)
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        newest = max((folder / "run" / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    seconds = [row["seconds"] for row in map(json.loads, lines) if row["kind"] == "step"][2:]
    after = [row for row in seconds if "checkpoint" in row]
    others = statistics.median(row["total"] for row in seconds if "checkpoint" not in row)
    total, taken = (statistics.median(row[key] for row in after) for key in ("total", "checkpoint"))
    figures = f"{others:.2f} | {total:.2f} | {total / others:.3f} | {taken:.2f} | {len(after)}"
    return f"| {name} | {size / 2**20:.0f} | {figures} |"


def main() -> None:
    rows = []
    for name in RUNS:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    lines = [
        "# What a checkpoint costs",
        "",
        f"`.venv/bin/python benchmarks/checkpoints.py`, {os.cpu_count()} cores. Medians, seconds.",
        "",
        "| run | MiB | a step | the one after a checkpoint | ratio | of it: taking the checkpoint | checkpoints |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
