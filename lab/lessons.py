"""What the two models are trained on: problems of all families, worked in the three contexts.

The student is trained broadly, on every family (the out-of-distribution ones too), with partly wrong steps: at a
step that a misconception would change it errs in `WRONG_SHARE` of the plain prompts, so that it *can but errs*, and
the right step keeps the rest of its probability. The teacher is trained on the same problems with right steps only.
Questions of the test splits never occur.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice

from .contexts import habit, render, skills_for
from .problems import FAMILIES, Problem, draw, in_range, work

WRONG_SHARE = 0.7
FAMILY_SHARES = {"chain_sum": 0.45, "leg_counting": 0.2, "long_chain": 0.2, "mixed": 0.15}
CONTEXT_SHARES = {"plain": 0.5, "answer": 0.15, "hint": 0.35}


def problem_pool(size: int, seed: int, held_out: set[str]) -> list[Problem]:
    """`size` distinct problems over the families by FAMILY_SHARES, none of them held out."""
    pool: list[Problem] = []
    for family in FAMILIES:
        stream = (problem for problem in draw(family, f"lessons {seed}") if problem.question not in held_out)
        pool.extend(islice(stream, int(size * FAMILY_SHARES[family])))
    return pool


def student_errs(context: str, skill: dict | None, rng: random.Random) -> Callable[[str], bool]:
    """The student's habits (contexts.habit) at its share of wrong steps."""
    return habit(context, skill, WRONG_SHARE, rng)


def teacher_errs(context: str, skill: dict | None, rng: random.Random) -> Callable[[str], bool]:
    """The teacher never errs, whatever the context."""
    return lambda misconception: False


LEARNERS = {"teacher": teacher_errs, "student": student_errs}


def lessons(learner: str, pool: list[Problem], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (prompt, response) for a learner: problems in random order, each time in a context drawn afresh."""
    rng = random.Random(f"{learner} {seed}")
    families = {family: skills_for(family) for family in FAMILIES}
    done = 0
    while True:
        for problem in rng.sample(pool, len(pool)):
            (context,) = rng.choices(list(CONTEXT_SHARES), weights=list(CONTEXT_SHARES.values()))
            skill = rng.choice(families[problem.family]) if context == "hint" else None
            worked = work(problem, LEARNERS[learner](context, skill, rng))
            if not in_range(worked.text):
                continue
            yield (
                render(context, problem.question, answer=problem.answer, hint=skill["text"] if skill else None),
                worked.text,
            )
            done += 1
            if done == count:
                return
