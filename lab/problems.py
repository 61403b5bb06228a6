"""Problems of the lab, and how they are worked: one true line per step, then the boxed answer.

A problem comes from reasoning-gym; its expression is parsed into a small tree, and working it writes one line for every
operation, e.g. `37 + 58 = 95`, `95 - 12 = 83`, `\\boxed{83}`. Three named misconceptions can replace a right step:

* `no_carry`     37 + 58 = 85   each column added by itself, the ten is dropped;
* `no_borrow`    52 - 37 = 25   the smaller digit is taken from the larger in each column (Brown & Burton 1978);
* `four_legs`    3 ducks: 3 * 4 every animal is given four legs.

Families in distribution are `chain_sum` (2-4 terms) and `leg_counting` (2-3 animals); out of distribution are
`long_chain` (chain_sum of 5-6 terms) and `mixed` (basic_arithmetic: other templates, a product before the sums).
Every partial result stays within 0..99, so that a model of a million parameters learns the steps.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

LEGS = {"chicken": 2, "duck": 2, "bird": 2, "dog": 4, "cat": 4, "cow": 4, "lion": 4, "starfish": 5,
        "ant": 6, "bee": 6, "wasp": 6, "beetle": 6, "spider": 8}  # fmt: skip
LARGEST = 99
MISCONCEPTIONS = ("no_carry", "no_borrow", "four_legs")

Tree = int | tuple  # a number, or (operator, left, right) with operator one of + - * legs


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A reasoning-gym dataset with its settings; problems of each size come in equal shares.

    `sizes` names what is counted and the counts, e.g. ("terms", 2, 3, 4).
    """

    dataset: str
    sizes: tuple
    settings: dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with its answer and the tree that says how to work it."""

    family: str
    question: str
    answer: str
    tree: Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A worked problem: its text, the result it boxes, and the misconceptions that changed a step (in order)."""

    text: str
    result: int
    errors: tuple[str, ...]


_TWO_DIGITS = {"min_digits": 2, "max_digits": 2}
FAMILIES = {
    "chain_sum": Family(dataset="chain_sum", sizes=("terms", 2, 3, 4), settings=_TWO_DIGITS),
    "leg_counting": Family(
        dataset="leg_counting", sizes=("animals", 2, 3), settings={"min_instances": 1, "max_instances": 9}
    ),
    "long_chain": Family(dataset="chain_sum", sizes=("terms", 5, 6), settings=_TWO_DIGITS),
    "mixed": Family(
        dataset="basic_arithmetic",
        sizes=("terms", 3, 4),
        settings={
            "operators": ("+", "-", "*"),
            "format_style": "natural",
            "allow_parentheses": False,
            "min_digits": 1,
            "max_digits": 2,
        },
    ),
}


def add_without_carry(a: int, b: int) -> int:
    """37 + 58 -> 85: columns of tens and ones added apart, modulo ten."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def subtract_without_borrow(a: int, b: int) -> int:
    """52 - 37 -> 25: in each column the smaller digit from the larger one."""
    return abs(a // 10 - b // 10) * 10 + abs(a % 10 - b % 10)


def _step(operator: str, a: int, b: int, errs: Callable[[str], bool]) -> tuple[str, int, str | None]:
    """One line: its text, its result, and the misconception that changed it (None where the line is right)."""
    if operator == "legs":
        wrong = b != 4 and errs("four_legs")
        b = 4 if wrong else b
        return f"{a} * {b} = {a * b}", a * b, "four_legs" if wrong else None
    if operator == "*":
        return f"{a} * {b} = {a * b}", a * b, None
    name, right, other = (
        ("no_carry", a + b, add_without_carry(a, b))
        if operator == "+"
        else ("no_borrow", a - b, subtract_without_borrow(a, b))
    )
    wrong = other != right and min(a, b) >= 0 and errs(name)
    result = other if wrong else right
    return f"{a} {operator} {b} = {result}", result, name if wrong else None


def work(problem: Problem, errs: Callable[[str], bool] = lambda name: False) -> Work:
    """Works a problem; `errs(misconception)` is asked at every step that the misconception would change."""
    lines: list[str] = []
    errors: list[str] = []

    def value(tree: Tree) -> int:
        if isinstance(tree, int):
            return tree
        operator, left, right = tree
        line, result, error = _step(operator, value(left), value(right), errs)
        lines.append(line)
        errors.extend([error] if error else [])
        return result

    result = value(problem.tree)
    return Work(text="\n".join([*lines, f"\\boxed{{{result}}}"]), result=result, errors=tuple(errors))


def in_range(text: str) -> bool:
    """Whether every number that a working writes stays within 0..LARGEST."""
    return "-" not in text.replace(" - ", "") and all(int(n) <= LARGEST for n in re.findall(r"\d+", text))


def _chain_tree(expression: str) -> Tree | None:
    """Left to right; None where a later `*` would bind tighter than that (reasoning-gym's own answer is then wrong)."""
    first, *rest = expression.split()
    tree: Tree = int(first)
    pairs = list(zip(rest[::2], rest[1::2], strict=True))
    if any(operator == "*" for operator, _ in pairs[1:]):
        return None
    for operator, number in pairs:
        tree = (operator, tree, int(number))
    return tree


def _legs_tree(animals: dict[str, int]) -> Tree | None:
    if not animals.keys() <= LEGS.keys():
        return None
    tree: Tree | None = None
    for animal, count in animals.items():
        node = ("legs", count, LEGS[animal])
        tree = node if tree is None else ("+", tree, node)
    return tree


def _parse(family: str, item: dict) -> Problem | None:
    """A reasoning-gym item as a Problem; None where the lab does not take it."""
    metadata = item["metadata"]
    tree = _legs_tree(metadata["animals"]) if "animals" in metadata else _chain_tree(metadata["expression"])
    if tree is None or (family == "mixed" and "*" not in metadata["expression"]):
        return None
    question = item["question"].strip().rsplit("\n", 1)[-1].removeprefix("Now, ")
    problem = Problem(family=family, question=question[0].upper() + question[1:], answer=item["answer"], tree=tree)
    solution = work(problem)
    assert str(solution.result) == item["answer"], (problem, solution)
    return problem if in_range(solution.text) else None


def _stream(spec: Family, name: str, count: int, seed: str) -> Iterator[Problem]:
    """Every problem of one size that the lab takes, in reasoning-gym's order."""
    import reasoning_gym  # a build-time need only

    what = spec.sizes[0]
    size = {f"min_{what}": count, f"max_{what}": count}
    start = random.Random(f"{name} {count} {seed}").getrandbits(40)
    dataset = reasoning_gym.create_dataset(spec.dataset, seed=start, size=10**9, **spec.settings, **size)
    index = 0
    while True:
        problem = _parse(name, dataset[index])
        index += 1
        if problem is not None:
            yield problem


def draw(family: str, seed: str, easy_share: float = 0.6) -> Iterator[Problem]:
    """An endless stream of distinct problems of a family; of those no misconception changes, `easy_share` are kept."""
    spec = FAMILIES[family]
    rng = random.Random(f"{family} {seed}")
    streams = [_stream(spec, family, count, seed) for count in spec.sizes[1:]]
    seen: set[str] = set()
    for stream in cycle(streams):
        for problem in stream:
            hard = bool(work(problem, lambda name: True).errors)
            if (hard or rng.random() < easy_share) and problem.question not in seen:
                break
        seen.add(problem.question)
        yield problem
