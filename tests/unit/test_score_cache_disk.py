"""The cache of teacher scores and the disk: full, read-only, bounded; and what is worth writing."""

import itertools
import os
import resource
import shutil
import signal
import time

import pytest
from score_cases import assert_same, entries, keep_all, one_of, place_at, score_all, worker_of
from service_rows import fresh_random

from tutorloop.contracts.records import ScoreRequest
from tutorloop.teacher_service import score_cache
from tutorloop.teacher_service.engines import make_engine
from tutorloop.teacher_service.score_cache import FROZEN, LASTING, PASSING, ScoreCache, forget_sampled


@pytest.fixture(autouse=True)
def all_is_worth_it(monkeypatch):
    keep_all(monkeypatch)


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


def test_a_folder_that_goes_is_made_again(tmp_path):
    random, worker = fresh_random(), worker_of("m", place_at(tmp_path), "fake")
    written = []
    for i in range(4):
        _, receipt = score_all(worker, [one_of(random, i)], ScoreRequest())
        written.append(receipt.bytes_written > 0)
        assert not receipt.note
        if i == 0:
            shutil.rmtree(tmp_path / "scores")
    assert written == [True, False, True, True]


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


def test_what_a_killed_writer_left_goes_after_a_while(tmp_path):
    random = fresh_random()
    left = tmp_path / "scores" / "t" / ".left"
    left.parent.mkdir(parents=True)
    for age, stands in ((0, True), (2 * score_cache.ABANDONED_SECONDS, False)):
        left.write_bytes(b"half an entry")
        then = time.time() - age
        os.utime(left, times=(then, then))
        score_all(worker_of("m", place_at(tmp_path), "fake"), [one_of(random)], ScoreRequest())
        assert left.exists() == stands


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
    assert kept <= len(entries(tmp_path)) <= min(kept + 2, 20)  # the first one is free
