r"""Read answers out of responses and golds without sympy. Linear in the text, so it cannot hang.

Where a response's answer stands: never in its reasoning, which ends with the last `</think>` (or the recipe's mark),
nor in reasoning that it opens and does not close. (Where the prompt opens it, a response that is cut off in it cannot
be told from one without.) Of the rest, after the marker's last occurrence, where there is a marker. Else the last
box, complete or not (`\boxed 4` is one where there are none with braces); where there is no box and `answers` is
"any", the last complete `<answer>…</answer>`; else somewhere in the text, to be searched. What is read again reads
the same: a verifier's prepared response is a response.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

from ..contracts.sections import THINKING

BOX_OR_BRACE = re.compile(r"\\\\?(?:boxed|fbox)\s*(?:\{|\Z)|\\.|[{}]", re.DOTALL)  # \{ and \} are text, not braces
BARE_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]+([0-9A-Za-z+-][^\s{}\\$]{0,99})")  # `\boxed 4`, without braces
JOINT = re.compile(r"(?:\\quad|\\text|\\[ ,;]|[\s{}$,;]|and\b|or\b|for part|\([a-z]\))*+")  # what makes boxes a list
ANYTHING = re.compile(r".*+", re.DOTALL)
SEPARATED = re.compile(r"[,;]|and|or")
TAGS = re.compile(r"<(/?)answer>")
DOLLARS = re.compile(r"\$\$?|\\[\[\]()]")
NO_ANSWER = "no answer where one is read"  # the rule of a judgement
MOST_JOINED = 100  # boxes of one list
LONGEST_JOINT = 70  # characters between two boxes of one list, as math-verify has it

Box = tuple[int, int, int]  # begin, content's begin, content's end or -1: unterminated


@dataclass(frozen=True, slots=True)
class Found:
    """An answer's text. Not `sure`: it is all of the response, and the answer somewhere in it."""

    text: str
    sure: bool = True


def read_answer(
    text: str,
    answers: Literal["box", "any"],
    marker: str,
    *,
    several: bool = False,
    thinking: tuple[str, str] = THINKING,
) -> Found | None:
    """The answer of a response, None where it has none. `several`: boxes that are one list are one answer; `thinking`:
    the marks around its reasoning."""
    opening, closing = thinking
    text = text.rpartition(closing)[2].partition(opening)[0]
    if marker:
        _, found, after = text.rpartition(marker)
        answer = after.lstrip(" \t").partition("\n")[0].strip()
        return Found(answer) if found and answer else None
    boxes = _boxes(text)
    if boxes:
        answer = _content(text, boxes[-1])
        if several and answer and values(answer) == 1:
            answer = _joined(text, boxes, JOINT)
        return Found(answer) if answer else None
    if bare := deque(BARE_BOX.finditer(text), maxlen=1):
        return Found(bare[0][1].rstrip(".,;"))
    if answers == "box":
        return None
    tag = _last_tag(text)
    if tag is not None:
        return Found(tag) if tag else None
    return Found(text.strip(), sure=False) if text.strip() else None


def harmless(marker: str) -> str:
    """A response whose answer is 1."""
    return f"{marker} 1" if marker else "\\boxed{1}"


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` or `\fbox{…}`, braces balanced, spaces around it stripped.

    None where there is none, or where the last one is unterminated or empty: an earlier box is then no answer.
    """
    boxes = _boxes(text)
    return _content(text, boxes[-1]) if boxes else None


def gold_answer(gold: str) -> str:
    """A gold's answer: its boxes, without the dollars around it; a solution in words stays as it is, to be searched."""
    boxes = _boxes(gold)
    if boxes and boxes[-1][2] < 0:  # the reader of the data may have cut it off
        return gold[boxes[-1][1] :].strip()
    answer = (_joined(gold, boxes, ANYTHING) or "") if boxes else gold
    while (bare := without_dollars(answer)) != answer:
        answer = bare
    return answer.strip()


def values(answer: str) -> int:
    """How many values a list has: the parts between commas and semicolons outside of all brackets."""
    inner = answer.strip()
    if inner.startswith(("\\{", "{")) and inner.endswith("}"):
        inner = inner.removeprefix("\\").removeprefix("{").removesuffix("}").removesuffix("\\")
    depth = found = 0
    for sign in re.finditer(r"[\[({})\],;]|\\text\{ *(?:and|or) *\}|\b(?:and|or)\b", inner):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(sign[0], 0)
        found += depth == 0 and sign[0][0] not in ")]}"
    return found + 1


def _boxes(text: str) -> list[Box]:
    """The boxes that are in no complete box, in their order."""
    boxes: list[Box] = []
    open_braces: list[tuple[int, int]] = []  # begin of a box (-1: no box), begin of what is in the braces
    for match in BOX_OR_BRACE.finditer(text):
        token = match[0]
        if token == "}":
            begin, inner = open_braces.pop() if open_braces else (-1, 0)
            if begin >= 0:
                while boxes and boxes[-1][0] > begin:
                    boxes.pop()
                boxes.append((begin, inner, match.start()))
        elif token == "{":
            open_braces.append((-1, 0))
        elif "box" in token:
            open_braces.append((match.start(), match.end()))
    boxes += [(begin, inner, -1) for begin, inner in open_braces if begin >= 0]
    return sorted(boxes)


def _content(text: str, box: Box) -> str | None:
    return text[box[1] : box[2]].strip() or None if box[2] >= 0 else None


def _joined(text: str, boxes: list[Box], joint: re.Pattern[str]) -> str | None:
    """The last box, and before it those other ones joined to it by `joint` with a comma, `and` or `or`, as one list."""
    contents, boxes = [_content(text, boxes[-1])], boxes[-MOST_JOINED:]
    for left, right in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between, content = text[left[2] + 1 : right[0]], _content(text, left)
        if not content or content in contents or len(between) > LONGEST_JOINT:
            break
        if not joint.fullmatch(between) or not SEPARATED.search(between):
            break
        contents.insert(0, content)
    return ", ".join(content for content in contents if content) or None


def _last_tag(text: str) -> str | None:
    """Content of the last complete `<answer>…</answer>`; "" where it is empty, None where there is none."""
    begin, content = -1, None
    for tag in TAGS.finditer(text):
        if not tag[1]:
            begin = tag.end()
        elif begin >= 0:
            content, begin = text[begin : tag.start()].strip(), -1
    return content


def without_dollars(text: str) -> str:
    r"""`$…$`, `$$…$$`, `\(…\)` or `\[…\]`, or a list of them, without the signs; anything else as it is."""
    inner = text.strip()
    outside = "".join(DOLLARS.split(inner)[::2])
    signs = DOLLARS.findall(inner)
    if signs and len(signs) % 2 == 0 and not re.sub(r"and|or|[\s,;.]", "", outside) and "\\$" not in inner:
        return DOLLARS.sub(" ", inner).strip().rstrip(".,")
    return text
