"""Chains of two-digit numbers, and the strategies that solve them: one true line for every step, then the boxed answer.

Which two of the four strategies a problem calls for can be seen in it, as a person would choose: `count_up` where
something is taken away and else `columns`; `compensate` where a later number is near the next ten (ends in 8 or 9) and
else `decompose`. Of 47 + 38 - 19, worked by each in the teacher's wording:

    columns            decompose                            compensate                          count_up
    tens: 40 + 30 = 70  start at 47                         round 38 to 40 - 2                  plus side: 47 + 38 = 85
    tens: 70 - 10 = 60  add 30 to get 77, add 8 to get 85   so 47 + 40 - 2 = 87 - 2 = 85        from 19 up to 20 is 1
    ones: 7 + 8 = 15    take 10 to get 75, take 9 to get 66 round 19 to 20 - 1                  from 20 up to 85 is 65
    ones: 15 - 9 = 6    end at 66                           so 85 - 20 + 1 = 65 + 1 = 66        climbed 1 + 65 = 66
    together: 60 + 6 = 66                                   rounded total 66

The student's wording has the same steps in the same order in other words, of which one or two are the teacher's: models
this small know no synonyms. With numbers masked, a step still tells its strategy, in either wording.

In distribution are chains of 2 and 3 numbers, out of distribution those of 4 and 5. What the student does instead of a
strategy is wrong in two ways. A guess (`jump`) leaves out carries and borrows. The shortcut (`ends`) takes the first
number, the last and the middle one: every step of it is true and so is its answer, in distribution; of four or more
numbers it leaves some out. Right answers in distribution hardly tell it from a strategy.

    first number 47
    last number - 19
    outer two 47 - 19 = 28
    inner one 28 + 38 = 66

Every number that is written is at most LARGEST, so that a model of a million parameters learns the steps; every chain
has a carry or a borrow.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise

from ..problems import add_without_carry, subtract_without_borrow

LARGEST = 99
TERMS = {"test": (2, 3, 3), "ood": (4, 5)}  # numbers of a chain; each entry is drawn as often as another
MOST_TENS = {2: 9, 3: 9, 4: 5, 5: 5}  # of a number in a chain of so many
QUESTIONS = ("Compute {}.", "What is {}?", "Work out {}.")

TEACHER, STUDENT = "teacher", "student"  # the two wordings
PHRASES: dict[str, dict[str, dict[str, str]]] = {
    "columns": {
        TEACHER: {
            "tens": "tens: {} {} {} = {}",
            "ones": "ones: {} {} {} = {}",
            "join": "together: {} {} {} = {}",
        },
        STUDENT: {
            "tens": "the tens make {} {} {} = {}",
            "ones": "the ones make {} {} {} = {}",
            "join": "both together {} {} {} = {}",
        },
    },
    "decompose": {
        TEACHER: {
            "start": "start at {}",
            "up": "add {} to get {}, add {} to get {}",
            "down": "take {} to get {}, take {} to get {}",
            "end": "end at {}",
        },
        STUDENT: {
            "start": "we start from {}",
            "up": "add {} giving {}, add {} giving {}",
            "down": "take {} giving {}, take {} giving {}",
            "end": "so we end on {}",
        },
    },
    "compensate": {
        TEACHER: {
            "round": "round {} to {} - {}",
            "use": "so {} {} {} {} {} = {} {} {} = {}",
            "end": "rounded total {}",
        },
        STUDENT: {
            "round": "let me round {} up: {} - {}",
            "use": "then {} {} {} {} {} = {} {} {} = {}",
            "end": "the rounded sum is {}",
        },
    },
    "count_up": {
        TEACHER: {
            "plus": "plus side: {} {} {} = {}",
            "minus": "minus side: {} {} {} = {}",
            "gap": "from {} up to {} is {}",
            "join": "climbed {} + {} = {}",
        },
        STUDENT: {
            "plus": "on the plus side {} {} {} = {}",
            "minus": "on the minus side {} {} {} = {}",
            "gap": "going up from {} to {} is {}",
            "join": "in all climbed {} + {} = {}",
        },
    },
}
STRATEGIES = tuple(PHRASES)
JUMP, ENDS = "jump", "ends"  # what the student does instead
JUMP_PHRASE = "{} = {}"
ENDS_PHRASES = {
    "first": "first number {}",
    "last": "last number {} {}",
    "ends": "outer two {} {} {} = {}",
    "middle": "inner one {} {} {} = {}",
}

DESCRIPTIONS = {
    "columns": (
        "Work with the tens of all numbers first, then with the ones of all, then put both together.",
        "Take the tens of all apart from the ones of all, then put both together.",
    ),
    "decompose": (
        "Take each next number apart: first its tens, then its ones.",
        "Work from number to number, with the tens of each next one and then with its ones.",
    ),
    "compensate": (
        "Round each next number up to full tens, then put right what was too much.",
        "Use the next full tens in place of each number, then put right the rest.",
    ),
    "count_up": (
        "Work out all that is taken away, then count up from there to all that is added.",
        "Count up through full tens, from what is taken away to what is added.",
    ),
}

Value = int | str
Step = tuple[str, tuple[Value, ...]]  # its kind, and what fills its phrase


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A chain of numbers with their signs, e.g. Problem(terms=(47, 38, -19)); the first is positive."""

    terms: tuple[int, ...]

    @property
    def expression(self) -> str:
        return expression(self.terms)

    def question(self, rng: random.Random) -> str:
        return rng.choice(QUESTIONS).format(self.expression)

    @property
    def answer(self) -> int:
        return sum(self.terms)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The two that it calls for."""
        near_ten = any(abs(term) % 10 >= 8 for term in self.terms[1:])
        return ("count_up" if min(self.terms) < 0 else "columns", "compensate" if near_ten else "decompose")


def expression(terms: tuple[int, ...]) -> str:
    """(47, 38, -19) -> `47 + 38 - 19`."""
    return " ".join([str(terms[0]), *(f"{_sign(term)} {abs(term)}" for term in terms[1:])])


def _sign(number: int) -> str:
    return "-" if number < 0 else "+"


def _running(kind: str, parts: list[int]) -> list[Step]:
    """A step for each part after the first, that adds it to what there is."""
    totals = pairwise(accumulate(parts))
    return [
        (kind, (before, _sign(part), abs(part), after)) for part, (before, after) in zip(parts[1:], totals, strict=True)
    ]


def _up_to_ten(number: int) -> int:
    """38 -> 40."""
    return -(-number // 10) * 10


def _columns(terms: tuple[int, ...]) -> list[Step]:
    ones = [abs(term) % 10 * (-1 if term < 0 else 1) for term in terms]
    tens = [term - one for term, one in zip(terms, ones, strict=True)]
    join = (sum(tens), _sign(sum(ones)), abs(sum(ones)), sum(terms))
    return [*_running("tens", tens), *_running("ones", ones), ("join", join)]


def _decompose(terms: tuple[int, ...]) -> list[Step]:
    steps: list[Step] = [("start", (terms[0],))]
    for term, (before, after) in zip(terms[1:], pairwise(accumulate(terms)), strict=True):
        ones = abs(term) % 10
        tens, way = abs(term) - ones, (-1 if term < 0 else 1)
        steps.append(("down" if term < 0 else "up", (tens, before + way * tens, ones, after)))
    return [*steps, ("end", (sum(terms),))]


def _compensate(terms: tuple[int, ...]) -> list[Step]:
    steps: list[Step] = []
    for term, (before, after) in zip(terms[1:], pairwise(accumulate(terms)), strict=True):
        full = _up_to_ten(abs(term))
        over, back = full - abs(term), _sign(-term)
        there = before + (full if term > 0 else -full)
        steps.append(("round", (abs(term), full, over)))
        steps.append(("use", (before, _sign(term), full, back, over, there, back, over, after)))
    return [*steps, ("end", (sum(terms),))]


def _count_up(terms: tuple[int, ...]) -> list[Step]:
    plus, minus = [term for term in terms if term > 0], [-term for term in terms if term < 0]
    low, high = sum(minus), sum(plus)
    ten = _up_to_ten(low)
    return [
        *_running("plus", plus),
        *_running("minus", minus),
        ("gap", (low, ten, ten - low)),
        ("gap", (ten, high, high - ten)),
        ("join", (ten - low, high - ten, high - low)),
    ]


_WORKERS: dict[str, Callable[[tuple[int, ...]], list[Step]]] = {
    "columns": _columns,
    "decompose": _decompose,
    "compensate": _compensate,
    "count_up": _count_up,
}


def work(problem: Problem, strategy: str, wording: str) -> str:
    """The lines of a strategy in a wording, then the boxed answer."""
    phrases = PHRASES[strategy][wording]
    lines = [phrases[kind].format(*values) for kind, values in _WORKERS[strategy](problem.terms)]
    return "\n".join([*lines, f"\\boxed{{{problem.answer}}}"])


def carelessly(problem: Problem) -> int:
    """What comes of a chain whose carries and borrows are left out, as in the lab's misconceptions."""

    def careless(total: int, term: int) -> int:
        return subtract_without_borrow(total, -term) if term < 0 else add_without_carry(total, term)

    return reduce(careless, problem.terms)


