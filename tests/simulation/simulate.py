"""A whole stage of a run, from a seed: the real driver, flow and pools, scripted replicas, a virtual clock.

    python tests/simulation/simulate.py 10000          # seeds 0 to 9999, on all cores
    python tests/simulation/simulate.py --seed 1234    # one of them again

A seed decides the recipe (method, staleness, replicas, sizes), how long each call takes, what fails, and when Ctrl-C
comes. After each run the invariants of `check` hold; a synchronous run is repeated with other replicas and timing.
"""

import argparse
import asyncio
import gc
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from clock import VirtualLoop, VirtualStopwatch
from drawn_recipes import recipe_of, setting
from invariants import check, unnoticed
from scripted import LATE, PROMPTS, Broken, Fate, ScriptedBackend, World, scripted_pool
from scripted_autoscaler import jumpy_autoscaler, scaled_by_itself
from scripted_broadcast import sent_by_broadcast
from scripted_folder import Quiet
from scripted_learner import ScriptedLearner

from tutorloop.cluster import driver as drivers
from tutorloop.cluster.checkpoints import Checkpoints
from tutorloop.cluster.driver import Driver
from tutorloop.cluster.flow.evaluation import EvalPlan, ProblemSet
from tutorloop.cluster.flow.flow import Flow, Services
from tutorloop.cluster.interrupt import Interrupt
from tutorloop.cluster.pools import watch
from tutorloop.cluster.pools.busy import Watch
from tutorloop.cluster.pools.calls import Pace
from tutorloop.cluster.pools.services import annotators
from tutorloop.cluster.pools.weight_broadcast import WeightBroadcast
from tutorloop.cluster.recording.counters import RunCounters
from tutorloop.contracts.config import REFERENCE
from tutorloop.contracts.errors import TutorloopError
from tutorloop.contracts.records import Sampling

ROWS = 17
drivers.Stopwatch = VirtualStopwatch  # whose seconds are those of the other clocks
watch.WATCH_SECONDS = 30.0  # of 5: looks would be half of all that happens
KINDS_OF_CALL = ("generate", "score", "judge")


class WatchedFlow(Flow):
    """Remembers every shard that it began, and did not cut into its rollouts."""

    begun: list
    cut = 0

    def restore(self, kept, changed=False):
        self.begun += [shard for shards in kept.values() for shard in shards if not shard.quarantined]
        super().restore(kept, changed)

    @property
    def left(self):
        """Shards in flight, which the last checkpoint holds."""
        return [shard for shards in self.shards.values() for shard in shards]

    def rewind(self, step, keep):
        super().rewind(step, keep)
        kept = {shard for shards in self.shards.values() for shard in shards}
        self.begun = [shard for shard in self.begun if shard.step < step or shard in kept]

    def _cut(self, shard, step, error):
        self.cut += 1
        self.begun.remove(shard)
        super()._cut(shard, step, error)

    def _begin(self, step, requests, group, attempt=1):
        before = len(self.shards.get(step, []))
        super()._begin(step, requests, group, attempt)
        self.begun += self.shards[step][before:]


@dataclass
class Outcome:
    """What one run came to."""

    world: World
    flow: WatchedFlow
    counters: RunCounters
    quiet: Quiet
    finished: bool | None  # None: an error ended it
    error: TutorloopError | None = None
    seconds: float = 0.0
    pools: list = field(default_factory=list)
    unnoticed: int = 0

    @property
    def steps(self):
        return self.quiet.steps


def fate_of(rng: random.Random) -> Fate:
    fate = Fate(rng, spread=rng.choice(["even", "even", "long", "none"]))
    fate.failing_call = rng.randint(1, 60) if rng.random() < 0.2 else 0
    fate.short_call = rng.randint(1, 60) if rng.random() < 0.1 else 0
    fate.failing_load = rng.randint(1, 10) if rng.random() < 0.05 else 0
    fate.stop_at = rng.random() * 20 if rng.random() < 0.3 else 0.0
    if rng.random() < 0.5:
        fate.deaths = [(rng.random() * 20, rng.choice([1, 1, 2, 9])) for _ in range(rng.randint(1, 4))]
        fate.stillborn = rng.choice([0.0, 0.2])
        fate.hanging_calls = (rng.randint(1, 60),) if rng.random() < 0.3 else ()
        fate.lost_batches = (rng.randint(1, 60),) if rng.random() < 0.3 else ()
        fate.flaky_calls = tuple(rng.randint(1, 60) for _ in range(rng.randint(0, 4)))
        if rng.random() < 0.2:
            fate.poison = f"{rng.randint(0, 12)}-{rng.randint(0, 1)}"
    if rng.random() < 0.3:
        fate.learner_deaths = tuple(rng.randint(1, 20) for _ in range(rng.randint(0, 2)))
        fate.learner_hangs = (rng.randint(1, 20),) if rng.random() < 0.3 else ()
        fate.learner_dies_at = rng.random() * 20 if rng.random() < 0.3 else 0.0
    if rng.random() < 0.3:
        pools = ["rollout", "a", "b", "verifier"]
        fate.resizes = [(rng.random() * 8, rng.choice(pools), rng.choice([1, 1, 2, 4])) for _ in range(6)]
    return fate


