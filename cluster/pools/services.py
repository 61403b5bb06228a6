"""Starting a stage's pools: generators, teachers and reference, verifiers; and the heads that the learner needs."""

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...actors.worker import RolloutWorker
from ...contracts.config import REFERENCE, Config, Lora, Reference, Teacher
from ...contracts.config import Pool as PoolConfig
from ...contracts.data_config import GIVEN
from ...contracts.engines import ROLLOUT_ENGINES, TEACHER_ENGINES
from ...contracts.errors import ConfigError, RolloutError, ServiceError, TeacherError, VerifierError
from ...contracts.verifier_config import Verifier
from ...teacher_service.http_engine import ServerLimits
from ...teacher_service.score_cache import CachePlace
from ...teacher_service.worker import TeacherWorker
from ...verifier_service.function_verifier import load_function
from ...verifier_service.worker import VerifierWorker
from ..methods.parts.annotations import STRATEGIES, TEACHER
from ..methods.parts.composition import Composition
from .pool import Pool, parts_of
from .replica import Backend
from .self_teaching import SelfTeachingWorker
from .threads import threads_of

OWN_SERVICE, OWN_AT_ONCE = PoolConfig(num_cpus=0.1), 1
NO_CACHES: Mapping[str, CachePlace] = {}
JUDGED_AT_ONCE = 4  # calls at one replica: a shard that waits for a poison sample holds up none of the others


def stage_generators(
    config: Config, composition: Composition, backend: Backend, caches: Mapping[str, CachePlace] = NO_CACHES
) -> dict[str, Pool]:
    """Who answers prompts, by source. The student's replicas also hand out given solutions. `caches`: of teachers."""
    student, own = config.student, (config.rollout, config, backend, config.student.lora, caches)
    rollouts = start_generators("rollout", student.model, config.learner.dtype, *own)
    generators = {"student": rollouts, **dict.fromkeys(GIVEN, rollouts)}
    if "teacher" in composition.generators:
        (teacher,) = config.named_teachers.values()
        place = config.teacher_rollout
        generators["teacher"] = start_generators(
            "teacher_rollout", teacher.model, teacher.dtype, place, config, backend
        )
    return generators


def start_generators(
    name: str,
    model: str,
    dtype: str,
    pool: PoolConfig,
    config: Config,
    backend: Backend,
    lora: Lora | None = None,
    caches: Mapping[str, CachePlace] = NO_CACHES,
) -> Pool:
    """A pool of rollout workers with `model`; with `lora` they take adapters of it. The student's rollout pool scores
    too, where a teacher shares it."""
    rollout = config.rollout
    arguments: dict[str, Any] = {
        "engine": ROLLOUT_ENGINES.to_send(rollout.engine),
        "model": model,
        "dtype": dtype,
        "max_batch": rollout.batch_size,
        **_shown(config),
        "lora": lora,
        "concurrent_calls": rollout.capabilities.concurrent_calls,
        **_placement(config, rollout.capabilities.split, pool),
    }
    if rollout.capabilities.weights_while_generating:
        arguments |= {"max_running": rollout.batch_size, "in_flight": rollout.in_flight}
    shared = {key: teacher for key, teacher in config.named_teachers.items() if teacher.shared}
    if not shared or pool is not rollout:
        return Pool(name, RolloutWorker, pool, RolloutError, backend, **arguments)
    ((teacher_id, teacher),) = shared.items()
    own = {"teacher_id": teacher_id, "tokens_per_batch": teacher.tokens_per_batch}
    own |= {"cache": caches.get(teacher_id)}
    return Pool(name, SelfTeachingWorker, pool, RolloutError, backend, **arguments, **own)


def _shown(config: Config) -> dict[str, Any]:
    """What a worker is told of prompts and responses."""
    return {
        "templates": config.templates,
        "template_kwargs": config.data.chat_template_kwargs,
        "suffix": config.data.prompt_suffix,
        "thinking": config.thinking,
    }


