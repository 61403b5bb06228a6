"""The lab: the embedded default of the system, small enough to live in the repository.

It holds verifiable maths problems with worked steps (`data/*.jsonl`), a tokenizer with a chat template, and two
tiny trained Qwen3 models: a TEACHER that works every family rightly, and a STUDENT that *can but errs* (it learned
partly wrong steps). Everything here is read as plain files; nothing in this module needs torch or reasoning-gym.
`python -m tutorloop.lab.build` makes all of it again from a seed (that does need the `lab` extra).

Beside it lie problems that several strategies solve, with a teacher and a student of their own (strategies/).
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent
SPLITS = ("train", "test", "ood")
STRATEGY_SPLITS = ("strategies-train", "strategies-test", "strategies-ood", "second-train", "second-test")
MODELS = ("teacher", "student", "strategies-teacher", "strategies-student")


def data_path(split: str) -> Path:
    """The JSONL file of a split: `train`, `test` (in distribution), `ood`, or one of strategies/."""
    known = (*SPLITS, *STRATEGY_SPLITS)
    if split not in known:
        raise ValueError(f"the lab's splits are {', '.join(known)}; got {split!r}; name one of them")
    return ROOT / "data" / f"{split}.jsonl"


def model_path(name: str) -> Path:
    """The folder of a model, e.g. `teacher`; `transformers` loads it as it is."""
    if name not in MODELS:
        raise ValueError(f"the lab's models are {', '.join(MODELS)}; got {name!r}; name one of them")
    return ROOT / "models" / name


def rows(split: str) -> list[dict]:
    """A split's problems, e.g. `{"id": "test-0007", "prompt": "...", "answer": "83", "solution": "...", ...}`."""
    with data_path(split).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def bank_path() -> Path:
    """The skill bank, in the published layout: hints, a quarter of them misleading (bank.py)."""
    return ROOT / "data" / "bank.json"


def skills() -> list[dict]:
    """The hints: rows of `id`, `skill`, `families`, `kind`, `text` and `misconceptions` (see contexts.py)."""
    return json.loads((ROOT / "data" / "skills.json").read_text(encoding="utf-8"))
