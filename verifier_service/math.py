r"""Mathematical equality of the answer with the gold: exact for plain numbers, math-verify for the rest.

What `prepare` cannot decide is judged where it can be killed. math-verify's own timeouts are off: they are SIGALRM,
which fails in a thread, and a timeout there is a silent False. Its wrong accepts are kept out in latex.py (what is
read) and math_equal.py (what is equal). Several boxes: the last decides; but where the gold is a list and the last box
is one value, boxes joined to it by no more than commas, `and`, `or` are one list with it.
"""

import re
from fractions import Fraction
from typing import Literal

from ..contracts.protocols import Judgement, Response
from ..contracts.sections import THINKING
from .answers import gold_answer, plain_number, read_answer, values, without_dollars
from .math_guard import too_large

LOOSE = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;!: ]|\\?\$|(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
SAME = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\leq", "\\le"), ("\\geq", "\\ge"), ("{,}", ","))
WORDS = re.compile(r"(?:\\(?:text|textbf|mathrm|mbox)\s*\{([A-Za-z][A-Za-z ]+)\.?\}|([A-Za-z]{3,}))\.?")
BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_(?:\{([0-9]{1,2})\}|([0-9]))")
DECIMAL = re.compile(r"[-+]?[0-9,]*\.([0-9]+)")
SIGNIFICANT = 6  # digits of a decimal that stands for a fraction which has no end
IN_BRACES = re.compile(r"\\(?:text|mbox|mathrm|operatorname|textbf|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
PROSE = re.compile(
    r"(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|and|min|max|gcd|lcm)\b)[^\W\d_]{3}|[^\W\d_]{2}\s+[^\W\d_]{2}"
    r"|[\u0400-\u1fff\u2e80-\ud7ff]"
)
LIST_WORD = re.compile(r"(?<=[0-9)}])(?:or|and)")
LONGEST_FORMULA = 300  # characters of a response that is nothing but a formula


class MathVerifier:
    """The canonical answer of a response that passed is the gold's; else the number, or sympy's form, or the text."""

    needs_gold = True
    waits = False

    def __init__(
        self, answers: Literal["box", "any"] = "box", marker: str = "", thinking: tuple[str, str] = THINKING
    ) -> None:
        self.answers: Literal["box", "any"] = answers
        self.marker, self.thinking = marker, thinking

    def prepare(self, response: Response) -> Judgement | Response:
        """Decides what needs no sympy: no answer, the same text, plain numbers, what is too large to evaluate.

        Else the answer and the gold's answer, as a response that is read the same; of a response whose answer must be
        searched, all of the text.
        """
        gold = gold_answer(response.gold)
        if not gold:
            return Judgement(False, error_class="no_gold")
        several = values(gold) > 1 and plain_number(gold) is None
        found = read_answer(response.text, self.answers, self.marker, several=several, thinking=self.thinking)
        if found is None:
            return Judgement(False)
        if not found.sure and not _is_formula(found.text):
            return Response(found.text, gold)
        quick = _decide_quickly(found.text, gold)
        if quick is not None:
            return quick
        return Response(f"{self.marker} {found.text}" if self.marker else f"\\boxed{{{found.text}}}", gold)

    def __call__(self, response: Response) -> Judgement:
        """Judges any response, prepared or not; may hang. Raises what sympy raises."""
        prepared = self.prepare(response)
        if isinstance(prepared, Judgement):
            return prepared
        found = read_answer(prepared.text, self.answers, self.marker, thinking=self.thinking)
        if found is None:  # the braces of a tagged answer need not match
            return Judgement(False)
        from .latex import search  # sympy: only here, in the process that can be killed

        answer, gold = found.text, prepared.gold
        if not found.sure:
            answer = gold_answer(search(answer))
        if "$" in gold or "\\(" in gold or "\\[" in gold:
            gold = gold_answer(search(gold)) or gold
        if not answer:
            return Judgement(False)
        return _decide_quickly(answer, gold) or _decide(answer, gold)


def _decide_quickly(answer: str, gold: str) -> Judgement | None:
    """What needs no sympy."""
    answer = without_dollars(answer)
    number, wanted = plain_number(answer), plain_number(gold)
    written = str(wanted) if wanted is not None else _same(gold)
    if number is not None and wanted is not None:
        if number == wanted or _rounded(answer, number, wanted) or _rounded(gold, wanted, number):
            return Judgement(True, written)
        return Judgement(False, str(number))
    if _same(answer) == _same(gold):
        return Judgement(True, written)
    for pattern, read in ((WORDS, _word), (BASED, _based)):
        left, right = pattern.fullmatch(answer), pattern.fullmatch(gold)
        if left and right:
            passed = read(left) == read(right)
            return Judgement(passed, written if passed else _same(answer))
    if too_large(answer) or too_large(gold):
        return Judgement(False, str(number) if number is not None else _same(answer), error_class="too_large")
    return None


def _decide(answer: str, gold: str) -> Judgement:
    """By sympy."""
    from .latex import normalised, read_formula
    from .math_equal import equal, exact_number

    wanted, value = read_formula(gold), read_formula(answer)
    if wanted is None or value is None:
        passed = _same(normalised(answer)).casefold() == _same(normalised(gold)).casefold()
    else:
        passed = equal(wanted, value)
    if passed:
        number = plain_number(gold)
        return Judgement(True, str(number) if number is not None else _same(gold))
    number = plain_number(answer)
    exact = exact_number(value) if number is None else number
    try:
        return Judgement(False, str(exact if exact is not None else value if value is not None else _same(answer)))
    except ValueError:  # an integer too long for Python to print
        return Judgement(False, _same(answer))


def _is_formula(text: str) -> bool:
    """Whether a response is nothing but a formula: no words, no line's end, more than a number."""
    inner = without_dollars(text)
    if len(text) > LONGEST_FORMULA or (inner == text and re.search(r"\$|\\[(\[]|\n", text)):
        return False
    bare = LIST_WORD.sub(" ", IN_BRACES.sub(" ", inner))
    return not PROSE.search(bare) and (inner != text or re.search(r"[\\A-Za-z=]", text) is not None)


def _same(latex: str) -> str:
    """A formula without what does not show: spaces, sizes of brackets and fractions, dollars, a full stop."""
    for long, short in SAME:
        latex = latex.replace(long, short)
    return LOOSE.sub("", latex.strip()).rstrip(".")


def _rounded(decimal: str, rounded: Fraction, value: Fraction) -> bool:
    """Whether a decimal of at least SIGNIFICANT digits is all that it shows of a value whose decimals have no end."""
    match = DECIMAL.fullmatch(decimal.strip())
    if not match or 10**400 % value.denominator == 0:
        return False
    places = len(match[1])
    digits = len(str(abs(int(rounded * 10**places))))
    return digits >= SIGNIFICANT and abs(rounded - value) < Fraction(1, 10**places)


def _word(match: re.Match[str]) -> str:
    return "".join((match[1] or match[2]).split()).casefold()


def _based(match: re.Match[str]) -> tuple[str, int]:
    """A number as written in its base."""
    return match[1].lstrip("0").casefold(), int(match[2] or match[3])