def run_once(recipe: tuple, fate: Fate, before: Outcome | None = None) -> Outcome:
    """One stage of a run; or what is left of it, after one that was interrupted."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_drive(recipe, fate, before))


async def _drive(recipe: tuple, fate: Fate, before: Outcome | None) -> Outcome:
    config, composition = setting(*recipe)
    world = World(fate, most_ahead=config.max_staleness, per_step=config.prompts_per_step)
    if before:
        world.go_on_from(before.world)
    backend = ScriptedBackend(world, {"rollout", "a"})
    at_once = {"rollout": fate.rng.choice([1, 4]), "verifier": 4}
    sizes = {"rollout": config.rollout.replicas, **{name: fate.rng.randint(1, 2) for name in ("a", "b", REFERENCE)}}
    names = ("rollout", "a", "b", REFERENCE, "verifier", "skills", "t")
    own = {name: scripted_pool(name, world, backend, sizes.get(name, 1), at_once.get(name, 1)) for name in names}
    quiet, interrupt = Quiet(), Interrupt(lambda _: None)
    if before:
        quiet = Quiet(steps=list(before.steps), checkpoints=before.quiet.checkpoints, kept=before.quiet.kept)
    driver = driver_of(config, composition, world, own, quiet, interrupt)
    flow, pools = driver.flow, {pool.name: pool for pool in dict.fromkeys([*driver.flow.pools, own["verifier"]])}
    driver.autoscaler = jumpy_autoscaler(fate, flow, [pools[name] for name in (*sizes, "verifier") if name in pools])
    for pool in pools.values():
        await pool.ready(quiet.note)
    if before:
        flow.begun = [shard for shard in before.flow.begun if shard not in before.flow.left]
        place = Path("unused") / str(before.world.finished_steps)
        driver.counters.resume(quiet.checkpoints[place]["tally"])
        await driver.resume(place, quiet.checkpoints[place])
    with interrupt.saving():
        loop = asyncio.get_running_loop()
        disturb(fate, world, pools, interrupt)
        try:
            finished, error = await driver.train(), None
        except TutorloopError as failure:
            finished, error = None, failure
    outcome = Outcome(world, flow, driver.counters, quiet, finished, error, loop.time(), list(pools.values()))
    outcome.unnoticed = unnoticed(outcome)
    for pool in outcome.pools:
        pool.members.watching.cancel()  # ten days of looking at them take too long
    await asyncio.sleep(2 * LATE if fate.hanging_calls or fate.learner_hangs else 0)  # what comes late comes now
    return outcome


def driver_of(config, composition, world: World, pools: dict, quiet: "Quiet", interrupt: Interrupt) -> Driver:
    """The real driver and flow, whose clocks are the loop's, with scripted pools."""
    annotating = {name: pools[name] for name in ("a", "b", REFERENCE) if name in pools}
    rollouts = pools["rollout"]
    generators = {"student": rollouts, "dataset": rollouts, "teacher": pools.get("t", rollouts)}
    services = Services(
        generators=generators, annotators=annotators(annotating, pools["verifier"], pools.get("skills"))
    )
    teachers = [("a", "b")[row % 2] for row in range(ROWS)] if "b" in pools else ["a"] * ROWS
    flow = WatchedFlow(config, composition, services, PROMPTS, teachers, 0, quiet.note)
    flow.begun = []
    pace = Pace(config.learner.deadline_seconds)
    pace.took("ready", 1, 1.0)  # the learner has started once
    return Driver(
        config=config,
        stage=0,
        folder=quiet,
        flow=flow,
        learner=ScriptedLearner(config, world, pace),
        skills=None,
        verifiers=pools["verifier"],
        broadcasts=WeightBroadcast(rollouts, 1) if world.fate.broadcast else None,
        autoscaler=None,
        self_teachers=[pools["a"]],
        averages=[],
        problems=[ProblemSet("in_distribution", PROMPTS, 2)] if config.eval.path else [],
        plan=EvalPlan(samples=1, sampling=Sampling(max_new_tokens=4), batch_size=1, seed=0),
        trigger=None,
        log=quiet,
        progress=quiet,
        interrupt=interrupt,
        counters=RunCounters(watch=Watch(asyncio.get_running_loop().time)),
        recorder=quiet,
        checkpoints=Checkpoints(quiet, 2),
        step=0,
        start_learner=partial(ScriptedLearner.again, config, world, pace),
    )


