"""Whether the chat templates do what the run needs of them: checked on real rows before any actor starts.

A template is a program of somebody else's: it may ignore the arguments it is given, end a turn with a token at which
nobody stops, or leave words out. That it shows every turn is checked where prompts are made (models/chat.py).
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta

from ..contracts.config import Config, Teacher
from ..contracts.errors import ConfigError, DataError, ModelError
from ..contracts.records import Prompt
from ..models.chat import PROBES, generation_prompt, render, shown_turns, template_of, turn_end
from ..models.contexts import PLAIN, Prompter
from ..models.loading import eos_ids, own_eos_ids
from ..models.thinking import last_of, marks_in
from .methods.parts.composition import Composition

OURS = {  # what apply_chat_template takes, and we decide
    *("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
ALWAYS_THERE = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "tools", "documents"}
ANY_WORDS = ("peer_text", "peer_answer", "feedback", "skill", "mistake", "title")
KEY = "data.chat_template_kwargs"
RULE = f"an argument of the chat template changes what it writes ({KEY})"


def check_chat(
    config: Config,
    compositions: Sequence[Composition],
    tokenizers: Mapping[str, Any],
    sets: Sequence[tuple[Sequence[Prompt], str]],
    replay: Sequence[Prompt] = (),
) -> list[str]:
    """`tokenizers`: the student's, and by their names those of teachers that run here. `sets`: the prompts and where
    they come from, those to train first; `replay`: those of `config.replay`. Returns notes for the person. Raises an
    InputError."""
    student, template_kwargs = tokenizers["student"], config.data.chat_template_kwargs
    for prompts, path in [*sets, *([(replay, config.replay.path)] if config.replay else [])]:
        if prompts:
            check_prompts(config.student.model, student, template_kwargs, prompts, path)
    train = sets[0][0]
    _check_contexts(config, compositions, tokenizers, train[0])
    generating = any("teacher" in composition.generators for composition in compositions)
    stops = eos_ids(config.student.model, student)
    notes = []
    for name, teacher in config.named_teachers.items():
        if name in tokenizers:
            both = (student, tokenizers[name])
            notes += _check_teacher_end(name, teacher, both, stops, template_kwargs, generating)
    given = [*(train if any("dataset" in composition.generators for composition in compositions) else ()), *replay]
    return notes + (_left_out(config, student, given) if given else [])


# ---- the end of a turn ----------------------------------------------------------------------------------------------


def check_template(model: str, tokenizer: Any, template_kwargs: Mapping[str, Any]) -> list[str]:
    """Something must end the model's responses. Notes where its files and its chat template differ about it. Raises
    ModelError, and ConfigError for an argument that is not the recipe's to give."""
    for key in sorted(OURS & set(template_kwargs)):
        raise ConfigError(RULE, f"{key}: the run decides it", f"remove {KEY}.{key}")
    own, stops, end = own_eos_ids(model, tokenizer), eos_ids(model, tokenizer), turn_end(tokenizer, template_kwargs)
    if not stops:
        found = f"{model}: no eos_token_id, no eos_token, and no chat template that ends a turn with a control token"
        remedy = "give eos_token_id in its generation_config.json, or eos_token in its tokenizer_config.json"
        raise ModelError("something ends a model's responses", found, remedy)
    if end is not None and end not in stops:
        found = f"{model}: with {dict(template_kwargs)} its chat template ends a turn with {_name(tokenizer, end)}"
        remedy = f"add {end} to eos_token_id in its generation_config.json"
        raise ModelError("a response stops where the chat template ends a turn", found, remedy)
    named = ", ".join(_name(tokenizer, i) for i in own)
    if end is not None and end not in own:
        said = f"its chat template ends a turn with {_name(tokenizer, end)}, its files name {named or 'no end'}"
        return [f"{model}: {said}: responses end with either, and an exported model's generation_config.json says so"]
    if end is None and template_of(tokenizer, template_kwargs):
        last = _name(tokenizer, tokenizer.eos_token_id)
        return [f"{model}: its chat template ends a turn with no control token: given responses end in {last}"]
    return []


def _check_teacher_end(
    name: str,
    teacher: Teacher,
    tokenizers: tuple[Any, Any],
    stops: Sequence[int],
    template_kwargs: Mapping[str, Any],
    generates: bool,
) -> list[str]:
    """A teacher ends its turns as the student does: `tokenizers` and `stops` are theirs. Raises ModelError where its
    own responses would train an end at which the student does not stop."""
    own, end = (turn_end(tokenizer, template_kwargs) for tokenizer in tokenizers)
    if generates:
        check_template(teacher.model, tokenizers[1], template_kwargs)
    if own is None or end is None or own == end:
        return []
    ours, theirs = _name(tokenizers[0], own), _name(tokenizers[0], end)
    if generates and end not in stops:
        remedy = f"add {end} to eos_token_id in the student's generation_config.json, or use one chat template"
        raise ModelError("a teacher that generates ends its turns as the student does", f"{theirs}; {ours}", remedy)
    return [f"{name} ends a turn with {theirs}, the student with {ours}: it may expect no end where the student ends"]


