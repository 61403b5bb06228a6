"""The second skill: the digits of a number, sorted or in reverse. Distillation never sees it, so it may be forgotten.

Sort the digits of 5291.      \\boxed{1259}
Reverse the digits of 5291.   \\boxed{1925}
"""

import random
from dataclasses import dataclass

LENGTHS = (3, 4, 5)
FAMILIES = {"sort_digits": "Sort the digits of {}.", "reverse_digits": "Reverse the digits of {}."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A question about digits, e.g. Task(family="sort_digits", digits="5291"); none is 0, so an answer is a number."""

    family: str
    digits: str

    @property
    def question(self) -> str:
        return FAMILIES[self.family].format(self.digits)

    @property
    def answer(self) -> str:
        return "".join(sorted(self.digits)) if self.family == "sort_digits" else self.digits[::-1]

    @property
    def solution(self) -> str:
        return f"\\boxed{{{self.answer}}}"


def draw(rng: random.Random) -> Task:
    """A task on digits that are not all in order already."""
    family = rng.choice(list(FAMILIES))
    while True:
        task = Task(family=family, digits="".join(rng.choices("123456789", k=rng.choice(LENGTHS))))
        if task.answer != task.digits:
            return task
