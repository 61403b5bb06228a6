r"""Cuts a solution into steps at the places where its writer paused, with the tokens of each.

Boundaries, strongest first: a blank line, a mark at the start of a line or sentence ("Step 3:", "3.", "- ", "Then,",
"###", "**…**"), a line's end, a sentence's end, and last what stands between an announcement (a colon, a line before a
displayed formula) and the thing announced. No boundary lies inside a formula or \boxed{…}.

A solution is cut at its blank lines and marks. Steps that are too short are merged with the next one. Those that are
too long, or more than a quarter of the solution, are cut at what boundaries they have. All is linear in the text, or
nearly so, whatever the text is.
"""

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ...contracts.errors import ConfigError

BLANK, MARKED, LINE, SENTENCE, ANNOUNCED = STRENGTHS = (5, 4, 3, 2, 1)
FEWEST = 4  # steps of a solution that has the boundaries for them: one or two align with anything
UNDECIDED = 8  # tokens without text, after which their character is given up; a character has at most four
REPLACED = "\ufffd"

COLON = re.compile(r":\**[^\S\n]*$")
DISPLAY = re.compile(r"[ \t]*+(?:\\\[|\$\$|\\begin\{)")
LINE_END = re.compile(r"\n(?:[^\S\n]*+\n)*+")
WORD_MARK = r"(?:(?:Step|Case|Part)\s?\d{1,3}\b|(?:First|Second|Third|Next|Then|Finally|Lastly),)"
LINE_MARK = re.compile(
    rf"^[ \t]*+(?:#{{1,6}}[ \t]|\*\*(?=\S)|[-*•][ \t]|\(?\d{{1,3}}[.)](?=\s)|{WORD_MARK})", re.MULTILINE
)
SENTENCE_MARK = re.compile(rf"\s+{WORD_MARK}")
SENTENCE_END = re.compile(
    r"(?<![.!?…])([.!?…]++)(?:[\"'”’»)\]*_]|\$\$?|\\[)\]])*+(?=[^\S\n]++[^\sa-z]|(?<=[$\])])[A-Z])"
    r"|(?<![。！？])([。！？]++)[”’」』）]*+(?=[^\S\n]*+\S)"
)
ABBREVIATED = re.compile(
    r"(?:^|[^\w.])(?:e\.g|i\.e|s\.t|w\.r\.t|cf|vs|resp|approx|[Ee]qs?|[Ff]igs?|Sec|Thm|Mrs?|Ms|Dr|Prof|St)$"
)
NUMBERED = re.compile(r"[ \t#*>-]*\(?(?:(?:Step|Case|Part) ?)?(?:\d{1,3}|[A-Za-z])")
SHORT = 24  # characters of what stands before a full stop that ends no sentence

OPENED = {r"\(": r"\)", r"\[": r"\]", "$": "$", "$$": "$$"}
FORMULA_MARK = re.compile(
    r"(\n\s*\n[ \t]*)|(\\(?:begin|end)\{[^{}\n]{0,40}\}|\\(?:boxed|fbox) ?\{|\\\[|\$\$?(?!<<)|\\[^\n]|[{}])"
)
MONEY = re.compile(r"\$\d[\d,]*(?:\.\d+)?(?=[\s.,;:!?)–-]|$)")


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How long steps may be. A step has more than `most` tokens only where no boundary would cut it, and less than
    `least` only where the whole solution has. Raises ConfigError."""

    least: int = 24  # tokens of a step
    most: int = 160
    steps: int = 32  # of a solution

    def __post_init__(self) -> None:
        if self.least < 1 or self.most < 2 * self.least or self.steps < 1:
            raise ConfigError(
                "a step has at least one token and may have twice its least, and a solution has a step",
                str(self),
                "set least ≥ 1, most ≥ 2·least and steps ≥ 1",
            )


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens [start, end) of a solution, and what they say. Example: Step(0, 3, "2 + 2")."""

    start: int
    end: int
    text: str


