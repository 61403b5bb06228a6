"""The cache of teacher scores: a hit is the engine's own answer, bit for bit, and a broken entry is never read."""

import itertools
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from service_rows import CONTEXT, SUPPORT, VOCAB, fresh_random, random_rollout, random_rollouts
from test_self_teacher import published
from test_teacher_contexts import groups_of_rollouts
from test_teacher_views import TEMPLATE
from test_teacher_views import rows as view_rows
from tiny import tiny_model, tiny_qwen3

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.records import Prompt, Rollout, ScoreRequest, TeacherScores, Verdict
from tutorloop.contracts.skills import SkillPairs
from tutorloop.teacher_service import score_cache
from tutorloop.teacher_service.engines import make_engine
from tutorloop.teacher_service.score_cache import FROZEN, LASTING, PASSING, CachePlace, ScoreCache, forget_sampled
from tutorloop.teacher_service.worker import TeacherWorker

SIGNALS = ("sampled", "topk", "given", "hidden")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


@pytest.fixture(autouse=True)
def all_is_worth_it(monkeypatch):
    """Tiny engines are as fast as the disk."""
    monkeypatch.setattr(score_cache, "EXPECTED", dict.fromkeys((LASTING, PASSING), float("inf")))


def place_at(run, scorer="a teacher", most_bytes=2**30):
    return CachePlace(run=str(run), teacher_id="t", most_bytes=most_bytes, scorer=scorer)


def worker_of(model, cache, engine="transformers", dtype="fp32", tokens_per_batch=96, **options):
    own = {"teacher_id": "t", "engine": engine, "model": str(model), "dtype": dtype}
    return TeacherWorker(**own, tokens_per_batch=tokens_per_batch, cache=cache, **options)


def score_all(worker, rollouts, request, *batches):
    return worker.score(encode(Rollout, rollouts), request, *batches)


def assert_same(batch, expected):
    """Bit for bit, whatever the arrays' shapes are where they hold nothing."""
    assert batch.equals(expected) and batch.schema.equals(expected.schema, check_metadata=True)
    for one, other in zip(decode(TeacherScores, batch), decode(TeacherScores, expected), strict=True):
        for name in ("logprobs", "topk_ids", "topk_logprobs", "entropy", "hidden", "views", "view_weights"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def entries(run):
    return sorted(Path(run, "scores", "t").glob(f"*{PASSING}")) + sorted(Path(run, "scores", "t").glob(f"*{LASTING}"))


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


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path):
    random = fresh_random()
    left = tmp_path / "scores" / "t" / ".left"
    left.parent.mkdir(parents=True)
    for age, stands in ((0, True), (2 * score_cache.ABANDONED_SECONDS, False)):
        left.write_bytes(b"half an entry")
        os.utime(left, times=(time.time() - age,) * 2)
        score_all(worker_of("m", place_at(tmp_path), "fake"), [one_of(random)], ScoreRequest())
        assert left.exists() == stands


def one_of(random, number=0, response=6, source="student"):
    rollout = random_rollout(random, number, 5, response)
    return replace(rollout, token_ids=rollout.token_ids % 256, source=source)


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tutorloop-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only an administrator mounts a disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def goes_on_without(run, random, why):
    """Scores as before, a note once, and nothing kept."""
    worker, notes = worker_of("m", place_at(run), "fake"), []
    for i in range(3):
        rollout = one_of(random, i)
        batch, receipt = score_all(worker, [rollout], ScoreRequest())
        assert_same(batch, score_all(worker_of("m", None, "fake"), [rollout], ScoreRequest())[0])
        assert (receipt.hits, receipt.bytes_written) == (0, 0)
        notes += [receipt.note] if receipt.note else []
    assert len(notes) == 1 and why in notes[0] and "no more scores of t are kept" in notes[0]


def test_a_full_disk_keeps_no_scores_and_says_so_once(full_disk):
    (full_disk / "everything").write_bytes(b"x" * 2**20)
    goes_on_without(full_disk, fresh_random(), "No space left on device")


def test_a_folder_that_takes_nothing_keeps_no_scores_and_says_so_once(tmp_path):
    (tmp_path / "scores").write_text("a file")
    goes_on_without(tmp_path, fresh_random(), "Not a directory")
    goes_on_without(tmp_path / "elsewhere", fresh_random(), "the run's folder is not on this machine")
    assert not (tmp_path / "elsewhere").exists()


