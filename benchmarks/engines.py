"""The quickstart under each pair of engines, at three seeds: does it end at the same accuracy, and how fast is it?

    .venv/bin/python benchmarks/engines.py              # all of it; about half an hour on two cores
    .venv/bin/python benchmarks/engines.py --table      # the table again, from the results alone

Runs are interleaved: every pair at one seed before the next seed. engines.json is written after each, and what it holds
is not run again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAIRS = [("transformers", "transformers"), ("vllm", "vllm")]
SPLITS = ("in_distribution", "out_of_distribution")


def measure(rollout: str, teacher: str, seed: int) -> dict:
    """One run's last accuracies, and medians over its steps."""
    folder = ROOT / "runs" / "engines" / f"{rollout}-{teacher}-{seed}"
    overrides = [f"rollout.engine={rollout}", f"teacher.engine={teacher}", f"seed={seed}", f"output_dir={folder}"]
    config = load_config(ROOT / "recipes" / "quickstart.yaml", overrides)
    resume = folder.exists()
    if not run.train(config, resume=resume, address=None, console=Console(stderr=True)):
        sys.exit("interrupted")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "step"][5:]
    last = {r["split"]: r["stats"]["avg_at_k"] for r in rows if r["kind"] == "eval" and r["model"] == "student"}
    pools = {
        pool: statistics.median(
            row["pools"][pool]["tokens_per_second"] / max(1e-9, row["pools"][pool]["busy_fraction"]) for row in steps
        )
        for pool in ("rollout", "teacher")
    }
    return {
        "rollout": rollout,
        "teacher": teacher,
        "seed": seed,
        "accuracy": {split: last[split] for split in SPLITS},
        "step_seconds": statistics.median(row["seconds"]["total"] for row in steps),
        "tokens_per_busy_second": pools,
        "wall_seconds": steps[-1]["wall_seconds"],
    }


def table(results: list[dict]) -> str:
    """Markdown: accuracies in percent with their 95 % intervals over problems, one row a run, then medians."""
    lines = [
        "# Engines: the quickstart with transformers and with vLLM",
        "",
        "`.venv/bin/python benchmarks/engines.py`; accuracy is avg@4 with its 95 % interval over problems; tokens a",
        "second are of the seconds that a pool was busy. vLLM is its CPU build, on two cores that all processes share.",
        "",
        "| rollout | teacher | seed | in distribution | out of it | rollout tok/s | teacher tok/s | step ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(results, key=lambda row: (row["rollout"], row["teacher"], row["seed"])):
        accuracy = [
            f"{100 * a['value']:.1f} ({100 * a['low']:.1f}–{100 * a['high']:.1f})"
            for a in (row["accuracy"][split] for split in SPLITS)
        ]
        speed = [f"{row['tokens_per_busy_second'][pool]:,.0f}" for pool in ("rollout", "teacher")]
        cells = [
            row["rollout"],
            row["teacher"],
            str(row["seed"]),
            *accuracy,
            *speed,
            f"{1000 * row['step_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Medians over the seeds (range):", ""]
    for pair in PAIRS:
        own = [row for row in results if (row["rollout"], row["teacher"]) == pair]
        for split in SPLITS if own else ():
            values = sorted(100 * row["accuracy"][split]["value"] for row in own)
            lines.append(
                f"- {' + '.join(pair)}, {split.replace('_', ' ')}: "
                f"{statistics.median(values):.1f} ({values[0]:.1f}–{values[-1]:.1f})"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="write the table from the results alone")
    arguments = parser.parse_args()
    file = RESULTS / "engines.json"
    results: list[dict] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    done = {(row["rollout"], row["teacher"], row["seed"]) for row in results}
    wanted = [] if arguments.table else [(*pair, seed) for seed in arguments.seeds for pair in PAIRS]
    for one in wanted:
        if one not in done:
            results.append(measure(*one))
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "engines.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
