"""A run from its recipe to its report: check, start the pools, drive each stage, write down what came out.

Everything that can be refused is refused before an actor starts; whatever ends the run, no Ray process stays behind.
A stage has its own learner, generators and teachers: it starts from the model that the stage before it left, with a
fresh optimizer.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef, cloudpickle
from rich.console import Console

from ..contracts.arrow import encode
from ..contracts.config import Config, Teacher
from ..contracts.records import Prompt, Sampling
from .driver import Driver
from .evaluation import EvalPlan, ProblemSet, evaluate
from .flow import Flow, Services
from .interrupt import Interrupt, Interrupted
from .learner_group import LearnerGroup
from .methods import compose_stages, own_module
from .methods.composition import Composition
from .metrics import MetricsLog
from .model_card import write_model_card
from .pool import Pool
from .preflight import Inputs, check_inputs, resources_needed
from .progress import Progress, final_table
from .report import write_report
from .run_folder import RunFolder
from .runtime import check_resources, cluster
from .services import heads, stage_generators, stage_teachers, start_generators, start_verifiers
from .skill_bank import SkillBank
from .stages import EntropyCollapse
from .tally import Tally
from .weight_broadcast import WeightBroadcast

Checkpoint = tuple[Path, dict[str, Any]]


@dataclass(slots=True, kw_only=True)
class Run:
    """What all stages of a run share. `stack` ends with the run."""

    config: Config
    folder: RunFolder
    inputs: Inputs
    checkpoint: Checkpoint | None
    verifiers: Pool | None
    prompts: ObjectRef
    problems: list[ProblemSet]
    progress: Progress
    interrupt: Interrupt
    tally: Tally
    stack: ExitStack
    _log: MetricsLog | None = None

    def open(self) -> MetricsLog:
        """The folder and its log appear, and Ctrl-C asks for a checkpoint, once the first stage could start."""
        if self._log is None:
            self.folder.create(self.config)
            self._log = MetricsLog(self.folder.path, self.config.metrics.host, self.config.metrics.port)
            self.stack.callback(self._log.close)
            self._log.truncate_after(self.checkpoint[1]["step"] if self.checkpoint else 0)
            self.progress.note(f"metrics at {self._log.url}")
            self.stack.enter_context(self.interrupt)
        return self._log


def train(config: Config, resume: bool, address: str | None, console: Console) -> bool:
    """Run `config` to its end. Returns False if it was interrupted (a checkpoint stands). Raises TutorloopError."""
    tally = Tally()  # its clock starts here
    compositions = compose_stages(config)
    for module in filter(None, (own_module(stage.method) for stage in config.plan)):
        cloudpickle.register_pickle_by_value(module)  # actors on other nodes do not have its file
    folder = RunFolder(Path(config.output_dir))
    folder.check(config, resume)
    inputs = check_inputs(config, compositions)
    checkpoint = folder.latest_checkpoint() if resume else None
    if checkpoint:
        tally.resume(checkpoint[1]["tally"])
    with cluster(address), ExitStack() as stack:
        check_resources(resources_needed(config, compositions))
        progress = stack.enter_context(Progress(config.total_steps, console))
        for note in inputs.notes:
            progress.note(note)
        for name, limits in inputs.servers.items():
            progress.note(f"{name}: {limits}")
        if checkpoint:
            progress.note(f"resuming after step {checkpoint[1]['step']} from {checkpoint[0]}")
        run = Run(
            config=config,
            folder=folder,
            inputs=inputs,
            checkpoint=checkpoint,
            verifiers=start_verifiers(config) if config.verifier.kind != "none" else None,
            prompts=ray.put(encode(Prompt, inputs.train)),
            problems=_problem_sets(inputs),
            progress=progress,
            interrupt=Interrupt(progress.note),
            tally=tally,
            stack=stack,
        )
        finished, summary = _stages(run, compositions)
    console.print(final_table(summary))
    console.print(f"run folder: {folder.path}", markup=False)
    return finished


def _stages(run: Run, compositions: list[Composition]) -> tuple[bool, dict[str, Any]]:
    """Drive one stage after the other, from the one that the checkpoint was in; whether all ended, and the summary."""
    state = run.checkpoint[1] if run.checkpoint else {"stage": 0, "first": 0}
    first, last = state["first"], len(compositions) - 1
    for number in range(state["stage"], last + 1):
        with ExitStack() as stack:
            driver = _assemble(run, number, compositions[number], first, stack)
            if run.checkpoint and number == state["stage"]:
                driver.load(*run.checkpoint)
            finished = driver.train()
            if not finished or number == last:
                return finished, _write_down(run, driver, finished)
            driver.learner.export(_left_by(run.folder, number))
            first = driver.step
    raise AssertionError("a run has at least one stage")


def _left_by(folder: RunFolder, stage: int) -> Path:
    """The model that a stage leaves to the next."""
    return folder.path / "stages" / f"{stage}"


def _assemble(run: Run, number: int, composition: Composition, first: int, stack: ExitStack) -> Driver:
    """Start stage `number`, which begins at the run's step `first`. Teachers come last: what evaluates them takes their
    place before."""
    stage = run.config.plan[number]
    config = run.config.of_stage(stage)
    if number:
        student = config.student.model_copy(update={"model": str(_left_by(run.folder, number - 1))})
        config = config.model_copy(update={"student": student})
    run.progress.phase(f"starting the learner and the generators of {config.method}")
    learner = LearnerGroup(config, composition.terms, composition.correction, heads(config, composition))
    stack.callback(learner.close)
    generators = stage_generators(config, composition)
    learner.ready()
    _ready(generators, stack)
    generators["student"].check_room(_longest(run.inputs, config))
    broadcasts = None
    if config.rollout.transfer == "broadcast":
        broadcasts = WeightBroadcast(learner, generators["student"], config.rollout.tensor_parallel)
    log = run.open()
    if not run.tally.evals:
        _evaluate_teachers(run, config, log)
    run.progress.phase(f"starting the teachers of {config.method}")
    teachers = stage_teachers(config, composition, generators["student"], run.inputs.servers)
    own = {name: pool for name, pool in teachers.items() if pool is not generators["student"]}
    _ready(own, stack)
    if composition.scoring and composition.scoring.top_k:
        _note_largest_k(run, [own[name] for name in config.named_teachers if name in own])
    skills = _skills(run, config, composition, stack)
    own_teachers = {name: teacher for name, teacher in config.named_teachers.items() if name in teachers}
    following = {name: t.follows for name, t in own_teachers.items() if t.follows and not t.shared}
    flow = Flow(
        config,
        composition,
        Services(
            generators=generators, teachers=teachers, verifiers=run.verifiers, skills=skills.pool if skills else None
        ),
        prompts=run.prompts,
        teacher_of_row=[prompt.teacher for prompt in run.inputs.train],
        first=first,
        interrupt=run.interrupt,
    )
    return Driver(
        config=config,
        stage=number,
        folder=run.folder,
        flow=flow,
        learner=learner,
        skills=skills,
        broadcasts=broadcasts,
        followers=[teachers[name] for name in following],
        averages=[teachers[name] for name, follows in following.items() if follows == "ema"],
        problems=run.problems,
        plan=eval_plan(config),
        trigger=EntropyCollapse(stage.until) if stage.until else None,
        log=log,
        progress=run.progress,
        interrupt=run.interrupt,
        tally=run.tally,
        step=first,
    )


def _note_largest_k(run: Run, teachers: Sequence[Pool]) -> None:
    for pool in teachers:
        run.progress.note(f"{pool.name}: top-k up to {pool.least('largest_k')} a token")


def _skills(run: Run, config: Config, composition: Composition, stack: ExitStack) -> SkillBank | None:
    """The run's bank, where teachers are shown skills; stages share it."""
    if not composition.scoring or not composition.scoring.views:
        return None
    bank = SkillBank(config, run.folder.path / "bank", run.prompts, [prompt.prompt_id for prompt in run.inputs.train])
    stack.callback(bank.pool.close)
    bank.pool.ready()
    return bank


