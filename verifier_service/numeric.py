r"""Equality of numbers as people write them: with units, thousands, currency, percent, powers of ten, fractions.

Exact arithmetic on what quantities.py reads, linear in the text: nothing here can hang. Of `x = 5` the number is 5, and
where the gold has a name too, it must be that. What holds several numbers (`3, 4`, `\pm 3`) is none.
"""

import re
from collections import deque
from fractions import Fraction
from typing import Literal

from ..contracts.protocols import Judgement, Response
from ..contracts.sections import THINKING
from .answers import NO_ANSWER, gold_answer, harmless, read_answer, without_dollars
from .characters import characters
from .forms import spelled
from .quantities import CURRENCY, SCALES, TAKES_BACK, Quantity, read_quantity

DIGITS = r"(?:[0-9]{1,3}(?:[,.' ][0-9]{3})++(?:[.,][0-9]++)?(?![0-9])|[0-9]++(?:[.,][0-9]++)?|\.[0-9]++)"
NUMBER = re.compile(
    rf"(?<![0-9A-Za-z_^])(?<!\^\{{)(?:[-+]\s?)?{CURRENCY}?(?:[0-9]+(?:\s(?=[0-9]+\s?/)|\s?(?=\\frac)))?"
    rf"(?:\\frac\s*\{{-?[0-9]+\}}\s*\{{[0-9]+\}}|\\frac[0-9][0-9]|{DIGITS}(?:\s?/\s?[0-9]+(?![.,]?[0-9]))?)"
    rf"(?:[eE][-+]?[0-9]+|\s*(?:\\times|[×*])\s*10\s*\^\s*\{{?[-+]?[0-9]+\}}?)?"
    rf"(?:\s*(?:{'|'.join(SCALES)})\b)?(?:\s*\\?%)?(?!\s*\^\s*\{{?[-0-9a-zA-Z])"
)
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")
BEFORE = re.compile(r"(?:\\text\{[A-Za-z :,]*\}|[A-Za-z:({\s])*+(?=[-+.0-9\\$€£¥₹])")  # words, and


Named = tuple[str, Quantity]


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
        self.harmless = harmless(marker)
        self.tolerance = Fraction(tolerance)

    def prepare(self, response: Response) -> Judgement:
        """Nothing here can hang."""
        gold = only_number(gold_answer(response.gold))
        if gold is None and WORD.search(response.gold):  # a solution in words
            gold = last_number(response.gold)
        if gold is None:
            return Judgement(False, error_class="gold_not_numeric", rule="the gold is no number")
        found = read_answer(response.text, self.answers, self.marker, thinking=self.thinking)
        if found is None:
            return Judgement(False, rule=NO_ANSWER)
        number = only_number(found.text) if found.sure else last_number(found.text)
        if number is None:
            return Judgement(False, found.text if found.sure else "", rule="the answer is no number")
        rule = "two numbers, with the units and names that they have"
        return Judgement(self._equal(number, gold), str(number[1].value), rule=rule)

    def __call__(self, response: Response) -> Judgement:
        return self.prepare(response)

    def _equal(self, number: Named, gold: Named) -> bool:
        if number[0] and gold[0] and number[0] != gold[0]:
            return False
        wanted = gold[1].value
        return any(abs(value - wanted) <= self.tolerance * abs(wanted) for value in number[1].seen_as(gold[1]))


def only_number(text: str) -> Named | None:
    """The number of a text, and the name before its last `=`; None where it has anything else but words or a unit."""
    text = spelled(without_dollars(text))
    name, _, number = text.rpartition("=")
    number = number.strip()
    if read := read_quantity(number):
        return _name(name), read
    match = BEFORE.match(number)
    if not match or TAKES_BACK & set(re.findall(r"[a-z]+", match[0].lower())):
        return None
    read = read_quantity(number[match.end() :].rstrip(") }"))
    return (_name(name), read) if read else None


def _name(text: str) -> str:
    """What is before a number's `=`; "" where that is no letter with its index."""
    name = text.rpartition("=")[2].strip()
    return name if re.fullmatch(r"\\?[A-Za-z]+(?:_\{?[A-Za-z0-9]+\}?)?", name) else ""


def last_number(text: str) -> Named | None:
    """The last number of a text."""
    text = characters(text)
    last = deque(NUMBER.finditer(text), maxlen=1)
    if not last or text.endswith("sqrt{", 0, last[0].start()):
        return None
    read = read_quantity(spelled(last[0][0]))
    return ("", read) if read else None
