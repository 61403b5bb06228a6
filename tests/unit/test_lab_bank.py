"""The lab's bank: hints to the letter, found by every family, with the share of misleading ones that was asked for."""

import json
from collections import Counter

import pytest

from tutorloop import lab
from tutorloop.lab.bank import BLOCK, DEFAULT_SHARE, KINDS, lab_bank, write_bank
from tutorloop.verifier_service.skills.published import load_published
from tutorloop.verifier_service.skills.retrieval import Retriever

HINTS = {hint["id"]: hint for hint in lab.skills()}
FAMILIES = {"chain_sum": "train", "leg_counting": "train", "long_chain": "ood", "mixed": "ood"}


def problems(family):
    return [row for row in lab.rows(FAMILIES[family]) if row["family"] == family][:200]


def of_kind(bank, kind):
    return [entry for entry in bank if entry.kind == kind]


def test_the_committed_file_is_what_is_written_and_what_is_loaded(tmp_path):
    write_bank(tmp_path / "bank.json")
    committed = lab.bank_path()
    assert (tmp_path / "bank.json").read_text() == committed.read_text()
    assert load_published(str(committed)) == lab_bank(DEFAULT_SHARE)


@pytest.mark.parametrize("share", [0, 0.125, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_shown_is_a_hint_to_the_letter_and_the_share_holds(share, seed):
    skills = of_kind(lab_bank(share, seed), "skill")
    assert lab_bank(share, seed) == lab_bank(share, seed)
    misleading = []
    for entry in skills:
        extra = json.loads(entry.extra)
        hint = HINTS[extra["hint"]]
        assert entry.texts[0] == hint["text"]
        assert extra["misleading"] == (hint["kind"] == "misleading") and hint["kind"] != "irrelevant"
        misleading.append(extra["misleading"])
    assert sum(misleading) == share * len(skills)
    for i, kind in enumerate(KINDS):
        of_this = misleading[2 * BLOCK * i : 2 * BLOCK * (i + 1)]
        assert sum(of_this) == share * len(of_this), kind.family


def test_seeds_choose_other_wordings():
    assert len({tuple(entry.texts[0] for entry in lab_bank(0.25, seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        lab_bank(share)


@pytest.mark.parametrize(("share", "seed"), [(0, 0), (0.25, 0), (0.25, 1), (0.25, 2), (0.5, 0), (0.5, 1), (1, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_retrieves_the_share_among_hints_that_speak_about_it(share, seed, family):
    rows = problems(family)
    found, mine = [], []
    for pairs in Retriever(lab_bank(share, seed)).pairs([row["prompt"] for row in rows], BLOCK):
        hints = [HINTS[json.loads(entry.extra)["hint"]] for entry in pairs.skills]
        found.append(sum(hint["kind"] == "misleading" for hint in hints) / BLOCK)
        mine.append(sum(family in hint["families"] for hint in hints) / BLOCK)
    assert sum(found) / len(rows) == pytest.approx(share, abs=0.03)
    assert sum(mine) / len(rows) > (0.9 if family == "mixed" else 0.99)  # `What is 3 * 4?` has no word of its own


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting"])
def test_problems_of_a_family_retrieve_different_skills_and_their_own_mistakes(family):
    rows = problems(family)
    found = Retriever(lab_bank()).pairs([row["prompt"] for row in rows], BLOCK)
    sets = Counter(frozenset(entry.entry_id for entry in pairs.skills) for pairs in found)
    assert len(sets) > 1 and max(sets.values()) < 0.9 * len(rows)
    for row, pairs in zip(rows, found, strict=True):
        named = {json.loads(entry.extra)["misconception"] for entry in pairs.mistakes}
        assert named == ({"no_carry", "no_borrow"} if family == "chain_sum" else {"no_carry", "four_legs"}), row
