"""A run from its recipe to its report: check, start the pools, drive each stage, write down what came out.

Everything that can be refused is refused before an actor starts; whatever ends the run, no Ray process stays behind.
A stage has its own learner, generators and teachers: it starts from the model that the stage before it left, with a
fresh optimizer.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray import cloudpickle
from rich.console import Console

from ..contracts.arrow import encode
from ..contracts.config import Config, Teacher
from ..contracts.errors import GuardTripped
from ..contracts.own_code import package_of
from ..contracts.records import Prompt, Sampling
from .checkpoints import Checkpoints
from .control.live_run import LiveRun
from .control.server import ControlServer
from .driver import Driver
from .flow.evaluation import EvalPlan, ProblemSet, evaluate
from .flow.flow import Flow, Services
from .interrupt import Interrupt
from .learner_group import LearnerGroup
from .methods import compose_stages, own_modules
from .methods.parts.composition import Composition
from .pools.autoscaler import autoscaler_of
from .pools.calls import Pace
from .pools.in_process import InProcessBackend
from .pools.pool import Pool
from .pools.ray_backend import RayBackend
from .pools.ray_cluster import cluster
from .pools.replica import Backend, Replica
from .pools.self_teaching import adopt_average
from .pools.services import (
    annotators,
    heads,
    judges,
    own_services,
    stage_generators,
    stage_teachers,
    start_generators,
    start_verifiers,
)
from .pools.weight_broadcast import WeightBroadcast
from .preflight import Inputs, needs_of
from .recording.counters import RunCounters, deaths_of
from .recording.metrics import MetricsLog
from .recording.model_card import write_model_card
from .recording.notify import Notifier
from .recording.progress import Progress, final_table
from .recording.recorder import Recorder
from .recording.report import write_report
from .recording.run_folder import Checkpoint, RunFolder
from .recording.samples import truncate_samples
from .resume_keys import write_down
from .resuming import begin
from .score_caches import cache_places, forget_sampled
from .skill_bank import SkillBank
from .stages import EntropyCollapse
from .startup import Startup


@dataclass(slots=True, kw_only=True)
class Run:
    """What all stages of a run share. `stack` ends with the run."""

    config: Config
    folder: RunFolder
    inputs: Inputs
    checkpoint: Checkpoint | None
    backend: Backend
    prompts: Any  # a reference
    problems: list[ProblemSet]
    progress: Progress
    notifier: Notifier
    interrupt: Interrupt
    counters: RunCounters
    recorder: Recorder
    startup: Startup
    stack: ExitStack
    verifiers: Pool | None = None
    live: LiveRun | None = None
    _log: MetricsLog | None = None

    def open(self) -> MetricsLog:
        """The folder and its log appear once the first stage could start."""
        if self._log is None:
            at, done = self.config.metrics, self.checkpoint[1]["step"] if self.checkpoint else 0
            write_down(self.folder.path, self.folder.changes, done)  # before the configuration that holds them
            self.folder.create(self.config)
            (self.folder.path / "summary.json").unlink(missing_ok=True)  # it says that a run has ended
            self._log = MetricsLog(self.folder.path, at.host, at.port, self.config.methods, self.notifier)
            self.stack.callback(self._log.close)
            self._log.truncate_after(done)
            truncate_samples(self.folder.path, done)
            self.progress.note(f"metrics at {self._log.url}")
            assert self.live
            self.stack.enter_context(ControlServer(self.live, self.folder.path))
        return self._log


def train(
    config: Config, resume: bool, address: str | None, console: Console, local: bool = False, allow: Sequence[str] = ()
) -> bool:
    """Run `config` to its end, on Ray or (`local`) in this process; a resumed one may have the keys of `allow` changed.
    Returns False if it was interrupted (a checkpoint stands). Raises TutorloopError."""
    counters = RunCounters()  # its clock starts here
    folder = RunFolder(Path(config.output_dir).absolute(), allow=allow)  # ranks write too, from folders of their own
    with ExitStack() as stack:
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
        prompts = backend.put(encode(Prompt, inputs.train))
        run = Run(
            config=config,
            folder=folder,
            inputs=inputs,
            checkpoint=checkpoint,
            backend=backend,
            prompts=prompts,
            problems=_problem_sets(inputs, backend),
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
            driver = await _assemble(run, number, compositions[number], first, stack)
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
            await run.folder.put(_left_by(run.folder, number), "a stage's model", driver.learner.export)
            first = driver.step
    raise AssertionError("a run has at least one stage")


def _left_by(folder: RunFolder, stage: int) -> Path:
    """The model that a stage leaves to the next."""
    return folder.path / "stages" / f"{stage}"


async def _assemble(run: Run, number: int, composition: Composition, first: int, stack: ExitStack) -> Driver:
    """Start stage `number`, which begins at the run's step `first`. Teachers come last: what evaluates them takes their
    place before."""
    stage = run.config.plan[number]
    config = run.config.of_stage(stage)
    if number:
        student = config.student.model_copy(update={"model": str(_left_by(run.folder, number - 1))})
        config = config.model_copy(update={"student": student})
    start_learner = partial(_learner, run, config, composition, Pace(config.learner.deadline_seconds), stack)
    learner, generators = await _start_student(run, config, composition, start_learner, stack)
    await generators["student"].check_room(run.inputs.longest)
    broadcasts = None
    if config.rollout.transfer == "broadcast":
        broadcasts = WeightBroadcast(generators["student"], config.rollout.tensor_parallel)
    log = run.open()
    if not run.counters.evals:
        await _evaluate_teachers(run, config, log)
    run.startup.phase("teachers", f"loading the teachers of {config.method}")
    given = (generators["student"], run.inputs.servers, run.backend, cache_places(config, run.folder))
    teachers = stage_teachers(config, composition, *given)
    own = {name: pool for name, pool in teachers.items() if pool is not generators["student"]}
    await _ready(own, run, stack)
    if composition.scoring and composition.scoring.top_k:
        await _note_largest_k(run, [own[name] for name in config.named_teachers if name in own and own[name].replicas])
    skills = await _skills(run, config, composition, stack)
    following = {name: t.follows for name, t in config.named_teachers.items() if name in own and t.follows}
    own_pools = own_services(composition, run.backend)
    await _ready(own_pools, run, stack)
    services = annotators(teachers, run.verifiers, skills.pool if skills else None, own_pools)
    flow = Flow(
        config,
        composition,
        Services(generators=generators, annotators=services),
        prompts=run.prompts,
        teacher_of_row=[prompt.teacher for prompt in run.inputs.train],
        first=first,
        tell=run.progress.note,
    )
    return Driver(
        config=config,
        stage=number,
        folder=run.folder,
        flow=flow,
        learner=learner,
        skills=skills,
        verifiers=run.verifiers,
        broadcasts=broadcasts,
        autoscaler=autoscaler_of(config, flow, run.backend, run.progress.note),
        self_teachers=[teachers[name] for name in following],
        averages=[_averaging(run, teachers[name]) for name, follows in following.items() if follows == "ema"],
        problems=run.problems,
        plan=eval_plan(config),
        trigger=EntropyCollapse(stage.until) if stage.until else None,
        log=log,
        progress=run.progress,
        interrupt=run.interrupt,
        counters=run.counters,
        recorder=run.recorder,
        checkpoints=Checkpoints(run.folder, config.checkpoint.keep),
        step=first,
        start_learner=start_learner,
    )


async def _learner(run: Run, config: Config, composition: Composition, pace: Pace, stack: ExitStack) -> LearnerGroup:
    """The learner, in its places. One that has died before leaves them first."""
    parts = (composition.terms, composition.correction, heads(config, composition), run.inputs.longest, pace)
    learner = await LearnerGroup.start(config, run.backend, *parts, tell=run.progress.note)
    stack.callback(learner.close)
    return learner


async def _start_student(
    run: Run,
    config: Config,
    composition: Composition,
    start_learner: Callable[[], Awaitable[LearnerGroup]],
    stack: ExitStack,
) -> tuple[LearnerGroup, dict[str, Pool]]:
    """The learner, the generators and the verifiers, which load side by side."""
    run.startup.phase("placing", f"finding room for the learner of {config.method}")
    learner = await start_learner()
    generators = stage_generators(config, composition, run.backend, cache_places(config, run.folder))
    run.startup.phase("learner", f"loading the learner of {config.method}")
    await learner.ready()
    run.startup.phase("generators", f"loading the generators of {config.method}")
    await _ready(generators, run, stack)
    if run.verifiers:
        run.startup.phase("verifiers", "starting the verifiers")
        await run.verifiers.ready(run.progress.note)
    return learner, generators


def _averaging(run: Run, pool: Pool) -> Pool:
    """A pool whose later replicas go on from the average of the others."""
    pool.adopt = partial(_adopt_average, run, pool)
    return pool


async def _adopt_average(run: Run, pool: Pool, newcomer: Replica, peers: Sequence[Replica]) -> int | None:
    saved = [folder / f"{pool.name}.safetensors" for folder in run.folder.all_checkpoints()]
    own = [file for file in saved if file.is_file()]
    return await adopt_average(newcomer, peers, pool.name, own, run.progress.note)


async def _note_largest_k(run: Run, teachers: Sequence[Pool]) -> None:
    for pool in teachers:
        run.progress.note(f"{pool.name}: top-k up to {await pool.least('largest_k')} a token")


async def _skills(run: Run, config: Config, composition: Composition, stack: ExitStack) -> SkillBank | None:
    """The run's bank, where teachers are shown skills; stages share it."""
    if not composition.scoring or not composition.scoring.views:
        return None
    prompt_ids = [prompt.prompt_id for prompt in run.inputs.train]
    bank = SkillBank(config, run.folder.path / "bank", run.prompts, prompt_ids, run.backend)
    stack.callback(bank.pool.close)
    run.startup.phase("skills", "opening the skill bank")
    await bank.ready(run.progress.note)
    return bank


