"""Prompts: a user's turn in the model's chat template, and the named, versioned templates of what a model is shown.

A context is a template's name, e.g. `answer@1`; "plain" is the problem alone, whose ids the prompt already has. Whoever
generates or scores in a context builds its prompt here, so that both read the same ids. A new wording is a new version:
a run's records name what its models really saw. The templates' wording is ours; METHODS.md says what each paper shows.

What is filled in was written by a dataset or sampled by a model, and stays text: braces in it are not filled again, and
the name of a control token in it does not become that token.

Shapes: P prompt tokens, R response tokens.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..contracts.errors import ConfigError
from ..contracts.records import Prompt

PLAIN = "plain"
THINKING = ("<think>", "</think>")
SOLVE = "Now solve the original problem correctly."
PEER = "\n\nA correct solution:\n\n{peer}"
FEEDBACK = "\n\nFeedback on your own earlier attempt:\n\n{feedback}"

# A part in [[double brackets]] is left out where a field of it is empty; of such parts at least one must be filled.
TEMPLATES: dict[str, str] = {
    "answer@1": "{problem}\nAnswer: {answer}",  # the lab's models were trained with it
    "solution@1": (  # OPSD, 2601.18734: the reference solution, then a transition
        "{problem}\n\nHere is a reference solution:\n\n{solution}\n\n"
        "Understand this solution, then solve the problem yourself, step by step and in your own words."
    ),
    "demonstration@1": (  # SDFT, 2601.19897: a golden demonstration
        "{problem}\n\nThis is an example of a good response to it:\n\n{solution}\n\n"
        "Now answer with a response of your own."
    ),
    "peer@1": f"{{problem}}{PEER}\n\n{SOLVE}",  # SDPO, 2601.20802
    "feedback@1": f"{{problem}}{FEEDBACK}\n\n{SOLVE}",  # SDPO
    "skills@1": (  # SGSD, 2605.28791: its headings; the sentence after them is ours
        "### General Principles\n{skill}\n\n[[### Mistakes to Avoid\n{mistake}\n\n]]"
        "Use what of this applies to the following problem.\n\nProblem: {problem}"
    ),
    "hint@1": "Hint: {title}\n{problem}",  # the lab's models were trained with it
    "peer_feedback@1": f"{{problem}}[[{PEER}]][[{FEEDBACK}]]\n\n{SOLVE}",  # SDPO: whichever of the two there is
}
FIELDS = ("problem", "answer", "solution", "peer", "peer_answer", "feedback", "skill", "mistake", "title")

NAME = re.compile(r"[\w.-]+@[\w.-]+")
MARK = re.compile(r"</?think>|<\|.*\|>", re.DOTALL)
FIELD = re.compile(r"\{(\w+)\}")
OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def check_templates(own: Mapping[str, str]) -> None:
    """Raises ConfigError for a template of one's own with a wrong name, an unknown field, or no `{problem}`."""
    for name, template in own.items():
        if not NAME.fullmatch(name):
            raise ConfigError("a template is called NAME@VERSION", f"templates.{name}", f"e.g. {name.strip('@')}@1")
        if name in TEMPLATES:
            raise ConfigError("a template's name is not one of ours", f"templates.{name}", "give it another version")
        unknown = sorted(set(FIELD.findall(template)) - set(FIELDS))
        if unknown:
            found = f"templates.{name} has {', '.join(f'{{{field}}}' for field in unknown)}"
            raise ConfigError("a template's fields are known", found, f"known: {', '.join(FIELDS)}")
        if "{problem}" not in OPTIONAL.sub("", template):
            raise ConfigError("a template shows the problem", f"templates.{name}: {template!r}", "write {problem}")


def fields_of(context: str, own: Mapping[str, str]) -> frozenset[str]:
    """The fields that a context's template names; of "plain", none. Raises ConfigError where it is unknown."""
    return frozenset() if context == PLAIN else frozenset(FIELD.findall(_template(context, own)))


def _template(context: str, own: Mapping[str, str]) -> str:
    known = TEMPLATES | dict(own)
    if context not in known:
        raise ConfigError("a context is a known template", context, f"known: {', '.join([PLAIN, *sorted(known)])}")
    return known[context]


class Prompter:
    """Builds the ids of a prompt in a context, for one model's tokenizer. Raises ConfigError for bad templates."""

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        self.templates = dict(templates or {})
        check_templates(self.templates)

    def ids(
        self,
        context: str,
        prompt: Prompt,
        *,
        peer_text: str = "",
        peer_answer: str = "",
        feedback: str = "",
        skill: str = "",
        mistake: str = "",
        title: str = "",
    ) -> np.ndarray | None:
        """int32 `[P]`, chat template and generation prompt applied; None where a field that it needs is empty."""
        if context == PLAIN:
            return prompt.token_ids
        values = {
            "answer": prompt.answer,
            "solution": prompt.solution,
            "peer": without_thinking(peer_text),
            "peer_answer": peer_answer,
            "feedback": feedback,
            "skill": skill,
            "mistake": mistake,
            "title": title,
        }
        values = {field: inert(self.tokenizer, value) for field, value in values.items()}
        text = fill(_template(context, self.templates), {"problem": prompt.text, **values})
        return None if text is None else tokenize_prompt(self.tokenizer, text, self.template_kwargs)