def disturb(fate: Fate, world: World, pools: dict, interrupt: Interrupt) -> None:
    """See to it that what happens at a time does."""
    at_time = asyncio.get_running_loop().call_later
    if fate.stop_at:
        at_time(fate.stop_at, interrupt.stop)
    if fate.learner_dies_at:
        at_time(fate.learner_dies_at, world.kill_learner)
    for at, many in fate.deaths:
        at_time(at, world.kill, many)
    for at, name, replicas in fate.resizes:
        at_time(at, pools[name].resize, replicas)


def simulate(seed: int) -> None:
    """Run a seed and check it; a synchronous run once more, with other replicas and another timing."""
    rng = random.Random(seed)
    recipe, fate = recipe_of(rng), fate_of(rng)
    sent_by_broadcast(fate, random.Random(f"broadcast {seed}"))
    scaled_by_itself(fate, random.Random(f"autoscale {seed}"))
    outcome = run_once(recipe, fate)
    check(outcome, recipe, fate)
    if outcome.finished is False:
        go_on(outcome, recipe, rng)
    if outcome.finished and recipe[1] == 0:
        method, staleness, prompts, _, _, *rest = recipe
        cut_otherwise = (method, staleness, prompts, rng.randint(1, 3), rng.choice([2, 4]), *rest)
        again = run_once(cut_otherwise, Fate(random.Random(seed + 1)))
        if not outcome.flow.cut and again.world.trained != outcome.world.trained:
            raise Broken("a synchronous run trains other rows with another timing")


def go_on(before: Outcome, recipe: tuple, rng: random.Random) -> None:
    """An interrupted run from its checkpoint to its end, with other replicas: nothing is lost, or trained twice."""
    method, staleness, prompts, _, *rest = recipe
    elsewhere = (method, staleness, prompts, rng.randint(1, 3), *rest)
    calm = Fate(random.Random(rng.random()))
    outcome = run_once(elsewhere, calm, before)
    check(outcome, elsewhere, calm)
    whole = [shard for shard in before.flow.left if shard.generated and not shard.quarantined]
    if again := outcome.world.asked & {request.rollout_id for shard in whole for request in shard.requests}:
        raise Broken(f"{len(again)} rollouts that a checkpoint holds are generated again")


def replay(seed: int) -> str:
    """ "" where a seed holds, else one line that says what is broken and how to see it again."""
    try:
        simulate(seed)
    except Exception as error:
        return f"{type(error).__name__}: {error} | again: python tests/simulation/simulate.py --seed {seed}"
    return ""


def find(seeds: int) -> int:
    """The first seed that a planted fault breaks; it breaks again in the same way."""
    found = next((line for line in map(replay, range(seeds)) if line), "")
    seed = found.rpartition("--seed ")[2]
    assert seed.isdecimal(), "no seed breaks, and each failing one says how to see it again"
    assert replay(int(seed)) == found, "it breaks again in the same way"
    return int(seed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", nargs="?", type=int, default=1000)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    if options.seed is not None:
        simulate(options.seed)
        print(f"seed {options.seed} holds")
        return
    start = time.perf_counter()
    seldom = partial(gc.set_threshold, 100_000)  # garbage is collected: a run makes many small objects
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=seldom) as pool:
        broken = [line for line in pool.map(replay, range(options.seeds), chunksize=50) if line]
    print(*broken[:10], sep="\n")
    print(f"{options.seeds} seeds, {len(broken)} broken, {time.perf_counter() - start:.1f} s")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
