"""What can be checked before any actor starts: models, tokenizers, data, contexts, teachers' names, resources."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..contracts.config import REFERENCE, Config, Pool, Teacher
from ..contracts.engines import ROLLOUT_ENGINES, TEACHER_ENGINES
from ..contracts.errors import ConfigError, DataError, ModelError, TeacherError, TokenizerMismatch
from ..contracts.records import Prompt
from ..models.checkpoint import check_weights
from ..models.contexts import fields_of
from ..models.loading import (
    check_architecture,
    context_length,
    load_config,
    load_tokenizer,
    tokenizer_hash,
    varying_frequencies,
)
from ..models.lora import check_targets
from ..teacher_service.http_engine import ServerLimits
from .chat_checks import check_chat, check_template
from .data import eval_data, fitting, load_prompts, load_replay
from .learner_group import need_of_learner
from .methods.parts.annotations import STRATEGIES
from .methods.parts.composition import Composition
from .pools.autoscaler import budget_of, scaled_pools
from .pools.pool import need_of
from .pools.room import SLACK, Need
from .pools.services import OWN_SERVICE, judges, judges_training, key_of, load_functions, pool_of
from .skill_bank import check_skills
from .strategies import check_strategies

SHOWN = {  # fields of templates that rows must have
    "answer": "data.answer_field",
    "solution": "data.solution_field",
    "strategy": "data.strategy_field",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that the run reads, checked."""

    train: list[Prompt]
    in_distribution: list[Prompt]
    out_of_distribution: list[Prompt]
    replay: list[Prompt]
    servers: dict[str, ServerLimits]  # of teachers behind http, by their names
    left_out: dict[str, int]  # rows by why: too_long of training, too_long_eval of evaluation, too_long_replay
    longest: int  # tokens of the longest prompt with its longest response, evaluations included
    notes: tuple[str, ...]  # what a person should know of them


def check_inputs(config: Config, compositions: Sequence[Composition]) -> Inputs:
    """Load tokenizers and data and check that they and what the stages ask fit together. Raises an InputError."""
    evaluation, verified = config.eval, config.verifier.kind != "none"
    if (evaluation.path or evaluation.ood_path) and not verified:
        raise ConfigError("an evaluation needs a verifier", "verifier.kind=none", "set eval.path= or choose a verifier")
    _check_autoscale(config, compositions)
    local = {name: teacher for name, teacher in config.named_teachers.items() if not teacher.remote}
    scorers = {name: teacher.model for name, teacher in local.items()}
    if config.reference:
        scorers[REFERENCE] = config.reference.model
    for model in {config.student.model, *scorers.values()}:
        check_architecture(model)
        check_weights(model)
    tokenizer = load_tokenizer(config.student.model)
    notes = check_template(config.student.model, tokenizer, config.data.chat_template_kwargs)
    _check_models(config)
    load_functions(config.verifier)
    if config.skills:
        check_skills(config.skills)
    if config.student.lora:
        check_targets(config.student.model, config.student.lora)
    contexts, tokenizers = dict([context_of("student", config.student.model)]), {"student": tokenizer}
    for name, model in scorers.items():
        tokenizers[name] = _check_same_tokenizer(config.student.model, tokenizer, name, model)
        room = local[name].capabilities.extra_tokens if name in local else 0
        who, context = context_of(f"teacher {name}", model)
        contexts[who] = context - room
    servers = {name: _probe(t, tokenizer, compositions) for name, t in config.named_teachers.items() if t.remote}
    contexts |= {f"teacher {name}": limits.context for name, limits in servers.items()}
    for name, teacher in local.items():
        _check_vocabularies(config.student.model, name, teacher, compositions)
        if teacher.follows and teacher.dtype != config.learner.dtype:
            found = f"{name}: {teacher.dtype}; learner: {config.learner.dtype}"
            raise ConfigError("a teacher that follows the student has the learner's dtype", found, "set both alike")

    (train, replay, *held_out), left_out = _fitting_rows(config, compositions, tokenizer, contexts)
    longest = longest_of([*train, *replay], config.rollout.max_new_tokens)
    for prompts in filter(None, held_out):
        longest = max(longest, longest_of(prompts, evaluation.max_new_tokens or config.rollout.max_new_tokens))
    _check_shown(config, compositions, train)
    sets = [(train, config.data.path), (held_out[0], evaluation.path), (held_out[1], evaluation.ood_path)]
    notes += check_chat(config, compositions, tokenizers, sets, replay)
    notes += _said_of_replay(config, replay)
    if config.strategies:
        notes.append(check_strategies(config, train))
    train = _with_teachers(config, compositions, train)
    return Inputs(
        train=train,
        in_distribution=held_out[0],
        out_of_distribution=held_out[1],
        replay=replay,
        servers=servers,
        left_out=left_out,
        longest=longest,
        notes=tuple(notes),
    )


