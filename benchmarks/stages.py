"""Where a step's time goes: `.venv/bin/python benchmarks/stages.py [RECIPE] [key.path=value …]`.

Runs the recipe (default: 30 synchronous steps of the quickstart, without evaluation) in a temporary folder and prints
medians over its steps, the first five left out. `generate`, `score` and `verify` are what the pools were busy with;
`wait`, `learn`, `publish` and `load` are what the driver waited for, and they sum to the step. At max_staleness 0
nothing overlaps; beyond it, generating goes on while the learner works, and `wait` shrinks.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[1]
WARM_UP = 5
DEFAULTS = ["steps=30", "max_staleness=0", "eval.path=", "eval.ood_path=", "checkpoint.every=0"]
WORK = {"rollout": "generate", "teacher": "score", "verifier": "verify"}


def stages_of(rows: list[dict]) -> dict[str, list[float]]:
    """Milliseconds of each stage in each step."""
    stages: dict[str, list[float]] = {}
    for row in rows:
        for pool, figures in row["pools"].items():
            if pool.split(".")[0] in WORK:
                busy = figures["busy_seconds"]
                stages.setdefault(WORK[pool.split(".")[0]], []).append(1000 * busy)
        for stage in ("wait", "learn", "publish", "load", "total"):
            stages.setdefault(stage, []).append(1000 * row["seconds"].get(stage, 0.0))
    return stages


def main(arguments: list[str]) -> None:
    given = arguments and "=" not in arguments[0]
    recipe = Path(arguments.pop(0)) if given else ROOT / "recipes" / "quickstart.yaml"
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(recipe, [*DEFAULTS, *arguments, f"output_dir={folder}/run"])
        run.train(config, resume=False, address=None, console=Console(stderr=True))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    rows = [row for row in map(json.loads, lines) if row["kind"] == "step"][WARM_UP:]
    stages = stages_of(rows)
    whole = statistics.median(stages["total"])
    tokens = statistics.median(row["tokens"]["generated"] for row in rows)
    title = f"{recipe.name}: medians over {len(rows)} steps, {tokens:,.0f} tokens generated a step"
    table = Table("stage", "ms", "share of the step", title=title)
    for stage, values in stages.items():
        median = statistics.median(values)
        table.add_row(stage, f"{median:.1f}", f"{100 * median / whole:.0f} %")
    Console().print(table)
    memory = summary["peak_memory_bytes_by_pool"]
    print("peak memory, MiB:", ", ".join(f"{name} {size / 2**20:.0f}" for name, size in memory.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