def _longest(inputs: Inputs, config: Config) -> int:
    """Tokens of the longest prompt with the longest response."""
    return max(len(prompt.token_ids) for prompt in inputs.train) + config.rollout.max_new_tokens


def _ready(pools: Mapping[str, Pool], stack: ExitStack) -> None:
    for pool in dict.fromkeys(pools.values()):
        stack.callback(pool.close)
        pool.ready()


def _evaluate_teachers(run: Run, config: Config, log: MetricsLog) -> None:
    """Each teacher generates once, so that the student's goal is known. A self-teacher is the student, and is not;
    nor is one behind http, which only scores."""
    others = [t for t in config.named_teachers.values() if t.model != config.student.model and t.engine != "http"]
    try:
        for teacher in others if run.problems else []:
            run.progress.phase(f"evaluating the teacher {teacher.model}")
            one: Teacher = teacher.model_copy(update={"replicas": 1})
            pool = start_generators("teacher as generator", teacher.model, teacher.dtype, one, config)
            pool.ready()
            assert run.verifiers, "preflight refuses an evaluation without a verifier"
            parts = (eval_plan(config), pool, run.verifiers, [], "teacher", 0, run.interrupt)
            for row in [evaluate(problems, *parts) for problems in run.problems]:
                run.tally.evals.append(row)
                log.log_eval(row)
                run.progress.eval(row)
            pool.close()
    except Interrupted:
        run.progress.note("interrupted before the first step")


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


def _write_down(run: Run, driver: Driver, finished: bool) -> dict[str, Any]:
    """summary.json, final/ (of a finished run) and report.html."""
    run.progress.phase("writing the summary, the model and the report")
    config, folder = run.config, run.folder
    memory = {pool.name: pool.peak_memory() for pool in driver.flow.pools}
    memory["learner"] = driver.learner.peak_memory()
    summary = {
        "method": " → ".join(stage.method for stage in config.plan),
        "seed": config.seed,
        "steps": driver.step,
        "interrupted": not finished,
        "weight_versions": driver.step + 1,
        "peak_memory_bytes": sum(memory.values()),
        "peak_memory_bytes_by_pool": memory,
        **run.tally.summary(),
    }
    folder.write("summary.json", json.dumps(summary, indent=2))
    if finished:
        driver.learner.export(folder.path / "final")
        write_model_card(folder.path / "final" / "README.md", config, summary)
    write_report(folder.path)
    return summary
