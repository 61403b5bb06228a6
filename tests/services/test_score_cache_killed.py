"""Processes that write the same entries of the cache of teacher scores, and are killed in the middle of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tutorloop.teacher_service.score_cache import PASSING, unsealed

WRITER = """
import sys
import numpy as np
from tutorloop.contracts.records import Rollout, ScoreRequest
from tutorloop.teacher_service import score_cache
from tutorloop.teacher_service.engines import make_engine
score_cache.EXPECTED = dict.fromkeys(score_cache.EXPECTED, float("inf"))
place = score_cache.CachePlace(run=sys.argv[1], teacher_id="t", most_bytes=2**30, scorer="s")
cache = score_cache.ScoreCache(place, make_engine("fake", "m", teacher_id="t", dtype="fp32"))
request, rows = ScoreRequest(signal="hidden"), 600
known = {}
print("ready", flush=True)
for turn in range(10**9):
    for i in range(40):
        ids = np.random.default_rng(i).integers(0, 256, 5 + rows).astype(np.int32)
        own = dict(rollout_id=str(i), prompt_id="p", group_id="g", sample_index=i, token_ids=ids, prompt_length=5)
        rollout = Rollout(**own, text="", logprobs=np.zeros(rows, np.float32), loss_mask=np.ones(rows, bool))
        (score,), use = cache.score([rollout], request, "frozen")
        assert not use.note and known.setdefault(i, score.hidden.tobytes()) == score.hidden.tobytes()
    for entry in list(cache.folder.glob("*.sampled"))[turn % 3 :: 3]:
        entry.unlink(missing_ok=True)
    if turn == 0:
        print("turned", flush=True)
"""


def test_writers_that_are_killed_leave_whole_entries_alone(tmp_path: Path) -> None:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random, found = np.random.default_rng(seed), 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        for writer in writers:
            assert writer.stdout
            assert [writer.stdout.readline() for _ in range(2)] == [b"ready\n", b"turned\n"]
        time.sleep(0.1 * random.random())
        assert [writer.poll() for writer in writers] == [None] * 3  # each found what the others wrote as it would be
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.communicate()
        for entry in (tmp_path / "scores" / "t").glob(f"*{PASSING}"):
            assert unsealed(entry.read_bytes(), entry.stem) is not None
            found += 1
    assert found
