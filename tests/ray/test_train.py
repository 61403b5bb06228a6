"""The whole loop on a real Ray cluster, with real (tiny) models, DeepSpeed ranks and verifiers."""

import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from chat_templates import Q3
from ray import cloudpickle
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_model, tiny_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cli.main import app
from tutorloop.cluster import run
from tutorloop.cluster.pools import services
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import ResourceError, WeightsMismatch
from tutorloop.contracts.recipe import load_config, parse_config
from tutorloop.contracts.records import WeightBucket, WeightManifest

ROOT = Path(__file__).parents[2]
PROBLEMS = [{"id": f"p{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_qwen3(folder / "student")
    tiny_qwen3(folder / "teacher", seed=1, hidden=48)
    tiny_qwen3(folder / "other", seed=2)
    lines = "".join(json.dumps(problem) + "\n" for problem in PROBLEMS)
    (folder / "problems.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that stands for the module; each run joins it and leaves nothing behind."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(autouse=True)
def nothing_left_behind(address: str) -> Iterator[None]:
    yield
    assert not ray.is_initialized()


def recipe(models: Path, folder: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "method": "opd",
        "output_dir": str(folder),
        "steps": 4,
        "prompts_per_step": 4,
        "student": {"model": str(models / "student")},
        "teacher": {"model": str(models / "teacher"), "signal": "exact"},
        "data": {"path": str(models / "problems.jsonl")},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 12, "batch_size": 4},
        "learner": {"learning_rate": 1e-2, "tokens_per_batch": 64},
    }
    for key, value in changes.items():
        section = tree.get(key)
        tree[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
    return parse_config(tree)


def train(config: Config, address: str, resume: bool = False) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=100)
    assert run.train(config, resume, address, console)
    return json.loads((Path(config.output_dir) / "summary.json").read_text())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a step computed, without what a clock said."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    clocked = ("seconds", "wall_seconds", "pools")
    return [{k: v for k, v in row.items() if k not in clocked} for row in rows if row["kind"] == "step"]


def weights_of(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "final" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_run_leaves_what_it_promises(models: Path, tmp_path: Path, address: str) -> None:
    evaluation = {"path": str(models / "problems.jsonl"), "ood_path": str(models / "problems.jsonl"), "samples": 2}
    summary = train(recipe(models, tmp_path / "run", eval={**evaluation, "every": 2}), address)
    folder = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "checkpoints/step-000004/state.json"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    assert summary["steps"] == 4 and summary["weight_versions"] == 5 and not summary["interrupted"]
    assert set(summary["accuracy"]) == {"before", "after", "teacher", "ood_before", "ood_after", "ood_teacher"}
    assert None not in summary["accuracy"].values()
    assert summary["tokens"]["generated"] == summary["tokens"]["trained"] > 0
    assert set(summary["pools"]) == {"rollout", "teacher", "verifier", "learner"}
    assert [row["step"] for row in summary["evals"] if row["model"] == "student"] == [0, 0, 2, 2, 4, 4]
    assert summary["staleness"] == {"mean": 0.0, "max": 0}
    kls = [row["learner"]["reverse_kl"] for row in steps_of(folder)]
    assert kls[-1] < kls[0]
    assert all(0 < pool["busy_fraction"] <= 1 for pool in summary["pools"].values())
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").open()]
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    for row in steps_of(folder):
        own = [line for line in train_lines if line["step"] == row["step"]]
        assert sum(line["passed"] for line in own) / 8 == row["pass_rate"] and all(line["trained"] for line in own)
        lengths = [len(line["token_ids"]) - line["prompt_length"] for line in own]
        assert sum(lengths) == row["tokens"]["generated"] == sum(len(line["logprobs"]) for line in own)
        assert all(line["golds"] for line in own)
    seen = {(line["model"], line["split"], line["step"]) for line in lines if line["kind"] == "eval"}
    assert seen == {(row["model"], row["split"], row["step"]) for row in summary["evals"]}
    assert "What the model wrote" in (folder / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "2+2="}], add_generation_prompt=True)
    assert model.config.model_type == "qwen3"


@pytest.mark.parametrize("ranks", [1, 2])
def test_synchronous_runs_repeat_and_resume_bit_for_bit(models: Path, tmp_path: Path, address: str, ranks: int) -> None:
    learner = {"ranks": ranks, "zero_stage": 2}
    settings = {"learner": learner, "rollout": {"replicas": 2}, "checkpoint": {"every": 2, "keep": 9}}
    whole = train(recipe(models, tmp_path / "whole", **settings), address)
    if ranks == 1:
        often = {**settings, "checkpoint": {"minutes": 1e-9, "keep": 9}}  # what trains depends on no clock
        train(recipe(models, tmp_path / "again", **often), address)
        assert len(list((tmp_path / "again" / "checkpoints").iterdir())) == 4
        assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "again")
        assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "again")

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    resumed = train(recipe(models, cut, **settings), address, resume=True)
    assert steps_of(cut) == steps_of(tmp_path / "whole")
    assert weights_of(cut) == weights_of(tmp_path / "whole")
    assert (cut / "rollouts.jsonl").read_bytes() == (tmp_path / "whole" / "rollouts.jsonl").read_bytes()
    assert resumed["tokens"] == whole["tokens"]


