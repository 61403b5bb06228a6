"""The named, versioned templates of what a model is shown, as the last turn of a prompt (chat.py).

A context is a template's name, e.g. `answer@1`; "plain" is the problem alone, whose ids the prompt already has. Whoever
generates or scores in a context builds its prompt here, so that both read the same ids. A new wording is a new version:
a run's records name what its models really saw. The templates' wording is ours; METHODS.md says what each paper shows.

What is filled in was written by a dataset or sampled by a model, and stays text: braces in it are not filled again, and
the name of a control token in it does not become that token.

Shapes: P prompt tokens.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..contracts.errors import ConfigError
from ..contracts.records import Prompt
from ..contracts.sections import THINKING
from .chat import inert, prompt_ids, shown_turns
from .thinking import Marks, without_thinking

PLAIN = "plain"
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
    "strategy@1": (  # published SGPO, 2606.24064
        "{problem}\n\nGuidance on how to solve it:\n\n{strategy}\n\nNow solve it, step by step."
    ),
}
FIELDS = ("problem", "answer", "solution", "strategy", "peer", "peer_answer", "feedback", "skill", "mistake", "title")

NAME = re.compile(r"[\w.-]+@[\w.-]+")
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
    """Builds the ids of a prompt in a context, for one model's tokenizer. Raises ConfigError for bad templates.

    `suffix`: the recipe's own words at the end of every problem; `thinking`: the marks of what a peer is shown without;
    `checked`: the chat template must show every turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        suffix: str = "",
        thinking: Marks = THINKING,
        *,
        checked: bool = False,
    ) -> None:
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        self.templates, self.suffix, self.thinking = dict(templates or {}), suffix, thinking
        self.checked = checked
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
        """int32 `[P]`, chat template and generation prompt applied; None where a field that it needs is empty.

        The turns before the problem stay before it. Raises ModelError.
        """
        if context == PLAIN:
            return prompt.token_ids
        values = {
            "answer": prompt.answer,
            "solution": prompt.solution,
            "strategy": prompt.strategy,
            "peer": without_thinking(peer_text, self.thinking),
            "peer_answer": peer_answer,
            "feedback": feedback,
            "skill": skill,
            "mistake": mistake,
            "title": title,
        }
        values = {field: inert(self.tokenizer, value, self.template_kwargs) for field, value in values.items()}
        before = json.loads(prompt.turns) if prompt.turns else []
        *before, last = shown_turns(self.tokenizer, prompt.text, self.template_kwargs, before, self.suffix)
        text = fill(_template(context, self.templates), {"problem": last["content"], **values})
        if text is None:
            return None
        turns = [*before, {"role": "user", "content": text}]
        return prompt_ids(self.tokenizer, turns, self.template_kwargs, checked=self.checked)


def fill(template: str, values: Mapping[str, str]) -> str | None:
    """The template with its fields' values, each put in once and never read again; None where one it needs is empty."""
    parts = OPTIONAL.split(template)  # the odd ones are optional
    empty = [any(not values[field].strip() for field in FIELD.findall(part)) for part in parts]
    if any(empty[0::2]) or (len(parts) > 1 and all(empty[1::2])):
        return None
    kept = [part for i, part in enumerate(parts) if not (i % 2 and empty[i])]
    return FIELD.sub(lambda match: values[match[1]], "".join(kept))