def test_a_write_that_breaks_off_leaves_nothing(tmp_path):
    random = fresh_random()
    score_all(worker_of("m", place_at(tmp_path), "fake"), [one_of(random)], ScoreRequest())
    before, limits = set((tmp_path / "scores" / "t").iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        worker = worker_of("m", place_at(tmp_path), "fake")
        _, receipt = score_all(worker, [one_of(random, 1, 600)], ScoreRequest(signal="hidden"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in receipt.note and set((tmp_path / "scores" / "t").iterdir()) == before


def test_it_is_bounded_and_what_was_used_least_lately_goes_first(tmp_path):
    random, most = fresh_random(), 200_000
    worker = worker_of("m", place_at(tmp_path, most_bytes=most), "fake")
    rollouts = [one_of(random, i, 20) for i in range(300)]
    clock = itertools.count(1_000_000)
    for i, rollout in enumerate(rollouts):
        before = set(entries(tmp_path))
        assert score_all(worker, [rollout], ScoreRequest())[1].bytes_written
        for entry in set(entries(tmp_path)) - before:
            os.utime(entry, times=(next(clock),) * 2)
        if i % 10 == 0:  # the first one is used again and again
            _, receipt = score_all(worker, [rollouts[0]], ScoreRequest())
            assert receipt.hits == 1
        assert sum(file.stat().st_size for file in entries(tmp_path)) <= most
    kept = [worker.cache._entry([rollout], ScoreRequest(), FROZEN).exists() for rollout in rollouts]
    assert kept[0] and kept[-1] and sum(kept) == len(entries(tmp_path)) >= 20
    assert kept[1:] == sorted(kept[1:])  # the newest ones


def test_sampled_ones_go_with_the_checkpoints_and_given_ones_stay(tmp_path):
    random, worker = fresh_random(), worker_of("m", place_at(tmp_path), "fake")
    sampled, given = one_of(random, 0), one_of(random, 1, source="dataset")
    for rollout in (sampled, given):
        score_all(worker, [rollout], ScoreRequest())
    for step, age in ((1, 500), (2, 100)):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        os.utime(tmp_path / "checkpoints" / f"step-{step:06d}", times=(time.time() - age,) * 2)

    def known_after(age):
        for entry in entries(tmp_path):
            os.utime(entry, times=(time.time() - age,) * 2)
        other = worker_of("m", place_at(tmp_path), "fake")
        score_all(other, [one_of(random, 2)], ScoreRequest())  # the folder is looked over before the first one
        return [score_all(other, [rollout], ScoreRequest())[1].hits for rollout in (sampled, given)]

    assert known_after(300) == [1, 1]  # a corrupt newest checkpoint has the run begin from the one before
    assert known_after(600) == [0, 1]
    forget_sampled(tmp_path)
    assert {entry.suffix for entry in entries(tmp_path)} == {LASTING}


# ---- what is worth it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine_seconds", "kept"), [(0.01, 4), (0.025, 10), (1.0, 20)])
def test_writing_takes_no_more_of_the_engines_time_than_an_entry_is_expected_to_save(
    engine_seconds, kept, tmp_path, monkeypatch
):
    """By a clock that shows 5 ms for each write: of 20 calls, as many are kept as a tenth of the engine's time pays."""
    now = [0.0]
    monkeypatch.setattr(score_cache.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(score_cache, "EXPECTED", {LASTING: 1.0, PASSING: 0.1})

    class Slow(ScoreCache):
        def _write(self, entry, scores):
            now[0] += 0.005
            return super()._write(entry, scores)

    engine = make_engine("fake", "m", teacher_id="t", dtype="fp32")
    answer = engine.score

    def slow(rollouts, request):
        now[0] += engine_seconds
        return answer(rollouts, request)

    engine.score = slow
    cache, random = Slow(place_at(tmp_path), engine), fresh_random()
    for i in range(20):
        cache.score([one_of(random, i)], ScoreRequest(), FROZEN)
    assert kept <= len(entries(tmp_path)) <= min(kept + 1, 20)
