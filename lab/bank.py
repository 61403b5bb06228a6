"""The lab's skill bank: the hints of data/skills.json as entries that a lexical search finds, some of them misleading.

The student follows a hint only in the words that it was trained on, so an entry's title is a hint's text, to the
letter, and the title alone is shown to it (`Hint: {title}`). The rest of an entry is there to be found by: `principle`
says the hint at more length, `when_to_apply` holds words of the families' questions.

Each kind of question, chains of sums and leg counting, has two blocks of BLOCK skills, and each block has the bank's
share of misleading ones. What a question names (numbers, animals) is in one block's words or in the other's, so one
block is found whole: among the first BLOCK skills of a problem the share holds, and which hints they are varies.
`python -m tutorloop.lab.bank` writes data/bank.json, which has a share of a quarter.
"""

import json
import random
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from ..contracts.skills import BankEntry
from . import bank_path, skills

BLOCK = 4  # skills that a block holds, and a problem retrieves
DEFAULT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of question: the family that names its hints, words of all its questions, and of its two blocks.

    The second block says `boost` once more: it wins where a question names as much of either.
    """

    family: str
    words: str
    boost: str
    blocks: tuple[str, str]


KINDS = (
    Kind(
        family="chain_sum",
        words="State the final answer to the following arithmetic problem. Compute, evaluate or solve it: what is it? "
        "With numbers such as 0 1 2 3 4 5 6 7 8 9",
        boost="Arithmetic problem answer.",
        blocks=(" ".join(map(str, range(10, 100, 2))), " ".join(map(str, range(11, 100, 2)))),
    ),
    Kind(
        family="leg_counting",
        words="How many legs are there in total if you have 2, 6 or 8 animals: birds, insects, spiders.",
        boost="Total legs.",
        blocks=(
            "duck ducks dog dogs cow cows starfish starfishs bee bees beetle beetles",
            "chicken chickens cat cats lion lions ant ants wasp wasps spider spiders",
        ),
    ),
)
PRINCIPLES = {
    "regroup": "Where the ones pass nine or fall below zero, a ten moves between columns.",
    "carry": "Where the ones add up to ten or more, add one to the tens.",
    "borrow": "Where the upper ones digit is the smaller, take one from the tens.",
    "leg-table": "Birds stand on two legs, insects on six, and spiders on eight of them.",
    "own-legs": "Multiply each number of animals by the legs of that one kind.",
    "columns-apart": "Work the tens by themselves and the ones by themselves, then write both.",
    "drop-ten": "Where the ones add up to ten or more, leave the tens alone.",
    "small-from-large": "Where the upper ones digit is the smaller, swap the two digits.",
    "four-legs": "Multiply each number of animals by four, whatever kind they are of.",
}
MISTAKES = {
    "no_carry": (
        ("The ten of a sum is dropped.", "Each column is added by itself.", "Carry the ten to the tens column."),
        ("37 + 58 is written as 85.", "The ones pass nine, and the tens do not grow.", "Add one to the tens."),
    ),
    "no_borrow": (
        ("The smaller digit is taken from the larger.", "The digits' order is ignored.", "Borrow a ten first."),
        ("52 - 37 is written as 25.", "The upper ones digit is too small, and is swapped.", "Take one from the tens."),
    ),
    "four_legs": (
        ("Every animal is given four legs.", "Dogs and cats are taken for all animals.", "Ask what each kind has."),
        ("3 ducks are counted as 3 * 4.", "The kind of animal is not looked at.", "Multiply by the kind's own legs."),
    ),
}
FOUND_BY = {"chain_sum": ("no_carry", "no_borrow"), "leg_counting": ("four_legs", "no_carry")}


def lab_bank(misleading_share: float = DEFAULT_SHARE, seed: int = 0) -> list[BankEntry]:
    """16 skills, of which that share are misleading hints and the rest useful ones, and 8 mistakes.

    The share is exact for multiples of 1/8, for every kind of question, and for every block where it is a multiple
    of 1/4. `seed` says which wording of a hint comes first. Raises ValueError.
    """
    if not 0 <= misleading_share <= 1:
        raise ValueError(f"a share of misleading skills lies between 0 and 1; got {misleading_share}")
    return _skills(misleading_share, random.Random(seed)) + _mistakes()


def _skills(share: float, rng: random.Random) -> list[BankEntry]:
    entries: list[BankEntry] = []
    for kind in KINDS:
        hints = {name: cycle(_hints(kind.family, name, rng)) for name in ("useful", "misleading")}
        misleading = 0
        for number, found_by in enumerate(kind.blocks, start=1):
            here = round(share * BLOCK * number) - misleading
            misleading += here
            names = ["useful"] * (BLOCK - here) + ["misleading"] * here
            when = f"{kind.boost if number == 2 else ''} {kind.words} {found_by}.".lstrip()
            entries += [_skill(len(entries) + i, next(hints[name]), when) for i, name in enumerate(names, start=1)]
    return entries


def _hints(family: str, name: str, rng: random.Random) -> list[dict]:
    """A family's hints of a kind: a wording of each skill, most misconceptions named first, then the next."""
    by_skill: dict[str, list[dict]] = {}
    for hint in skills():
        if family in hint["families"] and hint["kind"] == name:
            by_skill.setdefault(hint["skill"], []).append(hint)
    for wordings in by_skill.values():
        rng.shuffle(wordings)
    order = sorted(by_skill.values(), key=lambda wordings: -len(wordings[0]["misconceptions"]))
    return [wordings[i] for i in range(max(map(len, order))) for wordings in order if i < len(wordings)]


def _skill(number: int, hint: dict, when: str) -> BankEntry:
    return BankEntry(
        entry_id=f"gen_{number:03}",
        kind="skill",
        texts=(hint["text"], PRINCIPLES[hint["skill"]], when),
        extra=json.dumps({"hint": hint["id"], "misleading": hint["kind"] == "misleading"}),
    )


def _mistakes() -> list[BankEntry]:
    found = [(kind, name, text) for kind in KINDS for name in FOUND_BY[kind.family] for text in MISTAKES[name]]
    return [
        BankEntry(
            entry_id=f"err_{number:03}",
            kind="mistake",
            texts=(what, why, f"{how} {kind.words}"),
            extra=json.dumps({"misconception": name}),
        )
        for number, (kind, name, (what, why, how)) in enumerate(found, start=1)
    ]


def write_bank(path: Path) -> None:
    """The default bank in SGSD's published layout."""
    keys = {
        "skill": ("skill_id", "title", "principle", "when_to_apply"),
        "mistake": ("mistake_id", "description", "why_it_happens", "how_to_avoid"),
    }
    lists: dict[str, list[dict]] = {"skill": [], "mistake": []}
    for entry in lab_bank():
        values = zip(keys[entry.kind], (entry.entry_id, *entry.texts), strict=True)
        lists[entry.kind].append({**dict(values), **json.loads(entry.extra)})
    published = {
        "general_skills": lists["skill"],
        "task_specific_skills": {},
        "common_mistakes": lists["mistake"],
        "metadata": {"source": "python -m tutorloop.lab.bank", "misleading_share": DEFAULT_SHARE},
    }
    path.write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_bank(bank_path())
