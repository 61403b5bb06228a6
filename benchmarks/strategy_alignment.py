"""How fast steps are aligned: pairs of solutions a second on one core, with all that a rollout's credit needs.

    .venv/bin/python benchmarks/strategy_alignment.py       # writes results/strategy_alignment.md; a minute

Of each pair the plan, the credit of its steps, the coverage with its shaping, and the credit of its tokens. Solutions
that have nothing to do with each other; students that take a teacher's steps in an order of their own; and solutions
whose steps are of a few kinds. Seconds are the process's own, of one thread, and the best of ROUNDS rounds is taken,
since the machine has other work.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Literal  # noqa: E402

import numpy as np  # noqa: E402

from tutorloop.verifier_service.strategies.alignment import align, coverage, shaping, token_credit  # noqa: E402

PAIRS, SIZES, DIMENSIONS, TOKENS = 2_048, (12, 32), 128, 60  # tokens of a step
ROUNDS, KINDS_OF_STEPS, NOISE = 7, 8, 0.5
RESULTS = Path(__file__).parent / "results"
Vectors = list[np.ndarray]


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Vectors of about length 1."""
    return random.normal(size=(*shape, DIMENSIONS)) / np.sqrt(DIMENSIONS)


def unrelated(random: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    return normal(random, steps), normal(random, steps)


def followed(random: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    teacher = normal(random, steps)
    return teacher[random.permutation(steps)] + NOISE * random.random() * normal(random, steps), teacher


def few_kinds(random: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    codes = normal(np.random.default_rng(0), KINDS_OF_STEPS)
    student, teacher = (
        codes[random.integers(KINDS_OF_STEPS, size=steps)] + NOISE * normal(random, steps) for _ in range(2)
    )
    return student, teacher


CASES = {"unrelated": unrelated, "followed, in another order": followed, "of eight kinds of steps": few_kinds}


def seconds_of(students: Vectors, teachers: Vectors, order: Literal["free", "ordered"]) -> float:
    steps = len(students[0])
    spans = [(at, at + TOKENS) for at in range(0, steps * TOKENS, TOKENS)]
    started = time.process_time()
    found = align(students, teachers, order=order)
    for student, teacher, pair in zip(students, teachers, found, strict=True):
        token_credit(spans, steps * TOKENS, pair.credit, shaping(coverage(student, teacher)))
    return time.process_time() - started


def main() -> None:
    lines = [
        "# How fast steps are aligned\n",
        f"`.venv/bin/python benchmarks/strategy_alignment.py`: pairs in a second of one core's time, {DIMENSIONS} "
        f"numbers a step; plan, credit, coverage and the credit of each token. The best of {ROUNDS} rounds.\n",
        "| steps | solutions | free | ordered |",
        "|---|---|---:|---:|",
    ]
    for steps in SIZES:
        pairs = PAIRS * SIZES[0] ** 2 // steps**2
        for name, make in CASES.items():
            random = np.random.default_rng(steps)
            students, teachers = map(list, zip(*(make(random, steps) for _ in range(pairs)), strict=True))
            best = {
                order: pairs / min(seconds_of(students, teachers, order) for _ in range(ROUNDS))
                for order in ("free", "ordered")
            }
            lines.append(f"| {steps} × {steps} | {name} | {best['free']:,.0f} | {best['ordered']:,.0f} |")
            print(lines[-1], flush=True)
    (RESULTS / "strategy_alignment.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
