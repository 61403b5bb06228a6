"""What says the same is merged, whatever the order, and no evidence is lost; with a model and without."""

import json
import os
import random
import string
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from chat_server import serving
from skill_entries import entry

from tutorloop.lab.bank import lab_bank
from tutorloop.verifier_service.skills.chat import ChatModel
from tutorloop.verifier_service.skills.merge import (
    GROUP,
    STAGNANT,
    THRESHOLD,
    LlmMerger,
    _pairs,
    best,
    clusters,
    merge,
    nearest,
    standing,
)
from tutorloop.verifier_service.skills.published import load_published

DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def shared(name):
    path = DATA / "skills" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; TUTORLOOP_SHARED_DATA names the folder")
    return path


def random_entries(rng, count=60):
    """Entries of few words, so that many are alike, with evidence that overlaps."""
    words = ["carry", "the", "ten", "borrow", "é", "∑"]
    rollouts = [(f"r{i}", bool(i % 3)) for i in range(30)]
    return [
        entry(
            f"gen_cand_{i:06}",
            " ".join(rng.choices(words, k=rng.randrange(7))),
            kind=rng.choice(["skill", "mistake"]),
            principle=" ".join(rng.choices(words, k=rng.randrange(5))),
            group=rng.choice(["", "", "legs"]),
            evidence=rng.sample(rollouts, rng.randrange(0, 4)),
            counts=tuple(rng.randrange(5) for _ in range(4)),
        )
        for i in range(count)
    ]


def totals(entries):
    """What merging must keep: the evidence of each kind and group, and the sums of the counts."""
    evidence = {(e.kind, e.group, *pair) for e in entries for pair in zip(e.rollout_ids, e.outcomes, strict=True)}
    return evidence, [sum(getattr(e, name) for e in entries) for name in ("uses", "helpful", "harmful", "neutral")]


# ---- merging --------------------------------------------------------------------------------------------------------


def test_pairs_are_all_those_that_are_similar_and_no_others():
    rng = random.Random()
    for _ in range(30):
        sets = [frozenset(rng.choices(string.ascii_letters[:12], k=rng.randrange(1, 11))) for _ in range(60)]
        for threshold in (THRESHOLD, 0.5, 0.3, 1.0):
            slow = {
                (i, j)
                for j in range(len(sets))
                for i in range(j)
                if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold
            }
            found = list(_pairs(sets, threshold))
            assert set(found) == slow and len(found) == len(slow)


def test_merging_keeps_the_evidence_depends_on_no_order_and_is_done_after_once():
    for _ in range(30):
        rng = random.Random()
        entries = random_entries(rng)
        merged = merge(entries)
        assert totals(merged) == totals(entries)
        assert merge(rng.sample(entries, len(entries))) == merged
        assert merge(merged) == merged
        assert len(merged) < len(entries)
        assert {e.entry_id for e in merged} <= {e.entry_id for e in entries}
        assert merged == sorted(merged, key=lambda e: e.entry_id)


def test_a_chain_of_near_duplicates_is_one_and_the_rest_stays_apart():
    words = string.ascii_letters
    chained = [entry(f"gen_{i:03}", " ".join(words[i : i + 12])) for i in range(4)]
    others = [
        entry("gen_100", "quite another thing"),
        entry("gen_101", " ".join(words[:12]), group="legs"),
        entry("gen_102", " ".join(words[:12]), kind="mistake"),
    ]
    assert [e.entry_id for e in merge([*chained, *others])] == ["gen_000", "gen_100", "gen_101", "gen_102"]
    for one, other in pairwise(chained):
        assert [e.entry_id for e in merge([one, other])] == [one.entry_id]
    assert len(merge([chained[0], chained[3]])) == 2


def test_the_published_text_stays_before_that_of_an_update_before_a_candidates():
    same = "Carry the ten!"
    ids = ["gen_cand_000001", "dyn_0003_01", "gen_007"]
    loud = entry(ids[0], same, evidence=[("r1", True)] * 9, counts=(9, 9, 0, 0))
    (merged,) = merge([loud, entry(ids[1], same.upper()), entry(ids[2], "carry  the ten")])
    assert (merged.entry_id, merged.texts[0], merged.helpful, merged.rollout_ids) == (
        ids[2],
        "carry  the ten",
        9,
        ("r1",),
    )
    (merged,) = merge([loud, entry(ids[1], same.upper())])
    assert merged.entry_id == ids[1]


def test_the_best_are_helpful_then_used_then_evident():
    ranked = [
        entry("d", "4", counts=(9, 5, 1, 0)),
        entry("c", "3", counts=(9, 3, 0, 0)),
        entry("e", "5", counts=(5, 0, 0, 0)),
        entry("f", "6", evidence=[("r1", True), ("r2", False)]),
        entry("a", "7"),
        entry("b", "8"),
        entry("g", "9", counts=(9, 0, 1, 0)),
    ]
    shuffled = random.sample(ranked, len(ranked))
    assert sorted(shuffled, key=standing) == ranked
    assert best(shuffled, 3) == [e for e in shuffled if e in ranked[:3]]
    assert best(shuffled, 0) == [] and best(shuffled, 99) == shuffled


