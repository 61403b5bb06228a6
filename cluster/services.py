"""Starting a stage's pools: generators, teachers and reference, verifiers; and the heads that the learner needs."""

from ..actors.worker import RolloutWorker
from ..contracts.config import REFERENCE, Config, Lora, Reference, Teacher
from ..contracts.config import Pool as PoolConfig
from ..contracts.errors import RolloutError, TeacherError, VerifierError
from ..teacher_service.worker import TeacherWorker
from ..verifier_service.worker import VerifierWorker
from .methods.composition import Composition
from .pool import Pool, torch_placement


def stage_generators(config: Config, composition: Composition) -> dict[str, Pool]:
    """Who answers prompts, by source. The student also hands out the dataset's solutions."""
    student, rollout = config.student, config.rollout
    rollouts = start_generators("rollout", student.model, config.learner.dtype, rollout, config, student.lora)
    generators = {"student": rollouts, "dataset": rollouts}
    if "teacher" in composition.generators:
        (teacher,) = config.named_teachers.values()
        place = config.teacher_rollout
        generators["teacher"] = start_generators("teacher_rollout", teacher.model, teacher.dtype, place, config)
    return generators


def start_generators(
    name: str, model: str, dtype: str, pool: PoolConfig, config: Config, lora: Lora | None = None
) -> Pool:
    """A pool of rollout workers with `model`; with `lora` they take adapters of it."""
    placement = torch_placement(pool)
    rollout = config.rollout
    arguments = {
        "engine": rollout.engine,
        "model": model,
        "dtype": dtype,
        "max_batch": rollout.batch_size,
        "templates": config.templates,
        "template_kwargs": config.data.chat_template_kwargs,
        "lora": lora,
    }
    return Pool(name, RolloutWorker, pool, RolloutError, **arguments, **placement)


def start_verifiers(config: Config) -> Pool:
    verifier = config.verifier
    arguments = {"kind": verifier.kind, "timeout_seconds": verifier.timeout_seconds}
    return Pool("verifier", VerifierWorker, verifier, VerifierError, **arguments)


def stage_teachers(config: Config, composition: Composition) -> dict[str, Pool]:
    """The teachers that the stage asks, and the reference model under its own name."""
    named = config.named_teachers if composition.scoring else {}
    one = len(named) == 1
    teachers = {
        name: _start_teacher(name, "teacher" if one else f"teacher.{name}", t, config) for name, t in named.items()
    }
    if composition.reference and config.reference:
        teachers[REFERENCE] = _start_teacher(REFERENCE, REFERENCE, config.reference, config)
    return teachers


def _start_teacher(name: str, pool_name: str, teacher: Teacher | Reference, config: Config) -> Pool:
    own = {}
    if isinstance(teacher, Teacher) and teacher.follows:  # it starts where the stage's student starts
        own = {"follows": teacher.follows, "ema_decay": teacher.ema_decay, "lora": config.student.lora}
    return Pool(
        pool_name,
        TeacherWorker,
        teacher,
        TeacherError,
        teacher_id=name,
        engine=teacher.engine if isinstance(teacher, Teacher) else "transformers",
        model=config.student.model if own else teacher.model,
        dtype=teacher.dtype,
        tokens_per_batch=teacher.tokens_per_batch,
        templates=config.templates,
        template_kwargs=config.data.chat_template_kwargs,
        **own,
        **torch_placement(teacher),
    )


def heads(config: Config, composition: Composition) -> dict[str, tuple[str, str]]:
    """Teachers whose frozen head the exact divergence needs."""
    if composition.scoring is None or composition.scoring.signal != "hidden":
        return {}
    return {name: (teacher.model, teacher.dtype) for name, teacher in config.named_teachers.items()}
