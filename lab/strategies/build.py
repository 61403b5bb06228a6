"""Makes this lab from a seed: `python -m tutorloop.lab.strategies.build --seed 0 [--only STAGE] [--force]`.

Stages as in lab/build.py, which trains the models: data (five splits), tokenizer, the two models, their cards.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice

from .. import STRATEGY_SPLITS, data_path, model_path, pretrain, rows, tokenizer
from ..build import run_stages, train_model
from ..tokenizer import chat_prompt
from . import card, second
from .lessons import HeldOut, lessons, reworded, shown
from .problems import DESCRIPTIONS, STUDENT, TEACHER, Problem, distinct, draw, ends, jump, work

SIZES = {
    "strategies-teacher": pretrain.Size(
        hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate=384, steps=1600, batch=32, by_tokens=True
    ),
    "strategies-student": pretrain.Size(
        hidden=96, layers=4, heads=3, kv_heads=1, head_dim=32, intermediate=288, steps=5000, batch=32, by_tokens=True
    ),
}
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


def held_out(seed: int) -> HeldOut:
    """What no lesson may have: the chains of both tests, and the second skill's test."""
    problems = chains(seed)
    tested = {problem.terms for split in ("strategies-test", "strategies-ood") for problem in problems[split]}
    return HeldOut(terms=tested, questions={row["prompt"] for row in rows("second-test")})


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Whatever models are shown and write: every question, template, strategy and guess, as often as another."""
    rng = random.Random(f"strategies tokenizer {seed}")
    for index in range(2000):
        problem, task = draw(("test", "ood")[index % 2], rng), second.draw(rng)
        question, strategy = problem.question(rng), rng.choice(problem.strategies)
        described = shown(question, rng.choice(DESCRIPTIONS[strategy]))
        yield chat_prompt(question) + ends(problem)
        yield chat_prompt(question) + jump(problem, problem.answer)
        yield chat_prompt(question) + work(problem, strategy, STUDENT)
        yield chat_prompt(described) + work(problem, strategy, TEACHER)
        yield "".join(map(chat_prompt, reworded(problem, rng)))
        yield chat_prompt(task.question) + task.solution


def build_tokenizer(seed: int) -> None:
    """Learns the merges and saves the tokenizer into both models' folders."""
    made = tokenizer.train(tokenizer_texts(seed))
    for name in SIZES:
        made.save_pretrained(model_path(name))


def pairs_of(name: str, seed: int) -> list[tuple[str, str]]:
    """A model's lessons."""
    count = SIZES[name].steps * SIZES[name].batch
    return list(lessons(name.removeprefix("strategies-"), count, seed, held_out(seed)))


def files_of(stage: str) -> list:
    """The files by which a stage is known to be done."""
    files = {
        "data": [data_path(split) for split in STRATEGY_SPLITS],
        "tokenizer": [model_path(name) / "tokenizer.json" for name in SIZES],
        "cards": [model_path(name) / "README.md" for name in SIZES],
    }
    return files.get(stage) or [model_path(stage) / "model.safetensors"]


def main() -> None:
    def model(name: str):
        return lambda seed, work_folder: train_model(
            model_path(name), SIZES[name], pairs_of(name, seed), seed, work_folder / f"{name}.pt"
        )

    run_stages(
        {
            "data": lambda seed, _: build_data(seed),
            "tokenizer": lambda seed, _: build_tokenizer(seed),
            **{name: model(name) for name in SIZES},
            "cards": lambda *_: [card.write(name) for name in SIZES],
        },
        files_of,
    )


if __name__ == "__main__":
    main()
