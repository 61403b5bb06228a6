"""Makes the five splits from a seed: `python -m tutorloop.lab.strategies.build [--seed 0]`."""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice

from .. import data_path
from . import second
from .problems import DESCRIPTIONS, TEACHER, Problem, distinct, work

SPLIT_SIZES = {"strategies-test": 300, "strategies-ood": 300, "strategies-train": 1600}
SECOND_SIZES = {"second-test": 200, "second-train": 800}
WORDS = ("two", "three", "four", "five")


def to_row(split: str, index: int, problem: Problem, rng: random.Random) -> dict:
    """A problem with its solutions, one by each strategy in random order; `strategy` describes the first one's."""
    names = rng.sample(problem.strategies, len(problem.strategies))
    solutions = [work(problem, name, TEACHER) for name in names]
    return {
        "id": f"{split}-{index:04d}",
        "prompt": problem.question(rng),
        "answer": str(problem.answer),
        "solution": solutions[0],
        "solutions": solutions,
        "strategy": rng.choice(DESCRIPTIONS[names[0]]),
        "strategies": names,
        "family": f"{WORDS[len(problem.terms) - 2]}_terms",
    }


def chains(seed: int) -> dict[str, list[Problem]]:
    """The problems of the three splits; every chain of numbers occurs once over all of them."""
    rng, taken = random.Random(f"strategies splits {seed}"), set()
    return {
        split: list(islice(distinct("ood" if split == "strategies-ood" else "test", rng, taken), size))
        for split, size in SPLIT_SIZES.items()
    }


def splits(seed: int) -> dict[str, list[dict]]:
    """The rows of all five splits."""
    rng = random.Random(f"strategies rows {seed}")
    made = {
        split: [to_row(split, index, problem, rng) for index, problem in enumerate(problems)]
        for split, problems in chains(seed).items()
    }
    tasks = _distinct_tasks(random.Random(f"second {seed}"))
    for split, size in SECOND_SIZES.items():
        made[split] = [
            {
                "id": f"{split}-{index:04d}",
                "prompt": task.question,
                "answer": task.answer,
                "solution": task.solution,
                "family": task.family,
            }
            for index, task in enumerate(islice(tasks, size))
        ]
    return made


def _distinct_tasks(rng: random.Random) -> Iterator[second.Task]:
    seen: set[str] = set()
    while True:
        task = second.draw(rng)
        if task.question not in seen:
            seen.add(task.question)
            yield task


def as_text(found: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def build_data(seed: int) -> None:
    for split, found in splits(seed).items():
        data_path(split).write_text(as_text(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the splits of several strategies again from a seed.")
    parser.add_argument("--seed", type=int, default=0)
    build_data(parser.parse_args().seed)


if __name__ == "__main__":
    main()
