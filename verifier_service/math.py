r"""Mathematical equality of the answer with the gold: exact for numbers, sympy and math-verify for the rest.

Both are spelled alike first (forms.py); docs/verifiers.md has a table of what is one answer. What `prepare` cannot
decide is judged where it can be killed. math-verify's own timeouts are off: they are SIGALRM, which fails in a
thread, and a timeout there is a silent False. Its wrong accepts are kept out in latex.py (what is read) and
math_equal.py (what is equal). Several boxes: the last decides; but where the gold is a list and the last box is one
value, boxes joined to it by no more than commas, `and`, `or` are one list with it.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from ..contracts.protocols import Judgement, Response
from ..contracts.sections import THINKING
from .answers import NO_ANSWER, gold_answer, harmless, read_answer, values, without_dollars
from .characters import characters
from .forms import COMPARED, ambiguous, spelled
from .math_guard import too_large
from .quantities import TAKES_BACK, Quantity, part_unit, read_quantity, same_unit

SHOWN = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|[0-9]+|\S", re.DOTALL)
PLAIN = re.compile(
    r"\s*(-?)(?:\\?\$)?(?:([0-9]{1,15})|([1-9][0-9]{0,2}(?:,[0-9]{3}){1,4})|([0-9]{1,15}\.[0-9]{1,15}))\s*"
)
OPTION = re.compile(r"\(?\s*(?:\\text\{)?\s*\(?([A-J])\)?\s*\}?\s*\)?\.?")
CHOSEN = re.compile(
    r"(?:\\text\{)?\s*(?:(?P<bracket>\()\s*)?(?P<letter>[A-J])(?(bracket)\s*\)|\s*[).:])\s*\}?\s*(?=[^\s=])(?P<rest>.+)"
)
SAID = re.compile(r"\\text\{([^{}]*)\}")
KINDS = {"FiniteSet": "list or set", "Interval": "interval", "Set": "set of numbers", "Tuple": "tuple"}
KINDS |= {"MatrixBase": "matrix", "Relational": "relation", "And": "relation", "Number": "number"}
WORDS_BEHIND = re.compile(r"(?<=\S)\s*\\text\{[^{}]*\}\Z")  # of a gold: its author's remark
BUILT = re.compile(r":|\\mid|\|")
LINKS = frozenset(("or", "and", ""))
WORDS = re.compile(r"(?:\\(?:text|textbf|mathrm|mbox)\s*\{([A-Za-z][A-Za-z ]+)\.?\}|([A-Za-z]{3,}))\.?")
BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?_(?:\{([0-9]{1,2})\}|([0-9]))")
E_NOTATION = re.compile(r"(?<![A-Za-z0-9_\\.])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]([-+]?[0-9]{1,3})(?![A-Za-z0-9])")
MOST_ZEROS = 30
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
        self.harmless = harmless(marker)

    def prepare(self, response: Response) -> Judgement | Response:
        """Decides what needs no sympy: no answer, the same text, plain numbers, what is too large to evaluate.

        Else the answer and the gold's answer, as a response that is read the same; of a response whose answer must be
        searched, all of the text.
        """
        gold = gold_answer(response.gold)
        if not gold:
            return Judgement(False, error_class="no_gold", rule="no gold")
        several = values(gold) > 1 and read_quantity(gold, gold=True) is None
        found = read_answer(response.text, self.answers, self.marker, several=several, thinking=self.thinking)
        if found is None:
            return Judgement(False, rule=NO_ANSWER)
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
            return Judgement(False, rule=NO_ANSWER)
        from .latex import search  # sympy: only here, in the process that can be killed

        answer, gold = found.text, prepared.gold
        if not found.sure:
            answer = gold_answer(search(_written_out(characters(answer))))
        if "$" in gold or "\\(" in gold or "\\[" in gold:
            gold = gold_answer(search(gold)) or gold
        if not answer:
            return Judgement(False, rule=NO_ANSWER)
        if found.sure and gold == prepared.gold:  # as `prepare` saw them
            return _decide(answer, gold)
        return _decide_quickly(answer, gold) or _decide(answer, gold)


# ---- without sympy --------------------------------------------------------------------------------------------------


def _decide_quickly(answer: str, gold: str) -> Judgement | None:
    """What needs no sympy."""
    left, right = PLAIN.fullmatch(answer), PLAIN.fullmatch(gold)
    if left and right:
        number, wanted = _plain(left), _plain(right)
        return Judgement(number == wanted, str(number), rule="two numbers, exactly")
    gold = spelled(gold)
    answer = _chosen(spelled(without_dollars(answer)), gold)
    wanted = _gold_quantity(gold)
    number = read_quantity(answer, gold=wanted is None)
    written = str(wanted.value) if wanted is not None else _same(gold)
    if number is not None and wanted is not None:
        passed = wanted.value in number.seen_as(wanted)
        if passed or not (_rounded(number, wanted) or _rounded(wanted, number)):
            rule = "two numbers, with the units that they have, exactly"
            return Judgement(passed, written if passed else _shown(number, wanted), rule=rule)
        return Judgement(True, written, rule=f"a decimal of {SIGNIFICANT} digits or more that shows the other")
    if _same(answer) == _same(gold):
        return Judgement(True, written, rule="the same signs")
    for pattern, read, rule in ((WORDS, _word, "two words"), (BASED, _based, "two numbers in a base")):
        left, right = pattern.fullmatch(answer), pattern.fullmatch(gold)
        if left and right:
            passed = read(left) == read(right)
            return Judgement(passed, written if passed else _same(answer), rule=rule)
    unclear = ambiguous(answer) or ambiguous(gold) or _takes_back(answer)
    if not unclear and not same_unit(part_unit(answer)[1], part_unit(gold)[1]):
        unclear = "units of two different things"
    if unclear:
        return Judgement(False, _same(answer), rule=unclear)
    if too_large(gold):
        return Judgement(False, error_class="gold_too_large", rule="the gold is too large to be evaluated")
    if too_large(answer):
        rule = "the answer is too large to be evaluated"
        shown = str(number.value) if number else _same(answer)
        return Judgement(False, shown, error_class="too_large", fault=True, rule=rule)
    return None


def _plain(match: re.Match[str]) -> Fraction | int:
    sign, whole, grouped, decimal = match.groups()
    value = Fraction(decimal) if decimal else int(whole or grouped.replace(",", ""))
    return -value if sign else value


@lru_cache(maxsize=256)
def _gold_quantity(gold: str) -> Quantity | None:
    return read_quantity(gold, gold=True)


def _shown(number: Quantity, wanted: Quantity) -> str:
    """A wrong number as an answer; with its unit, where that is what is wrong."""
    unit = f" {' '.join(sorted(number.unit.words))}" if number.unit and number.value == wanted.value else ""
    return f"{number.value}{unit}"


def _chosen(answer: str, gold: str) -> str:
    """Of `(B) 12` the letter, where the gold is one, and else the rest."""
    wanted, found = OPTION.fullmatch(gold), CHOSEN.fullmatch(answer)
    if wanted and (alone := found or OPTION.fullmatch(answer)):
        return gold if (alone["letter"] if alone is found else alone[1]) == wanted[1] else answer
    if wanted or not found or CHOSEN.fullmatch(gold):
        return answer
    return spelled(found["rest"])


def _takes_back(answer: str) -> str:
    """How words within a formula change what it says, "" where they do not: `4 \\text{ (or 5)}`."""
    words = [said[1] for said in SAID.finditer(answer)]
    if not words or SAID.fullmatch(answer):
        return ""
    return "words beside the answer that change it" * any(
        said.strip(" ,;.").lower() not in LINKS
        and (re.search(r"[0-9]", said) or TAKES_BACK & set(re.findall(r"[a-z]+", said.lower().replace("'", ""))))
        for said in words
    )


def _written_out(text: str) -> str:
    """Numbers such as 1e6 with their zeros, which what searches an answer in words does not know."""

    def zeros(match: re.Match[str]) -> str:
        value = Fraction(match[1]) * Fraction(10) ** int(match[2])
        return f"{value.numerator}" if value.denominator == 1 else f"{float(value):.{MOST_ZEROS}f}".rstrip("0")

    return E_NOTATION.sub(lambda match: zeros(match) if abs(int(match[2])) <= MOST_ZEROS else match[0], text)


# ---- by sympy -------------------------------------------------------------------------------------------------------


def _decide(answer: str, gold: str) -> Judgement:
    """By sympy."""
    from .latex import read_formula, read_gold
    from .math_equal import equal, exact_number

    gold = spelled(gold)
    answer = _chosen(spelled(without_dollars(answer)), gold)
    answer, bare = part_unit(answer)[0], WORDS_BEHIND.sub("", part_unit(gold)[0])
    wanted, value = read_gold(bare), read_formula(ordered_as(bare, answer))
    if wanted is None or value is None:
        passed = _same(answer).casefold() == _same(bare).casefold()
        rule = f"the {'gold' if wanted is None else 'answer'} is no formula that can be read: by their signs"
    elif other_brackets(bare, answer):
        passed, rule = False, "a set is no tuple and no interval"
    else:
        passed, rule = equal(wanted, value), f"a {_kind(value)} against a {_kind(wanted)}, by their values"
    if passed:
        number = _gold_quantity(gold)
        return Judgement(True, str(number.value) if number is not None else _same(gold), rule=rule)
    number = read_quantity(answer)
    exact = exact_number(value) if number is None else number.value
    try:
        shown = str(exact if exact is not None else value if value is not None else _same(answer))
    except ValueError:  # an integer too long for Python to print
        shown = _same(answer)
    return Judgement(False, shown, rule=rule)


def _kind(value: Any) -> str:
    """What a formula is, for people."""
    name = next((part.__name__ for part in type(value).__mro__ if part.__name__ in KINDS), "")
    return KINDS.get(name, "formula")


def brackets(text: str) -> str:
    """What a text as a whole stands in: `{` a set, `(` or `[` a tuple or an interval, "" nothing."""
    text = text.strip()
    if text.startswith("\\{") and text.endswith("\\}") and "\\}" not in text[:-2]:
        return "" if BUILT.search(text) else "{"
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        depth = 0
        for at, sign in enumerate(text):
            depth += (sign in "([") - (sign in ")]")
            if not depth:
                return text[0] if at == len(text) - 1 and "," in text else ""
    return ""


def other_brackets(gold: str, answer: str) -> bool:
    """A set is no tuple and no interval."""
    kinds = {brackets(gold), brackets(answer)}
    return "{" in kinds and bool(kinds & {"(", "["})


def ordered_as(gold: str, answer: str) -> str:
    """A list without brackets as a tuple, where the gold is one: its order counts."""
    if (
        brackets(gold) == "("
        and not brackets(answer)
        and not COMPARED.search(answer)
        and values(answer) == values(gold[1:-1]) > 1
    ):
        return f"({answer})"
    return answer


def _is_formula(text: str) -> bool:
    """Whether a response is nothing but a formula: no words, no line's end, more than a number."""
    inner = without_dollars(text)
    if len(text) > LONGEST_FORMULA or (inner == text and re.search(r"\$|\\[(\[]|\n", text)):
        return False
    bare = LIST_WORD.sub(" ", IN_BRACES.sub(" ", inner))
    return not PROSE.search(bare) and (inner != text or re.search(r"[\\A-Za-z=]", text) is not None)


