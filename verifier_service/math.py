r"""Mathematical equality of the last box with the gold answer: exact for plain numbers, math-verify for the rest.

math-verify's own timeouts are off: they are SIGALRM, which fails in a thread, and a timeout there is a silent False.
This verifier may hang, and runs in a process that can be killed (pool.py). Four wrong accepts of math-verify 0.9.0 are
kept out: exact rationals that differ by less than its rounding, `\mathrm{e}` read as a symbol, `\sqrt(2)` read as
nothing, and an earlier box standing in for an unterminated last one.
"""

import logging
import re
from typing import Any

from math_verify import parse, verify
from sympy import Basic, Rational

from .answers import Decision, last_box, plain_number

ROOT = re.compile(r"\\sqrt\s*\(([^()]*)\)")
UPRIGHT = re.compile(r"\\mathrm\s*\{\s*([a-z])\s*\}")

for name in ("math_verify.utils", "math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.ERROR)  # they warn that the timeouts are off


class MathVerifier:
    """The last box decides. The canonical answer is the number, or sympy's form, or the box's text."""

    def __call__(self, text: str, gold: str) -> Decision:
        quick = self.decide_quickly(text, gold)
        return quick if quick else self._decide(last_box(text) or "", last_box(gold) or gold)

    def decide_quickly(self, text: str, gold: str) -> Decision | None:
        """The decision where it needs no sympy, else None: no box, or plain numbers on both sides."""
        box = last_box(text)
        if box is None:
            return Decision(False, "")
        answer, wanted = plain_number(box), plain_number(gold)
        if answer is None or wanted is None:
            return None
        return Decision(answer == wanted, str(answer))

    def _decide(self, box: str, gold: str) -> Decision:
        answer, wanted = _parse(box), _parse(gold)
        if not answer or not wanted:
            return Decision(box == gold.strip(), box)
        left, right = _exact(answer[0]), _exact(wanted[0])
        if left is not None and right is not None:
            return Decision(left == right, _canonical(left, box))
        passed = verify(wanted, answer, timeout_seconds=None, raise_on_error=True)
        number = plain_number(box)
        return Decision(passed, _canonical(answer[0] if number is None else number, box))


def _parse(latex: str) -> list[Any]:
    """math-verify's reading: a sympy expression (if it could be read) and the normalised string."""
    latex = UPRIGHT.sub(r"\1", ROOT.sub(r"\\sqrt{\1}", latex))
    return parse(f"\\boxed{{{latex}}}", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]


def _exact(value: object) -> Rational | None:
    """The exact rational that an expression is, if it is one: decimals are not, they compare with rounding."""
    if not isinstance(value, Basic) or not value.is_number or not value.is_rational:
        return None
    value = value.doit()
    return value if isinstance(value, Rational) else None


def _canonical(value: object, box: str) -> str:
    """One spelling for equal values; an integer too long for Python to print stays as it was written."""
    try:
        return str(value)
    except ValueError:
        return box


def warm_up() -> None:
    """Do once what makes a first call slow: imports, regular expressions, parser tables."""
    MathVerifier()("\\boxed{\\frac{1}{2}}", "0.5")
