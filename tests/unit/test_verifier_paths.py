"""Reasoning paths: equal where the equations are, whatever stands around them, and found in linear time."""

import time

import numpy as np
import pytest

from tutorloop.verifier_service.paths import equations, reasoning_path

EQUATIONS = [
    ("19 + 61 = 80\n\\boxed{80}", ["19+61=80"]),
    ("(3 + 4 = 7). Then $7 \\times 1,000 = 7000$.", ["3+4=7", "7*1000=7000"]),
    ("48/2 = <<48/2=24>>24 clips, and 24 + 48 = <<24+48=72>>72", ["48/2=24", "24+48=72"]),
    ("1. 3 + 4 = 7\n2. 7 - 1 = 6", ["3+4=7", "7-1=6"]),
    ("- 3 + 4 = 7", ["3+4=7"]),
    ("-3 + 4 = 1", ["-3+4=1"]),
    ("12 + 5 = 10 + 7 = 17 = 17", ["12+5=10+7", "10+7=17"]),
    ("2 * (3 + 4) = 14", ["2*(3+4)=14"]),
    ("it costs \\$5 × 3 = $15.", ["5*3=15"]),
    ("1.50 ÷ 2 = 0.75", ["1.50/2=0.75"]),
    ("x + 3 = 7, so x = 4", []),
    ("3 + 4\n= 7", []),
    ("no numbers = no equations", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "found"), EQUATIONS)
def test_equations_are_found_in_their_order(text, found):
    assert equations(text) == found


def written(random, steps):
    """The steps in words, spacing and signs drawn at random."""
    lines = []
    for left, sign, right, result in steps:
        space = " " * random.integers(0, 3)
        sign = {"*": random.choice(["*", "×", "\\times", "\\cdot"]), "-": random.choice(["-", "−"])}.get(sign, sign)
        left, right, result = (f"{n:,}" if random.random() < 0.5 else str(n) for n in (left, right, result))
        equation = f"{left}{space}{sign}{space}{right}{space}={space}{result}"
        before, after = (
            random.choice(["", "So ", "we get: ", "$", "* "]),
            random.choice(["", ".", ", and then", "$", " apples"]),
        )
        lines.append(before + equation + after)
    return random.choice(["\n", ";\n"]).join(lines)


def test_paths_are_equal_where_the_equations_are():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(200):
        numbers = random.integers(1, 20_000, (3, 3)).tolist()
        steps = [(a, str(random.choice(["+", "-", "*"])), b, c) for a, b, c in numbers]
        one, two = written(random, steps), written(random, steps)
        assert reasoning_path(one) == reasoning_path(two), (one, two)
        changed = [steps[1], steps[0], steps[2]], steps[:2], [*steps[:2], (*steps[2][:3], steps[2][3] + 1)]
        assert len({reasoning_path(written(random, other)) for other in (steps, *changed)}) == 4


def test_paths_without_equations_are_told_apart_by_their_words():
    assert reasoning_path("the answer\n is  \\boxed{7}") == reasoning_path("the answer is \\boxed{7} ")
    assert reasoning_path("the answer is \\boxed{7}") != reasoning_path("the answer is \\boxed{8}")
    assert reasoning_path("1+1=2") != reasoning_path("=1+1=2 x") or equations("=1+1=2 x") == ["1+1=2"]
    assert reasoning_path(" \n") == "" and len(reasoning_path("a")) == 16
    assert len(reasoning_path("\ud800")) == 16  # a lone surrogate has no UTF-8


HOSTILE = [
    "(",
    "1+1=",
    "1=",
    "=",
    " ",
    "1 ",
    "1,",
    "1,000",
    "<<",
    "1)",
    "1.",
    "-",
    "- ",
    "1+",
    "1+(",
    "=(",
    "(1",
    "1)-",
]
HOSTILE += ["\\", "1+1=2\n", "a=", "$ ", "1+1=(", "a++++=", "(1+1)=", "9", "\\times", "1 - ", "\t1"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_paths_take_linear_time(piece):
    start = time.process_time()
    reasoning_path(piece * (10**6 // len(piece)))
    assert time.process_time() - start < 1