def _fitting_rows(
    config: Config, compositions: Sequence[Composition], tokenizer: Any, contexts: Mapping[str, int]
) -> tuple[list[list[Prompt]], dict[str, int]]:
    """The rows of training, of the replay (which the student alone reads) and of both evaluations that fit every
    context, and how many were left out, by why."""
    data, evaluation, responses = config.data, config.eval, config.rollout.max_new_tokens
    needs: dict[str, Any] = {
        "need_answer": config.verifier.needs_gold,
        "keep_rows": config.verifier.reads_rows,
        "thinking": config.thinking,
    }
    own: dict[str, Any] = {**needs, "need_answer": config.verifier.needs_gold and judges_training(config, compositions)}
    loaded = [load_prompts(data, data.path, data.split, tokenizer, **own)]
    fitted = [fitting(loaded[0], responses, contexts, data.path, data)]
    loaded.append(load_replay(config.replay, data, tokenizer, config.thinking) if config.replay else [])
    student = dict(islice(contexts.items(), 1))
    fitted.append(fitting(loaded[1], responses, student, config.replay.path, data) if config.replay else [])
    held_out, answers = eval_data(data, evaluation), evaluation.max_new_tokens or responses
    for path in (evaluation.path, evaluation.ood_path):
        rows = load_prompts(held_out, path, evaluation.split, tokenizer, evaluation.problems, **needs) if path else []
        loaded.append(rows)
        fitted.append(fitting(rows, answers, contexts, path, data) if rows else [])
    gone = [len(rows) - len(kept) for rows, kept in zip(loaded, fitted, strict=True)]
    left_out = {"too_long": gone[0], "too_long_replay": gone[1], "too_long_eval": sum(gone[2:])}
    return fitted, {reason: count for reason, count in left_out.items() if count}


def _said_of_replay(config: Config, rows: Sequence[Prompt]) -> list[str]:
    """What a person should know of it."""
    if not (own := config.replay):
        return []
    return [f"replay: {own.path}: {len(rows):,} rows, {own.rows_per_step} in each step, of weight {own.weight:g}"]


def _check_models(config: Config) -> None:
    """Every engine can run the models that it will be given, as far as it can tell. Raises InputError."""
    rollout, local = config.rollout, [teacher for teacher in config.named_teachers.values() if not teacher.remote]
    for teacher in local:
        TEACHER_ENGINES.check_model(teacher.engine, teacher.model, teacher.tensor_parallel)
    generating = [(config.student.model, rollout.tensor_parallel)]
    if config.eval.path or config.eval.ood_path:  # teachers are evaluated by the engine that generates
        generating += [(teacher.model, teacher.tensor_parallel) for teacher in local]
    for model, parts in dict.fromkeys(generating):
        ROLLOUT_ENGINES.check_model(rollout.engine, model, parts)


def _check_autoscale(config: Config, compositions: Sequence[Composition]) -> None:
    """The budget holds what the pools begin with. Raises ConfigError."""
    needs = [need for need in needs_of(config, compositions) if need.pool in scaled_pools(config)]
    for resource, budget in budget_of(config.autoscale).items():
        key, taking = f"autoscale.{resource.lower()}s", [need for need in needs if need.each.get(resource)]
        if not taking:
            found = f"{key}={budget:g}; none of {', '.join(need.pool for need in needs)} takes a {resource}"
            remedy = "give the budget in what the pools take"
            raise ConfigError("autoscale bounds what its pools take", found, remedy)
        if (total := sum(need.replicas * need.each[resource] for need in taking)) > budget + SLACK:
            parts = " + ".join(f"{need.pool} {need.replicas} × {need.each[resource]:g}" for need in taking)
            remedy = f"raise it, or lower replicas or num_{resource.lower()}s"
            rule = "autoscale's budget holds the replicas that its pools begin with"
            raise ConfigError(rule, f"{parts} = {total:g} {resource}; {key}={budget:g}", remedy)


def _probe(teacher: Teacher, tokenizer: Any, compositions: Iterable[Composition]) -> ServerLimits:
    """What the teacher's servers can do; they must be able to do what the stages ask."""
    try:
        limits = TEACHER_ENGINES.class_of(teacher.engine).probe(
            teacher.model,
            teacher.urls,
            teacher.timeout_seconds,
            key_of("teacher.api_key_env", teacher.api_key_env),
            tokenizer,
        )
    except TeacherError as error:  # before the run it is the recipe's fault, and not the machine's
        raise ConfigError(error.rule, error.found, error.remedy) from error
    for scoring in (composition.scoring for composition in compositions if composition.scoring):
        if scoring.top_k > limits.largest_k:
            rule = "method_options.top_k is at most the largest K that the teacher's servers return"
            raise ConfigError(rule, f"{scoring.top_k}; {limits.largest_k}", "lower it, or raise their --max-logprobs")
    return limits


