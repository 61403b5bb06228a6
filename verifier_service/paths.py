"""Which responses reason alike: a digest of the steps that a response takes, equal where the steps are.

RFT (2308.01825) calls two rationales the same path when their lists of equations are the same. What counts as an
equation in free text is ours: arithmetic between numbers, `a op b = c`, on one line. A response without any is told
apart by its words.

This runs where nothing can kill it, so everything is linear in the text: each pattern takes a run of its characters
whole, and no run is read from two starts.
"""

import hashlib
import re
from itertools import pairwise

SIGNS = {"×": "*", "÷": "/", "−": "-", "–": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "\\$": ""}
SIGN = re.compile("|".join(map(re.escape, SIGNS)))
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
RUN = re.compile(r"[0-9.+\-*/^=()$ \t]+")
LEADING = re.compile(r"[ \t]*+(?:[-+*/^=.)]++[ \t]++)?")  # a list's bullet, or the rest of a sentence's algebra
BETWEEN = re.compile(r"(?<=[0-9.)])[ \t]++(?=[0-9(])")  # two terms with nothing between them do not belong together
DIGIT = re.compile(r"[0-9]")
SHORTEST = len("1+1=2")
SPACES = str.maketrans("", "", " \t$")
OPERATION = re.compile(r"[0-9][.)]*+[-+*/^][(+-]*+[0-9]")


def reasoning_path(text: str) -> str:
    """The digest of a response's path, 16 hexadecimal digits; "" of a blank response."""
    if not text.strip():
        return ""
    steps = equations(text)
    path = "=" + "\n".join(steps) if steps else "#" + " ".join(text.split())
    return hashlib.blake2b(path.encode("utf-8", "replace"), digest_size=8).hexdigest()


def equations(text: str) -> list[str]:
    """The arithmetic equations of a text in their order, without spaces and the commas of thousands."""
    plain = THOUSANDS.sub("", SIGN.sub(lambda match: SIGNS[match[0]], text))
    found: list[str] = []
    for run in RUN.findall(plain):
        if "=" in run and len(run) >= SHORTEST:
            for part in BETWEEN.split(LEADING.sub("", run, count=1)):
                found += _of_part(part.translate(SPACES))
    return found


def _of_part(part: str) -> list[str]:
    """`1+2=3=3` has one equation with an operation on its left, `1+2=3`; `1+2=2+1=3` has two."""
    sides = [_side(side) for side in part.split("=")]
    return [f"{left}={right}" for left, right in pairwise(sides) if OPERATION.search(left) and DIGIT.search(right)]


def _side(side: str) -> str:
    """One side without what belongs to the sentence: a full stop, a dash, brackets around the whole equation."""
    side = side.rstrip("+-*/^.(")
    if side.count("(") != side.count(")"):
        side = side.strip("()").rstrip("+-*/^.(")
    return side
