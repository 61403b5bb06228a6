"""The cache of teacher scores: a hit is the engine's own answer, bit for bit, and a broken entry is never read."""

import os
from dataclasses import replace

import numpy as np
import pytest
from score_cases import assert_same, entries, keep_all, place_at, score_all, worker_of
from service_rows import CONTEXT, SUPPORT, VOCAB, fresh_random, random_rollout, random_rollouts
from test_self_teacher import published
from test_teacher_contexts import groups_of_rollouts
from test_teacher_views import TEMPLATE
from test_teacher_views import rows as view_rows
from tiny import tiny_model, tiny_qwen3

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.records import Prompt, ScoreRequest, TeacherScores, Verdict
from tutorloop.contracts.skills import SkillPairs
from tutorloop.teacher_service.engines import make_engine
from tutorloop.teacher_service.score_cache import FROZEN, ScoreCache

SIGNALS = ("sampled", "topk", "given", "hidden")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


@pytest.fixture(autouse=True)
def all_is_worth_it(monkeypatch):
    keep_all(monkeypatch)


# ---- it changes no result --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["transformers", "fake"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_hit_is_what_the_engine_answered(signal, dtype, engine, qwen3, tmp_path):
    random, request = fresh_random(), ScoreRequest(signal=signal, top_k=SUPPORT)
    rollouts = [replace(r, token_ids=r.token_ids % 256, topk_ids=r.topk_ids % 256) for r in random_rollouts(random)]
    plain, none = score_all(worker_of(qwen3, None, engine, dtype), rollouts, request)
    worker = worker_of(qwen3, place_at(tmp_path), engine, dtype)
    first, missed = score_all(worker, rollouts, request)
    other = worker_of(qwen3, place_at(tmp_path), engine, dtype)  # a replica that comes later
    renamed = [replace(rollout, rollout_id=f"again-{rollout.rollout_id}", group_id="x") for rollout in rollouts]
    second, hit = score_all(other, rollouts, request)
    third, _ = score_all(other, renamed, request)
    assert_same(first, plain)
    assert_same(second, plain)
    assert third.drop_columns("rollout_id").equals(plain.drop_columns("rollout_id"))
    assert third.column("rollout_id").to_pylist() == [rollout.rollout_id for rollout in renamed]
    assert (none.hits, none.misses, none.spared) == (0, 0, 0)
    assert (missed.hits, missed.misses, missed.spared) == (0, len(rollouts), 0)
    assert (hit.hits, hit.misses, hit.tokens, hit.spared) == (len(rollouts), 0, 0, missed.tokens)
    assert hit.lengths == () and hit.rows == len(rollouts)
    assert missed.bytes_written == hit.bytes_read == sum(file.stat().st_size for file in entries(tmp_path))


def test_what_was_kept_changes_nothing_in_calls_that_know_a_part(qwen3, tmp_path):
    """The rest of a call goes through the model in the batches that it would have gone in."""
    random, request = fresh_random(), ScoreRequest(signal="hidden")
    known = [random_rollout(random, i, *random.integers(1, 60, 2)) for i in range(40)]
    plain, worker = worker_of(qwen3, None), worker_of(qwen3, place_at(tmp_path))
    hits = misses = 0
    for _ in range(12):
        rollouts = [known[i] for i in random.choice(len(known), random.integers(1, 25), replace=False)]
        expected, _ = score_all(plain, rollouts, request)
        found, receipt = score_all(worker, rollouts, request)
        assert_same(found, expected)
        hits, misses = hits + receipt.hits, misses + receipt.misses
    assert hits and misses  # those that stand alone in their forward pass were known


