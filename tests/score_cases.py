"""Teachers whose scores are kept, and rollouts for them, for the tests of the cache."""

from dataclasses import replace
from pathlib import Path

from service_rows import random_rollout

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.records import Rollout, TeacherScores
from tutorloop.teacher_service import score_cache
from tutorloop.teacher_service.score_cache import LASTING, PASSING, CachePlace
from tutorloop.teacher_service.worker import TeacherWorker


def keep_all(monkeypatch):
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


def one_of(random, number=0, response=6, source="student"):
    rollout = random_rollout(random, number, 5, response)
    return replace(rollout, token_ids=rollout.token_ids % 256, source=source)