def _check_shown(config: Config, compositions: Iterable[Composition], prompts: Sequence[Prompt]) -> None:
    """Every row has what the templates and the learner are shown of it."""
    needed: set[str] = set()
    for composition in compositions:
        scoring = composition.scoring
        contexts = [scoring.context] if scoring else []
        contexts += [ask.context for ask in composition.samples(0, 0)]
        for context in contexts:
            needed |= fields_of(context, config.templates) & SHOWN.keys()
        if "dataset" in composition.generators:
            needed.add("solution")
    for field in sorted(needed):
        for prompt in prompts:
            if not getattr(prompt, field).strip():
                found = f"row {prompt.prompt_id} of {config.data.path} has none"
                raise DataError(f"the method shows each row's {field}", found, f"name its field with {SHOWN[field]}=…")


def context_of(who: str, model: str) -> tuple[str, int]:
    """`who`, with what else bounds its context than its positions, and the context in tokens."""
    config = load_config(model)
    varying = varying_frequencies(config)
    why = f" (rope_type={varying[0]}: beyond it, frequencies would depend on the batch)" if varying else ""
    return who + why, context_length(config)


def longest_of(prompts: Sequence[Prompt], new_tokens: int) -> int:
    """Tokens of the longest prompt with the longest response."""
    return max(len(prompt.token_ids) for prompt in prompts) + new_tokens


def _check_same_tokenizer(student: str, tokenizer: Any, name: str, teacher: str) -> Any:
    """The teacher's own, which may have another chat template."""
    other = load_tokenizer(teacher)
    ours, theirs = tokenizer_hash(tokenizer), tokenizer_hash(other)
    if ours != theirs:
        found = f"student {student}: {len(tokenizer)} tokens, hash {ours[:8]}; "
        found += f"teacher {name} {teacher}: {len(other)} tokens, hash {theirs[:8]}"
        remedy = "use models of one tokenizer family: a teacher scores the student's exact token ids"
        raise TokenizerMismatch("student and teacher share one tokenizer", found, remedy)
    return other


def _check_vocabularies(student: str, name: str, teacher: Teacher, compositions: Iterable[Composition]) -> None:
    """Models of one tokenizer may still pad their vocabulary to different sizes; a divergence needs one size."""
    ours, theirs = (int(load_config(model).vocab_size) for model in (student, teacher.model))
    for scoring in (composition.scoring for composition in compositions if composition.scoring):
        if scoring.signal != "sampled" and ours != theirs:
            rule = f"student and teacher have one vocabulary size where teacher.signal is {teacher.signal}"
            raise ModelError(rule, f"student {ours}, teacher {name} {theirs}", "use teacher.signal=sampled")
        if scoring.top_k > theirs:
            rule = "method_options.top_k is at most the vocabulary size"
            raise ConfigError(rule, f"{scoring.top_k}; teacher {name} has {theirs}")


def _with_teachers(config: Config, compositions: Iterable[Composition], prompts: list[Prompt]) -> list[Prompt]:
    """Each row with the name of the teacher that it asks: its own, or the only one. Raises DataError, ConfigError."""
    names = list(config.named_teachers)
    if not names:
        return prompts
    routed = any(c.scoring and not c.scoring.everyone for c in compositions)
    for prompt in prompts:
        if prompt.teacher and prompt.teacher not in names:
            found = f"row {prompt.prompt_id} names {prompt.teacher!r}; the recipe has {', '.join(names)}"
            raise DataError("a row's `teacher` is one of the recipe's", found)
        if not prompt.teacher and len(names) > 1 and routed:
            found = f"row {prompt.prompt_id} of {config.data.path} does not"
            remedy = "or configure one teacher, or let all score each rollout (method_options.teachers=combined)"
            raise ConfigError("with several teachers every row says in `teacher` which to ask", found, remedy)
    return [replace(prompt, teacher=prompt.teacher or names[0]) for prompt in prompts]


def needs_of(config: Config, compositions: Sequence[Composition]) -> list[Need]:
    """What the pools and the learner ask the cluster for."""
    teachers = {name: teacher for name, teacher in config.named_teachers.items() if not teacher.shared}
    names = {name: pool_of(name, config.named_teachers) for name in teachers}
    pools: dict[str, Pool | None] = {"rollout": config.rollout}
    pools |= {names[name]: teacher for name, teacher in teachers.items()}
    pools |= {REFERENCE: config.reference, "verifier": config.verifier if judges(config, compositions) else None}
    if any("teacher" in composition.generators for composition in compositions):
        pools["teacher_rollout"] = config.teacher_rollout
    needs = [need_of(name, pool) for name, pool in pools.items() if pool]
    own = {one.service for composition in compositions for one in composition.own_annotations if one.worker}
    needs += [need_of(service, OWN_SERVICE) for service in sorted(own)]
    if config.skills:
        needs.append(need_of("skills", config.skills, on_driver_node=True))
    if config.strategies:
        needs.append(need_of(STRATEGIES, config.strategies))
    return [*needs, need_of_learner(config)]