def test_contexts_and_views_are_served_too(qwen3, tmp_path):
    random, tokens = fresh_random(), {"tokens_per_batch": 512, "templates": TEMPLATE}
    long = tiny_qwen3(tmp_path / "long", context=512)
    prompts, rollouts, verdicts = groups_of_rollouts(random)
    peers = ScoreRequest(signal="topk", top_k=SUPPORT, context="peer_feedback@1"), prompts, verdicts, None
    own, shown, pairs = view_rows(random)
    views = ScoreRequest(signal="topk", top_k=SUPPORT, context="pair@t", views=3), own, None, pairs
    for asked, (request, texts, judged, skills) in ((rollouts, peers), (shown, views)):
        batches = (
            encode(Prompt, texts),
            encode(Verdict, judged) if judged else None,
            encode(SkillPairs, skills) if skills else None,
        )
        expected, receipt = score_all(worker_of(long, None, **tokens), asked, request, *batches)
        worker = worker_of(long, place_at(tmp_path), **tokens)
        for hits, misses in ((0, len(receipt.lengths)), (len(receipt.lengths), 0)):
            found, own_receipt = score_all(worker, asked, request, *batches)
            assert_same(found, expected)
            assert (own_receipt.hits, own_receipt.misses, own_receipt.errors) == (hits, misses, receipt.errors)


def test_what_is_refused_is_refused_again_and_not_kept(qwen3, tmp_path):
    random = fresh_random()
    good = [random_rollout(random, i, 4, 6) for i in range(3)]
    bad = [random_rollout(random, 7, 4000, 200), random_rollout(random, 8, 4, 0)]
    worker = worker_of(qwen3, place_at(tmp_path))
    for misses in (3, 0):
        batch, receipt = score_all(worker, [bad[0], *good, bad[1]], ScoreRequest())
        classes = [score.error_class for score in decode(TeacherScores, batch)]
        assert classes == ["too_long", "", "", "", "empty"] and receipt.misses == misses
    worker.engine.model.get_input_embeddings().weight.data[:] = np.nan  # a model that overflows
    others = [random_rollout(random, i, 5, 6) for i in range(3)]
    for _ in range(2):
        _, receipt = score_all(worker, others, ScoreRequest())
        assert receipt.errors == {"not_finite": 3} and (receipt.hits, receipt.bytes_written) == (0, 0)


# ---- what an entry is called by --------------------------------------------------------------------------------------


def test_all_that_changes_the_answer_changes_the_entry(qwen3, tmp_path):
    random = fresh_random()
    rollout = random_rollout(random, 0, 5, 6)
    engine = make_engine("fake", "m", teacher_id="t", dtype="fp32")
    given = ScoreRequest(signal="given")
    other_ids = np.where(np.arange(11) == 7, (rollout.token_ids + 1) % 256, rollout.token_ids).astype(np.int32)
    shifted = {"prompt_length": 4, "logprobs": np.zeros(7, np.float32), "loss_mask": np.ones(7, bool)}
    asked = [
        ("a", FROZEN, ScoreRequest(), [rollout]),
        ("b", FROZEN, ScoreRequest(), [rollout]),
        ("a", "another fingerprint", ScoreRequest(), [rollout]),
        ("a", FROZEN, ScoreRequest(signal="hidden"), [rollout]),
        ("a", FROZEN, ScoreRequest(signal="topk", top_k=3), [rollout]),
        ("a", FROZEN, ScoreRequest(signal="topk", top_k=4), [rollout]),
        ("a", FROZEN, given, [rollout]),
        ("a", FROZEN, given, [replace(rollout, topk_ids=rollout.topk_ids[:, ::-1])]),
        ("a", FROZEN, given, [replace(rollout, topk_ids=rollout.topk_ids[:, :2])]),
        ("a", FROZEN, ScoreRequest(), [replace(rollout, token_ids=other_ids)]),
        ("a", FROZEN, ScoreRequest(), [replace(rollout, **shifted, topk_ids=np.zeros((0, 0), np.int32))]),
        ("a", FROZEN, ScoreRequest(), [rollout, replace(rollout, rollout_id="r1")]),
        ("a", FROZEN, ScoreRequest(), [replace(rollout, source="dataset")]),  # it lasts longer
    ]
    names = [ScoreCache(place_at(tmp_path, a), engine)._entry(r, q, w).name for a, w, q, r in asked]
    assert len(set(names)) == len(names)
    same = replace(rollout, rollout_id="x", group_id="y", text="z", topk_ids=np.zeros((0, 0), np.int32))
    cache = ScoreCache(place_at(tmp_path, "a"), engine)
    assert cache._entry([same], ScoreRequest(context="hinted", everyone=True), FROZEN).name == names[0]


