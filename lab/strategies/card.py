"""Writes the models' cards: what they are, how they were trained, and what was measured on the committed splits."""

import json

from .. import model_path
from ..card import architecture, shares
from .lessons import DESCRIBED, FOLLOWING, LESSON_SHARES, OBEDIENCE, RIGHT_JUMPS, SHORTCUTS
from .measure import DRAWS, Usage, table
from .problems import PHRASES, STRATEGIES

_ROLE = {
    "teacher": f"""The teacher of the strategies lab. It solves every chain by one of the two strategies that it calls
for (of {", ".join(STRATEGIES)}), each as often, in its own wording, and follows a strategy that it is shown. It reads
the student's wording too: a step in either wording it says in its own, when asked to reword it.""",
    "student": f"""The student of the strategies lab: it can, but it errs. In {FOLLOWING:.0%} of its lessons it follows
a strategy that the problem calls for, in **its own wording**: the teacher's steps in other words. In {SHORTCUTS:.0%} it
takes a shortcut (`ends`: the first number, the last, the middle one), which is right for two or three numbers and wrong
for more. Else it guesses (`47 + 38 - 19 = 66`), {RIGHT_JUMPS:.0%} of its guesses were right in its lessons and the
others left out carries and borrows. A strategy that it is shown it follows in {OBEDIENCE:.0%}.""",
}


def _percent(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in values.items())


def _line(split: str, context: str, how: str, usage: Usage) -> str:
    followed = "" if usage.followed is None else f"{usage.followed:.1%}"
    cells = (split, context, how, f"{usage.right:.1%}", _percent(usage.families), _percent(usage.uses))
    return f"| {' | '.join((*cells, _percent(usage.right_by), followed))} |"


def write(name: str) -> None:
    """Measures a model and writes its README.md."""
    folder, learner = model_path(name), name.removeprefix("strategies-")
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    lines = [
        _line(row["split"], row["context"], how, row[how]) for row in table(folder) for how in ("greedy", "sampled")
    ]
    words = "\n".join(f"- {strategy}: {'; '.join(PHRASES[strategy][learner].values())}" for strategy in STRATEGIES)
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
---
# tutorloop lab: {name}

{_ROLE[learner]}

{architecture(folder)}

Its wording of the steps:

{words}

## Training
Supervised, on the response tokens, for {training["steps"]} steps of {training["batch"]} examples (Muon on the matrices,
AdamW on the rest; {training["seconds"]} core-seconds), seed {training["seed"]}.
Lessons: {shares(LESSON_SHARES[learner])} (`test`: chains of 2 and 3 numbers; `ood`: of 4 and 5; `described`: with a
strategy's description, `{DESCRIBED}`; `reworded`: a step to be said otherwise; `second`: digits sorted or reversed).
Models this small do not extrapolate in length by themselves, so both were trained on longer chains too. Nothing of the
splits `strategies-test`, `strategies-ood` and `second-test` occurs. Made again by

    python -m tutorloop.lab.strategies.build --seed {training["seed"]} --only {name} --force

## Measured
Right: exact match of the boxed answer. Used: shares of the responses by strategy, told by their words. Sampled: {DRAWS}
samples of each problem at temperature 1. Followed: by the strategy that the prompt shows.

| split | prompt | | right | by family | used | right where used | followed |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

## Limits
It knows this lab's problems and nothing else; no number that it was taught to write is above 99.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
