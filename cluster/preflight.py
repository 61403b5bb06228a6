"""What can be checked before any actor starts: models, tokenizers, data, contexts, teachers' names, resources."""

from dataclasses import dataclass
from typing import Any

from ..contracts.config import Config, Pool, Teacher
from ..contracts.errors import ConfigError, DataError, ModelError, TokenizerMismatch
from ..contracts.records import Prompt, ScoreRequest
from ..models.loading import check_weights, load_config, load_tokenizer, tokenizer_hash
from .data import check_context, load_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that the run reads, checked."""

    train: list[Prompt]
    in_distribution: list[Prompt]
    out_of_distribution: list[Prompt]


def check_inputs(config: Config, scoring: ScoreRequest) -> Inputs:
    """Load tokenizers and data and check that they and what teachers are asked fit together. Raises an InputError."""
    tokenizer = load_tokenizer(config.student.model)
    for model in {config.student.model, *(teacher.model for teacher in config.named_teachers.values())}:
        check_weights(model)
    contexts = {"student": context_length(config.student.model)}
    for name, teacher in config.named_teachers.items():
        _check_same_tokenizer(config.student.model, tokenizer, name, teacher.model)
        _check_vocabularies(config.student.model, name, teacher, scoring)
        contexts[f"teacher {name}"] = context_length(teacher.model)

    data, evaluation = config.data, config.eval
    train = load_prompts(data, data.path, data.split, tokenizer)
    held_out = [
        load_prompts(data, path, evaluation.split, tokenizer, evaluation.problems) if path else []
        for path in (evaluation.path, evaluation.ood_path)
    ]
    for who, context in contexts.items():
        check_context(train, config.rollout.max_new_tokens, context, data.path, who)
        for prompts, path in zip(held_out, (evaluation.path, evaluation.ood_path), strict=True):
            if prompts:
                check_context(prompts, evaluation.max_new_tokens or config.rollout.max_new_tokens, context, path, who)
    _check_teacher_names(config, train)
    return Inputs(train=train, in_distribution=held_out[0], out_of_distribution=held_out[1])


def context_length(model: str) -> int:
    """Most positions the model takes; very many where its configuration does not say."""
    return int(getattr(load_config(model), "max_position_embeddings", 0) or 1 << 30)


def _check_same_tokenizer(student: str, tokenizer: Any, name: str, teacher: str) -> None:
    other = load_tokenizer(teacher)
    ours, theirs = tokenizer_hash(tokenizer), tokenizer_hash(other)
    if ours != theirs:
        found = f"student {student}: {len(tokenizer)} tokens, hash {ours[:8]}; "
        found += f"teacher {name} {teacher}: {len(other)} tokens, hash {theirs[:8]}"
        remedy = "use models of one tokenizer family: a teacher scores the student's exact token ids"
        raise TokenizerMismatch("student and teacher share one tokenizer", found, remedy)


def _check_vocabularies(student: str, name: str, teacher: Teacher, scoring: ScoreRequest) -> None:
    """Models of one tokenizer may still pad their vocabulary to different sizes; a divergence needs one size."""
    ours, theirs = (int(load_config(model).vocab_size) for model in (student, teacher.model))
    if teacher.signal != "sampled" and ours != theirs:
        rule = f"student and teacher have one vocabulary size where teacher.signal is {teacher.signal}"
        raise ModelError(rule, f"student {ours}, teacher {name} {theirs}", "use teacher.signal=sampled")
    if scoring.top_k > theirs:
        rule = "method_options.top_k is at most the vocabulary size"
        raise ConfigError(rule, f"{scoring.top_k}; teacher {name} has {theirs}")


def _check_teacher_names(config: Config, prompts: list[Prompt]) -> None:
    names = config.named_teachers
    for prompt in prompts:
        if prompt.teacher and prompt.teacher not in names:
            found = f"row {prompt.prompt_id} names {prompt.teacher!r}; the recipe has {', '.join(names)}"
            raise DataError("a row's `teacher` is one of the recipe's", found)
        if not prompt.teacher and len(names) > 1:
            rule = "with several teachers every row says in `teacher` which to ask"
            raise ConfigError(
                rule, f"row {prompt.prompt_id} of {config.data.path} does not", "or configure one teacher"
            )


def teacher_names(config: Config, prompts: list[Prompt]) -> list[str]:
    """The teacher of each row."""
    only = next(iter(config.named_teachers))
    return [prompt.teacher or only for prompt in prompts]


def resources_needed(config: Config) -> dict[str, float]:
    """Sum of what the pools and the learner take, by Ray's names."""
    pools: list[Pool] = [config.rollout, config.verifier, *config.named_teachers.values()]
    learner = config.learner
    return {
        "CPU": sum(p.replicas * p.num_cpus for p in pools) + learner.ranks * learner.num_cpus,
        "GPU": sum(p.replicas * p.num_gpus for p in pools) + learner.ranks * learner.num_gpus,
    }