@pytest.mark.parametrize(("signal", "options"), [("sampled", {}), ("topk", {"top_k": 8, "support": "student"})])
def test_the_other_strengths_of_opd_run_within_the_staleness_bound(
    models: Path, tmp_path: Path, address: str, signal: str, options: dict[str, Any]
) -> None:
    teacher = {"signal": signal}
    config = recipe(models, tmp_path / "run", teacher=teacher, method_options=options, max_staleness=2, steps=8)
    summary = train(config, address)
    rows = steps_of(tmp_path / "run")
    assert 0 < max(row["staleness_max"] for row in rows) <= 2
    assert all(row["learner"]["missing_scores"] == 0 for row in rows)
    assert summary["tokens"]["trained"] == summary["tokens"]["generated"]
    assert summary["dropped"] == {}
    if signal == "topk":
        assert rows[-1]["learner"]["topk_reverse_kl"] < rows[0]["learner"]["topk_reverse_kl"]


def test_each_row_asks_the_teacher_that_it_names(models: Path, tmp_path: Path, address: str) -> None:
    rows = [{**problem, "teacher": "ab"[i % 2]} for i, problem in enumerate(PROBLEMS)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {name: {"model": str(models / model)} for name, model in (("a", "teacher"), ("b", "other"))}
    config = recipe(models, tmp_path / "run", teacher=None, teachers=named, data={"path": str(data)}, steps=2)
    summary = train(config, address)
    assert summary["pools"].keys() >= {"teacher.a", "teacher.b"}
    assert summary["dropped"] == {}
    assert summary["tokens"]["trained"] == summary["tokens"]["generated"]


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
    models: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(importlib.import_module(__name__))
    monkeypatch.setattr(services, "RolloutWorker", Deaf)
    with pytest.raises(WeightsMismatch, match="version 2"):
        train(recipe(models, tmp_path / "run"), address)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_more_than_the_cluster_has_is_refused_before_an_actor_starts(
    models: Path, tmp_path: Path, address: str
) -> None:
    for section, expected in (({"num_gpus": 1}, "the cluster has 0"), ({"num_cpus": 64}, "the cluster has 4")):
        with pytest.raises(ResourceError, match=expected):
            train(recipe(models, tmp_path / "run", rollout=section), address)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1"):
        train(recipe(models, tmp_path / "run"), "127.0.0.1:1")


def test_gsm8k_with_a_qwen3_checkpoint_from_disk(tmp_path: Path, address: str) -> None:
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
    summary = train(config, address)
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["tokens"]["trained"] > 0 and row["abstained"] == 0 for row in rows)
    assert summary["verifier_errors"] == {} and summary["accuracy"]["after"] is not None


def test_eval_reports_a_model_by_itself(models: Path, address: str) -> None:
    data = ["--data", str(models / "problems.jsonl"), "--samples", "2", "--max-new-tokens", "8"]
    arguments = ["eval", str(models / "student"), "rollout.num_cpus=0.1", *data, "--address", address, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    stats = json.loads(result.stdout)
    assert (stats["problems"], stats["samples"]) == (len(PROBLEMS), 2)
    assert all(0 <= stats[name]["low"] <= stats[name]["value"] <= 1 for name in ("avg_at_k", "pass_at_k", "maj_at_k"))
    refused = CliRunner().invoke(app, ["eval", str(models / "student"), "rollout.replica=2"])
    assert refused.exit_code == 2 and "did you mean rollout.replicas" in refused.stderr
