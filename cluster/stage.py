"""A stage of a run: its learner, generators, teachers and services started, and the driver that will drive it.

A stage starts from the model that the stage before it left, with a fresh optimizer. What all stages share is the `Run`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..contracts.config import Config, Teacher
from ..contracts.records import Sampling
from .checkpoints import Checkpoints
from .control.live_run import LiveRun
from .control.server import ControlServer
from .driver import Driver
from .entropy_collapse import EntropyCollapse
from .flow.evaluation import EvalPlan, ProblemSet, evaluate
from .flow.flow import Flow, Services
from .interrupt import Interrupt
from .learner_group import LearnerGroup
from .methods.parts.composition import Composition
from .pools.autoscaler import autoscaler_of
from .pools.calls import Pace
from .pools.pool import Pool
from .pools.replica import Backend, Replica
from .pools.self_teaching import adopt_average
from .pools.services import (
    annotators,
    heads,
    own_services,
    stage_generators,
    stage_teachers,
    start_generators,
)
from .pools.weight_broadcast import WeightBroadcast
from .preflight import Inputs
from .recording.counters import RunCounters
from .recording.metrics import MetricsLog
from .recording.notify import Notifier
from .recording.progress import Progress
from .recording.recorder import Recorder
from .recording.run_folder import Checkpoint, RunFolder
from .recording.samples import truncate_samples
from .resume_keys import write_down
from .score_caches import cache_places
from .skill_bank import SkillBank
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


def left_by(folder: RunFolder, stage: int) -> Path:
    """The model that a stage leaves to the next."""
    return folder.path / "stages" / f"{stage}"


async def assemble(run: Run, number: int, composition: Composition, first: int, stack: ExitStack) -> Driver:
    """Start stage `number`, which begins at the run's step `first`. Teachers come last: what evaluates them takes their
    place before."""
    stage = run.config.plan[number]
    config = run.config.of_stage(stage)
    if number:
        student = config.student.model_copy(update={"model": str(left_by(run.folder, number - 1))})
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
    own_pools = own_services(config, composition, run.backend)
    await _ready(own_pools, run, stack)
    services = annotators(teachers, run.verifiers, skills.pool if skills else None, own_pools)
    teacher_of_row, replayed = [prompt.teacher for prompt in run.inputs.train], len(run.inputs.replay)
    places = Services(generators=generators, annotators=services)
    flow = Flow(config, composition, places, run.prompts, teacher_of_row, first, run.progress.note, replayed)
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
    prompt_ids = [prompt.prompt_id for prompt in (*run.inputs.train, *run.inputs.replay)]
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


def problem_sets(inputs: Inputs, backend: Backend) -> list[ProblemSet]:
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
