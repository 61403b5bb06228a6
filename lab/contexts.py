"""The three prompt contexts of the lab, named and versioned, and what each does to a model that errs.

`plain`   the question;
`answer`  the question with its answer shown beneath;
`hint`    a short skill (data/skills.json), then the question.

A skill is `useful` (it repairs the misconceptions it names), `misleading` (it induces them) or `irrelevant`. The
student follows these: under a useful skill or with the answer shown it works rightly, under a misleading one it
errs. The teacher never errs.
"""

import random
from collections.abc import Callable, Collection

from . import skills

CONTEXTS = {"plain": "plain/v1", "answer": "answer/v1", "hint": "hint/v1"}


def render(context: str, question: str, *, answer: str | None = None, hint: str | None = None) -> str:
    """The user's turn in a context, e.g. `Hint: Carry the ten.\\nCompute 7 * 2 + 1.`"""
    if context == "plain":
        return question
    if context == "answer" and answer is not None:
        return f"{question}\nAnswer: {answer}"
    if context == "hint" and hint is not None:
        return f"Hint: {hint}\n{question}"
    raise ValueError(
        f"a context is one of {', '.join(CONTEXTS)}, `answer` needs the answer and `hint` a hint; got {context!r} "
        f"with answer={answer!r}, hint={hint!r}"
    )


def skills_for(family: str, kind: str | None = None, tags: Collection[str] = ()) -> list[dict]:
    """The skills that speak about a family, optionally of one kind only (`useful`, `misleading`, `irrelevant`).

    `tags` are a row's, the misconceptions that would change the problem: with them a useful skill repairs all of them,
    and a misleading one induces at least one.
    """

    def fits(skill: dict) -> bool:
        named = set(skill["misconceptions"])
        if not tags or skill["kind"] == "irrelevant":
            return True
        return named.issuperset(tags) if skill["kind"] == "useful" else not named.isdisjoint(tags)

    return [s for s in skills() if family in s["families"] and kind in (None, s["kind"]) and fits(s)]


def habit(context: str, skill: dict | None, wrong_share: float, rng: random.Random) -> Callable[[str], bool]:
    """What the student does at a step that a misconception would change: the `errs` that problems.work asks.

    By itself it errs in `wrong_share` of such steps; the answer shown prevents that, a skill decides over the
    misconceptions that it names.
    """

    def errs(misconception: str) -> bool:
        if context == "answer":
            return False
        if skill is not None and misconception in skill["misconceptions"]:
            return skill["kind"] == "misleading"
        return rng.random() < wrong_share

    return errs
