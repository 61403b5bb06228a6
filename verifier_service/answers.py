r"""Read answers out of text without sympy: the last box, and plain numbers. Linear in the text, so they cannot hang."""

import re
from dataclasses import dataclass
from fractions import Fraction

OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are text, not braces
NUMBER = re.compile(r"([+-]?)\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?)(?:\s*/\s*([0-9]+))?")
LONGEST_NUMBER = 400  # characters; longer ones are left to the verifier that can be killed


@dataclass(frozen=True, slots=True)
class Decision:
    """A `contracts.protocols.Judgement`."""

    passed: bool
    answer: str


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{…}` or `\fbox{…}`, braces balanced, spaces around it stripped.

    None where there is none, or where the last one is unterminated or empty: an earlier box is then no answer.
    """
    content = None
    opening = OPENING.search(text)
    while opening:
        end = _closing(text, opening.end())
        if end is None:
            return None
        content = text[opening.end() : end].strip()
        opening = OPENING.search(text, end)
    return content or None


def _closing(text: str, start: int) -> int | None:
    """Where the brace opened just before `start` is closed."""
    depth = 1
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return None


def plain_number(text: str) -> Fraction | None:
    """Exact value of an integer, a decimal or a/b, with `$` and spaces around, thousands as `,` or `{,}`; else None."""
    if len(text) > LONGEST_NUMBER:
        return None
    match = NUMBER.fullmatch(text.replace("\\$", "$").replace("{,}", ",").strip().strip("$").strip())
    if not match or not any(c.isdigit() for c in match[2]) or (match[3] and ("." in match[2] or not int(match[3]))):
        return None
    value = Fraction(match[2].replace(",", "")) / int(match[3] or 1)
    return -value if match[1] == "-" else value
