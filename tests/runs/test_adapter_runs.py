"""Adapters in whole runs in one process, with one rank; with two: tests/ray/test_lora_runs.py."""

import shutil
from pathlib import Path
from typing import Any

from loop_cases import make_models, recipe, steps_of, train, weights_of
from lora_cases import LORA, check_export
from safetensors.torch import load_file

from tutorloop.contracts.recipe import parse_config
from tutorloop.models.loading import locate_model


def test_a_run_with_adapters_resumes_bit_for_bit(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    settings: dict[str, Any] = {"student": {"lora": LORA.model_dump()}, "checkpoint": {"every": 2, "keep": 9}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(models, whole, **settings), None)
    assert load_file(whole / "final" / "adapter" / "adapter_model.safetensors").keys()
    check_export(models / "student", whole / "final")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    train(recipe(models, cut, **settings), None, resume=True)
    assert steps_of(cut) == steps_of(whole)
    assert weights_of(cut) == weights_of(whole)


def test_grpo_trains_adapters(tmp_path: Path) -> None:
    tree = {
        "method": "grpo",
        "output_dir": str(tmp_path / "run"),
        "steps": 2,
        "prompts_per_step": 6,
        "student": {"model": "lab:student", "lora": LORA.model_dump()},
        "data": {"path": "lab:train"},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 32},
        "learner": {"learning_rate": 1e-3},
    }
    train(parse_config(tree), None)
    assert [row["tokens"]["trained"] > 0 for row in steps_of(tmp_path / "run")] == [True, True]
    check_export(locate_model("lab:student"), tmp_path / "run" / "final")
