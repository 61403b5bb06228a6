"""What score cache, guards and deadlines cost: the quickstart, synchronous, in one process, every other step without.

    .venv/bin/python benchmarks/reliability_cost.py       # writes results/reliability_cost.md; five minutes

A step is compared with the one before it, so that a machine that gets slower counts for neither. Which steps are those
without alternates within each pair: with, without; without, with; …
"""

import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tutorloop.cluster import run
from tutorloop.cluster.driver import Driver
from tutorloop.cluster.pools.calls import Pace
from tutorloop.cluster.recording.guards import Guards
from tutorloop.contracts.recipe import load_config
from tutorloop.learner import worker
from tutorloop.teacher_service.requests import only_numbers
from tutorloop.teacher_service.score_cache import CacheUse, ScoreCache

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "reliability_cost.md"
FIRST, PAIRS = 20, 120  # steps that do not count, and pairs of those that do


class Turns:
    """Whether the step that runs has all of it. `seconds`: of each step, CPU and wall."""

    def __init__(self) -> None:
        self.steps, self.seconds, self._last = 0, [], (time.process_time(), time.perf_counter())

    @property
    def on(self) -> bool:
        return self.steps % 4 in (0, 3)

    def next(self) -> None:
        now = (time.process_time(), time.perf_counter())
        self.seconds.append((now[0] - self._last[0], now[1] - self._last[1]))
        self.steps, self._last = self.steps + 1, now


def without(turns: Turns) -> None:
    """Leave all of it out in the steps whose turn that is."""
    score, observe, shift, deadline = ScoreCache.score, Guards.observe, worker.policy_shift, Pace.deadline

    def scored(cache: ScoreCache, rollouts: Any, request: Any, weights: str) -> Any:
        if turns.on:
            return score(cache, rollouts, request, weights)
        return [only_numbers(answer) for answer in cache.engine.score(rollouts, request)], CacheUse()

    ScoreCache.score = scored
    Guards.observe = lambda own, *args: observe(own, *args) if turns.on else None
    worker.policy_shift = lambda *args: shift(*args) if turns.on else (0.0, 0)
    Pace.deadline = lambda own, *args: deadline(own, *args) if turns.on else 1e9

    record = Driver.record

    async def recorded(driver: Driver, *args: Any) -> None:
        await record(driver, *args)
        turns.next()

    Driver.record = recorded


def main() -> None:
    turns = Turns()
    without(turns)
    with tempfile.TemporaryDirectory() as folder:
        own = ["eval.path=", "eval.ood_path=", "checkpoint.every=0", "max_staleness=0", f"steps={FIRST + 2 * PAIRS}"]
        config = load_config(ROOT / "recipes" / "quickstart.yaml", [f"output_dir={folder}/run", *own])
        run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True)
    lines = [
        "# What score cache, guards and deadlines cost\n",
        f"`.venv/bin/python benchmarks/reliability_cost.py`: the quickstart's training, synchronous, in one process; "
        f"{PAIRS} neighbouring steps, one with and one without. Seconds of a step, medians.\n",
        "| | with | without | ratio of neighbours | quartiles |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for at, name in enumerate(("CPU", "wall")):
        pairs = []
        for first in range(FIRST, FIRST + 2 * PAIRS, 2):
            one, other = turns.seconds[first][at], turns.seconds[first + 1][at]
            pairs.append((one, other) if first % 4 == 0 else (other, one))
        ratios = [a / b for a, b in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = (statistics.median(column) for column in zip(*pairs, strict=True))
        lines.append(f"| {name} | {' | '.join(f'{x:.4f}' for x in medians)} | {middle:.4f} | {low:.3f} – {high:.3f} |")
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-2], lines[-1], sep="\n")


if __name__ == "__main__":
    main()