def fill(template: str, values: Mapping[str, str]) -> str | None:
    """The template with its fields' values, each put in once and never read again; None where one it needs is empty."""
    parts = OPTIONAL.split(template)  # the odd ones are optional
    empty = [any(not values[field].strip() for field in FIELD.findall(part)) for part in parts]
    if any(empty[0::2]) or (len(parts) > 1 and all(empty[1::2])):
        return None
    kept = [part for i, part in enumerate(parts) if not (i % 2 and empty[i])]
    return FIELD.sub(lambda match: values[match[1]], "".join(kept))


def without_thinking(text: str) -> str:
    """A response without its `<think>…</think>`; thinking that the generation prompt opened counts too."""
    kept, at = [], 0
    closed, opened = text.find("</think>"), text.find("<think>")
    if closed >= 0 and (opened < 0 or closed < opened):
        at = closed + len("</think>")
    while (start := text.find("<think>", at)) >= 0 and (end := text.find("</think>", start)) >= 0:
        kept.append(text[at:start])
        at = end + len("</think>")
    return "".join([*kept, text[at:]]).strip()


def inert(tokenizer: Any, text: str) -> str:
    """`text` in which no name of a control token is whole: such a name gets a space after its first character.

    The tokenizer's own `split_special_tokens` would do it only for text that is tokenised apart from its template, and
    then other merges form at the border than the model was trained with.
    """
    names = _control_names(tokenizer)
    while names and (broken := names.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)) != text:
        text = broken
    return text


@lru_cache(maxsize=8)
def _control_names(tokenizer: Any) -> re.Pattern[str] | None:
    """The added tokens' names, control tokens and such as `<think>`; not runs of spaces, which some tokenizers add."""
    added = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    names = sorted((name for name in added if len(name.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def special_ids(tokenizer: Any) -> np.ndarray:
    """Ids int32 of what says nothing of the reasoning: special tokens, `<think>`, `</think>`, `<|…|>`, 1-8 newlines.

    Source: the masks of SGSD's code, 2605.28791.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    marks = [i for i, token in added if token.special or MARK.fullmatch(token.content)]
    lines = [tokenizer("\n" * count, add_special_tokens=False)["input_ids"] for count in range(1, 9)]
    runs = [ids[0] for ids in lines if len(ids) == 1]
    return np.unique(np.asarray([*tokenizer.all_special_ids, *marks, *runs], np.int32))


def tokenize_prompt(
    tokenizer: Any, text: str, template_kwargs: Mapping[str, Any], turns: Any = (), *, suffix: str = ""
) -> np.ndarray:
    """Token ids int32 `[P]` of a user turn with the generation prompt.

    Without a chat template, of the bare text: it is then the whole prompt, and its control tokens are meant.
    """
    if not getattr(tokenizer, "chat_template", None):
        return np.asarray(tokenizer(text)["input_ids"], np.int32)
    rendered = _render(tokenizer, [*turns, _turn(tokenizer, "user", text)], template_kwargs, add_generation_prompt=True)
    return np.asarray(tokenizer(rendered, add_special_tokens=False)["input_ids"], np.int32)


def tokenize_response(
    tokenizer: Any,
    prompt: str,
    response: str,
    template_kwargs: Mapping[str, Any],
    turns: Any = (),
    *,
    suffix: str = "",
    thinking: Any = (),
) -> np.ndarray:
    """Token ids int32 `[R]` of a given response as the model would have ended it, to stand after the generation prompt.

    They are the chat template's rendering of the assistant's turn up to the end-of-sequence token, or else to the first
    control token (some models end a turn with another); without either, or without a chat template, the text and EOS.
    """
    response = inert(tokenizer, response)
    if getattr(tokenizer, "chat_template", None):
        turns = [*turns, _turn(tokenizer, "user", prompt), {"role": "assistant", "content": response}]
        before = _render(tokenizer, turns[:-1], template_kwargs, add_generation_prompt=True)
        whole = _render(tokenizer, turns, template_kwargs, add_generation_prompt=False)
        response = whole.removeprefix(before) if whole.startswith(before) else response
    ids: list[int] = tokenizer(response, add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    control = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    end = next((at for ends in ({eos}, control) for at, i in enumerate(ids) if i in ends), None)
    return np.asarray([*ids, eos] if end is None else ids[: end + 1], np.int32)


def _turn(tokenizer: Any, role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": inert(tokenizer, text)}


def _render(
    tokenizer: Any, turns: list[dict[str, str]], template_kwargs: Mapping[str, Any], *, add_generation_prompt: bool
) -> str:
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
    )
