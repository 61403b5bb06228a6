r"""What a step intends, without its instance: numbers become ⟨num⟩, variables ⟨v⟩, names ⟨e⟩; the rest stays.

A rule, and its limits:
- A number takes its currency, percent sign and separators of thousands with it. 3/4 and \frac{3}{4} are one number
  each, 48/2 = 24 divides one by another. Of number words, "two" to "trillion".
- A variable is a letter alone, with its subscript: x, y_1, x2; in a formula also capitals side by side (AB, ABC). Stay:
  products (xy), Greek commands (\alpha), the x of "3 x 4", and outside formulas "a", "I" and, where a sentence starts,
  "A", unless they stand beside an operator.
- A name is a run of capitalised words that starts no sentence. It stays where a tool has it ("Heron's formula"), and in
  a title. Where a sentence starts, a name stays; elsewhere, a capitalised word that names nothing does not.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from .segments import formulas

NUMBER_SIGN, VARIABLE_SIGN, ENTITY_SIGN = "⟨num⟩", "⟨v⟩", "⟨e⟩"

LETTER = r"[^\W\d_]"
NUMBER_WORDS = (
    "(?i:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty"
    "|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion|trillion)"
)
SPELLED = rf"(?<!{LETTER}){NUMBER_WORDS}(?:[- ]{NUMBER_WORDS})*(?!{LETTER})"
DIGITS = r"(?>\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})++(?!\d)(?:\.\d++)?|\d++(?:\.\d++)?|\.\d++)"
PART = rf" ?(?:\{{ ?{DIGITS} ?\}}|\d)"
NUMBER = rf"(?:\\[dtc]?frac{PART}{PART}|{DIGITS}(?:/{DIGITS}(?! ?[=/]))?)(?: ?\\?%)?|{SPELLED}"
VARIABLE = (
    rf"(?<!{LETTER})[A-Za-zα-ορ-ωΑ-Ω](?:_\{{[^{{}}$\s]{{0,40}}\}}"
    rf"|(?:_(?:\d+|[A-Za-z])|\d{{1,3}})?(?!{LETTER}|['’]{LETTER}))"
)
UPRIGHT = r"\\(?:text[a-z]*|mbox|mathrm|mathbb|mathcal|operatorname\*?)\{[^{}$\n]{0,200}\}"
VERBATIM = (
    r"\\(?:begin|end)\{[^{}\n]{0,40}\}|\\[a-zA-Z]+|\\[^\n]|⟨(?:num|v|e)⟩|\b(?:e\.g|i\.e)\.|(?<=[\w⟩}%])['’][a-z]{1,2}\b"
    r"|(?<=[\d⟩%)] )x(?= [\d⟨$.(])"
)
NAME = rf"(?:(?:Mrs?|Ms|Dr|Prof|St)\. ?)?[A-ZÀ-ÖØ-Þ]{LETTER}+(?:-{LETTER}+|['’]{LETTER}{{3,}})*"
WORD = rf"{LETTER}+(?:['’]{LETTER}+)?"
PROSE = re.compile(
    rf"(?P<upright>{UPRIGHT})|(?P<number>\\?[$£€](?={DIGITS}){NUMBER}|{NUMBER})|(?P<verbatim>{VERBATIM})"
    rf"|(?P<variable>{VARIABLE})|(?P<name>{NAME}(?: {NAME})*)|(?P<word>{WORD})|(?P<stop>[.!?:…。！？\n]+)"
)
FORMULA = re.compile(
    rf"(?P<upright>{UPRIGHT})|(?P<number>(?:\\\$)?{NUMBER})|(?P<verbatim>{VERBATIM})"
    rf"|(?P<variable>{VARIABLE}|(?<!{LETTER})[A-Z]{{2,4}}(?!{LETTER}))|(?P<word>{WORD})"
)
NUMBERS, FIRST_NAME = re.compile(NUMBER), re.compile(NAME)

OPERATORS = frozenset("=+*/^<>≤≥×·")
OPENING_QUOTES = frozenset("\"'“‘")
TOOL_WORDS = (
    r"(?i:theorem|formula|lemma|law|rule|identity|identities|inequality|equation|principle|method|algorithm|criterion"
    r"|triangle|sequence|expansion|series|distribution|diagram|function|coordinate|system)(?:e?s)?(?!\w)"
)
TOOL = re.compile(rf"(?:['’]s?)?[ -]{TOOL_WORDS}")
NO_NAMES = re.compile(
    rf"\b(?:{TOOL_WORDS}|(?:Step|Case|Part|Answer|Solution|Final|Cosines|Sines|LCM|GCD|GCF|HCF|LHS|RHS|AM-GM)\b)"
)
NOT_WITHIN = r"(?<![^\s*#(\"“])"
CAPITALISED = re.compile(rf"{NOT_WITHIN}(?!{NUMBER_WORDS}(?!{LETTER}))[A-Z][a-z]+(?!{LETTER})")
LOWER = re.compile(rf"{NOT_WITHIN}(?!{NUMBER_WORDS}(?!{LETTER}))[a-z]{{4,}}(?!{LETTER})")
LAST_WORDS = (".", "!", "?")
DISPLAYED = (r"\[", "$$", r"\begin")


def abstract(text: str) -> str:
    """The text with ⟨num⟩, ⟨v⟩ and ⟨e⟩ for its numbers, variables and names; of an abstracted text, itself."""
    return "".join(_Reader(text).read())


class _Reader:
    """Reads a text once, from its start to its end."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.begins = True  # the next word starts a sentence
        self.line_end, self.title = -1, False  # of the last line with a name

    def read(self) -> Iterator[str]:
        spans = formulas(self.text)
        edges = [0, *(edge for span in spans for edge in span), len(self.text)]
        for number, (start, end) in enumerate(pairwise(edges)):
            pattern = FORMULA if number % 2 else PROSE
            at = start
            for match in pattern.finditer(self.text, start, end):
                yield self.text[at : match.start()]
                yield self._formula_part(match) if number % 2 else self._prose_part(match)
                at = match.end()
            yield self.text[at:end]
            if number % 2:
                inner = self.text[start:end].rstrip("$)]\\ ")
                self.begins = self.text.startswith(DISPLAYED, start) or inner.endswith(LAST_WORDS)

    def _formula_part(self, match: re.Match[str]) -> str:
        kind, found = match.lastgroup, match[0]
        if kind == "upright":
            return NUMBERS.sub(NUMBER_SIGN, found)
        return {"number": NUMBER_SIGN, "variable": VARIABLE_SIGN}.get(kind or "", found)

    def _prose_part(self, match: re.Match[str]) -> str:
        kind, found, begins = match.lastgroup, match[0], self.begins
        if kind in ("upright", "number"):
            return self._formula_part(match)
        if kind == "stop":
            self.begins = True
            return found
        self.begins = begins and kind == "verbatim" and found not in (VARIABLE_SIGN, ENTITY_SIGN)
        if kind == "variable":
            return found if self._is_word(match, begins) else VARIABLE_SIGN
        return self._name(match, begins) if kind == "name" else found

    def _is_word(self, letter: re.Match[str], begins: bool) -> bool:
        """Whether "a", "A" or "I" is one."""
        if letter[0] not in ("a", "I") and not (letter[0] == "A" and begins):
            return False
        before = self.text[max(0, letter.start() - 2) : letter.start()].rstrip()[-1:]
        after = self.text[letter.end() : letter.end() + 2].lstrip()[:1]
        return not OPERATORS & {before, after}

    def _name(self, run: re.Match[str], begins: bool) -> str:
        first = FIRST_NAME.match(run[0])
        assert first is not None
        if NO_NAMES.search(run[0]) or TOOL.match(self.text, run.end()) or self._in_title(run.start()):
            return run[0]
        if not begins and self.text[max(0, run.start() - 1) : run.start()] not in OPENING_QUOTES:
            return ENTITY_SIGN
        return run[0] if first.end() == len(run[0]) else f"{first[0]} {ENTITY_SIGN}"

    def _in_title(self, at: int) -> bool:
        """Whether most words of the line are capitalised, and nothing ends it."""
        if at >= self.line_end:
            start = self.text.rfind("\n", max(0, self.line_end), at) + 1
            end = self.text.find("\n", at)
            self.line_end = len(self.text) if end < 0 else end
            line = self.text[start : self.line_end].rstrip()
            capitalised = len(CAPITALISED.findall(line))
            few = capitalised < 2 or line.endswith(LAST_WORDS)
            self.title = not few and capitalised > len(LOWER.findall(line))
        return self.title
