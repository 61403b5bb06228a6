"""Do the guards catch a collapse in time, and do healthy runs raise none? On the lab; table in results/guards.md.

    .venv/bin/python benchmarks/guards.py                # collapses, and all recipes of methods.py
    .venv/bin/python benchmarks/guards.py --only opd_runaway
    .venv/bin/python benchmarks/guards.py --table             # the table again, from the results alone

guards.json holds the figures that guards read of each step, and is written after every run; what it holds is not run
again. The table is made by the guards as they are, shown these figures one step after the other, so a change of a limit
needs no new run. Runs are in one process, one at a time, each at seed 0.
"""

import argparse
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import methods
from rich.console import Console

from tutorloop.cluster import run
from tutorloop.cluster.recording.guards import RULES, Guards, figures_of
from tutorloop.cluster.recording.metrics import StepRow, read_rows
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import GuardTripped
from tutorloop.contracts.recipe import load_config

RESULTS = methods.ROOT / "benchmarks" / "results"
RUNS = methods.ROOT / "runs" / "guards"
JSON_FILE, TABLE_FILE = "guards.json", "guards.md"
STEPS = 100
EVAL = ["eval.path=lab:test", "eval.ood_path=", "eval.every=4", "eval.problems=128", "eval.samples=2"]
COLLAPSES = {  # name → recipe, and what makes it collapse
    "opd_runaway": ("opd", ["learner.learning_rate=2.5e-3", "learner.warmup_steps=0"]),
    "sdpo_ema95": ("sdpo", ["teacher.ema_decay=0.95"]),
    "constant_advantage": ("constant_advantage", []),  # at this seed it falls least
    "constant_advantage_2": ("constant_advantage", ["seed=2"]),
}
ROLLED_BACK = "+rollback"  # the same collapse, whose guards roll it back


def names() -> list[str]:
    healthy = [name for name in methods.recipes() if name not in COLLAPSES]
    return [*COLLAPSES, *healthy, *(name + ROLLED_BACK for name in COLLAPSES)]


def configure(name: str) -> Config:
    collapse = name.removesuffix(ROLLED_BACK)
    if collapse not in COLLAPSES:
        return methods.configure(name, 0, STEPS).model_copy(update={"output_dir": str(RUNS / name)})
    recipe, own = COLLAPSES[collapse]
    acts = ["guards.action=rollback", "checkpoint.every=5"] if name.endswith(ROLLED_BACK) else []
    folder = f"output_dir={RUNS / name}"
    return load_config(methods.ROOT / "recipes" / f"{recipe}.yaml", [*methods.QUIET, *EVAL, *own, *acts, folder])