def _placement(config: Config, split: bool, pool: PoolConfig) -> dict[str, Any]:
    """What an engine is told of its replica's CPUs and GPUs; `split`: it may split its model."""
    place: dict[str, Any] = {"device": "cuda" if pool.num_gpus else "cpu", "threads": threads_of(config, pool)}
    if not split:
        return place
    share = pool.num_gpus if 0 < pool.num_gpus < 1 else 1.0
    return place | {"tensor_parallel": parts_of(pool), "gpu_share": share}


def judges_training(config: Config, compositions: Iterable[Composition]) -> bool:
    """Whether a stage's rollouts are judged: all that a model samples, where there is a verifier. Given solutions are
    not."""
    sources = {source for composition in compositions for source in composition.generators}
    return config.verifier.kind != "none" and bool(sources - {*GIVEN})


def judges(config: Config, compositions: Iterable[Composition]) -> bool:
    """Whether anything is, in training or in an evaluation: a verifier pool is started for it, and not otherwise."""
    evaluates = bool(config.eval.path or config.eval.ood_path) and config.verifier.kind != "none"
    return evaluates or judges_training(config, compositions)


def start_verifiers(config: Config, backend: Backend) -> Pool:
    """Reward functions of one's own are loaded here and travel by value: other nodes do not have their files."""
    verifier = config.verifier
    arguments = {
        "config": verifier,
        "functions": load_functions(verifier),
        "api_key": key_of("verifier.api_key_env", verifier.api_key_env),
        "thinking": config.thinking,
    }
    return Pool(
        "verifier", VerifierWorker, verifier, VerifierError, backend, concurrent_calls=JUDGED_AT_ONCE, **arguments
    )


def load_functions(verifier: Verifier) -> dict[str, bytes]:
    """The pickled reward functions of one's own that a verifier names. Raises ConfigError."""
    kinds = [verifier.kind, *(reward.kind for reward in verifier.rewards)]
    return {kind: load_function(kind) for kind in kinds if ":" in kind}


def stage_teachers(
    config: Config,
    composition: Composition,
    rollouts: Pool,
    servers: Mapping[str, ServerLimits],
    backend: Backend,
    caches: Mapping[str, CachePlace] = NO_CACHES,
) -> dict[str, Pool]:
    """The teachers that the stage asks, and the reference model under its own name. `servers`: limits of http ones;
    `caches`: where scores are kept."""
    named = config.named_teachers if composition.scoring else {}
    hidden = composition.scoring is not None and composition.scoring.signal == "hidden"
    teachers: dict[str, Pool] = {}
    for name, teacher in named.items():
        pool_name = pool_of(name, named)
        if teacher.shared:
            teachers[name] = rollouts
        elif teacher.remote:
            own = {"limits": servers[name], "cache": caches.get(name)}
            teachers[name] = _ask_servers(name, pool_name, teacher, config, own, backend)
        else:
            own = {"hidden": hidden} if teacher.capabilities.hidden_apart else {}
            own |= {"cache": caches.get(name)}
            teachers[name] = _start_teacher(name, pool_name, teacher, config, teacher.engine, own, backend)
    if composition.reference and config.reference:
        own = {"cache": caches.get(REFERENCE)}
        teachers[REFERENCE] = _start_teacher(
            REFERENCE, REFERENCE, config.reference, config, "transformers", own, backend
        )
    return teachers


def pool_of(teacher: str, named: Collection[str]) -> str:
    """The name of a teacher's pool, one of those that are named."""
    return "teacher" if len(named) == 1 else f"teacher.{teacher}"


def own_services(config: Config, composition: Composition, backend: Backend) -> dict[str, Pool]:
    """What a method asks beside teachers, verifier and skills: the strategies, and a pool of one replica for each
    service that it brings itself."""
    workers = {own.service: own.worker for own in composition.own_annotations if own.worker}
    pools = {
        name: Pool(name, worker, OWN_SERVICE, ServiceError, backend, concurrent_calls=OWN_AT_ONCE)
        for name, worker in workers.items()
    }
    return pools | ({STRATEGIES: start_strategies(config, backend)} if STRATEGIES in composition.services else {})


