"""From the words of a dataset to token ids: turns in the model's chat template, and where a turn ends.

Words of a dataset or of a model stay words: no name of a special token in them, and no mark that the chat template
itself writes (`<|im_start|>`), becomes that token. Other added tokens (`kg`) are words like any other. What the recipe
says in its own name, data.prompt_suffix and templates, is left as it is, and so is all of a prompt without a chat
template. A given solution keeps its reasoning between the template's own marks, in one block.

Shapes: P prompt tokens, R response tokens.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..contracts.errors import ModelError
from ..contracts.sections import THINKING
from .thinking import Marks, last_of, marks_in, split

Turns = Sequence[Mapping[str, str]]

NONE: Mapping[str, Any] = {}
MARK = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[/?[A-Z][A-Z_]+\]")  # <|im_start|>, <s>, <<SYS>>, [INST]
WORD = "aleph4711"  # stands for any text where only the template's own words matter
PROBES: tuple[Turns, ...] = (
    [{"role": "user", "content": WORD}, {"role": "assistant", "content": WORD}],
    [{"role": role, "content": WORD} for role in ("system", "user", "assistant")],
)


# ---- the chat template ----------------------------------------------------------------------------------------------


def template_of(tokenizer: Any, template_kwargs: Mapping[str, Any] = NONE) -> str:
    """The chat template's source; "" where the tokenizer has none. Raises ModelError where it cannot be told which."""
    named = getattr(tokenizer, "chat_template", None)
    if not named:
        return ""
    wanted = template_kwargs.get("chat_template")
    if isinstance(named, dict) and not (wanted in named or "{" in wanted if wanted else "default" in named):
        remedy = f"choose one, e.g. data.chat_template_kwargs.chat_template={min(named)}, or call one of them default"
        found = f"{tokenizer.name_or_path}: {', '.join(sorted(named))}"
        raise ModelError("of several chat templates one is the default", found, remedy)
    return tokenizer.get_chat_template(wanted, template_kwargs.get("tools"))


def render(tokenizer: Any, turns: Turns, template_kwargs: Mapping[str, Any], *, generation_prompt: bool) -> str:
    """Turns as the chat template writes them. Raises ModelError with what the template raised."""
    template_of(tokenizer, template_kwargs)
    try:
        return tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=generation_prompt, **template_kwargs
        )
    except Exception as error:  # a template is a program: it raises what it likes
        roles = ", ".join(turn["role"] for turn in turns)
        found = f"{type(error).__name__}: {error} (turns: {roles}; {tokenizer.name_or_path})"
        remedy = "give turns and data.chat_template_kwargs that it takes, or mend the template"
        raise ModelError("a model's chat template takes the turns that it is given", found, remedy) from error


def generation_prompt(tokenizer: Any, turns: Turns, template_kwargs: Mapping[str, Any]) -> str:
    """What the template writes after the turns to begin a response."""
    with_it, without = (render(tokenizer, turns, template_kwargs, generation_prompt=asked) for asked in (True, False))
    return with_it[len(os.path.commonprefix([with_it, without])) :]  # noqa: RUF071 (of strings)


def check_shown(tokenizer: Any, turns: Turns, template_kwargs: Mapping[str, Any], rendered: str) -> None:
    """Raises ModelError for a turn whose words the template left out. What it does to spaces is its own affair."""
    pairs = marks_in(template_of(tokenizer, template_kwargs))
    words = [turn["content"].strip() for turn in turns]
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and words[i] not in rendered:  # templates leave reasoning out
            words[i] = split(words[i], pairs)[2].strip()
    for turn, text in zip(turns, words, strict=True):
        if not text or rendered.count(text) >= sum(other.count(text) for other in words):
            continue
        if "".join(text.split()) in "".join(rendered.split()) and text not in rendered:
            continue
        found = f"the {turn['role']} turn {text[:60]!r} is not in {rendered[-200:]!r}"
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            taken = text in render(tokenizer, parts, template_kwargs, generation_prompt=True)  # pyright: ignore
        except ModelError:
            taken = False
        if taken:
            found, remedy = f"{found}: it wants content parts, a list of {{type, text}}", "use one for plain text"
        else:
            remedy = "use a template that shows such turns, or data without them"
        raise ModelError("a chat template shows every turn", found, remedy)


# ---- words that stay words ------------------------------------------------------------------------------------------


