"""Problems that SmolLM2-135M-Instruct can do, in about ten tokens: repeat a sentence, say where a thing was left.

Each problem is about a scene of its own: a person, a colour, a thing, a place. Scenes are drawn without repetition from
a seed, so no scene of the test split occurs in training. The split `ood` asks other things of other scenes: on which
day something was bought, and to write JSON. `passes` is the reward function that the recipe names: it reads the whole
response, since a model of this size writes no box.

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
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
KINDS = {"train": ("repeat", "where"), "test": ("repeat", "where"), "ood": ("when", "json")}
SPLITS = {"train": 3000, "test": 600, "ood": 400}


def problem(kind: str, name: str, color: str, thing: str, place: str) -> tuple[str, str]:
    """The prompt of a kind on a scene, and its answer."""
    if kind == "repeat":
        sentence = f"{name} put the {color} {thing} in the {place}."
        return f"Repeat this sentence word for word.\n{sentence}", sentence
    if kind == "where":
        return f"{name} left the {color} {thing} in the {place}. Where is the {thing}?", place
    if kind == "when":
        day = DAYS[PLACES.index(place) % len(DAYS)]
        return f"{name} bought a {color} {thing} on {day}. When did {name} buy the {thing}?", day
    asked = (
        f'Write this as JSON with the keys "name", "color" and "place".\nName: {name}\nColor: {color}\nPlace: {place}'
    )
    return asked, json.dumps({"name": name, "color": color, "place": place})


def splits(seed: int = 0) -> dict[str, list[dict]]:
    """The rows of each split, the kinds by turns."""
    scenes = list(product(NAMES, COLORS, THINGS, PLACES))
    random.Random(seed).shuffle(scenes)
    drawn = iter(scenes)
    rows: dict[str, list[dict]] = {}
    for split, size in SPLITS.items():
        rows[split] = []
        for number, kind in zip(range(size), cycle(KINDS[split]), strict=False):
            prompt, answer = problem(kind, *next(drawn))
            rows[split].append({"id": f"{split}-{number:04d}", "prompt": prompt, "answer": answer, "kind": kind})
    return rows


def write(folder: Path, seed: int = 0) -> list[str]:
    """A JSONL file for each split, written aside and renamed; the names of those that were not so before."""
    written = []
    for split, rows in splits(seed).items():
        path, text = folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            aside = folder / f".{path.name}.part"
            aside.write_text(text, encoding="utf-8")
            aside.rename(path)
            written.append(path.name)
    return written


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("\"'`* ").rstrip(".").lower().split())


def right(kind: str, response: str, answer: str) -> bool:
    """repeat: the sentence alone, capitals, quotes and full stop aside. where, when: the place or day, and no other.

    json: an object with these fields and no others.
    """
    if kind == "repeat":
        return _plain(response) == _plain(answer)
    if kind == "json":
        found = re.search(r"\{[^{}]*\}", response)
        try:
            return found is not None and json.loads(found.group()) == json.loads(answer)
        except json.JSONDecodeError:
            return False
    known = {word.lower() for word in (PLACES if kind == "where" else DAYS)}
    return {word for word in re.findall(r"[a-z]+", response.lower()) if word in known} == {answer.lower()}


def passes(prompts: list, completions: list, answer: list[str], kind: list[str], **columns: list) -> list[float]:
    """A reward function with TRL's signature (docs/verifiers.md): 1 for a right response, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(right(k, text, gold)) for k, text, gold in zip(kind, texts, answer, strict=True)]
