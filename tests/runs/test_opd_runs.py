"""Distillation in one process, with tiny models: resume, the strengths of opd, several teachers, gsm8k from disk.

That a run on Ray gives the same, bit for bit, is shown by tests/ray/test_train.py.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_templates import Q3
from loop_cases import PROBLEMS, make_models, recipe, steps_of, train, weights_of
from tiny import tiny_model
from transformers import AutoTokenizer

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster.pools import services
from tutorloop.contracts.errors import WeightsMismatch
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.records import WeightBucket, WeightManifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def test_synchronous_runs_repeat_and_resume_bit_for_bit(models: Path, tmp_path: Path) -> None:
    """With two ranks: tests/ray/test_train.py."""
    settings = {"rollout": {"replicas": 2}, "checkpoint": {"every": 2, "keep": 9}, "learner": {"zero_stage": 2}}
    whole = train(recipe(models, tmp_path / "whole", **settings), None)
    often = {**settings, "checkpoint": {"minutes": 1e-9, "keep": 9}}  # what trains depends on no clock
    train(recipe(models, tmp_path / "again", **often), None)
    assert len(list((tmp_path / "again" / "checkpoints").iterdir())) == 4
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "again")
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "again")

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    resumed = train(recipe(models, cut, **settings), None, resume=True)
    assert steps_of(cut) == steps_of(tmp_path / "whole")
    assert weights_of(cut) == weights_of(tmp_path / "whole")
    assert (cut / "rollouts.jsonl").read_bytes() == (tmp_path / "whole" / "rollouts.jsonl").read_bytes()
    assert resumed["tokens"] == whole["tokens"]


@pytest.mark.parametrize(("signal", "options"), [("sampled", {}), ("topk", {"top_k": 8, "support": "student"})])
def test_the_other_strengths_of_opd_run_within_the_staleness_bound(
    models: Path, tmp_path: Path, signal: str, options: dict[str, Any]
) -> None:
    teacher = {"signal": signal}
    config = recipe(models, tmp_path / "run", teacher=teacher, method_options=options, max_staleness=2, steps=8)
    summary = train(config, None)
    rows = steps_of(tmp_path / "run")
    assert 0 < max(row["staleness_max"] for row in rows) <= 2
    assert all(row["learner"]["missing_scores"] == 0 for row in rows)
    assert summary["tokens"]["trained"] == summary["tokens"]["generated"]
    assert summary["dropped"] == {}
    if signal == "topk":
        assert rows[-1]["learner"]["topk_reverse_kl"] < rows[0]["learner"]["topk_reverse_kl"]


def test_each_row_asks_the_teacher_that_it_names(models: Path, tmp_path: Path) -> None:
    rows = [{**problem, "teacher": "ab"[i % 2]} for i, problem in enumerate(PROBLEMS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {name: {"model": str(models / model)} for name, model in (("a", "teacher"), ("b", "other"))}
    config = recipe(models, tmp_path / "run", teacher=None, teachers=named, data={"path": str(data)}, steps=2)
    summary = train(config, None)
    assert summary["pools"].keys() >= {"teacher.a", "teacher.b"}
    assert summary["dropped"] == {}
    assert summary["tokens"]["trained"] == summary["tokens"]["generated"]


def test_gsm8k_with_a_qwen3_checkpoint_from_disk(tmp_path: Path) -> None:
    shared = Path(os.environ.get("TUTORLOOP_SHARED_DATA", ROOT.parent / "shared" / "data"))
    problems = shared / "problems" / "gsm8k_train.jsonl"
    if not problems.is_file():
        pytest.skip(f"the shared data is not there: {problems}")
    names = {name: str(tmp_path / name) for name in ("student", "teacher")}
    for seed, folder in enumerate(names.values()):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "lab" / "models" / "teacher")
        tokenizer.chat_template = Q3  # reads enable_thinking, as the recipe has it
        tokenizer.save_pretrained(folder)
        tiny_model("qwen3", vocab=512, hidden=32, context=1024, seed=seed).save_pretrained(folder)
    local = [
        "data.name=",
        "data.prompt_field=problem",
        "rollout.num_gpus=0",
        "teacher.num_gpus=0",
        "learner.num_gpus=0",
    ]
    small = ["steps=3", "prompts_per_step=4", "rollout.max_new_tokens=16", "eval.problems=4"]
    models = [f"{name}.model={folder}" for name, folder in names.items()]
    paths = [f"data.path={problems}", f"eval.path={problems}", f"output_dir={tmp_path / 'run'}"]
    config = load_config(ROOT / "recipes" / "gsm8k_qwen3.yaml", [*models, *paths, *local, *small])
    summary = train(config, None)
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["tokens"]["trained"] > 0 and row["abstained"] == 0 for row in rows)
    assert summary["verifier_errors"] == {} and summary["accuracy"]["after"] is not None


class Deaf(RolloutWorker):
    """A replica that changes a weight after the third version arrives, before it is proved."""

    def load_weights(self, manifest: WeightManifest, *buckets: WeightBucket) -> float:
        if manifest.version == 2:
            data = buckets[0].arrays[0].copy()
            data[5] ^= 1
            arrays = (data, *buckets[0].arrays[1:])
            first = WeightBucket(version=buckets[0].version, entries=buckets[0].entries, arrays=arrays)
            buckets = (first, *buckets[1:])
        return super().load_weights(manifest, *buckets)


def test_a_replica_with_other_weights_stops_the_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "RolloutWorker", Deaf)
    with pytest.raises(WeightsMismatch, match="version 2"):
        train(recipe(models, tmp_path / "run"), None)
