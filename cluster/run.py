"""A run from its recipe to its report: check, start the pools, drive, write down what came out.

Everything that can be refused is refused before an actor starts; whatever ends the run, no Ray process stays behind.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from ..actors.worker import RolloutWorker
from ..contracts.config import Config, Teacher
from ..contracts.config import Pool as PoolConfig
from ..contracts.errors import RolloutError, TeacherError, VerifierError
from ..contracts.records import Prompt, Sampling, encode
from ..teacher_service.worker import TeacherWorker
from ..verifier_service.worker import VerifierWorker
from .driver import Driver
from .evaluation import EvalPlan, ProblemSet
from .flow import Flow
from .interrupt import Interrupt, Interrupted
from .learner_group import LearnerGroup
from .methods import compose
from .methods.composition import Composition
from .metrics import MetricsLog
from .model_card import write_model_card
from .pool import Pool, torch_placement
from .preflight import Inputs, check_inputs, resources_needed, teacher_names
from .progress import Progress, final_table
from .report import write_report
from .run_folder import RunFolder
from .runtime import check_resources, cluster
from .tally import Tally

Checkpoint = tuple[Path, dict[str, Any]]


def train(config: Config, resume: bool, address: str | None, console: Console) -> bool:
    """Run `config` to its end. Returns False if it was interrupted (a checkpoint stands). Raises TutorloopError."""
    tally = Tally()  # its clock starts here
    composition = compose(config)
    folder = RunFolder(Path(config.output_dir))
    folder.check(config, resume)
    inputs = check_inputs(config, composition.scoring)
    checkpoint = folder.latest_checkpoint() if resume else None
    if checkpoint:
        tally.resume(checkpoint[1]["tally"])
    with cluster(address), ExitStack() as stack:
        check_resources(resources_needed(config))
        progress = stack.enter_context(Progress(config.steps, console))
        driver = _assemble(config, composition, inputs, folder, checkpoint, tally, progress, stack)
        try:
            if not driver.tally.evals:
                _evaluate_teachers(driver)
        except Interrupted:
            progress.note("interrupted before the first step")
        _start_teachers(driver, stack)
        finished = driver.train()
        summary = _write_down(driver, finished)
    console.print(final_table(summary))
    console.print(f"run folder: {folder.path}", markup=False)
    return finished


def _assemble(
    config: Config,
    composition: Composition,
    inputs: Inputs,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    tally: Tally,
    progress: Progress,
    stack: ExitStack,
) -> Driver:
    """Start everything but the teachers, whose place is first taken by what evaluates them."""
    progress.phase("starting the learner, rollout and verifier pools")
    step = checkpoint[1]["step"] if checkpoint else 0
    if checkpoint:
        progress.note(f"resuming after step {step} from {checkpoint[0]}")
    learner = LearnerGroup(config, composition.terms, _heads(config))
    stack.callback(learner.close)
    rollouts = start_generators("rollout", config.student.model, config.learner.dtype, config.rollout, config)
    verifiers = start_verifiers(config)
    learner.ready()
    if checkpoint:
        learner.load(checkpoint[0] / "learner")
    rollouts.ready()
    verifiers.ready()

    folder.create(config)
    log = MetricsLog(folder.path, config.metrics.host, config.metrics.port)
    stack.callback(log.close)
    log.truncate_after(step)
    progress.note(f"metrics at {log.url}")
    interrupt = stack.enter_context(Interrupt(progress.note))
    flow = Flow(
        config,
        composition,
        prompts=ray.put(encode(Prompt, inputs.train)),
        teacher_of_row=teacher_names(config, inputs.train),
        rollouts=rollouts,
        teachers={},
        verifiers=verifiers,
        first_step=step,
        interrupt=interrupt,
    )
    return Driver(
        config=config,
        folder=folder,
        flow=flow,
        learner=learner,
        problems=_problem_sets(inputs),
        plan=eval_plan(config),
        log=log,
        progress=progress,
        interrupt=interrupt,
        tally=tally,
        step=step,
    )


def start_generators(name: str, model: str, dtype: str, pool: PoolConfig, config: Config) -> Pool:
    """A pool of rollout workers with `model`."""
    placement = torch_placement(pool)
    rollout = config.rollout
    arguments = {"engine": rollout.engine, "model": model, "dtype": dtype, "max_batch": rollout.batch_size}
    return Pool(name, RolloutWorker, pool, RolloutError, **arguments, **placement)


def start_verifiers(config: Config) -> Pool:
    verifier = config.verifier
    arguments = {"kind": verifier.kind, "timeout_seconds": verifier.timeout_seconds}
    return Pool("verifier", VerifierWorker, verifier, VerifierError, **arguments)


def _start_teachers(driver: Driver, stack: ExitStack) -> None:
    driver.progress.phase("starting the teachers")
    names = driver.config.named_teachers
    for name, teacher in names.items():
        pool_name = "teacher" if len(names) == 1 else f"teacher.{name}"
        driver.flow.teachers[name] = Pool(
            pool_name,
            TeacherWorker,
            teacher,
            TeacherError,
            teacher_id=name,
            engine=teacher.engine,
            model=teacher.model,
            dtype=teacher.dtype,
            tokens_per_batch=teacher.tokens_per_batch,
            **torch_placement(teacher),
        )
    for pool in driver.flow.teachers.values():
        pool.ready()


def _evaluate_teachers(driver: Driver) -> None:
    """Each teacher generates once, in its own pool's place, so that the student's goal is known."""
    for teacher in driver.config.named_teachers.values() if driver.problems else ():
        driver.progress.phase(f"evaluating the teacher {teacher.model}")
        one: Teacher = teacher.model_copy(update={"replicas": 1})
        pool = start_generators("teacher as generator", teacher.model, teacher.dtype, one, driver.config)
        pool.ready()
        driver.measure(pool, "teacher")
        pool.close()


def _heads(config: Config) -> dict[str, tuple[str, str]]:
    """Teachers whose frozen head the exact divergence needs."""
    named = config.named_teachers.items()
    return {name: (teacher.model, teacher.dtype) for name, teacher in named if teacher.signal == "exact"}


def _problem_sets(inputs: Inputs) -> list[ProblemSet]:
    sets = []
    if inputs.in_distribution:
        sets.append(ProblemSet.of("in_distribution", inputs.in_distribution))
    if inputs.out_of_distribution:
        sets.append(ProblemSet.of("out_of_distribution", inputs.out_of_distribution))
    return sets


def eval_plan(config: Config) -> EvalPlan:
    new_tokens = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return EvalPlan(
        samples=config.eval.samples,
        sampling=Sampling(max_new_tokens=new_tokens, temperature=config.eval.temperature),
        batch_size=config.rollout.batch_size,
        seed=config.seed,
    )


def _write_down(driver: Driver, finished: bool) -> dict[str, Any]:
    """summary.json, final/ (of a finished run) and report.html."""
    driver.progress.phase("writing the summary, the model and the report")
    config, folder = driver.config, driver.folder
    memory = {pool.name: pool.peak_memory() for pool in driver.flow.pools}
    memory["learner"] = driver.learner.peak_memory()
    summary = {
        "method": config.method,
        "seed": config.seed,
        "steps": driver.step,
        "interrupted": not finished,
        "weight_versions": driver.step + 1,
        "peak_memory_bytes": sum(memory.values()),
        "peak_memory_bytes_by_pool": memory,
        **driver.tally.summary(),
    }
    folder.write("summary.json", json.dumps(summary, indent=2))
    if finished:
        driver.learner.export(folder.path / "final")
        write_model_card(folder.path / "final" / "README.md", config, summary)
    write_report(folder.path)
    return summary