def test_nearest_is_the_most_similar_known_entry_of_the_same_kind_and_group():
    text = "one two three four five six seven eight nine ten"
    known = [
        entry("gen_001", text.replace("ten", "eleven")),
        entry("gen_002", text),
        entry("gen_003", text, kind="mistake"),
        entry("gen_004", "nothing alike"),
    ]
    candidates = [entry("gen_001", text), entry("gen_cand_2", "other words"), entry("gen_cand_3", text, group="legs")]
    assert nearest(known, candidates) == {"gen_001": "gen_002"}


def test_what_says_the_opposite_in_nearly_the_same_words_stays_apart():
    skills = [e for e in lab_bank(0.5) if e.kind == "skill"]
    misleading = {e.entry_id: json.loads(e.extra)["misleading"] for e in skills}
    for cluster in clusters(skills):
        assert len({misleading[e.entry_id] for e in cluster}) == 1, cluster


def test_real_candidates_merge_and_lose_nothing():
    entries = load_published(str(shared("sgsd_qwen3_4b_raw_skill_candidates.json")))
    entries = [replace(e, rollout_ids=(e.entry_id,), outcomes=(True,), uses=1) for e in entries]
    twice = [
        replace(e, entry_id=f"{e.entry_id}_b", rollout_ids=("b",), texts=(e.texts[0].upper(), f"{e.texts[1]}!", "else"))
        for e in entries
    ]
    merged = merge(entries + twice)
    assert totals(merged) == totals(entries + twice) and merge(merged) == merged
    assert len(merged) == len(merge(entries)) == len(entries)  # they are paraphrases at most: a model's to merge
    assert all(e.rollout_ids == ("b", e.entry_id) for e in merged)


# ---- merging with a model -------------------------------------------------------------------------------------------


def llm_merged(answer, entries):
    with serving(answer) as server:
        merger = LlmMerger(ChatModel(server.url, "m", timeout_seconds=30.0))
        return merge(entries, merger), merger.errors, [json.loads(b["messages"][1]["content"]) for _, b in server.asked]


def pairing(_, notes):
    """A model that merges each two neighbours."""
    merged = [
        {"from": [a["number"], b["number"]], **{key: f"{a[key]}+" for key in ("title", "principle", "when_to_apply")}}
        for a, b in zip(notes[::2], notes[1::2], strict=False)
    ]
    return json.dumps({"merged": merged})


def distinct(count):
    return [
        entry(f"gen_{i:03}", f"alpha{i} beta{i}", principle="x", evidence=[(f"r{i}", True)], counts=(1, 2, 3, 4))
        for i in range(count)
    ]


def test_a_model_merges_group_by_group_until_one_group_is_left():
    entries = distinct(100)
    merged, errors, asked = llm_merged(pairing, entries)
    assert totals(merged) == totals(entries) and not errors
    assert sorted(map(len, asked[:4])) + [len(notes) for notes in asked[4:]] == [
        4,
        32,
        32,
        32,
        25,
        25,
        26,
    ]  # 100 -> 50 -> 26 -> 13
    assert len(merged) == 13
    assert {e.entry_id for e in merged} <= {e.entry_id for e in entries}
    assert any("+" in e.texts[0] for e in merged)


def test_three_passes_that_merge_nothing_are_enough():
    entries = distinct(2 * GROUP)
    merged, _, asked = llm_merged(lambda *_: '{"merged": []}', entries)
    assert merged == entries and len(asked) == 2 * STAGNANT


REPLIES = [
    "no json",
    "[]",
    "{}",
    '{"merged": 3}',
    '{"merged": [{"from": [0, 1]}]}',
    '{"merged": [{"from": [0, 99], "title": "t", "principle": "p", "when_to_apply": "w"}]}',
    '{"merged": [{"from": "01", "title": "t", "principle": "p", "when_to_apply": "w"}]}',
    '{"merged": [{"from": [0, 1], "title": "t", "principle": "p", "when_to_apply": "w"}, '
    '{"from": [1, 2], "title": "t", "principle": "p", "when_to_apply": "w"}]}',
]


@pytest.mark.parametrize("said", REPLIES)
def test_a_reply_that_is_not_as_asked_leaves_the_group(said):
    entries = distinct(4)
    merged, errors, _ = llm_merged(lambda *_: said, entries)
    assert merged == entries and errors == {"bad_json": 1}


def test_a_note_of_one_entry_changes_nothing():
    entries = distinct(3)
    said = '{"merged": [{"from": [1, 1], "title": "t", "principle": "p", "when_to_apply": "w"}]}'
    assert llm_merged(lambda *_: said, entries)[0] == entries
