"""The whole loop on a real Ray cluster, with real (tiny) models, DeepSpeed ranks and verifiers.

The same loop in one process, and what does not depend on where it runs, is in tests/runs.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop_cases import PROBLEMS, make_models, recipe, steps_of, train, weights_of
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.contracts.errors import ResourceError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def of_two_ranks(models: Path) -> dict[str, Any]:
    """Settings of a run."""
    problems = str(models / "problems.jsonl")
    return {
        "learner": {"ranks": 2, "zero_stage": 2},
        "checkpoint": {"every": 2, "keep": 9},
        "eval": {"path": problems, "ood_path": problems, "samples": 2, "every": 2},
    }


@pytest.fixture(scope="module")
def whole(models: Path, of_two_ranks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, four_cpus: str) -> Path:
    """That run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(models, folder, **of_two_ranks), four_cpus)
    return folder


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    folder, summary = whole, json.loads((whole / "summary.json").read_text())
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "checkpoints/step-000004/state.json"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    assert summary["steps"] == 4 and summary["weight_versions"] == 5 and not summary["interrupted"]
    assert set(summary["accuracy"]) == {"before", "after", "teacher", "ood_before", "ood_after", "ood_teacher"}
    assert None not in summary["accuracy"].values()
    assert summary["tokens"]["generated"] == summary["tokens"]["trained"] > 0
    assert set(summary["pools"]) == {"rollout", "teacher", "verifier", "learner"}
    assert summary["startup_seconds"].keys() >= {"inputs", "ray", "learner", "generators", "teachers"}
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


def test_two_ranks_resume_bit_for_bit(
    models: Path, whole: Path, of_two_ranks: dict[str, Any], tmp_path: Path, address: str
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    resumed = train(recipe(models, cut, **of_two_ranks), address, resume=True)
    assert steps_of(cut) == steps_of(whole)
    assert weights_of(cut) == weights_of(whole)
    assert (cut / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    assert resumed["tokens"] == json.loads((whole / "summary.json").read_text())["tokens"]


def test_one_rank_in_one_process_goes_on_where_two_were_on_ray(
    models: Path, whole: Path, of_two_ranks: dict[str, Any], tmp_path: Path
) -> None:
    """Elsewhere, with another ZeRO stage: the same rollouts, and weights but for the last bits."""
    cut = tmp_path / "elsewhere" / "run"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    learner = {**of_two_ranks["learner"], "ranks": 1, "zero_stage": 0}
    train(recipe(models, cut, **{**of_two_ranks, "learner": learner}), None, resume=True)
    for own, other in zip(steps_of(cut), steps_of(whole), strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
    found, wanted = (load_file(folder / "final" / "model.safetensors") for folder in (cut, whole))
    assert all(np.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5) for name in wanted)


def test_a_synchronous_run_is_that_of_one_process_bit_for_bit(models: Path, tmp_path: Path, address: str) -> None:
    """Two replicas, and a checkpoint that either way continues."""
    settings: dict[str, Any] = {"rollout": {"replicas": 2}, "checkpoint": {"every": 2, "keep": 9}}
    ways = {"ray": address, "here": None}
    summaries = {way: train(recipe(models, tmp_path / way, **settings), where) for way, where in ways.items()}
    assert steps_of(tmp_path / "ray") == steps_of(tmp_path / "here") and len(steps_of(tmp_path / "ray")) == 4
    assert weights_of(tmp_path / "ray") == weights_of(tmp_path / "here")
    rollouts = [(tmp_path / way / "rollouts.jsonl").read_bytes() for way in ways]
    assert rollouts[0] == rollouts[1]
    assert summaries["ray"]["tokens"] == summaries["here"]["tokens"]
    cut = tmp_path / "cut"  # begun on Ray, ended here
    shutil.copytree(tmp_path / "ray", cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    train(recipe(models, cut, **settings), None, resume=True)
    assert steps_of(cut) == steps_of(tmp_path / "ray")
    assert weights_of(cut) == weights_of(tmp_path / "ray")


OWN_ENGINE = """
from tutorloop.actors.transformers_engine import TransformersEngine
from tutorloop.contracts.engines import RolloutCapabilities

class Mine(TransformersEngine):
    capabilities = RolloutCapabilities()

    def decode(self, token_ids, thinking):
        from words import LAST
        return super().decode(token_ids, thinking) + LAST
"""


def test_an_asynchronous_run_takes_the_steps_of_one_process(models: Path, tmp_path: Path, address: str) -> None:
    """What a step trains on depends on who was faster; that each is whole and within the bound does not. Its engine is
    a class of the recipe's own, which its actors get with a module beside it."""
    (tmp_path / "engines.py").write_text(OWN_ENGINE)
    (tmp_path / "words.py").write_text("LAST = ' (mine)'")
    engine = {"engine": f"{tmp_path}/engines.py:Mine"}
    changes: dict[str, Any] = {"teacher": {"signal": "sampled"}, "rollout": engine, "max_staleness": 2, "steps": 8}
    for way, where in {"ray": address, "here": None}.items():
        summary = train(recipe(models, tmp_path / way, **changes), where)
        rows = steps_of(tmp_path / way)
        assert [row["step"] for row in rows] == list(range(1, 9))
        assert 0 < max(row["staleness_max"] for row in rows) <= 2
        assert all(row["learner"]["missing_scores"] == 0 for row in rows)
        assert summary["tokens"]["trained"] == summary["tokens"]["generated"]
        assert summary["dropped"] == {} and summary["weight_versions"] == 9
        assert sum(row["rollouts"]["trained"] for row in rows) == 64
        lines = [json.loads(line) for line in (tmp_path / way / "rollouts.jsonl").open()]
        assert len(lines) == 64 and all(line["response"].endswith(" (mine)") for line in lines)


def test_more_than_the_cluster_has_is_refused_before_an_actor_starts(
    models: Path, tmp_path: Path, address: str
) -> None:
    for section, expected in (({"num_gpus": 1}, "the cluster has 0"), ({"num_cpus": 64}, "the cluster has 4")):
        with pytest.raises(ResourceError, match=expected):
            train(recipe(models, tmp_path / "run", rollout=section), address)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1"):
        train(recipe(models, tmp_path / "run"), "127.0.0.1:1")


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
