"""A model's reasoning: the marks around it, what it says without it, and its place in a given solution."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..contracts.sections import THINKING

Marks = tuple[str, str]

CLOSING = re.compile(r"<(/)([\w:]*(?:think|thought|reason)\w*)>|\[(/)(\w*(?:THINK|THOUGHT|REASON)\w*)\]")


@lru_cache(maxsize=32)
def marks_in(template: str, thinking: Marks = THINKING) -> tuple[Marks, ...]:
    """The configured marks, and others that a chat template's source names."""
    found = [(match[0].replace("/", "", 1), match[0]) for match in CLOSING.finditer(template)]
    return tuple(dict.fromkeys([thinking, *found]))


def split(text: str, pairs: Sequence[Marks]) -> tuple[Marks | None, str, str]:
    """The marks of a text's reasoning (None: it has none), the reasoning and the answer, without the marks.

    One whole block at the start is taken as it stands. Of anything else (two blocks, a mark that is missing) the
    answer is what follows the last closing mark, and all before it is the reasoning: never closed, there is no answer.
    """
    for opening, closing in pairs:
        if opening not in text and closing not in text:
            continue
        head, closed, answer = text.rpartition(closing)
        if text.count(opening) == text.count(closing) == 1 and text.lstrip().startswith(opening):
            return (opening, closing), head.partition(opening)[2], answer
        head, answer = (head, answer) if closed else (text, "")
        marks = re.compile(f"{re.escape(opening)}|{re.escape(closing)}")
        head, answer = (marks.sub("\n", part).strip() for part in (head, answer))
        return (opening, closing), f"\n{head}\n", f"\n\n{answer}"
    return None, "", text


def last_of(text: str, pairs: Sequence[Marks]) -> tuple[Marks | None, bool]:
    """The pair of the last mark in a text, and whether that mark opens; None where it has no mark."""
    places = [(text.rfind(mark), pair, mark == pair[0]) for pair in pairs for mark in pair if mark in text]
    return max(places, default=(0, None, False), key=lambda place: place[0])[1:]


def without_thinking(text: str, thinking: Marks = THINKING) -> str:
    """A response without its `<think>…</think>`; thinking that the generation prompt opened counts too."""
    opening, closing = thinking
    kept, at = [], 0
    closed, opened = text.find(closing), text.find(opening)
    if closed >= 0 and (opened < 0 or closed < opened):
        at = closed + len(closing)
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        kept.append(text[at:start])
        at = end + len(closing)
    return "".join([*kept, text[at:]]).strip()


def decode_response(tokenizer: Any, token_ids: np.ndarray, thinking: Marks = THINKING) -> str:
    """A response's text without special tokens, but for the marks of its reasoning."""
    ids, kept = token_ids.tolist(), _special_marks(tokenizer, thinking)
    if kept:
        left_out = set(tokenizer.all_special_ids) - kept
        left_out |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - kept
        ids = [i for i in ids if i not in left_out]
    return tokenizer.decode(ids, skip_special_tokens=not kept, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=8)
def _special_marks(tokenizer: Any, thinking: Marks) -> frozenset[int]:
    """Ids of the marks that are special tokens, which decoding would leave out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = set(tokenizer.all_special_ids)
    return frozenset(i for i, token in added if token.content in thinking and (token.special or i in special))
