"""Shards in flight are in the checkpoints: a run that goes on asks for nothing that it had, and trains it as it was."""

import asyncio
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster import run
from tutorloop.cluster.flow.kept_shards import kept, read_shards, write_shards
from tutorloop.cluster.flow.shard import Shard
from tutorloop.cluster.pools.in_process import InProcessBackend
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.receipts import Receipt, RolloutReceipt, ScoreReceipt
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.records import SampleRequest, TeacherScores

ROOT = Path(__file__).parents[2]
SMALL = ["eval.path=", "eval.ood_path=", "prompts_per_step=4", "rollout.batch_size=8", "learner.warmup_steps=0"]
AHEAD = ["steps=6", "max_staleness=2", "checkpoint.every=2", "checkpoint.keep=9", "record=all"]
CLOCKED = ("seconds", "wall_seconds", "pools", "tokens", "failed", "score_cache")


def train(name: str, folder: Path, resume: bool = False) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    config = load_config(ROOT / "recipes" / f"{name}.yaml", [f"output_dir={folder}", *SMALL, *AHEAD])
    assert run.train(config, resume, None, Console(file=io.StringIO(), width=100), local=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows if row["kind"] == "step"]
    return steps, {name: own.tobytes() for name, own in load_file(folder / "final" / "model.safetensors").items()}


@pytest.mark.parametrize("name", [pytest.param("opd_exact", marks=pytest.mark.sweep), "dapo"])
def test_an_asynchronous_run_goes_on_as_if_it_had_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process answers come in one order, so its weights can be compared to the bit; dapo asks on top."""
    whole = train(name, tmp_path / "whole")
    assert max(row["staleness_max"] for row in whole[0]) == 2
    made: list[str] = []
    real = RolloutWorker.generate
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "final")
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:06d}")
    known = json.loads((cut / "checkpoints" / "step-000002" / "shards" / "shards.json").read_text())
    held = {request["rollout_id"] for shard in known if "rollouts" in shard["files"] for request in shard["requests"]}
    assert held

    def generate(worker: RolloutWorker, prompts: Any, requests: Any, sampling: Any) -> Any:
        made.extend(request.rollout_id for request in requests)
        return real(worker, prompts, requests, sampling)

    monkeypatch.setattr(RolloutWorker, "generate", generate)
    again = train(name, cut, resume=True)
    assert made and not held & set(made)
    assert again == whole
    shown = [json.loads(line)["rollout_id"] for line in (cut / "rollouts.jsonl").open(encoding="utf-8")]
    assert len(set(shown)) == len(shown)


class OwnReceipt(Receipt):
    """Of a service of one's own."""


def test_batches_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hidden = [rng.standard_normal((rows, 3)).astype(np.float16) for rows in (2, 1, 5)]
    scores = [
        TeacherScores(rollout_id=f"{i}", teacher_id="t", logprobs=rng.random(len(own), np.float32), hidden=own)
        for i, own in enumerate(hidden)
    ]
    requests = tuple(
        SampleRequest(rollout_id=f"{i}", group_id="0", sample_index=i, row=0, seed=2**62 + i) for i in range(3)
    )
    shard = Shard(7, requests, attempt=2)
    shard.batches = {"rollouts": encode(TeacherScores, []), "teacher.t": encode(TeacherScores, scores), "own": "unread"}
    lengths = {"lengths": (3, 4, 5), "response_lengths": (2, 0, 5), "finish_reasons": ("eos",) * 3}
    shard.receipts = {
        "rollouts": RolloutReceipt(rows=3, seconds=0.5, weight_version=6, **lengths),
        "teacher.t": ScoreReceipt(rows=3, seconds=0.25, errors={"too long": 1}),
        "own": OwnReceipt(rows=3, seconds=0.1),
    }
    shard.to_learner, shard.ready = {"teacher.t": "scores", "own": "credits"}, True
    unbegun = Shard(8, requests[:1])

    async def through() -> dict[int, list[Shard]]:
        backend = InProcessBackend()
        await write_shards(tmp_path, kept({7: [shard], 8: [unbegun]}), backend)
        return read_shards(tmp_path, backend)

    found = asyncio.run(through())
    (back,), (fresh,) = found[7], found[8]
    assert back.requests == requests and (back.step, back.attempt) == (7, 2)
    assert back.receipts == {name: shard.receipts[name] for name in ("rollouts", "teacher.t")}
    assert not back.ready and back.to_learner == {"teacher.t": "scores"}, "what cannot be kept is asked for again"
    for one, other in zip(decode(TeacherScores, back.batches["teacher.t"]), scores, strict=True):
        assert one.hidden.tobytes() == other.hidden.tobytes() and one.hidden.dtype == np.float16
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    assert not fresh.ready and not fresh.batches and fresh.requests == requests[:1]


def test_shards_of_other_settings_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("opd_exact", folder)
    shutil.rmtree(folder / "final")
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    own = [f"output_dir={folder}", *SMALL, *AHEAD, "rollout.temperature=0.9"]
    config = load_config(ROOT / "recipes" / "opd_exact.yaml", own)
    quiet = Console(file=io.StringIO(), width=100)
    assert run.train(config, True, None, quiet, local=True, allow=["rollout.temperature"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    last = [row for row in rows if row["kind"] == "step"][-1]
    known = json.loads((folder / "checkpoints" / "step-000006" / "state.json").read_text())["tally"]["dropped"]
    assert last["step"] == 6 and last["dropped"]["settings_changed"] == known["settings_changed"] > 0