def _name(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


# ---- prompts --------------------------------------------------------------------------------------------------------


def check_prompts(
    model: str, tokenizer: Any, template_kwargs: Mapping[str, Any], prompts: Sequence[Prompt], path: str
) -> None:
    """Arguments that act, on the first row's turns, and prompts that leave the response to begin. Raises ConfigError,
    DataError."""
    turns = _turns(tokenizer, template_kwargs, prompts[0])
    _check_arguments(tokenizer, template_kwargs, turns)
    ends = {turn_end(tokenizer, template_kwargs), tokenizer.eos_token_id}
    if not template_of(tokenizer, template_kwargs) or not generation_prompt(tokenizer, turns, template_kwargs):
        ends |= set(eos_ids(model, tokenizer))  # where a template opens the response, it may name one of them
    blank: dict[int, bool] = {}
    for prompt in prompts:
        for token in prompt.token_ids[::-1].tolist():
            if token in ends:
                found = f"prompt {prompt.prompt_id} of {path} ends in {_name(tokenizer, token)}"
                remedy = f"mend the chat template of {model} (add_generation_prompt), or the end of the text"
                raise DataError("a prompt does not end as a response does", found, remedy)
            if token not in blank:
                blank[token] = not tokenizer.decode([token]).strip()
            if not blank[token]:
                break


def _turns(tokenizer: Any, template_kwargs: Mapping[str, Any], prompt: Prompt) -> list[Mapping[str, str]]:
    before = json.loads(prompt.turns) if prompt.turns else []
    return shown_turns(tokenizer, prompt.text, template_kwargs, before)


def _check_arguments(tokenizer: Any, template_kwargs: Mapping[str, Any], turns: Sequence[Mapping[str, str]]) -> None:
    """Each argument changes what some turn looks like: its value, or another that it keeps from being taken."""
    if not template_kwargs:
        return
    template = template_of(tokenizer, template_kwargs)
    read = sorted(_read(template) - ALWAYS_THERE - set(tokenizer.special_tokens_map))
    known = f"the template reads {', '.join(read)}" if read else "the template reads none"
    answered = [*turns, {"role": "assistant", "content": "<think>\n1\n</think>\n\n2"}]
    probes = [*PROBES, PROBES[0][:1], PROBES[1][:2], turns, answered, [*answered, turns[-1]]]

    def looks(arguments: Mapping[str, Any]) -> list[str]:
        return [_look(tokenizer, probe, arguments, prompt) for probe in probes for prompt in (False, True)]

    for key, value in template_kwargs.items():
        near = difflib.get_close_matches(key, read, 1)
        if not template:
            raise ConfigError(RULE, f"{key}: the tokenizer has no chat template", f"remove {KEY}.{key}")
        others = [{**template_kwargs, key: other} for other in _others(value)]
        others.append({name: given for name, given in template_kwargs.items() if name != key})
        given = looks(template_kwargs)
        if all(looks(other) == given for other in others):
            remedy = f"did you mean {near[0]}?" if near and near[0] != key else f"remove {KEY}.{key}, or give a value"
            raise ConfigError(RULE, f"{key}: {value!r} changes nothing; {known}", remedy)


def _look(tokenizer: Any, turns: Sequence[Mapping[str, str]], arguments: Mapping[str, Any], prompt: bool) -> str:
    try:
        return render(tokenizer, turns, arguments, generation_prompt=prompt)
    except ModelError as error:
        return error.found


def _others(value: Any) -> list[Any]:
    """Values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [0, value + 1]
    return {str: ["", "x"], list: [[]], dict: [{}]}.get(type(value), [True, False])


def _read(template: str) -> set[str]:
    """The variables that a template reads."""
    source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)  # transformers' own tag
    return meta.find_undeclared_variables(jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))


def _check_contexts(
    config: Config, compositions: Iterable[Composition], tokenizers: Mapping[str, Any], prompt: Prompt
) -> None:
    """Every template that the run shows, in the chat template of the model that is shown it, on one row. `tokenizers`:
    the student's, and by their names the teachers'. Raises ModelError."""
    teachers = [name for name in config.named_teachers if name in tokenizers]
    shown: dict[tuple[str, str], None] = {}
    for composition in compositions:
        if composition.scoring:
            shown |= {(composition.scoring.context, name): None for name in teachers or ["student"]}
        for ask in composition.samples(0, 0):
            names = teachers if ask.source == "teacher" else ["student"]
            shown |= {(ask.context, name): None for name in names}
    words = dict.fromkeys(ANY_WORDS, "1")
    for context, name in shown:
        if context == PLAIN:
            continue
        data = config.data
        own = (data.chat_template_kwargs, config.templates, data.prompt_suffix, config.thinking)
        try:
            Prompter(tokenizers[name], *own, checked=True).ids(context, prompt, **words)
        except ModelError as error:
            raise ModelError(error.rule, f"{context}, shown to the {name}: {error.found}", error.remedy) from error


def _left_out(config: Config, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """That solutions lose their reasoning, where the generation prompt says that there is none."""
    template_kwargs = config.data.chat_template_kwargs
    template = template_of(tokenizer, template_kwargs)
    pairs = marks_in(template, config.thinking)
    if not template:
        return []
    written = generation_prompt(tokenizer, _turns(tokenizer, template_kwargs, prompts[0]), template_kwargs)
    marks, opened = last_of(written, pairs)
    lost = sum(any(mark in prompt.solution for pair in pairs for mark in pair) for prompt in prompts)
    if not marks or opened or not lost:
        return []
    return [f"{lost:,} solutions are taken without their reasoning: the generation prompt closes it with {marks[1]}"]
