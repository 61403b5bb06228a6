"""What the driver itself costs: its time for each rollout, with replicas that answer at once.

    .venv/bin/python benchmarks/driver_cost.py

The real driver, flow and pools; the replicas and the learner of tests/simulation, which take no time of their own but
that of making a receipt. GRPO, 2 samples a prompt, calls of 8 rollouts, steps of at most 1024 prompts: of 200 replicas
each has a call in a step; medians of three runs, interleaved.
"""

import gc
import json
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "simulation"))
import simulate  # noqa: E402
from scripted import Fate  # noqa: E402

from tutorloop.cluster.run import seldom_collected  # noqa: E402

REPLICAS, PROMPTS = (2, 20, 200), (100, 1_000, 10_000, 100_000)
SAMPLES, CALL, STEP, ROUNDS = 2, 8, 1024, 3
RESULTS = ROOT / "benchmarks" / "results"


def seconds_of(replicas: int, prompts: int) -> float:
    """Of one stage, per rollout. `prompts` in all."""
    steps = -(-prompts // STEP)
    recipe = ("grpo", 1, prompts // steps, replicas, CALL, steps, 0)
    fate = Fate(random.Random(0), spread="none")
    gc.collect()
    start = time.perf_counter()
    with seldom_collected():  # as in a run
        outcome = simulate.run_once(recipe, fate)
    spent = time.perf_counter() - start
    rollouts = recipe[2] * steps * SAMPLES
    assert outcome.finished and outcome.world.finished_steps == steps
    return spent / rollouts


def main() -> None:
    cases = [(replicas, 10_000) for replicas in REPLICAS] + [(2, prompts) for prompts in PROMPTS if prompts != 10_000]
    found: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    seconds_of(2, 100)  # a first one imports
    for _ in range(ROUNDS):
        for case in cases:
            found[case].append(1000 * seconds_of(*case))
    lines = [
        "# What the driver costs",
        "",
        f"`.venv/bin/python benchmarks/driver_cost.py`. Milliseconds a rollout, medians of {ROUNDS} (least – most).",
        "",
        "| rollout replicas | prompts | ms a rollout |",
        "|---|---|---|",
    ]
    for (replicas, prompts), values in sorted(found.items()):
        middle = statistics.median(values)
        lines.append(f"| {replicas} | {prompts:,} | {middle:.3f} ({min(values):.3f} – {max(values):.3f}) |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "driver_cost.md").write_text(text, encoding="utf-8")
    rows = [{"replicas": r, "prompts": p, "ms": values} for (r, p), values in found.items()]
    (RESULTS / "driver_cost.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