def inert(
    tokenizer: Any, text: str, template_kwargs: Mapping[str, Any] = NONE, *, suffix: str = "", keep: Sequence[str] = ()
) -> str:
    """`text` in which no control token's name is whole: such a name gets a space after its first character.

    Names within the `suffix` at its end stay, and so do those of `keep`. The tokenizer's own `split_special_tokens`
    would do it only for text that is tokenised apart from its template, and then other merges form at the border than
    the model was trained with.
    """
    names = _pattern(control_names(tokenizer, template_of(tokenizer, template_kwargs)) - frozenset(keep))
    while names:
        own = len(text) - len(suffix) if text.endswith(suffix) else len(text)
        broken = names.sub(lambda match: match[0] if match.start() >= own else f"{match[0][0]} {match[0][1:]}", text)  # noqa: B023
        if broken == text:
            break
        text = broken
    return text


@lru_cache(maxsize=32)
def _pattern(names: frozenset[str]) -> re.Pattern[str] | None:
    ordered = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


@lru_cache(maxsize=32)
def control_names(tokenizer: Any, template: str) -> frozenset[str]:
    """The special tokens' names, and the marks that the template writes: those that are added tokens, wherever its
    source has them, and others that stand around a turn. Not runs of spaces, which some tokenizers add."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added if token.special)}
    written = _written(tokenizer, template) if template else ""
    marks = {token.content for token in added if MARK.fullmatch(token.content) and token.content in template + written}
    names = {str(name) for name in special | marks} | set(MARK.findall(written))
    return frozenset(name for name in names if len(name.strip()) > 1)


def _written(tokenizer: Any, template: str) -> str:
    """What the template writes around turns of no meaning; "" where it takes none of them."""
    found = []
    for turns in PROBES:
        for prompt in (False, True):
            try:
                texts = {"chat_template": template}
                found.append(render(tokenizer, turns[: -1 if prompt else None], texts, generation_prompt=prompt))
            except ModelError:
                continue
    return "".join(found)


def special_ids(tokenizer: Any, thinking: Marks = THINKING) -> np.ndarray:
    """Ids int32 of what says nothing of the reasoning: special tokens, its marks, `<|…|>`, runs of 1-8 newlines.

    Source: the masks of SGSD's code, 2605.28791.
    """
    marks = re.compile(rf"</?think>|<\|.*\|>|{'|'.join(map(re.escape, thinking))}", re.DOTALL)
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    named = [i for i, token in added if token.special or marks.fullmatch(token.content)]
    lines = [tokenizer("\n" * count, add_special_tokens=False)["input_ids"] for count in range(1, 9)]
    runs = [ids[0] for ids in lines if len(ids) == 1]
    return np.unique(np.asarray([*tokenizer.all_special_ids, *named, *runs], np.int32))


# ---- token ids ------------------------------------------------------------------------------------------------------


def tokenize_prompt(
    tokenizer: Any, text: str, template_kwargs: Mapping[str, Any], turns: Turns = (), *, suffix: str = ""
) -> np.ndarray:
    """Token ids int32 `[P]` of the user turn `text`, after the `turns` before it, with the generation prompt.

    `suffix`: the recipe's own words at the end of `text`. Without a chat template, of the bare text, whose control
    tokens are meant; what the tokenizer itself would put after it (an EOS) is left out. Raises ModelError.
    """
    return prompt_ids(tokenizer, shown_turns(tokenizer, text, template_kwargs, turns, suffix), template_kwargs)


def shown_turns(
    tokenizer: Any, text: str, template_kwargs: Mapping[str, Any], turns: Turns = (), suffix: str = ""
) -> list[Mapping[str, str]]:
    """The turns that a prompt shows, inert. An assistant's reasoning keeps its marks: the template reads them."""
    template = template_of(tokenizer, template_kwargs)
    if not template:
        return [*turns, {"role": "user", "content": text}]
    named = "".join(sorted(control_names(tokenizer, template)))
    marks = [mark for pair in marks_in(template + named) for mark in pair]

    def words(turn: Mapping[str, str]) -> str:
        keep = marks if turn["role"] == "assistant" else ()
        return inert(tokenizer, turn["content"], template_kwargs, keep=keep)

    before = [{"role": inert(tokenizer, turn["role"], template_kwargs), "content": words(turn)} for turn in turns]
    return [*before, {"role": "user", "content": inert(tokenizer, text, template_kwargs, suffix=suffix)}]


