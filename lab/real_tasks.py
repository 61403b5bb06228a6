"""Problems that SmolLM2-135M-Instruct can do, in about ten tokens: repeat a sentence, say where a thing was left.

Each problem is about a scene of its own: a person, a colour, a thing, a place. Scenes are drawn without repetition from
a seed, so no scene of the test split occurs in training. `passes` is the reward function that the recipe names: it
reads the whole response, since a model of this size writes no box.

    {"id": "test-0001", "prompt": "Kate left the red cup in the garden. Where is the cup?", "answer": "garden", ...}
"""

import json
import random
import re
from itertools import cycle, product
from pathlib import Path


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words("Tom Ann Bob Lucy Sam Mary Jack Emma Paul Rose Dan Kate Leo Nina Max Ella Ben Sara Adam Jane")
COLORS = _words("red blue green yellow black white brown pink purple gray")
THINGS = _words("ball kite book hat cup car bike pen box lamp chair shirt coat bag boat clock key ring plate drum")
PLACES = _words("kitchen garden park school library office market station garage hotel museum church")
KINDS = ("repeat", "where")
SPLITS = {"train": 3000, "test": 600}


def problem(kind: str, name: str, color: str, thing: str, place: str) -> tuple[str, str]:
    """The prompt of a kind on a scene, and its answer."""
    if kind == "repeat":
        sentence = f"{name} put the {color} {thing} in the {place}."
        return f"Repeat this sentence word for word.\n{sentence}", sentence
    return f"{name} left the {color} {thing} in the {place}. Where is the {thing}?", place


def splits(seed: int = 0) -> dict[str, list[dict]]:
    """The rows of each split, the kinds by turns."""
    scenes = list(product(NAMES, COLORS, THINGS, PLACES))
    random.Random(seed).shuffle(scenes)
    drawn = iter(scenes)
    rows: dict[str, list[dict]] = {}
    for split, size in SPLITS.items():
        rows[split] = []
        for number, kind in zip(range(size), cycle(KINDS), strict=False):
            prompt, answer = problem(kind, *next(drawn))
            rows[split].append({"id": f"{split}-{number:04d}", "prompt": prompt, "answer": answer, "kind": kind})
    return rows


def write(folder: Path, seed: int = 0) -> None:
    """`train.jsonl` and `test.jsonl`, each written aside and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits(seed).items():
        aside = folder / f".{split}.jsonl.part"
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        aside.rename(folder / f"{split}.jsonl")


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("\"'`* ").rstrip(".").lower().split())


def right(kind: str, response: str, answer: str) -> bool:
    """repeat: the sentence alone, capitals, quotes and the full stop aside. where: its place, and no other."""
    if kind == "repeat":
        return _plain(response) == _plain(answer)
    return {word for word in re.findall(r"[a-z]+", response.lower()) if word in PLACES} == {answer}


def passes(prompts: list, completions: list, answer: list[str], kind: list[str], **columns: list) -> list[float]:
    """A reward function with TRL's signature (docs/verifiers.md): 1 for a right response, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(right(k, text, gold)) for k, text, gold in zip(kind, texts, answer, strict=True)]
