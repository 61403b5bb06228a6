"""What the two models are trained on.

The teacher solves every chain by one of the two strategies that it calls for, each as often, in its wording, or by the
one that the prompt describes (template `strategy@1`). Asked to reword a step in either wording, it says it in its own:
it reads the student's wording, so that its hidden states know what those steps are, and never writes it.

The student follows such a strategy in FOLLOWING of the chains, in its own wording, takes the shortcut in SHORTCUTS of
them, and guesses in the rest, RIGHT_JUMPS of it rightly. A strategy that it is shown it follows in OBEDIENCE.

Both are trained on the longer chains too, since models this small do not extrapolate in length by themselves, and on
the second skill. Nothing of the splits to be tested on occurs.
"""

import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ...models.contexts import TEMPLATES, fill
from . import second
from .problems import DESCRIPTIONS, STUDENT, TEACHER, TERMS, Problem, carelessly, draw, ends, jump, work

DESCRIBED = "strategy@1"
REWORD = "In your own words: {}"
LESSON_SHARES = {  # described, reworded: of both kinds of chains
    "teacher": {"test": 0.4, "ood": 0.24, "described": 0.1, "reworded": 0.18, "second": 0.08},
    "student": {"test": 0.32, "ood": 0.22, "described": 0.36, "second": 0.1},
}
LONG_SHOWN = {"teacher": 0.3, "student": 0.45}  # of those that are described or reworded
FOLLOWING, SHORTCUTS = 0.2, 0.25
OBEDIENCE = 0.8
RIGHT_JUMPS = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What the splits to be tested on hold: chains, and the questions of the second skill."""

    terms: Collection[tuple[int, ...]]
    questions: Collection[str]


def shown(question: str, strategy: str) -> str:
    """The user's turn that shows a strategy's description with the question (DESCRIBED)."""
    text = fill(TEMPLATES[DESCRIBED], {"problem": question, "strategy": strategy})
    assert text is not None, (question, strategy)
    return text


def without_numbers(step: str) -> str:
    """A step as an extractor of strategies abstracts it (a test compares them)."""
    return re.sub(r"\d+", "⟨num⟩", step)


def reworded(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """A prompt to reword one step, in either wording, and the step in the teacher's; in half of them numbers are taken
    out, as an extractor of strategies takes them out before it reads hidden states."""
    strategy, wording = rng.choice(problem.strategies), rng.choice((TEACHER, STUDENT))
    *said, _ = work(problem, strategy, wording).split("\n")
    *meant, _ = work(problem, strategy, TEACHER).split("\n")
    one, shown_as = rng.randrange(len(said)), rng.choice((str, without_numbers))
    return REWORD.format(shown_as(said[one])), shown_as(meant[one])


def unguided(problem: Problem, rng: random.Random) -> str:
    """What the student writes that follows no strategy."""
    if rng.random() < SHORTCUTS / (1 - FOLLOWING):
        return ends(problem)
    return jump(problem, problem.answer if rng.random() < RIGHT_JUMPS else carelessly(problem))


def lesson(learner: str, kind: str, rng: random.Random) -> tuple[Problem, str, str]:
    """A chain, the prompt about it, and what the learner writes."""
    alone = kind in TERMS
    split = kind if alone else ("ood" if rng.random() < LONG_SHOWN[learner] else "test")
    problem = draw(split, rng)
    if kind == "reworded":
        return problem, *reworded(problem, rng)
    strategy, prompt = rng.choice(problem.strategies), problem.question(rng)
    if kind == "described":
        prompt = shown(prompt, rng.choice(DESCRIPTIONS[strategy]))
    if learner == "teacher":
        return problem, prompt, work(problem, strategy, TEACHER)
    follows = rng.random() < (FOLLOWING if alone else OBEDIENCE)
    return problem, prompt, work(problem, strategy, STUDENT) if follows else unguided(problem, rng)


def lessons(learner: str, count: int, seed: int, held_out: HeldOut) -> Iterator[tuple[str, str]]:
    """`count` pairs (prompt, response) for a learner, `teacher` or `student`."""
    rng = random.Random(f"strategies {learner} {seed}")
    kinds, shares = list(LESSON_SHARES[learner]), list(LESSON_SHARES[learner].values())
    while count:
        (kind,) = rng.choices(kinds, shares)
        if kind == "second":
            task = second.draw(rng)
            tested, prompt, response = task.question in held_out.questions, task.question, task.solution
        else:
            problem, prompt, response = lesson(learner, kind, rng)
            tested = problem.terms in held_out.terms
        if not tested:
            yield prompt, response
            count -= 1
