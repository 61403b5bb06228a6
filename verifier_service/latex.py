r"""Formulas read by math-verify's parser, whole or not at all. It may hang: only in a process that can be killed.

The parser stops without a word where it understands no more, and then `4\sqrt(2)` is 4 and `1:4:9:\ldots` is 1/4/9.
Here a formula that it did not read to the end has no value, and is compared as text. So has one that goes on in dots,
whose rest nobody knows, and one that is no number, such as 1/0.
"""

import logging
import re
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from antlr4 import Token
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from latex2sympy2_extended.math_normalization import normalize_latex
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify.grader import should_treat_as_complex, unwrap_fcs
from math_verify.parser import get_extraction_regexes, get_last_eq
from sympy import And, Basic, Eq, Expr, Intersection, MatrixBase, Pow, Rational, Set, Union, nan, zoo
from sympy.core.relational import Relational

from .forms import COMPARED

CONFIG = LatexExtractionConfig(boxed_match_priority=-1)
NORMALIZATION = replace(CONFIG.normalization_config, boxed="none", units=False)  # quantities.py knows them
ROOT = re.compile(r"\\?\bsqrt\s*\(([^()]*)\)")
UPRIGHT = re.compile(r"\\mathrm\s*\{\s*([a-z])\s*\}|\\text\s*\{\s*([ei])\s*\}")
LIST_WORD = re.compile(r"(?<=[0-9)}])(?:or|and)(?=[0-9A-Z(\\-])")  # a word that nobody set apart
MANY_LINES = re.compile(r"matrix|\{(?:cases|array|aligned|align)\}")
ESCAPED = re.compile(r"\\\\(?=[a-zA-Z])")
PRIMED = re.compile(r"'(?![^{]*\})|\\prime")  # a derivative, feet, minutes: the parser leaves it out
DOTS = re.compile(r"\\(?:[lcd]?dots\w*|vdots)|\.\.\.|…")
JUNCTION = re.compile(r"\s*(\\text\{ ?(?:or|and) ?\}|\\(?:lor|vee|land|wedge)(?![A-Za-z])|\b(?:or|and)\b)\s*")
AND = ("and", r"\land", r"\wedge", r"\text{and}", r"\text{ and }")
BUILDER = re.compile(r"\\\{\s*([a-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?::|\\mid(?![a-z])|\|)\s*(.*)\\\}", re.DOTALL)
CONJUGATE = re.compile(r"\\(?:overline|bar)\s*\{([-+0-9a-z. ]*i[-+0-9. ]*)\}")
I_ALONE = re.compile(r"(?<![a-z])i(?![a-z])")
MOST_PARTS = 8
UNSOLVED = (NotImplementedError, ArithmeticError, AttributeError, TypeError, ValueError)  # what as_set raises
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(rf"(?:\\text|\\mbox|\\mathrm)\s*\{{\s*({'|'.join(SCALES)})\b|\b({'|'.join(SCALES)})\s*$")
BROKEN_INLINE = re.compile(r"(?<!\$)\$[ \t]*\n[^$]*\n[ \t]*\$(?!\$)|\\\([ \t]*\n[^\\]*\n[ \t]*\\\)")  # a line ends it