async def _ready(pools: Mapping[str, Pool], run: Run, stack: ExitStack) -> None:
    for pool in dict.fromkeys(pools.values()):
        stack.callback(pool.close)
        await pool.ready(run.progress.note)


async def _evaluate_teachers(run: Run, config: Config, log: MetricsLog) -> None:
    """Each teacher generates once, so that the student's goal is known. A self-teacher is the student, and is not;
    nor is one behind http, which only scores."""
    others = [t for t in config.named_teachers.values() if t.model != config.student.model and not t.remote]
    for teacher in others if run.problems else []:
        run.startup.phase("teacher evaluation", f"evaluating the teacher {teacher.model}")
        one: Teacher = teacher.model_copy(update={"replicas": 1})
        pool = start_generators("teacher as generator", teacher.model, teacher.dtype, one, config, run.backend)
        await pool.ready(run.progress.note)
        assert run.verifiers, "preflight refuses an evaluation without a verifier"
        parts = (eval_plan(config), pool, run.verifiers, "teacher", 0, run.recorder)
        for row in await evaluate(run.problems, *parts):
            row = run.counters.eval_row(config, row)
            log.log_eval(row)
            run.progress.eval(row)
        pool.close()


def _problem_sets(inputs: Inputs, backend: Backend) -> list[ProblemSet]:
    splits: tuple[Literal["in_distribution"], Literal["out_of_distribution"]] = (
        "in_distribution",
        "out_of_distribution",
    )
    return [ProblemSet.of(split, problems, backend) for split in splits if (problems := getattr(inputs, split))]


def eval_plan(config: Config) -> EvalPlan:
    new_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return EvalPlan(
        samples=config.eval.samples,
        sampling=Sampling(max_new_tokens=new_tokens, temperature=config.eval.temperature),
        batch_size=config.rollout.batch_size,
        seed=config.seed,
        reads_answers=config.verifier.needs_gold,
    )


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
