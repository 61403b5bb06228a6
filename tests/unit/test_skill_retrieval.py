"""Retrieval is LanceDB's search, batched; pairs by rank and their weights; and the worker that serves them."""

import importlib.util
import math
import random

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import FTS

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import SkillError
from tutorloop.contracts.records import Prompt
from tutorloop.contracts.skills import BankEntry, SkillPairs
from tutorloop.verifier_service.skills.retrieval import Retriever, tokenize
from tutorloop.verifier_service.skills.store import SkillBank
from tutorloop.verifier_service.skills.worker import SkillWorker

SYLLABLES = ["ka", "run", "ning", "tri", "ang", "le", "s", "ed", "É", "naï", "ve", "x^2", "3.14", "the", "of"]


def words(rng: random.Random, length: int) -> str:
    """Made-up words, common ones among them more often, with all that a tokenizer may stumble on in between."""
    made = ("".join(rng.choices(SYLLABLES, k=1 + int(rng.paretovariate(1.5)) % 4)) for _ in range(length))
    return "".join(
        word + rng.choice([" ", " ", " ", ", ", "-", "\n", "_", ". ", "\\frac{", "'", "\u2028"]) for word in made
    )


def bank(rng: random.Random, size: int) -> list[BankEntry]:
    entries = []
    for i in range(size):
        texts = (words(rng, 3), words(rng, rng.randrange(40)), words(rng, 8))
        entries.append(BankEntry(entry_id=f"e{i:04d}", kind=rng.choice(["skill", "mistake"]), texts=texts))
    rng.shuffle(entries)
    return entries


def entry(entry_id: str, kind: str, text: str) -> BankEntry:
    return BankEntry(entry_id=entry_id, kind=kind, texts=(text, "", ""))


def bm25(entries: list[BankEntry], problem: str) -> dict[str, float]:
    """Each entry's similarity, word by word from the formula."""
    texts = {e.entry_id: tokenize([e.text])[0] for e in entries}
    mean = sum(map(len, texts.values())) / len(texts)
    sums, most = dict.fromkeys(texts, 0.0), 0.0
    for word in tokenize([problem])[0]:
        having = sum(word in text for text in texts.values())
        if not having:
            continue
        idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        most += idf * 2.2
        for key, text in texts.items():
            times = text.count(word)
            sums[key] += idf * 2.2 * times / (times + 1.2 * (0.25 + 0.75 * len(text) / mean))
    return {key: value / most if most else 0.0 for key, value in sums.items()}


def test_similarities_are_the_formula():
    rng = random.Random()
    entries = bank(rng, 60)
    retriever = Retriever(entries)
    for problem in [words(rng, 30) for _ in range(5)] + ["", "unheard", "the of"]:
        wanted = bm25(entries, problem)
        for kind in ("skill", "mistake"):
            found = retriever.search(problem, 1000, kind)
            assert {e.entry_id: pytest.approx(s, abs=1e-12) for e, s in found} == {
                e.entry_id: wanted[e.entry_id] for e in entries if e.kind == kind
            }
            assert all(0 <= s < 1 for _, s in found)


def test_the_best_are_those_of_lancedb():
    """Same scores, on text that both tokenize; entries of one score may change places."""
    rng = random.Random()
    entries = bank(rng, 2000)
    columns = {name: [getattr(e, name) for e in entries] for name in ("entry_id", "kind", "text")}
    table = lancedb.connect("memory://").create_table("entries", pa.table(columns))
    table.create_index("text", config=FTS())
    retriever = Retriever(entries)
    for problem in [words(rng, rng.randrange(1, 40)) for _ in range(30)]:
        for kind in ("skill", "mistake"):
            query = table.search(problem, query_type="fts").where(f"kind = '{kind}'", prefilter=True)
            theirs = {row["entry_id"]: row["_score"] for row in query.limit(20).to_list()}
            ordered = retriever.search(problem, 2000, kind)
            assert retriever.search(problem, 5, kind) == ordered[:5]
            ours = {e.entry_id: s for e, s in ordered}
            if not theirs:
                assert not any(ours.values())
                continue
            scale = max(theirs.values()) / max(ours.values())
            assert theirs == {key: pytest.approx(scale * ours[key], rel=1e-4) for key in theirs}
            best = sorted(ours.values())[::-1][: len(theirs)]
            assert sorted(theirs.values())[::-1] == pytest.approx([scale * s for s in best], rel=1e-4)


def test_many_texts_are_tokenized_as_each_alone():
    rng = random.Random()
    texts = [words(rng, rng.randrange(30)) for _ in range(40)] + ["", " ", "x" * 50, "a\0b", "x" * 3 + "0", ""]
    assert tokenize(texts) == [tokenize([text])[0] for text in texts]
    assert tokenize([]) == []
    assert tokenize(["The Cafés' running_equations, \\frac{1}{2}"]) == [["cafe", "run", "equat", "frac", "1", "2"]]


def test_pairs_go_by_rank_and_weights_by_similarity():
    rng = random.Random()
    entries = bank(rng, 300)
    retriever = Retriever(entries)
    problems = [words(rng, 25) for _ in range(20)]
    for problem, found in zip(problems, retriever.pairs(problems, 8), strict=True):
        best = {kind: retriever.search(problem, 8, kind) for kind in ("skill", "mistake")}
        assert found.skills == tuple(e for e, _ in best["skill"])
        assert found.mistakes == tuple(e for e, _ in best["mistake"])
        means = np.array([(a + b) / 2 for (_, a), (_, b) in zip(best["skill"], best["mistake"], strict=True)])
        assert found.weights == pytest.approx(np.exp(means) / np.exp(means).sum(), rel=1e-6)
        assert found.weights.dtype == np.float32 and found.weights.sum() == pytest.approx(1)