def test_equal_rollouts_of_a_call_are_asked_for_once(tmp_path):
    class Servers:
        """One request a rollout, as of an http teacher."""

        tokens_per_batch, vocab, context, teacher_id = 1, 256, 4096, "t"

        def __init__(self):
            self.fake, self.asked = make_engine("fake", "m", teacher_id="t", dtype="fp32"), []

        def score(self, rollouts, request):
            self.asked += [rollout.rollout_id for rollout in rollouts]
            return self.fake.score(rollouts, request)

    random, engine = fresh_random(), Servers()
    one, two = (replace(r, token_ids=r.token_ids % 256) for r in (random_rollout(random, i, 4, 5) for i in range(2)))
    twin = replace(one, rollout_id="twin")
    cache = ScoreCache(place_at(tmp_path), engine)
    for expected, hits in ((["r0", "r1"], {1}), ([], {0, 1, 2})):
        engine.asked.clear()
        scores, use = cache.score([one, twin, two], ScoreRequest(), FROZEN)
        assert engine.asked == expected and use.hits == hits
        assert [score.rollout_id for score in scores] == ["r0", "twin", "r1"]
        assert np.array_equal(scores[0].logprobs, scores[1].logprobs)


@pytest.mark.parametrize("follows", ["live", "ema"])
def test_a_self_teacher_is_known_by_the_weights_that_it_holds(follows, qwen3, tmp_path):
    rollouts, request = random_rollouts(fresh_random()), ScoreRequest(signal="hidden")
    worker = worker_of(qwen3, place_at(tmp_path), follows=follows)
    plain = worker_of(qwen3, None, follows=follows)

    def take(seed, version):
        buckets, manifest = published(tiny_model("qwen3", seed=seed), version)
        for one in (worker, plain):
            one.load_weights(manifest, *buckets)

    def scored():
        expected, _ = score_all(plain, rollouts, request)
        found, receipt = score_all(worker, rollouts, request)
        assert_same(found, expected)
        return receipt.hits

    assert scored() == scored() == 0  # before its first version nobody says what it holds
    take(3, 1)
    assert (scored(), scored()) == (0, len(rollouts))
    take(4, 2)
    assert (scored(), scored()) == (0, len(rollouts))
    if follows == "live":
        take(3, 9)  # the same weights by another number, as after a restart
        assert scored() == len(rollouts)
        return
    worker.save_average(str(tmp_path / "average"))
    worker = worker_of(qwen3, place_at(tmp_path), follows=follows)
    worker.load_average(str(tmp_path / "average"))
    assert scored() == len(rollouts)
    take(5, 3)
    assert scored() == 0


# ---- entries that are not whole --------------------------------------------------------------------------------------


def test_an_entry_that_is_cut_or_changed_is_never_read(qwen3, tmp_path):
    random, request = fresh_random(), ScoreRequest(signal="hidden")
    rollouts = random_rollouts(random)
    worker = worker_of(qwen3, place_at(tmp_path), tokens_per_batch=4096)
    expected, _ = score_all(worker, rollouts, request)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    cuts = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    flipped = bytearray(whole)
    flipped[int(random.integers(len(whole)))] ^= 1 << int(random.integers(8))
    for broken in (*cuts, bytes(flipped), whole + b"\0"):
        entry.write_bytes(broken)
        found, receipt = score_all(worker, rollouts, request)
        assert_same(found, expected)
        assert receipt.hits == 0 and entry.read_bytes() == whole
    worker.engine = None  # nobody else to ask
    assert score_all(worker, rollouts, request)[1].hits == len(rollouts)


def test_an_entry_under_another_name_is_not_read(qwen3, tmp_path):
    random = fresh_random()
    worker = worker_of(qwen3, place_at(tmp_path))
    one, other = random_rollout(random, 0, 5, 6), random_rollout(random, 1, 5, 6)
    score_all(worker, [one], ScoreRequest())
    (entry,) = entries(tmp_path)
    score_all(worker, [other], ScoreRequest())
    (second,) = set(entries(tmp_path)) - {entry}
    os.replace(second, entry)
    assert score_all(worker, [one], ScoreRequest())[1].hits == 0