def prompt_ids(tokenizer: Any, turns: Turns, template_kwargs: Mapping[str, Any], *, checked: bool = True) -> np.ndarray:
    """Token ids int32 `[P]` of inert turns with the generation prompt; `checked`: all of them must be shown."""
    if template_of(tokenizer, template_kwargs):
        rendered = render(tokenizer, turns, template_kwargs, generation_prompt=True)
        if checked:
            check_shown(tokenizer, turns, template_kwargs, rendered)
        return np.asarray(tokenizer(rendered, add_special_tokens=False)["input_ids"], np.int32)
    if len(turns) > 1:
        found, remedy = f"{len(turns)} turns, and the tokenizer has no chat template", "use a model that has one"
        raise ModelError("several turns need a chat template", found, remedy)
    text = turns[0]["content"]
    ids, bare = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next((at for at in range(len(ids)) if bare and ids[at : at + len(bare)] == bare), None)
    return np.asarray(ids if start is None else ids[: start + len(bare)], np.int32)


def tokenize_response(
    tokenizer: Any,
    text: str,
    solution: str,
    template_kwargs: Mapping[str, Any],
    turns: Turns = (),
    *,
    suffix: str = "",
    thinking: Marks = THINKING,
) -> np.ndarray:
    """Token ids int32 `[R]` of a given response as the model would have written it after the prompt's ids.

    Its reasoning stands in one block: what the generation prompt has opened is not opened again, and where it has
    closed the block (enable_thinking: false) the reasoning is left out. It ends as the chat template ends a turn, or
    with EOS where the template writes no control token there. Raises ModelError.
    """
    end = turn_end(tokenizer, template_kwargs, thinking)
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        found, remedy = "no eos_token, and the chat template ends no turn", "give eos_token in tokenizer_config.json"
        raise ModelError("a response ends in a token", found, remedy)
    pairs = marks_in(template_of(tokenizer, template_kwargs), thinking)
    marks, reasoning, answer = split(solution, pairs)
    reasoning, answer = (inert(tokenizer, part, template_kwargs) for part in (reasoning, answer))
    shown = shown_turns(tokenizer, text, template_kwargs, turns, suffix)
    body = _response(tokenizer, shown, template_kwargs, pairs, (marks, reasoning, answer))
    ids: list[int] = tokenizer(body, add_special_tokens=False)["input_ids"]
    return np.asarray(ids[: ids.index(end) + 1] if end in ids else [*ids, end], np.int32)


def _response(
    tokenizer: Any,
    turns: list[Mapping[str, str]],
    template_kwargs: Mapping[str, Any],
    pairs: Sequence[Marks],
    solution: tuple[Marks | None, str, str],
) -> str:
    """What follows the generation prompt: as the template writes it, if that is right, and else put together here."""
    marks, reasoning, answer = solution
    block = f"{marks[0]}{reasoning}{marks[1]}" if marks else ""
    if not template_of(tokenizer, template_kwargs):
        return block + answer
    before = render(tokenizer, turns, template_kwargs, generation_prompt=True)
    asked, opened = last_of(generation_prompt(tokenizer, turns, template_kwargs), pairs)
    if asked and not opened:
        block, reasoning, answer = "", "", answer.lstrip("\n") if block else answer
    elif asked:
        reasoning, answer = (reasoning, answer) if block else ("\n\n", f"\n\n{answer}")
        block = f"{asked[0]}{reasoning}{asked[1]}"
    whole = render(
        tokenizer, [*turns, {"role": "assistant", "content": block + answer}], template_kwargs, generation_prompt=False
    )
    rest = whole.removeprefix(before)
    if whole.startswith(before) and answer.strip() in rest:
        pair = asked if opened else marks
        if not block or (
            pair
            and rest.count(pair[0]) == (not opened)
            and rest.count(pair[1]) == 1
            and reasoning.strip() in rest.partition(pair[1])[0]
        ):
            return rest
    if asked and opened:
        block = block.removeprefix(asked[0])
        block = block.lstrip("\n") if before.endswith("\n") else block
    return block + answer


# ---- where a turn ends ----------------------------------------------------------------------------------------------


def turn_end(tokenizer: Any, template_kwargs: Mapping[str, Any] = NONE, thinking: Marks = THINKING) -> int | None:
    """The id of the first control token that the chat template writes after an assistant's words; None without one."""
    if not template_of(tokenizer, template_kwargs):
        return None
    names = control_names(tokenizer, template_of(tokenizer, template_kwargs))
    marks = {mark for pair in marks_in(template_of(tokenizer, template_kwargs), thinking) for mark in pair}
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True)
    control = {i for i, name in [*special, *((i, token.content) for i, token in added)] if name in names - marks}
    for turns in PROBES:
        try:
            whole = render(tokenizer, turns, template_kwargs, generation_prompt=False)
        except ModelError:
            continue
        after = tokenizer(whole.rpartition(WORD)[2], add_special_tokens=False)["input_ids"]
        return next((i for i in after if i in control), None)
    return None
