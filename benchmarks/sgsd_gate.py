"""Does the gate keep a bank with misleading skills useful? SGSD on the lab: misleading share × gate on, off.

    .venv/bin/python benchmarks/sgsd_gate.py                       # 0, 25, 50 %, three seeds: goes on where it stopped
    .venv/bin/python benchmarks/sgsd_gate.py --shares 0 0.5 --seeds 0
    .venv/bin/python benchmarks/sgsd_gate.py --table               # the table again, from the results alone

Each run is recipes/sgsd_lab.yaml with a bank of that share (lab/bank.py, made anew from the run's seed), for as many
steps in each. Without the gate every view is trusted: the student is pulled to all of them. Measured as in methods.py:
avg@8 at temperature 1 over 400 problems of each split.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import methods
import numpy as np
from methods_table import SPLITS, Row
from ray.cluster_utils import Cluster

from tutorloop.contracts.recipe import load_config
from tutorloop.lab.bank import lab_bank
from tutorloop.verifier_service.skills.published import save_published

RESULTS = methods.ROOT / "benchmarks" / "results"
RUNS = methods.ROOT / "runs" / "sgsd_gate"
JSON_FILE, TABLE_FILE = "sgsd_gate.json", "sgsd_gate.md"
STANCES = ("skill_helpful", "skill_harmful", "skill_neutral")
LAST = 20  # steps whose stances are averaged


def train(share: float, gate: bool, seed: int, steps: int, address: str) -> tuple[Row, dict[str, float]]:
    """One run: its row with accuracies, and what its views were in the first and the last steps."""
    name = f"{100 * share:.0f}-{'on' if gate else 'off'}-{seed}"
    RUNS.mkdir(parents=True, exist_ok=True)
    bank = RUNS / f"bank-{100 * share:.0f}-{seed}.json"
    save_published(lab_bank(share, seed), str(bank), {})
    recipe = methods.ROOT / "recipes" / "sgsd_lab.yaml"
    own = [
        f"steps={steps}",
        f"seed={seed}",
        f"output_dir={RUNS / name}",
        f"skills.path={bank}",
        f"method_options.gate={str(gate).lower()}",
    ]
    row = methods._run(load_config(recipe, [*methods.QUIET, *own]), name, seed, address)
    lines = (RUNS / name / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    steps_seen = [row["learner"] for row in map(json.loads, filter(None, lines)) if "learner" in row]
    parts = {"first": steps_seen[:LAST], "last": steps_seen[-LAST:]}
    views = {
        f"{stance}_{part}": float(np.mean([learner.get(stance, 0.0) for learner in seen]))
        for part, seen in parts.items()
        for stance in STANCES
    }
    return methods.measure(row, str(RUNS / name / "final")), views


def table(results: dict[str, Any]) -> str:
    """One row for each share and gate: medians over the seeds, with the least and the most."""
    commands = "\n".join(f"    {command}" for command in results["commands"])
    lines = [
        "# SGSD on the lab: misleading share × gate\n",
        f"{results['machine']}. {results['steps']} steps of `recipes/sgsd_lab.yaml`, made by\n\n{commands}\n",
        "avg@8, %: median over the seeds (least – most). `views`: % of them that were helpful, harmful and neutral, by "
        f"outcome × stance, in the first and in the last {LAST} steps. Without the gate it is measured and ignored.\n",
        "| misleading | gate | seeds | in distribution | out of distribution | views, first steps | last steps |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[float, bool], list[dict[str, Any]]] = {}
    for run in sorted(results["runs"], key=lambda run: (run["share"], not run["gate"], run["seed"])):
        groups.setdefault((run["share"], run["gate"]), []).append(run)
    for (share, gate), runs in groups.items():
        cells = [_cell([run["accuracy"][split] for run in runs]) for split in SPLITS]
        views = [
            ", ".join(f"{100 * median(run['views'][f'{stance}_{part}'] for run in runs):.0f}" for stance in STANCES)
            for part in ("first", "last")
        ]
        lines.append(
            f"| {100 * share:.0f}% | {'on' if gate else 'off'} | {len(runs)} | {' | '.join([*cells, *views])} |"
        )
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    least, most = 100 * min(values), 100 * max(values)
    return f"**{100 * median(values):.1f}** ({least:.1f} – {most:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="SGSD on the lab: misleading share × gate on, off.")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.25, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="write the table from the results, and run nothing")
    given = parser.parse_args()
    file = given.results / JSON_FILE
    results = {"machine": methods.machine(), "steps": given.steps, "commands": [], "runs": []}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["steps"] != given.steps:
            raise SystemExit(f"error: {file} holds runs of {results['steps']} steps; give --steps or another --results")
    if given.table:
        (given.results / TABLE_FILE).write_text(table(results), encoding="utf-8")
        return
    command = shlex.join(["python", "benchmarks/sgsd_gate.py", *sys.argv[1:]])
    results["commands"] = [*(old for old in results["commands"] if old != command), command]
    done = {(run["share"], run["gate"], run["seed"]) for run in results["runs"]}
    todo = [(s, g, n) for n in given.seeds for s in given.shares for g in (True, False) if (s, g, n) not in done]
    head = {"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for share, gate, seed in todo:
            row, views = train(share, gate, seed, given.steps, cluster.address)
            accuracy = {split: row.accuracy[split]["avg_at_k"]["value"] for split in SPLITS}
            own = {"share": share, "gate": gate, "seed": seed, "wall_seconds": row.wall_seconds}
            results["runs"].append({**own, "accuracy": accuracy, "views": views, "tokens": row.tokens})
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (given.results / TABLE_FILE).write_text(table(results), encoding="utf-8")
            print(f"{share} {'on' if gate else 'off'} seed {seed}: {accuracy}", flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