def segment(pieces: Sequence[str], limits: StepLimits = StepLimits()) -> list[Step]:
    """The steps of a solution, from the text that each of its tokens adds.

    They cover every token, in order: a token with a boundary inside ends the step before. No tokens, no steps.
    """
    if not pieces:
        return []
    total = len(pieces)
    places = _cuts(pieces)
    strong = (place for place, strength in places.items() if strength >= MARKED)
    starts = _apart(strong, total, limits.least)
    longest = max(2 * limits.least, min(limits.most, total // FEWEST))
    by_strength = [[p for p, s in places.items() if s == strength] for strength in STRENGTHS]
    whole = list(pairwise([*starts, total]))
    starts = [start for begin, end in whole for start in _split(begin, end, by_strength, limits.least, longest)]
    if len(starts) > limits.steps:
        starts = [starts[i * len(starts) // limits.steps] for i in range(limits.steps)]
    return [Step(begin, end, "".join(pieces[begin:end])) for begin, end in pairwise([*starts, total])]


def segment_text(tokenizer: Any, text: str, limits: StepLimits = StepLimits()) -> list[Step]:
    """The steps of a given text, by the tokens that the tokenizer makes of it."""
    clean = text.encode("utf-8", "replace").decode("utf-8")  # no tokenizer takes half a surrogate pair
    return segment(pieces_of(tokenizer, tokenizer(clean, add_special_tokens=False)["input_ids"]), limits)


def _apart(places: Iterable[int], total: int, least: int) -> list[int]:
    """Starts of steps: 0 and each place that leaves the step before it, and what follows, `least` tokens."""
    starts = [0]
    for place in places:
        if place - starts[-1] >= least and total - place >= least:
            starts.append(place)
    return starts


def _split(begin: int, end: int, by_strength: Sequence[list[int]], least: int, longest: int) -> Iterator[int]:
    """Starts of the steps that [begin, end) becomes, cut in two again and again while it is longer than `longest`."""
    left = [(begin, end)]
    while left:
        begin, end = left.pop()
        cut = _middle(begin + least, end - least, by_strength) if end - begin > longest else None
        if cut is None:
            yield begin
        else:
            left += [(cut, end), (begin, cut)]


def _middle(first: int, last: int, by_strength: Sequence[list[int]]) -> int | None:
    """Of the strongest places in [first, last], the one nearest its middle; None where there is no place."""
    for places in by_strength:
        low, high = bisect_left(places, first), bisect_right(places, last)
        if low < high:
            middle = (first + last) / 2
            near = bisect_left(places, middle, low, high)
            return min(places[max(low, near - 1) : min(high, near + 1)], key=lambda place: abs(place - middle))
    return None


# ---- what each token says ----------------------------------------------------------------------------------------


def pieces_of(tokenizer: Any, token_ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text that each token adds: joined, the text of all. "" for special tokens and ids out of the vocabulary.

    A character that several tokens spell comes with the last of them, and bytes that spell none are U+FFFD. Tokenizers
    that are not byte-level may decode such bytes, and what is beside them, in another way when all are there.
    """
    ids = np.asarray(token_ids).tolist()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        return _spelled(backend, ids)
    return _streamed(tokenizer, ids)


def _spelled(backend: Any, ids: list[int]) -> list[str]:
    """Of a byte-level tokenizer: its tokens are bytes, and any cut through them can be decoded further."""
    byte_of = _byte_alphabet()
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    known: dict[int, bytes] = {}
    for i in set(ids):
        token = backend.id_to_token(i) if 0 <= i < 2**32 and i not in special else None
        try:
            known[i] = bytes(byte_of[c] for c in token or "")
        except KeyError:  # an added token: it stands for itself
            known[i] = (token or "").encode()
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pieces = [decode(known[i]) for i in ids]
    return [*pieces[:-1], pieces[-1] + decode(b"", final=True)] if pieces else []


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    """Of any tokenizer: each token decoded after those before it, which decide its spaces."""
    pieces: list[str] = []
    before: list[int] = []
    pending: list[int] = []
    said = ""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    for number, i in enumerate(ids, 1):
        pending += [i] if 0 <= i < len(tokenizer) else []
        text = decode([*before, *pending])
        complete = len(text) > len(said) and not text.endswith(REPLACED)
        if not (complete or len(pending) > UNDECIDED or number == len(ids)):
            pieces.append("")
            continue
        pieces.append(text[len(said) :])
        before, pending = pending, []
        said = decode(before)
    return pieces


# ---- where a solution may be cut ---------------------------------------------------------------------------------


def _cuts(pieces: Sequence[str]) -> dict[int, int]:
    """The tokens before which a step may begin, in order, each with the strength of the boundary before it."""
    text = "".join(pieces)
    ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
    begins = np.concatenate([[0], ends[:-1]])
    found = sorted(_boundaries(text))
    places = np.fromiter((place for place, _ in found), np.int64, len(found))
    tokens = np.searchsorted(begins, places)
    kept = (tokens > 0) & (tokens < len(pieces))
    found = [boundary for boundary, own in zip(found, kept, strict=True) if own]
    places, tokens = places[kept], tokens[kept]
    moved = begins[tokens]
    spans = np.asarray(formulas(text), np.int64).reshape(-1, 2)
    free = ~_inside(places, spans) & ~_inside(moved, spans) & (moved < len(text))
    cuts: dict[int, int] = {}
    for (place, strength), token, at, own in zip(found, tokens.tolist(), moved.tolist(), free, strict=True):
        if own and (place == at or text[at - 1].isspace() or text[at].isspace()):
            cuts[token] = max(strength, cuts.get(token, 0))
    return cuts


def _inside(places: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Which places are strictly inside one of the spans [K, 2], which are in order and apart."""
    if not len(spans):
        return np.zeros(len(places), bool)
    last = np.searchsorted(spans[:, 0], places, "left") - 1
    return (last >= 0) & (spans[last, 1] > places)


def _boundaries(text: str) -> Iterator[tuple[int, int]]:
    """(character, strength) of every boundary, in any order; formulas count as text."""
    for match in LINE_END.finditer(text):
        announced = COLON.search(text, max(0, match.start() - 3), match.start()) or DISPLAY.match(text, match.end())
        yield match.end(), ANNOUNCED if announced else BLANK if match[0].count("\n") > 1 else LINE
    for match in LINE_MARK.finditer(text):
        yield match.start(), MARKED
    for match in SENTENCE_END.finditer(text):
        if match[2] or _ends(text, match):
            yield match.end(), MARKED if SENTENCE_MARK.match(text, match.end()) else SENTENCE


def _ends(text: str, stop: re.Match[str]) -> bool:
    """Whether it ends a sentence: not an ellipsis, not after "e.g", not after a list's number at a line's start."""
    if stop[1] != ".":
        return set(stop[1]) - set(".…") != set()
    before = text[max(0, stop.start() - SHORT) : stop.start()]
    _, newline, line = before.rpartition("\n")
    numbered = (newline or stop.start() <= SHORT) and NUMBERED.fullmatch(line)
    return not (numbered or ABBREVIATED.search(before))


# ---- formulas ----------------------------------------------------------------------------------------------------


class _Formula(NamedTuple):
    """One that is open: what closes it, where it and its content start, and whether it may be an amount of money."""

    closing: str
    start: int
    inner: int
    money: bool


def formulas(text: str) -> list[tuple[int, int]]:
    r"""[start, end) of each formula, in order and apart: $…$, $$…$$, \(…\), \[…\], \begin…\end and \boxed{…}.

    What nothing closes before a blank line ends there; blank lines just inside the marks of a display do not count. A $
    before an amount of money opens no formula where the next $ looks as if it opened one itself, and none does before
    one of GSM8K's calculations, <<3+1=4>>.
    """
    found: list[tuple[int, int]] = []
    now: _Formula | None = None
    depth = 0
    for match in FORMULA_MARK.finditer(text):
        mark, at = match[0], match.start()
        if match[1]:
            if now and not _goes_on(text, now, match):
                found += [] if now.money else [(now.start, at)]
                now = None
            continue
        if now and now.closing == mark[0] == "$" and not (now.money and (mark == "$$" or _opens(text, at))):
            found.append((now.start, at + 1))
            now = None
            if mark == "$":
                continue
            mark, at = "$", at + 1
        if now is None or now.money:
            now, depth = _opened(text, mark, at) or now, 1
            continue
        depth += _deeper(now.closing, mark)
        if depth == 0:
            found.append((now.start, match.end()))
            now = None
    return found if now is None or now.money else [*found, (now.start, len(text))]


def _opened(text: str, mark: str, at: int) -> _Formula | None:
    if mark.startswith("\\begin"):
        closing = "\\end"
    elif mark.startswith(("\\boxed", "\\fbox")):
        closing = "}"
    else:
        closing = OPENED.get(mark, "")
    money = closing == "$" and MONEY.match(text, at) is not None
    return _Formula(closing, at, at + len(mark), money) if closing else None


def _deeper(closing: str, mark: str) -> int:
    if closing == "}":
        return -1 if mark == "}" else int(mark == "{" or mark.startswith(("\\boxed", "\\fbox")))
    if closing == "\\end":
        return int(mark.startswith("\\begin")) - int(mark.startswith("\\end"))
    return -int(mark == closing)


def _goes_on(text: str, formula: _Formula, blank: re.Match[str]) -> bool:
    """Whether a blank line is just inside the marks of a display."""
    if formula.closing not in ("$$", r"\]", "\\end"):
        return False
    return not text[formula.inner : blank.start()].strip() or text.startswith(formula.closing, blank.end())


def _opens(text: str, at: int) -> bool:
    """Whether a $ looks as if it opened a formula, or a price: "$x", " $7"."""
    before, after = text[max(0, at - 1) : at], text[at + 1 : at + 2]
    return after.isdigit() or (after.strip() != "" and (before.strip() == "" or before == "("))
