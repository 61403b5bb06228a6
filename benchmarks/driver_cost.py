"""What the driver itself costs: its time for each rollout, with replicas that answer at once.

    .venv/bin/python benchmarks/driver_cost.py

The real driver, flow and pools; the replicas and the learner of tests/simulation, which take no time of their own but
that of making a receipt. GRPO, 2 samples a prompt, calls of 8 rollouts; medians of three runs, interleaved.
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

REPLICAS, PROMPTS = (2, 20, 200), (100, 1_000, 10_000, 100_000)
SAMPLES, CALL, STEPS, ROUNDS = 2, 8, 3, 3
RESULTS = ROOT / "benchmarks" / "results"


def seconds_of(replicas: int, prompts: int) -> float:
    """Of one stage of STEPS steps, per rollout. `prompts` in all."""
    recipe = ("grpo", 1, max(1, prompts // STEPS), replicas, CALL, STEPS, 0)
    fate = Fate(random.Random(0), spread="none")
    gc.collect()
    start = time.perf_counter()
    outcome = simulate.run_once(recipe, fate)
    spent = time.perf_counter() - start
    rollouts = recipe[2] * STEPS * SAMPLES
    assert outcome.finished and outcome.world.finished_steps == STEPS
    return spent / rollouts


def main() -> None:
    cases = [(replicas, 1_000) for replicas in REPLICAS] + [(2, prompts) for prompts in PROMPTS if prompts != 1_000]
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