def train(name: str) -> dict[str, Any]:
    """What guards read of each step, accuracy by step, and what they said in the run itself."""
    config, begun = configure(name), time.monotonic()
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    stopped = False
    try:
        if not run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True):
            raise KeyboardInterrupt
    except GuardTripped:
        stopped = True
    for part in ("checkpoints", "final"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return {**read(folder), "stopped": stopped, "wall_seconds": round(time.monotonic() - begun, 1)}


def read(folder: Path) -> dict[str, Any]:
    """A run's folder as guards.json has it."""
    rows = read_rows(folder / "metrics.jsonl")
    own, before, figures = {one.name for one in fields(StepRow)}, {}, []
    for line in [row for row in rows if row["kind"] == "step"]:
        row = StepRow(**{name: line.get(name) for name in own})
        dropped = {reason: count - before.get(reason, 0) for reason, count in row.dropped.items()}
        before = row.dropped
        figures.append({kind: float(f"{value:.6g}") for kind, value in figures_of(row, dropped).items()})
    kinds = [rule.kind for rule in RULES if any(rule.kind in own for own in figures)]
    evals = [row for row in rows if row["kind"] == "eval" and row["model"] == "student"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "figures": {kind: [own.get(kind) for own in figures] for kind in kinds},
        "accuracy": {row["step"]: row["stats"]["avg_at_k"]["value"] for row in evals},
        "pass_rate": [row.get("pass_rate") for row in rows if row["kind"] == "step"],
        "rollbacks": summary.get("rollbacks", 0),
    }


# ---- the guards, shown a run again -----------------------------------------------------------------------------------


def replay(name: str, row: dict[str, Any]) -> tuple[dict[str, int], dict[str, float]]:
    """By kind: the step of its first alarm, and how far it went of the way from what is usual to its limit, for as many
    steps in a row as trip a guard: at 1 it would have tripped."""
    config, guards = configure(name), Guards()
    alarms: dict[str, int] = {}
    ways: dict[str, list[float]] = {}
    for step in range(1, 1 + max(map(len, row["figures"].values()))):
        figures = {kind: own[step - 1] for kind, own in row["figures"].items() if own[step - 1] is not None}
        for rule in [rule for rule in RULES if rule.kind in figures]:
            if known := guards.limit(rule, config):
                ways.setdefault(rule.kind, []).append(_way(figures[rule.kind], *known[:2]))
        guards.judge(config, step, figures)
        for said in guards.said:
            alarms.setdefault(said.split()[1], step)
    rows = config.guards.patience
    lasting = {kind: [min(own[at : at + rows]) for at in range(len(own) - rows + 1)] for kind, own in ways.items()}
    return alarms, {kind: max(own) for kind, own in lasting.items() if own}


def _way(value: float, usual: float, limit: float) -> float:
    """0 at what is usual, 1 at the limit; by ratios where all are above 0."""
    if min(value, usual, limit) > 0:
        return math.log(value / usual) / math.log(limit / usual)
    return (value - usual) / (limit - usual)


def _around(accuracy: dict[int, float], step: int) -> str:
    """The evaluations before and after `step`, or the one there."""
    last = max(own for own in accuracy if own <= step)
    following = min((own for own in accuracy if own >= step), default=last)
    return ", ".join(f"{100 * accuracy[own]:.1f} (step {own})" for own in dict.fromkeys([last, following]))


def table(results: dict[str, Any]) -> str:
    runs, commands = results["runs"], "\n".join(f"    {command}" for command in results["commands"])
    settings = configure("opd").guards
    lines = [
        "# Guards on the lab\n",
        f"{results['machine']}; one process, seed 0 unless said otherwise, {STEPS} steps. `guards.warmup` "
        f"{settings.warmup}, `guards.patience` {settings.patience}. Figures collected by\n\n{commands}\n",
        "## Collapses\n",
        "Accuracy, %: avg@2 of 128 problems, evaluated every few steps. `half`: the first evaluation at which it is "
        "below half of the best so far. `seen`: the pass rate of the rollouts in whose row the first alarm stands.\n",
        "| run | start | best | first alarm | of | seen | accuracy then | half at step | at the end | with rollbacks |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [_collapse(name, runs) for name in COLLAPSES if name in runs]
    healthy = [name for name in names() if name in runs and name not in COLLAPSES and ROLLED_BACK not in name]
    kinds = [rule.kind for rule in RULES if any(rule.kind in runs[name]["figures"] for name in healthy)]
    lines += [
        "\n## Healthy runs\n",
        "How far each figure went of the way from what is usual to its limit, in % (of the ratio), for as many steps "
        "in a row as trip the guard: 100 would be an alarm, below 0 it moved away from the limit. –: not measured.\n",
        f"| run | alarms | {' | '.join(kinds)} |",
        f"| --- | --- |{' ---: |' * len(kinds)}",
    ]
    farthest: dict[str, float] = {}
    for name in healthy:
        alarms, ways = replay(name, runs[name])
        farthest = {kind: max(ways.get(kind, -9.9), farthest.get(kind, -9.9)) for kind in kinds}
        said = ", ".join(f"{kind} {step}" for kind, step in alarms.items()) or "none"
        lines.append(f"| {name} | {said} | {' | '.join(_percent(ways.get(kind)) for kind in kinds)} |")
    lines.append(f"| **farthest** | | {' | '.join(f'**{_percent(farthest[kind])}**' for kind in kinds)} |")
    return "\n".join(lines) + "\n"


def _collapse(name: str, runs: dict[str, Any]) -> str:
    row, accuracy = runs[name], {int(step): value for step, value in runs[name]["accuracy"].items()}
    alarms, _ = replay(name, row)
    best, half = 0.0, None
    for step, value in sorted(accuracy.items()):
        best = max(best, value)
        half = half or (step if value < best / 2 else None)
    first = min(alarms.values(), default=None)
    kinds = ", ".join(kind for kind, step in alarms.items() if step == first)
    then = seen = "–"
    if first is not None:
        then, seen = _around(accuracy, first), f"{100 * row['pass_rate'][first - 1]:.1f}"
    rescued = runs.get(name + ROLLED_BACK)
    end = max(accuracy)
    with_rollbacks = "–"
    if rescued:
        last = max(map(int, rescued["accuracy"]))
        stopped = ", then stopped" if rescued["stopped"] else ""
        with_rollbacks = f"{100 * rescued['accuracy'][str(last)]:.1f} ({rescued['rollbacks']}{stopped})"
    cells = [name, f"{100 * accuracy[0]:.1f}", f"{100 * best:.1f}", f"**{first or 'none'}**", kinds, seen, then]
    return f"| {' | '.join([*cells, str(half or 'never'), f'{100 * accuracy[end]:.1f}', with_rollbacks])} |"


def _percent(way: float | None) -> str:
    return "–" if way is None else f"{100 * way:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Guards on the lab: collapses and healthy runs.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), default=names(), help=", ".join(names()))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="write the table from the results, and run nothing")
    given = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command does
    file = given.results / JSON_FILE
    results = {"machine": methods.machine(), "commands": [], "runs": {}}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
    todo = [] if given.table else [name for name in given.only if name not in results["runs"]]
    if todo:
        command = shlex.join(["python", "benchmarks/guards.py", *sys.argv[1:]])
        results["commands"] = [*(old for old in results["commands"] if old != command), command]
    for count, name in enumerate(todo, 1):
        results["runs"][name] = row = train(name)
        file.write_text(json.dumps(results) + "\n", encoding="utf-8")
        print(f"{count}/{len(todo)} {name}: {row['wall_seconds']} s, alarms {replay(name, row)[0]}", flush=True)
    (given.results / TABLE_FILE).write_text(table(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
