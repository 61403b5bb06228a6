r"""One way of writing for the many ways in which models write an answer. No sympy; linear in the text.

Response and gold both pass through here before anything is compared, so what is said here holds for both. Nothing is
dropped that could change a value: a mark that means nothing (bold, colours, spaces, zero-width characters) goes; what
means something is written in LaTeX (`x²` is `x^{2}`, `½` is `\frac{1}{2}`, `1e3` is `1\times 10^{3}`); and what reads
two ways stays as it is and is told by `ambiguous`.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

from .characters import characters
from .markup import LEAD_IN, NAMED, PERCENT, TEXT, markup

MOST_BRACES = 5  # around the whole of an answer
COMPARED = re.compile(r"[<>]|\\(?:le|ge|lt|gt|ne)(?![A-Za-z])")  # what an inequality has
LONGEST = 2_000  # characters; longer ones are no answer, and stay as they are

# ---- numbers --------------------------------------------------------------------------------------------------------

SPACED_GROUPS = re.compile(r"(?<![0-9.,])(?<![0-9] )([0-9]{1,3})((?: [0-9]{3})+)(?![0-9])(?! [0-9])")
IN_GROUPS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
EXPONENT = re.compile(r"(?<![A-Za-z0-9_\\.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]([-+]?[0-9]{1,4})(?![A-Za-z0-9.])")
BARRED = re.compile(
    r"(?<![0-9])([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot|overset\{\.\})\{([0-9]+)\}|\(([0-9]+)\)"
    r"|\\dot\{([0-9])\}([0-9]*)\\dot\{([0-9])\}|\\(?:overline|bar|dot) ?([0-9]))(?![0-9])"
)
TWO_DOTS = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\dot\{?([0-9])\}?([0-9]*)\\dot\{?([0-9])\}?(?![0-9])")
GOING_ON = re.compile(r"(?<![0-9])([0-9]+)\.([0-9]+) ?(?:\\ldots|\.\.\.|\\overline\{\.\.\.\})\s*\Z")
FACTORIAL_POWER = re.compile(r"(?<![A-Za-z0-9])([0-9]+|[A-Za-z])!\s*\^")
PRODUCT = re.compile(r"(?<=[0-9)])\s*(?=\()")
BMOD = re.compile(r"(?<![0-9A-Za-z^_}])(-?[0-9]{1,40})\s*(?:\\bmod|\\mod|\\text\{ ?mod ?\})\s*([0-9]{1,20})(?![0-9^])")
OF_INTEGERS = re.compile(r"(?:\\(gcd|lcm)|\\text\{(gcd|lcm|GCD|LCM)\}) ?\(([0-9, ]{1,200})\)")
CLOCK = re.compile(r"(?<![0-9:])([0-9]{1,2}):([0-9]{2})\s*(?:\\text\{)?\s*([aApP])\.?\s*[mM]\.?\s*\}?")
PERMILLE = re.compile(r"([0-9.]+)\s*\\permille ?")
TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?|\\[a-z]+|[a-z])\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)(?![A-Za-z])")


def repeating(whole: str, before: str, block: str) -> Fraction:
    """`whole.before` and then `block` for ever."""
    start = Fraction(int((whole or "0") + before), 10 ** len(before))
    return start + Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(before))


def _as_fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value.numerator)


def _barred(match: re.Match[str]) -> str:
    block = match[3] or match[4] or match[8] or f"{match[5]}{match[6] or ''}{match[7]}"
    return _as_fraction(repeating(match[1], match[2], block))


def _going_on(match: re.Match[str]) -> str:
    """Digits that repeat to their end: one at least three times, several at least twice. Others are unknown."""
    whole = match[2]
    for size in range(1, len(whole) // 2 + 1):
        block = whole[-size:]
        times = 1
        while whole.endswith(block * (times + 1)):
            times += 1
        if times >= (3 if size == 1 else 2):
            return _as_fraction(repeating(match[1], whole[: len(whole) - size * times], block))
    return match[0]


def numbers(text: str) -> str:
    """Numbers, and signs between them, as the parser of formulas reads them right."""
    if not any(sign.isdigit() for sign in text):
        return text
    text = SPACED_GROUPS.sub(lambda match: match[1] + match[2].replace(" ", ""), text)
    text = EXPONENT.sub(lambda match: rf"{match[1]}\times 10^{{{int(match[2])}}}", text)
    if "." in text:
        text = TWO_DOTS.sub(lambda m: _as_fraction(repeating(m[1], m[2], f"{m[3]}{m[4]}{m[5]}")), text)
        text = GOING_ON.sub(_going_on, BARRED.sub(_barred, text))
    if "\\permille" in text:
        text = PERMILLE.sub(lambda match: rf"\frac{{{match[1]}}}{{1000}}", text)
    if ":" in text and not TEXT.fullmatch(text):
        text = CLOCK.sub(lambda match: rf"\text{{{int(match[1])}:{match[2]}{match[3].upper()}M}}", text)
    if "!" in text:
        text = FACTORIAL_POWER.sub(r"(\1!)^", text)
    if "mod" in text:
        text = BMOD.sub(lambda match: str(int(match[1]) % int(match[2])) if int(match[2]) else match[0], text)
    if "(" in text:
        text = _products(OF_INTEGERS.sub(_of_integers, text))
    if "circ" in text and TRIG.search(text):
        text = DEGREES.sub(r"(\1\\cdot \\frac{\\pi}{180})", text)
    return text


def _of_integers(match: re.Match[str]) -> str:
    parts = match[3].replace(" ", "").split(",")
    if not all(parts):
        return match[0]
    function = math.gcd if (match[1] or match[2]).lower() == "gcd" else math.lcm
    return str(function(*map(int, parts)))


def _products(text: str) -> str:
    r"""`2(3)` and `(2)(3)` as products: the parser would add them. Not the arguments of functions, nor pairs."""
    parts, start = [], 0
    for match in PRODUCT.finditer(text):
        head = text[: match.start()][-24:]
        digits = re.search(r"[0-9.]+\Z", head)
        before = head[: digits.start()] if digits else head
        if digits and re.search(r"[_A-Za-z\\]\Z|_\{\Z|\\[A-Za-z]+ ?\^ ?\Z", before):
            continue
        inner = text[match.end() + 1 :].partition(")")[0]
        if "," in inner or (not digits and "," in head.rpartition("(")[2]):
            continue
        parts += [text[start : match.start()], r"\cdot "]
        start = match.end()
    return "".join([*parts, text[start:]])


# ---- the whole ------------------------------------------------------------------------------------------------------


def spelled(text: str) -> str:
    r"""An answer or a gold in one spelling. What is longer than LONGEST stays as it is."""
    return text if len(text) > LONGEST else _spelled(text)


@lru_cache(maxsize=256)  # golds come again with each response of their group, and an answer in each part of its way
def _spelled(text: str) -> str:
    text = _unwrapped(markup(characters(text)))
    if text.isalpha() and text.isascii():
        return text
    text = NAMED.sub(_named, PERCENT.sub("%", text))
    text = numbers(text)
    for _ in range(MOST_BRACES):
        if not (text.startswith("{") and text.endswith("}") and _closes(text, "{}") == len(text) - 1):
            break
        inner = text[1:-1].strip()
        text = rf"\{{{inner}\}}" if _is_list(inner) and not IN_GROUPS.fullmatch(inner) else inner
    return text.strip().rstrip(".").rstrip() if not text.rstrip().endswith(("...", "\\.")) else text.strip()


def _named(match: re.Match[str]) -> str:
    """A function or letter that its name alone says; words stay words."""
    if not match[1]:
        return match[0]
    return "\\infty " if match[1] == "infinity" else f"\\{match[1]}{'' if match[1] in ('sqrt', 'frac') else ' '}"


def _is_list(text: str) -> bool:
    """Whether a comma is outside of all brackets."""
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            return True
    return False


def _closes(text: str, pair: str) -> int:
    """Where the bracket that a text begins with is closed; -1 where it is not."""
    depth = 0
    for at, sign in enumerate(text):
        depth += (sign == pair[0]) - (sign == pair[1])
        if not depth:
            return at
    return -1


def _unwrapped(text: str) -> str:
    """Without brackets around the whole of it, where they hold one value."""
    text = text.strip()
    if (words := TEXT.fullmatch(text)) and re.search(r"[0-9]", words[1]) and not CLOCK.search(words[1]):
        text = LEAD_IN.sub("", words[1].strip(), count=1)
    for _ in range(3):
        bare = text[:-1] if text.endswith(").") else text
        if not (bare.startswith("(") and _closes(bare, "()") == len(bare) - 1):
            break
        inner = bare[1:-1].strip()
        if not inner or re.search(r"[,;]|\\(?:text|pm|mid)|\.\.", inner) or re.fullmatch(r"[A-Za-z]", inner):
            break
        text = inner
    return text


SIDE_BY_SIDE = re.compile(r"[0-9)]\s+(?=[0-9.])|[0-9]\s*(?:'|\^\\circ)\s*[0-9]")
MIXED = re.compile(r"(?<![0-9.,/} ])(?<![0-9/}] )([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9])")
LOWERED_NUMBER = re.compile(r"(?<![A-Za-z0-9\\_}])(?<!log)(?<!\\)[0-9]+\)?\s*_")
FUNCTION_BASE = re.compile(
    r"\\(?:log|lg)\s*_?(?:\{[^{}]*\}|[0-9])|\\(?:frac|binom|sqrt|begin|end)(?![A-Za-z])(?: ?[0-9]{1,2})?"
)


def ambiguous(text: str) -> str:
    r"""Why a formula reads two ways, "" where it does not: numbers side by side, or with something below them."""
    bare = FUNCTION_BASE.sub("#", text)
    bare = re.sub(r"\\begin\{[a-z]*matrix\}.*\\end\{[a-z]*matrix\}|&|\\\\", "#", bare)
    if SIDE_BY_SIDE.search(MIXED.sub("1", bare)):
        return "numbers side by side"
    return "a number with a subscript" if LOWERED_NUMBER.search(bare) else ""