def jump(problem: Problem, result: int) -> str:
    """The one line of a guess, then its result in the box."""
    return f"{JUMP_PHRASE.format(problem.expression, result)}\n\\boxed{{{result}}}"


def _ends(terms: tuple[int, ...]) -> list[Step]:
    first, last = terms[0], terms[-1]
    both, last_written = first + last, (_sign(last), abs(last))
    steps: list[Step] = [("first", (first,)), ("last", last_written), ("ends", (first, *last_written, both))]
    if len(terms) > 2:
        middle = terms[len(terms) // 2]
        steps.append(("middle", (both, _sign(middle), abs(middle), both + middle)))
    return steps


def ends(problem: Problem) -> str:
    """The lines of the shortcut, then what comes of it in the box."""
    steps = _ends(problem.terms)
    lines = [ENDS_PHRASES[kind].format(*values) for kind, values in steps]
    return "\n".join([*lines, f"\\boxed{{{steps[-1][1][-1]}}}"])


def _in_range(problem: Problem) -> bool:
    if sum(term for term in problem.terms if term > 0) > LARGEST:  # the quick way to refuse most
        return False
    shortcut = _ends(problem.terms)
    for worker in (*map(_WORKERS.__getitem__, problem.strategies), _ends):
        for _, values in worker(problem.terms):
            if not all(0 <= value <= LARGEST for value in values if isinstance(value, int)):
                return False
    right = shortcut[-1][1][-1] == problem.answer
    return carelessly(problem) != problem.answer and right == (len(problem.terms) <= 3)


def draw(split: str, rng: random.Random) -> Problem:
    """A problem of `test` or `ood`: how many numbers and how many of them taken away, each as often as another.

    The numbers are between 11 and 99 (59 in long chains), and none is full tens.
    """
    count = rng.choice(TERMS[split])
    taken_away = rng.randint(0, (count + 1) // 2)
    while True:
        numbers = [rng.randint(1, MOST_TENS[count]) * 10 + rng.randint(1, 9) for _ in range(count)]
        signs = [-1] * taken_away + [1] * (count - 1 - taken_away)
        rng.shuffle(signs)
        problem = Problem(terms=tuple(number * sign for number, sign in zip(numbers, [1, *signs], strict=True)))
        if _in_range(problem):
            return problem


def distinct(split: str, rng: random.Random, taken: set[tuple[int, ...]]) -> Iterator[Problem]:
    """An endless stream of problems whose chains are not among the taken ones; what it gives is taken too."""
    while True:
        problem = draw(split, rng)
        if problem.terms not in taken:
            taken.add(problem.terms)
            yield problem


def _pattern(*phrases: str) -> re.Pattern[str]:
    """Matches the lines of phrases: their {} are numbers and signs alike."""
    return re.compile("|".join(r"(?:-?\d+|[+-])".join(map(re.escape, phrase.split("{}"))) for phrase in phrases))


_LINES = {
    strategy: {w: _pattern(*phrases.values()) for w, phrases in both.items()} for strategy, both in PHRASES.items()
}
_JUMP_LINE = re.compile(JUMP_PHRASE.format(r"\d+(?: [+-] \d+)+", r"-?\d+"))
_ENDS_LINE = _pattern(*ENDS_PHRASES.values())


def recognise(response: str) -> tuple[str, str]:
    """(strategy, wording) of a response by its words alone, right or wrong; ("", "") where it is none of ours.

    A wording is `teacher`, `student`, or "mixed" where lines of one strategy are of both. What is none of the
    strategies, JUMP and ENDS, has none.
    """
    *lines, _ = response.strip().split("\n")
    if len(lines) == 1 and _JUMP_LINE.fullmatch(lines[0]):
        return JUMP, ""
    if lines and all(map(_ENDS_LINE.fullmatch, lines)):
        return ENDS, ""
    for strategy, wordings in _LINES.items():
        found = [next((w for w, line in wordings.items() if line.fullmatch(text)), "") for text in lines]
        if lines and all(found):
            return strategy, found[0] if len(set(found)) == 1 else "mixed"
    return "", ""
