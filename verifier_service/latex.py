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
from math_verify.grader import should_treat_as_complex
from math_verify.parser import get_extraction_regexes, get_last_eq
from sympy import Basic, MatrixBase, nan, zoo

CONFIG = LatexExtractionConfig(boxed_match_priority=-1)
NORMALIZATION = replace(CONFIG.normalization_config, boxed="none")
ROOT = re.compile(r"\\?\bsqrt\s*\(([^()]*)\)")
UPRIGHT = re.compile(r"\\mathrm\s*\{\s*([a-z])\s*\}|\\text\s*\{\s*([ei])\s*\}")
LIST_WORD = re.compile(r"(?<=[0-9)}])(?:or|and)(?=[0-9A-Z(\\-])")  # a word that nobody set apart
ESCAPED = re.compile(r"\\\\(?=[a-zA-Z])")
DOTS = re.compile(r"\\(?:[lcd]?dots\w*|vdots)|\.\.\.|…")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SCALE = re.compile(rf"(?:\\text|\\mbox|\\mathrm)\s*\{{\s*({'|'.join(SCALES)})\b|\b({'|'.join(SCALES)})\s*$")
SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ", "π": r"\pi "}
    | {"∞": r"\infty ", "°": r"^\circ ", "\u00a0": " ", "∪": r"\cup "}
)
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
    if "matrix" not in latex:
        latex = ESCAPED.sub(r"\\", latex)
    latex = SCALE.sub(lambda match: rf"\cdot 10^{{{SCALES[match[1] or match[2]]}}}\text{{", latex)
    latex = ROOT.sub(r"\\sqrt{\1}", latex.translate(SIGNS)).replace("**", "^")
    latex = LIST_WORD.sub(", ", latex)
    return normalize_latex(UPRIGHT.sub(lambda match: match[1] or match[2], latex), NORMALIZATION)


@lru_cache(maxsize=256)  # golds come again with each response of their group
def read_formula(latex: str) -> Basic | MatrixBase | None:
    """The value of a formula; None where it could not be read to its end."""
    if DOTS.search(latex):
        return None
    text = normalised(latex)
    for part in dict.fromkeys((text, get_last_eq(text))):
        try:
            value = _Reader(is_real=not should_treat_as_complex(part)).parse(part)
        except Exception as error:  # the parser raises bare Exceptions, and whatever its conversions do
            if isinstance(error, MemoryError | RecursionError):
                raise
            continue
        if not isinstance(value, (Basic, MatrixBase)) or value.has(nan, zoo):
            return None
        return value
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