for name in ("math_verify.utils", "math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # they warn that the timeouts are off, and show the text


class _WholeParser(PSParser):
    """Raises where something is left that it did not read.

    It tries ANTLR's fast prediction first: where that reads to the end without an error, the exact one reads the same.
    """

    def math(self):
        tokens: Any = self.getTokenStream()
        for mode in (PredictionMode.SLL, PredictionMode.LL):
            self._interp.predictionMode = mode
            try:
                tree = super().math()
                if tokens.LA(1) == Token.EOF:
                    return tree
            except RecursionError:
                raise
            except Exception:  # what the error listener raises
                if mode == PredictionMode.LL:
                    raise
            self.reset()
        raise ValueError("the parser stopped before the end")


class _Reader(_Latex2Sympy):
    def create_parser(self, latex_str: str) -> PSParser:
        parser = _WholeParser(super().create_parser(latex_str).getTokenStream())
        parser.removeErrorListeners()
        parser.addErrorListener(self.MathErrorListener(latex_str))
        return parser


def normalised(latex: str) -> str:
    """math-verify's spelling of a formula, with its mistakes in `\\sqrt(2)` and `\\mathrm{e}` kept out."""
    if not MANY_LINES.search(latex):
        latex = ESCAPED.sub(r"\\", latex)
    latex = SCALE.sub(lambda match: rf"\cdot 10^{{{SCALES[match[1] or match[2]]}}}\text{{", latex)
    latex = ROOT.sub(r"\\sqrt{\1}", latex).replace("**", "^")
    latex = LIST_WORD.sub(", ", latex)
    return normalize_latex(UPRIGHT.sub(lambda match: match[1] or match[2], latex), NORMALIZATION)


@lru_cache(maxsize=256)  # golds come again with each response of their group; a response's must leave nothing behind
def read_gold(latex: str) -> Basic | MatrixBase | None:
    """The value of a gold's formula."""
    return read_formula(latex)


def read_formula(latex: str) -> Basic | MatrixBase | None:
    """The value of a formula; None where it could not be read to its end. Roots of odd degree are real ones."""
    if DOTS.search(latex) or PRIMED.search(latex):
        return None
    if (solutions := _read_solutions(latex)) is not None:  # none is an answer too
        return solutions
    text = normalised(CONJUGATE.sub(lambda match: f"({I_ALONE.sub('(-i)', match[1])})", latex))
    for part in dict.fromkeys((text, get_last_eq(text))):
        try:
            value = _Reader(is_real=not should_treat_as_complex(part)).parse(part)
        except Exception as error:  # the parser raises bare Exceptions, and whatever its conversions do
            if isinstance(error, MemoryError | RecursionError):
                raise
            continue
        if not isinstance(value, (Basic, MatrixBase)) or value.has(nan, zoo):
            return None
        if isinstance(value, Expr) and any(map(_is_odd_root, value.atoms(Pow))):
            return value.replace(_is_odd_root, _real_root)
        return value
    return None


def _is_odd_root(value: Basic) -> bool:
    """A cube root, or another odd one, of a negative number: the parser has the complex one."""
    if not isinstance(value, Pow) or not isinstance(value.exp, Rational) or value.exp.p != 1 or value.exp.q % 2 == 0:
        return False
    base = value.base.doit() if value.base.is_number else None
    return bool(base is not None and base.is_extended_real and base.is_negative)


def _real_root(value: Any) -> Basic:
    return -((-value.base) ** value.exp)


def _read_solutions(latex: str) -> Set | None:
    r"""The numbers that `x<1 \text{ or } x>3` or `\{x : x>2\}` speaks of; None of what is neither."""
    builder = BUILDER.fullmatch(latex.strip())
    if builder:
        latex = builder[2]
    parts = JUNCTION.split(latex)[::2]
    if (len(parts) == 1 and not builder) or len(parts) > MOST_PARTS or not all(map(COMPARED.search, parts)):
        return None
    joined = {"and" if junction.strip() in AND else "or" for junction in JUNCTION.findall(latex)}
    read = [read_formula(part.strip()) for part in parts]
    if len(joined) > 1 or not all(isinstance(one, Relational | And) for one in read):
        return None
    letters = set[Basic]().union(*(one.free_symbols for one in read if one is not None))
    if len(letters) != 1 or any(isinstance(one, Eq) for one in read):
        return None
    try:
        sets = [unwrap_fcs(one).as_set() for one in read]  # pyright: ignore
        return (Intersection if joined == {"and"} else Union)(*sets)
    except UNSOLVED:  # sympy cannot
        return None


def search(text: str) -> str:
    """The formula or number in a text that math-verify takes for the answer first, "" where there is none.

    The best of its patterns decides, and of those that it matches there the last: never an earlier one which could be
    read in place of one that could not.
    """
    text = BROKEN_INLINE.sub("", text)
    patterns = [
        (priority, pattern)
        for of_target, _ in get_extraction_regexes([CONFIG, ExprExtractionConfig()])
        for pattern, priority in of_target
    ]
    for _, group in groupby(sorted(patterns, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        matches = [match for _, pattern in group for match in pattern.finditer(text)]
        if matches:
            return _formula(max(matches, key=lambda match: (match.end(), -match.start())))
    return ""


def _formula(match: re.Match[str]) -> str:
    """What a pattern matched, as one formula."""
    found = {name: value for name, value in match.groupdict().items() if value}
    formulas = [value for name, value in found.items() if "latex" in name]
    percent = r"\%" if any(name.endswith("percent") for name in found) else ""
    if formulas:
        return ", ".join(formulas) + percent
    if "expr" in found:
        return found["expr"].strip()
    integer = "".join(value for name, value in found.items() if name.startswith("integer"))
    decimal = "".join(value for name, value in found.items() if name.startswith("decimal"))
    return integer.replace(",", "").replace(" ", "") + decimal.replace(",", ".") + percent
