r"""Equality of numbers as people write them: with units, thousands, currency, percent, powers of ten, fractions.

Exact arithmetic on what a few regular expressions read, linear in the text: nothing here can hang. How a number reads:
- `1,000.99`, `1.000,99`, `1 000.99`: of two kinds of signs the last is the decimal one. Alone, a full stop and a comma
  are decimal, but for a comma (or several of either) before groups of three digits: `1,000` is a thousand.
- `3/4`, `\frac{3}{4}` and `1 3/4`; `1.5e3`, `1.5 \times 10^{3}`; `2 million`.
- What follows a number is its unit, which is not compared. `50%` is equal to 50 and to 1/2, `50%` to `50%` alone.
"""

import re
from collections import deque
from fractions import Fraction
from typing import Literal, NamedTuple

from ..contracts.protocols import Judgement, Response
from ..contracts.sections import THINKING
from .answers import LONGEST_NUMBER, gold_answer, read_answer

PLAIN = (
    [(sign, "") for sign in ("\\! ", "\\!", "\\left", "\\right", "\\displaystyle", "**")]
    + [
        (sign, " ")
        for sign in ("\\,", "\\;", "\\:", "\\ ", "~", "\u00a0", "\u202f", "\u2009", "\\text", "\\mbox", "\\mathrm")
    ]
    + [("{,}", ","), ("\\%", "%"), ("−", "-"), ("\\times", "×"), ("\\cdot", "×"), ("\\dfrac", "\\frac")]
    + [("\\tfrac", "\\frac"), ("\\$", "$"), ("$", ""), ("percent", "%")]
)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
DIGITS = r"(?:[0-9]{1,3}(?:[,.' ][0-9]{3})++(?:[.,][0-9]++)?(?![0-9])|[0-9]++(?:[.,][0-9]++)?|\.[0-9]++)"
NUMBER = re.compile(
    rf"(?<![0-9A-Za-z_^])(?<!\^\{{)(?P<sign>[-+]\s?)?[€£¥₹]?(?:(?P<whole>[0-9]+)(?:\s(?=[0-9]+\s?/)|\s?(?=\\frac)))?"
    rf"(?:\\frac\s*\{{(?P<over>-?[0-9]+)\}}\s*\{{(?P<under>[0-9]+)\}}|\\frac(?P<short>[0-9][0-9])"
    rf"|(?P<digits>{DIGITS})(?:\s?/\s?(?P<down>[0-9]+)(?![.,]?[0-9]))?)"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]+)|\s*[×*]\s*10\s*\^\s*\{{?(?P<power>[-+]?[0-9]+)\}}?)?"
    rf"(?:[\s{{]*(?P<scale>{'|'.join(SCALES)})\b)?(?P<percent>\s*%)?(?!\s*\^\s*\{{?[-0-9a-zA-Z])"
)
BEFORE = re.compile(r"[A-Za-z:({\s]*+")  # words, and
AFTER = re.compile(r"(?:\^\{?(?:[23]|\s*\\circ\s*)\}?|\\circ|[^\W\d_]|[\s°²³€£¥₹/.,:;'){}*-])*+")  # a unit
HIGHEST_POWER = 400  # of ten


class Number(NamedTuple):
    value: Fraction
    percent: bool


class NumericVerifier:
    """Passes where the answer's number is within `tolerance`, as a share, of the gold's; the canonical answer is it.

    A gold without a number abstains as "gold_not_numeric".
    """

    needs_gold = True
    waits = False

    def __init__(
        self,
        answers: Literal["box", "any"] = "box",
        marker: str = "",
        tolerance: float = 0.0,
        thinking: tuple[str, str] = THINKING,
    ) -> None:
        self.answers: Literal["box", "any"] = answers
        self.marker, self.thinking = marker, thinking
        self.tolerance = Fraction(tolerance)

    def prepare(self, response: Response) -> Judgement:
        """Nothing here can hang."""
        gold = only_number(gold_answer(response.gold)) or last_number(response.gold)
        if gold is None:
            return Judgement(False, error_class="gold_not_numeric")
        found = read_answer(response.text, self.answers, self.marker, thinking=self.thinking)
        if found is None:
            return Judgement(False)
        number = only_number(found.text) if found.sure else last_number(found.text)
        if number is None:
            return Judgement(False, found.text if found.sure else "")
        return Judgement(self._equal(number, gold), str(number.value))

    def __call__(self, response: Response) -> Judgement:
        return self.prepare(response)

    def _equal(self, number: Number, gold: Number) -> bool:
        spellings = [number.value]
        if number.percent != gold.percent:
            spellings.append(number.value * 100 if number.percent else number.value / 100)
        return any(abs(value - gold.value) <= self.tolerance * abs(gold.value) for value in spellings)


def only_number(text: str) -> Number | None:
    """The number of a text, or of what follows its last `=`, which has nothing else but words or a unit."""
    text = _plain(text.rpartition("=")[2])
    match = NUMBER.search(text)
    if match and BEFORE.fullmatch(text, 0, match.start()) and AFTER.fullmatch(text, match.end()):
        return _value(match)
    return None


def last_number(text: str) -> Number | None:
    """The last number of a text."""
    last = deque(NUMBER.finditer(text := _plain(text)), maxlen=1)
    return _value(last[0]) if last and not text.endswith("sqrt{", 0, last[0].start()) else None


def _plain(text: str) -> str:
    for sign, plain in PLAIN:
        text = text.replace(sign, plain)
    return text


def _value(match: re.Match[str]) -> Number | None:
    """The number that was matched; None where it is too long, or divides by zero."""
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    part = match.groupdict()
    over, under = part["over"] or part["digits"], part["under"] or part["down"] or "1"
    if part["short"]:
        over, under = part["short"]
    power = int(part["exponent"] or part["power"] or 0) + SCALES.get(part["scale"], 0)
    if not int(under) or abs(power) > HIGHEST_POWER:
        return None
    value = int(part["whole"] or 0) + (_decimal(over) if part["digits"] else Fraction(int(over))) / int(under)
    value *= Fraction(10) ** power
    if part["sign"] and part["sign"][0] == "-":
        value = -value
    return Number(value / 100 if part["percent"] else value, bool(part["percent"]))


def _decimal(digits: str) -> Fraction:
    digits = digits.replace(" ", "").replace("'", "")
    commas, stops = digits.count(","), digits.count(".")
    if commas and stops:
        decimal = max(",.", key=digits.rfind)
    elif stops == 1 or (commas == 1 and (len(digits) - digits.index(",") != 4 or digits.startswith("0"))):
        decimal = "," if commas else "."
    else:
        decimal = ""
    plain = "".join("." if sign == decimal else "" if sign in ",." else sign for sign in digits)
    return Fraction(plain)
