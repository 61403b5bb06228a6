"""A run from its recipe to its report: check, start the pools, drive each stage, write down what came out.

Everything that can be refused is refused before an actor starts; whatever ends the run, no Ray process stays behind.
Each stage is put together in stage.py.
"""

import asyncio
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ray import cloudpickle
from rich.console import Console

from ..contracts.arrow import encode
from ..contracts.config import Config
from ..contracts.errors import GuardTripped
from ..contracts.own_code import package_of
from ..contracts.records import Prompt
from .control.live_run import LiveRun
from .driver import Driver
from .interrupt import Interrupt
from .methods import compose_stages, own_modules
from .methods.parts.composition import Composition
from .pools.in_process import InProcessBackend
from .pools.ray_backend import RayBackend
from .pools.ray_cluster import cluster
from .pools.services import (
    judges,
    start_verifiers,
)
from .preflight import needs_of
from .recording.counters import RunCounters, deaths_of
from .recording.model_card import write_model_card
from .recording.notify import Notifier
from .recording.progress import Progress, final_table
from .recording.recorder import Recorder
from .recording.report import write_report
from .recording.run_folder import RunFolder
from .resuming import begin
from .score_caches import forget_sampled
from .stage import Run, assemble, left_by, problem_sets
from .startup import Startup


def train(
    config: Config, resume: bool, address: str | None, console: Console, local: bool = False, allow: Sequence[str] = ()
) -> bool:
    """Run `config` to its end, on Ray or (`local`) in this process; a resumed one may have the keys of `allow` changed.
    Returns False if it was interrupted (a checkpoint stands). Raises TutorloopError."""
    counters = RunCounters()  # its clock starts here
    folder = RunFolder(Path(config.output_dir).absolute(), allow=allow)  # ranks write too, from folders of their own
    with ExitStack() as stack:
        stack.enter_context(seldom_collected())
        progress = stack.enter_context(Progress(config.total_steps, console))
        stack.enter_context(_saying_what_stands(folder, progress))
        interrupt = stack.enter_context(Interrupt(progress.note))
        startup = Startup(progress.phase)
        startup.phase("inputs", "reading models and data")
        compositions = compose_stages(config)
        stack.enter_context(folder.claimed(config, resume, progress.note))
        notifier = stack.enter_context(Notifier(config, folder.path, counters.kind_of, progress.note))
        stack.enter_context(folder.room_for("the run"))
        inputs, checkpoint = begin(config, compositions, folder, resume, progress.note)
        if checkpoint:
            counters.resume(checkpoint[1]["tally"])
        backend = InProcessBackend() if local else _join(config, compositions, address, startup, stack)
        prompts = backend.put(encode(Prompt, [*inputs.train, *inputs.replay]))
        run = Run(
            config=config,
            folder=folder,
            inputs=inputs,
            checkpoint=checkpoint,
            backend=backend,
            prompts=prompts,
            problems=problem_sets(inputs, backend),
            progress=progress,
            notifier=notifier,
            interrupt=interrupt,
            counters=counters,
            recorder=Recorder(folder.path, config.record, prompts, backend),
            startup=startup,
            stack=stack.enter_context(ExitStack()),
        )
        finished, summary = asyncio.run(_stages(run, compositions))
        notifier.over(finished, summary)
    console.print(final_table(summary))
    console.out(f"run folder: {folder.path}", highlight=False)
    return finished


def _join(
    config: Config, compositions: list[Composition], address: str | None, startup: Startup, stack: ExitStack
) -> RayBackend:
    """Ray, with room for the run."""
    startup.phase("ray", "joining Ray" if address else "starting Ray")
    _take_own_code_along(config)
    stack.enter_context(cluster(address, startup.show))
    backend = RayBackend()
    backend.check_room(needs_of(config, compositions))
    return backend


def _take_own_code_along(config: Config) -> None:
    """Actors on other nodes do not have the files of methods and engines of one's own."""
    for module in own_modules(config):
        cloudpickle.register_pickle_by_value(package_of(module))


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Python looks for garbage less often. A driver makes many small objects that live for a step: looking through them
    for what is unreachable would be half of its time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _saying_what_stands(folder: RunFolder, progress: Progress) -> Iterator[None]:
    """An interrupted run says what it can be continued from."""
    try:
        yield
    except KeyboardInterrupt:
        progress.note(f"interrupted; {folder.standing}")
        raise


async def _stages(run: Run, compositions: list[Composition]) -> tuple[bool, dict[str, Any]]:
    """Drive one stage after the other, from the one that the checkpoint was in; whether all ended, and the summary."""
    run.live = LiveRun(run.config.methods, run.config.total_steps, run.backend, run.progress)
    if judges(run.config, compositions):
        run.verifiers = start_verifiers(run.config, run.backend)
        run.stack.callback(run.verifiers.close)
    state = run.checkpoint[1] if run.checkpoint else {"stage": 0, "first": 0}
    first, last = state["first"], len(compositions) - 1
    for number in range(state["stage"], last + 1):
        with ExitStack() as stack:
            driver = await assemble(run, number, compositions[number], first, stack)
            if run.checkpoint and number == state["stage"]:
                run.startup.phase("checkpoint", "loading the checkpoint")
                await driver.resume(*run.checkpoint)
            run.startup.end()
            assert run.live
            run.live.driver = driver
            with run.interrupt.saving():
                try:
                    finished = await driver.train()
                except GuardTripped:
                    await _write_down(run, driver, finished=False)
                    raise
            if not finished or number == last:
                return finished, await _write_down(run, driver, finished)
            await run.folder.put(left_by(run.folder, number), "a stage's model", driver.learner.export)
            first = driver.step
    raise AssertionError("a run has at least one stage")


async def _write_down(run: Run, driver: Driver, finished: bool) -> dict[str, Any]:
    """summary.json, final/ (of a finished run) and report.html."""
    run.progress.phase("writing the summary, the model and the report")
    config, folder = run.config, run.folder
    replicas = {pool.name: pool.replicas for pool in driver.flow.pools}
    memory = await run.backend.peak_memory({**replicas, "learner": driver.learner.ranks})
    summary = {
        "method": config.methods,
        "seed": config.seed,
        "steps": driver.step,
        "interrupted": not finished,
        "weight_versions": driver.step + 1,
        "peak_memory_bytes": sum(memory.values()),
        "peak_memory_bytes_by_pool": memory,
        "startup_seconds": dict(run.startup.seconds),
        **deaths_of(driver.flow.pools, driver.restarts),
        **({"left_out": run.inputs.left_out} if run.inputs.left_out else {}),
        **run.counters.summary(),
    }
    if run.recorder.lost:
        run.progress.note(f"{run.recorder.lost} batches of rollouts were lost before rollouts.jsonl could show them")
    if finished:
        await folder.put(folder.path / "final", "the model", driver.learner.export)
        write_model_card(folder.path / "final" / "README.md", config, summary)
        forget_sampled(folder.path)
    folder.write("summary.json", json.dumps(summary, indent=2))
    write_report(folder.path)
    return summary
