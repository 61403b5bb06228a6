"""What the autoscaler makes of a bad split, on a real Ray cluster: replicas that sleep for as long as is known.

    .venv/bin/python benchmarks/autoscale.py            # writes benchmarks/results/autoscale.md

The real driver, flow, pools and Ray backend; workers sleep for each rollout, and the learner for each step, so that a
busy machine changes little. Eight replicas in all; steps a minute of the worst static split, of the likeliest best ones
by their stages' seconds, and of the autoscaler from the worst one on.
"""

import asyncio
import logging
import sys
import time
from pathlib import Path

from ray import cloudpickle

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "simulation"))
import balancing  # noqa: E402
from balancing import POOLS, Load, Ran, Timed, recipe  # noqa: E402
from scripted import PROMPTS, World  # noqa: E402
from simulate import driver_of  # noqa: E402

from tutorloop.cluster.interrupt import Interrupt  # noqa: E402
from tutorloop.cluster.methods import METHODS  # noqa: E402
from tutorloop.cluster.pools.autoscaler import Autoscaler  # noqa: E402
from tutorloop.cluster.pools.pool import Pool  # noqa: E402
from tutorloop.cluster.pools.ray_backend import RayBackend  # noqa: E402
from tutorloop.cluster.pools.ray_cluster import cluster  # noqa: E402
from tutorloop.contracts import config as sections  # noqa: E402
from tutorloop.contracts.errors import RolloutError  # noqa: E402
from tutorloop.contracts.receipts import Receipt, RolloutReceipt, ScoreReceipt, VerdictReceipt  # noqa: E402
from tutorloop.contracts.records import StepReport  # noqa: E402
from tutorloop.contracts.reliability import Autoscale  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "autoscale.md"
EACH = {"rollout": 0.15, "a": 0.06, "verifier": 0.01}  # seconds a rollout, of 32 a step
LEARNER = 0.3  # seconds a step
WORST, BUDGET, CPU = {"rollout": 1, "a": 1, "verifier": 6}, 8, 0.1
STATIC = [WORST, *(dict(zip(POOLS, own, strict=True)) for own in ((5, 2, 1), (4, 3, 1)))]
STALENESS, HELD, WATCHED = 1, 40.0, 180.0  # seconds


class Sleeper:
    """A worker of any pool: sleeps for each rollout, and answers with receipts of the right shape."""

    def __init__(self, each: float) -> None:
        self.each, self.version = each, 0

    def _sleep(self, requests: tuple) -> float:
        time.sleep(self.each * len(requests))
        return self.each * len(requests)

    def load_weights(self, version: int) -> None:
        self.version = version

    def generate(self, prompts: object, requests: tuple, sampling: object) -> tuple[tuple, Receipt]:
        one = (1,) * len(requests)
        lengths = {
            "lengths": (8,) * len(requests),
            "response_lengths": one,
            "finish_reasons": ("stop",) * len(requests),
        }
        own = {"rows": len(requests), "seconds": self._sleep(requests), "weight_version": self.version}
        return requests, RolloutReceipt(**own, **lengths)

    def score(self, rollouts: tuple, request: object) -> tuple[None, Receipt]:
        return None, ScoreReceipt(rows=len(rollouts), seconds=self._sleep(rollouts))

    def judge(self, rollouts: tuple, prompts: object) -> tuple[None, Receipt]:
        no, many = (False,) * len(rollouts), len(rollouts)
        told = {"passed": no, "abstained": no, "rewards": (0.0,) * many, "answers": ("",) * many, "paths": ("",) * many}
        return None, VerdictReceipt(rows=many, seconds=self._sleep(rollouts), **told)


class SleepingLearner:
    """In place of the learner's ranks."""

    ranks = ()

    async def step(self, *_: object) -> StepReport:
        await asyncio.sleep(LEARNER)
        return StepReport(loss=0.0, tokens=1, rollouts=1, seconds=LEARNER, metrics={"grad_norm": 1.0})

    async def publish(self, version: int) -> tuple[int, list]:
        return version, []

    async def save(self, folder: Path) -> None: ...
    async def saved(self) -> dict:
        return {}

    async def beside(self, work):
        return await work


async def run(sizes: dict, seconds: float, budget: int = 0) -> Ran:
    """`seconds` of training, which begin once all replicas are there."""
    config, ran = recipe(STALENESS), Ran()
    world, backend = World(Load(each=EACH), most_ahead=STALENESS, per_step=config.prompts_per_step), RayBackend()
    own = {
        name: Pool(name, Sleeper, sections.Pool(replicas=size, num_cpus=CPU), RolloutError, backend, each=EACH[name])
        for name, size in sizes.items()
    }
    quiet, interrupt = Timed(ran, own.values()), Interrupt(lambda _: None)
    driver = driver_of(config, METHODS["opd"](config), world, own, quiet, interrupt)
    driver.flow.prompts, driver.learner = backend.put(PROMPTS), SleepingLearner()
    driver.flow.split_for = max(config.rollout.replicas, sizes["rollout"])
    if budget:
        settings = Autoscale(cpus=CPU * budget)
        driver.autoscaler = Autoscaler(settings, driver.flow, [*own.values()], backend.free, print)
    try:
        for pool in own.values():
            await pool.ready(quiet.note)
        start = asyncio.get_running_loop().time()
        asyncio.get_running_loop().call_later(seconds, interrupt.stop)
        with interrupt.saving():
            await driver.train()
    finally:
        for pool in own.values():
            pool.close()
    ran.steps = [(at - start, step) for at, step in ran.steps]
    ran.sizes = [(at - start, own) for at, own in ran.sizes]
    ran.decisions = list(driver.autoscaler.decisions) if driver.autoscaler else []
    return ran


def named(sizes: dict) -> str:
    return " + ".join(f"{size} {'teacher' if name == 'a' else name}" for name, size in sizes.items())


def main() -> None:
    logging.disable(logging.WARNING)
    for module in (sys.modules[__name__], balancing):
        cloudpickle.register_pickle_by_value(module)
    with cluster(None):
        held = {named(sizes): asyncio.run(run(sizes, HELD)).pace(HELD / 4, HELD) * 60 for sizes in STATIC}
        moved = asyncio.run(run(WORST, WATCHED, BUDGET))
    best = max(held.values())
    work = ", ".join(f"{'teacher' if name == 'a' else name} {32 * each:.3g}" for name, each in EACH.items())
    lines = [
        "# What the autoscaler makes of a bad split",
        "",
        f"`.venv/bin/python benchmarks/autoscale.py`, a real Ray cluster, {BUDGET} replicas that sleep: {work} seconds",
        f"a step, the learner {LEARNER}; `max_staleness` {STALENESS}. Steps a minute.",
        "",
        "| | steps a minute | of the best |",
        "|---|---|---|",
        *(f"| static: {name} | {pace:.1f} | {pace / best:.0%} |" for name, pace in held.items()),
    ]
    for begin in range(0, int(WATCHED), 30):
        pace = moved.pace(begin, begin + 30) * 60
        lines.append(f"| autoscaler, seconds {begin} to {begin + 30} | {pace:.1f} | {pace / best:.0%} |")
    changes = [f"- after {at:.0f} s: {named(sizes)}" for at, sizes in moved.changes]
    told = [f"- {own.what.replace('a ', 'teacher ')}: {own.why}" for own in moved.decisions]
    lines += ["", "Its moves, each as the step after it saw it, and why:", "", *changes, "", *told]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