def _same(latex: str) -> str:
    """A formula by its signs alone, without the spaces between them; digits that stood apart stay apart."""
    return "".join(_signs(latex.strip().rstrip(".")))


def _signs(latex: str) -> Iterator[str]:
    end, last = 0, ""
    for match in SHOWN.finditer(latex):
        sign = match[0]
        if sign in ("$", "\\$"):
            continue
        if sign.startswith("\\text{"):
            sign = rf"\text{{{' '.join(sign[6:-1].split())}}}"
        apart = match.start() > end and last[-1:].isdigit() and sign[0].isdigit()
        command = last.startswith("\\") and last[-1:].isalpha() and sign[0].isalpha()
        yield f" {sign}" if apart or command else sign
        end, last = match.end(), sign


def _rounded(decimal: Quantity, other: Quantity) -> bool:
    """Whether a decimal of at least SIGNIFICANT digits is all that it shows of a value whose decimals have no end."""
    value = other.in_unit_of(decimal)
    if decimal.places < 0 or value is None or 10**400 % value.denominator == 0:
        return False
    digits = len(str(abs(int(decimal.value * 10**decimal.places))))
    return digits >= SIGNIFICANT and abs(decimal.value - value) < Fraction(1, 10**decimal.places)


def _word(match: re.Match[str]) -> str:
    return "".join((match[1] or match[2]).split()).casefold()


def _based(match: re.Match[str]) -> tuple[str, int]:
    """A number as written in its base."""
    return match[1].lstrip("0").casefold(), int(match[2] or match[3])