def test_a_problem_is_served_alike_in_any_batch():
    rng = random.Random()
    entries = bank(rng, 100)
    problems = [words(rng, 25) for _ in range(600)]  # more than are scored at once
    together = Retriever(entries).pairs(problems, 4)
    rng.shuffle(entries)
    retriever = Retriever(entries)
    for i in rng.sample(range(600), 20):
        (alone,) = retriever.pairs([problems[i]], 4)
        assert (alone.skills, alone.mistakes) == (together[i].skills, together[i].mistakes)
        assert np.array_equal(alone.weights, together[i].weights)


def test_ties_go_by_id_and_short_lists_end_the_pairs():
    entries = [entry(f"s{i}", "skill", "same words") for i in (3, 1, 2, 0)]
    entries += [entry(f"m{i}", "mistake", "same words") for i in (1, 0)]
    (found,) = Retriever(entries).pairs(["words"], 3)
    assert [e.entry_id for e in found.skills] == ["s0", "s1"]
    assert [e.entry_id for e in found.mistakes] == ["m0", "m1"]
    assert found.weights.tolist() == [0.5, 0.5]
    for short in ([], entries[:4]):
        (found,) = Retriever(short).pairs(["words"], 3)
        assert found.skills == found.mistakes == () and found.weights.shape == (0,)
    assert Retriever(entries).pairs([], 3) == []


class Letters:
    """Counts of letters: the smallest embedder."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def test_embeddings_are_compared_by_cosine():
    entries = [entry("s1", "skill", "aab"), entry("s2", "skill", "bb"), entry("m", "mistake", "c")]
    retriever = Retriever(entries, Letters())
    assert [(e.entry_id, s) for e, s in retriever.search("ab", 2, "skill")] == [
        ("s1", pytest.approx(3 / math.sqrt(10))),
        ("s2", pytest.approx(1 / math.sqrt(2))),
    ]
    assert retriever.search("", 1, "mistake")[0][1] == 0
    (found,) = retriever.pairs(["ab"], 8)
    assert (found.skills, found.mistakes) == ((entries[0],), (entries[2],))
    assert Retriever([], Letters()).pairs(["ab"], 8)[0].skills == ()


def test_a_model_without_its_extra_is_refused():
    if importlib.util.find_spec("sentence_transformers"):
        pytest.skip("sentence-transformers is installed")
    with pytest.raises(SkillError, match=r"tutorloop\[embeddings\]"):
        Retriever([], "some/model")


# ---- the worker -----------------------------------------------------------------------------------------------------


def prompts(texts: dict[str, str]) -> pa.RecordBatch:
    ids = np.zeros(1, np.int32)
    return encode(Prompt, [Prompt(prompt_id=i, text=t, token_ids=ids, answer="") for i, t in texts.items()])


@pytest.fixture
def worker(tmp_path):
    made = SkillBank.open(str(tmp_path), create=True)
    made.add([entry("s1", "skill", "halve twice"), entry("s2", "skill", "draw it")])
    made.add([entry("m1", "mistake", "forgot to halve"), entry("m2", "mistake", "no drawing")])
    return SkillWorker(path=str(tmp_path), embedder="lexical")


def test_a_worker_gives_each_distinct_prompt_its_pairs(worker):
    batch = prompts({"p0": "unused", "p1": "halve 12", "p2": "draw a line"})
    found, receipt = worker.retrieve(batch, [2, 1, 2], 8)
    rows = decode(SkillPairs, found)
    assert [row.prompt_id for row in rows] == ["p2", "p1"] and receipt.rows == 2 and receipt.tokens == 0
    assert rows[1].skill_ids == ("s1", "s2") and rows[1].mistake_ids == ("m1", "m2")
    assert rows[1].skills[0] == "halve twice." and rows[1].mistakes[0] == "forgot to halve."
    assert rows[1].bank_version == worker.version == 3
    assert decode(SkillPairs, worker.retrieve(batch, [1], 1)[0])[0].skill_ids == ("s1",)
    assert decode(SkillPairs, worker.retrieve(batch, [], 8)[0]) == []


def test_a_worker_reads_one_version_until_told(worker):
    batch = prompts({"p": "halve 12"})
    version = worker.bank.add([entry("s0", "skill", "halve"), entry("m0", "mistake", "halve")])
    for told, best in ((False, "s1"), (True, "s0")):
        assert not told or worker.refresh(version) == version
        (row,) = decode(SkillPairs, worker.retrieve(batch, [0], 8)[0])
        assert row.skill_ids[0] == best and row.bank_version == worker.version
    with pytest.raises(SkillError):
        worker.refresh(version + 1)


def test_a_worker_writes_down_what_came_of_what_was_shown_once(worker):
    found, _ = worker.retrieve(prompts({"p1": "halve 12"}), [0], 8)
    before = worker.bank.version
    came = [[("p1", (1, -1)), ("p1", (0, None))], [("p1", (None, -1, 1))]]  # a view beyond the pairs: none
    assert worker.save(before, came, found, found) == before + 1 == worker.save(0, [])
    expected = dict.fromkeys(("s1", "m1"), (2, 1, 0, 1)) | dict.fromkeys(("s2", "m2"), (2, 0, 2, 0))
    for _ in range(2):  # and once more from the same version, as where the answer was lost
        assert {e.entry_id: (e.uses, e.helpful, e.harmful, e.neutral) for e in worker.bank.entries()} == expected
        assert worker.save(before, came, found, found) > before + 1
    assert worker.restore(before) > before + 1 and all(e.uses == 0 for e in worker.bank.entries())
