"""What crosses a process about skills: a bank's entries, and the skill-mistake pairs of a prompt.

Shapes: K pairs of one prompt.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa

from .records import EMPTY_F, FLOATS, STRINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class BankEntry:
    """A skill or a common mistake, in the three texts that SGSD's published layout gives each, and what is known of it.

    skill: title, principle, when_to_apply; mistake: description, why_it_happens, how_to_avoid.
    """

    entry_id: str  # gen_001, err_001 as published; dyn_… of an online update
    kind: str  # "skill" | "mistake"
    group: str = ""  # "" general; else the task that a task-specific skill belongs to
    texts: tuple[str, str, str]
    rollout_ids: tuple[str, ...] = ()  # its evidence
    outcomes: tuple[bool, ...] = ()  # of these rollouts: passed
    uses: int = 0  # times that a teacher was conditioned on it
    helpful: int = 0  # and where the verdict and the teacher's stance agreed, disagreed,
    harmful: int = 0
    neutral: int = 0  # or the teacher had none
    extra: str = ""  # other keys of a published entry, as JSON

    @property
    def text(self) -> str:
        """What is embedded and searched, as published: `title. principle. when`, or the mistake's three texts."""
        return " ".join(part.strip().rstrip(".") + "." for part in self.texts if part.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillPairs:
    """What the teachers of one prompt are shown: K skills and mistakes, paired by rank, with their weights."""

    prompt_id: str
    skill_ids: tuple[str, ...]
    mistake_ids: tuple[str, ...]
    skills: tuple[str, ...]  # [K] as shown
    mistakes: tuple[str, ...]
    titles: tuple[str, ...] = ()  # of the skills
    weights: np.ndarray = field(default_factory=lambda: EMPTY_F)  # float32 [K], sums to 1
    bank_version: int = 0

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        {
            "prompt_id": pa.string(),
            "skill_ids": STRINGS,
            "mistake_ids": STRINGS,
            "skills": STRINGS,
            "mistakes": STRINGS,
            "titles": STRINGS,
            "weights": FLOATS,
            "bank_version": pa.int64(),
        }
    )
