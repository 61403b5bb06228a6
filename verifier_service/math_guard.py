r"""Formulas whose evaluation would explode, told without evaluating them: linear in the text, before any sympy.

The formula is read once, into an upper bound of each part's magnitude: log10 of its absolute value, where a letter
counts as 1. So what is known of every power, factorial and binomial before it is computed is how many digits it would
have, or what degree. What is beyond the limits below is refused: no answer to an exercise is, and sympy or its parser
would hang or run out of memory on many of them. So is an integral, which is an exercise and no answer: to work it out
may take for ever. What slips through is killed by the pool.
"""

import math
import re

LONGEST = 2_000  # characters
MOST_DIGITS = 20_000  # of a number to be computed; 2006! has 5,800
MOST_TERMS = 500  # of a power of a sum in letters, multiplied out
HIGHEST_DEGREE = 200  # of a fraction in letters: polynomial division
HIGHEST_BOUND = 1_000  # of a sum's or product's index
MOST_BRACKETS = 7  # around one another, braces of no command among them: the parser's time grows exponentially
MOST_EXPONENTS = 3  # in one another
DEEPEST = 40  # parts in one another
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+|\*\*|[a-zA-Z]|\S", re.DOTALL)
OPENING = {"(": ")", "[": "]", "{": "}"}
LOOSE = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|[,;!: ])|~")
DIGITS = frozenset("0123456789.")
LOG_E = math.log10(math.e)
HUGE = 1e300


class TooLarge(Exception):
    """A part is beyond the limits."""


def too_large(latex: str) -> bool:
    """Whether a formula must not be evaluated."""
    if len(latex) > LONGEST:
        return True
    walk = _Walk(TOKEN.findall(LOOSE.sub("", latex)))
    try:
        walk.group("")
    except TooLarge:
        return True
    return walk.degree > HIGHEST_DEGREE and ("frac" in latex or "/" in latex)


Part = tuple[float, bool, int]  # log10 of its bound, whether it has a letter, how many terms it is the sum of


class _Walk:
    """One walk over the tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.brackets, self.depth, self.exponents = tokens, 0, 0, 0, 0
        self.degree = 0.0  # the highest of a letter

    def group(self, closing: str) -> Part:
        """Terms up to the closing bracket: the largest of them, times how many."""
        largest, factors, letter, terms = 0.0, 0.0, False, 1
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token in (")", "]", "}"):  # brackets need not match: half-open intervals
                if closing:
                    self.at += 1
                    break
                self.at += 1
            elif token in ("+", "-", "=", "<", ">", ",", ";", "&", "\\\\", "\\cup", "\\pm", "\\le", "\\ge"):
                largest, factors, terms = max(largest, factors), 0.0, terms + 1
                self.at += 1
            else:
                bound, has_letter = self.power()
                factors, letter = factors + bound, letter or has_letter
        return max(largest, factors) + math.log10(terms), letter, terms

    def power(self) -> tuple[float, bool]:
        """An atom with its exponents and factorials; powers bind to the right."""
        base, letter, terms = self.atom()
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token in ("^", "**"):
                self.at += 1
                self.exponents += 1
                if self.exponents > MOST_EXPONENTS:
                    raise TooLarge
                exponent, exponent_letter = self.power()
                self.exponents -= 1
                base = self.raised(base, exponent, terms if letter else 0)
                letter = letter or exponent_letter
            elif token == "!":
                self.at += 1
                base = self.factorial(base)
            elif token == "_":
                self.at += 1
                self.atom()
            else:
                break
        return base, letter

    def raised(self, base: float, exponent: float, terms: int = 0) -> float:
        """The bound of a power, where it is within the limits. `terms`: of a base with letters."""
        times = 10**exponent if exponent < 300 else HUGE
        digits = times * max(base, 0.31) if base else 0.0
        if digits > MOST_DIGITS or (terms and times > MOST_DIGITS):
            raise TooLarge
        if terms > 1 and (times > MOST_TERMS or math.comb(int(times) + terms - 1, terms - 1) > MOST_TERMS):
            raise TooLarge
        self.degree = max(self.degree, times if terms else 0.0)
        return digits

    def factorial(self, base: float) -> float:
        digits = 10**base * max(base, 0.0) if base < 300 else HUGE
        if digits > 4 * MOST_DIGITS:
            raise TooLarge
        return digits

    def atom(self) -> Part:
        """A number, a letter, a group, or a command with what belongs to it."""
        if self.at >= len(self.tokens):
            return 0.0, False, 1
        self.enter()
        self.at += 1
        part = self.of_token(self.tokens[self.at - 1])
        self.depth -= 1
        return part

    def enter(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise TooLarge

    def of_token(self, token: str) -> Part:
        if token in OPENING:
            return self.bracketed(token)
        if token[0] in DIGITS:
            return self.number(token), False, 1
        if token == "e":
            return LOG_E, False, 1
        if token == "\\exp":
            return self.raised(LOG_E, self.atom()[0]), False, 1
        if token == "\\Gamma":
            return self.factorial(self.atom()[0]), False, 1
        if token.startswith("\\") and token.endswith("int"):
            raise TooLarge
        if token == "\\pi":
            return 0.5, False, 1
        if token in ("\\sum", "\\prod"):
            return self.bounded()
        if token in ("\\binom", "\\dbinom", "\\tbinom"):
            return self.binomial()
        if token.startswith("\\") and token[1:].endswith("frac"):
            over, under = self.atom(), self.atom()
            return max(over[0], under[0]), over[1] or under[1], max(over[2], under[2])
        if token == "\\sqrt":
            return self.root()
        return 0.0, len(token) == 1 and token.isalpha(), 1

    def bracketed(self, token: str) -> Part:
        before = self.tokens[self.at - 2] if self.at > 1 else ""
        counts = token != "{" or not (before.startswith("\\") or before in ("^", "_", "}", "]"))
        self.brackets += counts
        if self.brackets > MOST_BRACKETS:
            raise TooLarge
        part = self.group(OPENING[token])
        self.brackets -= counts
        return part

    def number(self, token: str) -> float:
        digits = token.replace(",", "").partition(".")[0].lstrip("0")
        if len(digits) > 15:
            return float(len(digits))
        return math.log10(int(digits) + (not token.isdecimal())) if digits else 0.0

    def bounded(self) -> Part:
        """A sum or product: its bounds are no powers."""
        for _ in range(2):
            if self.at < len(self.tokens) and self.tokens[self.at] in ("_", "^"):
                self.at += 1
                if self.atom()[0] > math.log10(HIGHEST_BOUND):
                    raise TooLarge
        return 0.0, True, 1

    def binomial(self) -> Part:
        over, under = self.atom(), self.atom()
        count = 10 ** min(over[0], under[0], 300.0)
        if count * max(over[0], 0.31) > MOST_DIGITS:
            raise TooLarge
        return count * over[0], over[1] or under[1], 1

    def root(self) -> Part:
        if self.at < len(self.tokens) and self.tokens[self.at] == "[":
            self.atom()
        return self.atom()