def start_strategies(config: Config, backend: Backend) -> Pool:
    """Replicas of the extractor, which read the student's tokens."""
    from ...verifier_service.strategies.worker import StrategyWorker

    assert config.strategies, "the method's needs are checked"
    arguments = {
        "path": config.strategies.path,
        "tokenizer": config.student.model,
        **_placement(config, False, config.strategies),
    }
    return Pool(STRATEGIES, StrategyWorker, config.strategies, ServiceError, backend, **arguments)


def annotators(
    teachers: Mapping[str, Pool], verifiers: Pool | None, skills: Pool | None, own: Mapping[str, Pool] | None = None
) -> dict[str, dict[str, Pool]]:
    """The pools that say something about rollouts: by service, and by teacher where there may be several. `own`: of the
    method's own services."""
    services = {
        "verifier": {"": verifiers},
        "skills": {"": skills},
        REFERENCE: {"": teachers.get(REFERENCE)},
        TEACHER: {name: pool for name, pool in teachers.items() if name != REFERENCE},
        **{name: {"": pool} for name, pool in (own or {}).items()},
    }
    return {service: {name: pool for name, pool in pools.items() if pool} for service, pools in services.items()}


def _ask_servers(
    name: str, pool_name: str, teacher: Teacher, config: Config, own: dict[str, Any], backend: Backend
) -> Pool:
    arguments = {
        "engine": TEACHER_ENGINES.to_send(teacher.engine),
        "model": teacher.model,
        "tokenizer": config.student.model,
        "urls": teacher.urls,
        "requests_per_url": teacher.requests_per_url,
        "timeout_seconds": teacher.timeout_seconds,
        "api_key": key_of("teacher.api_key_env", teacher.api_key_env),
        **own,
    }
    return _teacher_pool(name, pool_name, teacher, config, arguments, backend)


def key_of(setting: str, variable: str) -> str:
    """The servers' key from the environment, never from the recipe. Raises ConfigError."""
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        rule = f"{setting} names an environment variable that holds the servers' key"
        raise ConfigError(rule, f"{variable} is not set", f"export {variable}=…")
    return key


def _start_teacher(
    name: str,
    pool_name: str,
    teacher: Teacher | Reference,
    config: Config,
    engine: str,
    own: dict[str, Any],
    backend: Backend,
) -> Pool:
    """`own`: what worker and engine take besides."""
    arguments = {
        "engine": TEACHER_ENGINES.to_send(engine),
        "model": teacher.model,
        "dtype": teacher.dtype,
        "tokens_per_batch": teacher.tokens_per_batch,
        **_placement(config, TEACHER_ENGINES.capabilities(engine).split, teacher),
        **own,
    }
    if isinstance(teacher, Teacher) and teacher.follows:  # it starts where the stage's student starts
        following = {"follows": teacher.follows, "ema_decay": teacher.ema_decay, "lora": config.student.lora}
        arguments |= {"model": config.student.model, **following}
    return _teacher_pool(name, pool_name, teacher, config, arguments, backend)


def _teacher_pool(
    name: str, pool_name: str, pool: PoolConfig, config: Config, arguments: dict[str, Any], backend: Backend
) -> Pool:
    return Pool(pool_name, TeacherWorker, pool, TeacherError, backend, teacher_id=name, **_shown(config), **arguments)


def heads(config: Config, composition: Composition) -> dict[str, tuple[str, str]]:
    """Teachers whose frozen head the exact divergence needs."""
    if composition.scoring is None or composition.scoring.signal != "hidden":
        return {}
    return {name: (teacher.model, teacher.dtype) for name, teacher in config.named_teachers.items()}
