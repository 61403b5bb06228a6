"""Adapters on two DeepSpeed ranks and in whole runs with them; with one rank: tests/runs/test_adapter_runs.py.

The reference of the learner shares nothing with it, nor with peft: one process, float64, A and B as leaves of
W + alpha/rank · B·A in a plain transformers model, dense logits, torch's AdamW.
"""

import json
import math
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from loop_cases import make_models, recipe, steps_of, train, weights_of
from lora_cases import check_export
from ray import cloudpickle
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tutorloop.contracts.arrow import encode
from tutorloop.contracts.config import Learner, Lora
from tutorloop.contracts.records import Correction, Rollout, StepPlan, TeacherScores, Term, TrainRow
from tutorloop.learner.checkpoint import Saved
from tutorloop.learner.packing import plan_updates
from tutorloop.learner.worker import LearnerWorker
from tutorloop.models.weights import read_bucket

LORA = Lora(rank=4, alpha=8.0)
STEPS, RATE, CLIP = 5, 1e-2, 0.05


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


# ---- the learner against a plain loop --------------------------------------------------------------------------------


class Host(LearnerWorker):
    """A rank whose process builds one learner after another."""

    def __init__(self) -> None:
        pass

    def build(self, **arguments: Any) -> None:
        LearnerWorker.__init__(self, **arguments)


@torch.no_grad()
def make_pairs(teacher: str, seed: int) -> list[list[tuple[Rollout, TeacherScores]]]:
    """STEPS lists of six rollouts with the teacher's hidden states."""
    print("seed", seed)
    random = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    steps = []
    for step in range(STEPS):
        steps.append([])
        for i in range(6):
            prompt, response = int(random.integers(1, 7)), int(random.integers(1, 25))
            ids = random.integers(0, 300, prompt + response).astype(np.int32)
            name = f"{step}-{i}"
            hidden = model.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0, prompt - 1 : -1]
            rollout = Rollout(
                rollout_id=name,
                prompt_id=name,
                group_id=name,
                sample_index=0,
                token_ids=ids,
                prompt_length=prompt,
                text="",
                logprobs=np.full(response, -math.log(300), np.float32),
                loss_mask=random.random(response) < 0.85,
            )
            said = model.lm_head(hidden).log_softmax(-1)[torch.arange(response), torch.from_numpy(ids[prompt:]).long()]
            own = {"logprobs": said.numpy(), "hidden": hidden.numpy()}
            scores = TeacherScores(rollout_id=name, teacher_id="teacher", **own)
            steps[-1].append((rollout, scores))
    return steps


def plain_loop(
    student: str, teacher: str, data: list[list[tuple[Rollout, TeacherScores]]], start: dict[str, torch.Tensor]
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of each step, and the last adapters; all in float64."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64).requires_grad_(False)
    head = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).lm_head.weight.detach()
    base = dict(model.named_parameters())
    leaves = {name: tensor.double().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms = [], []
    for pairs in data:
        weights = dict(base)
        for name in [name for name in leaves if ".lora_A." in name]:
            layer, b = name.split(".lora_A.")[0] + ".weight", leaves[name.replace(".lora_A.", ".lora_B.")]
            weights[layer] = base[layer] + LORA.alpha / LORA.rank * (b @ leaves[name])
        total, count = torch.zeros((), dtype=torch.float64), 0
        for rollout, scores in pairs:
            ids = torch.from_numpy(rollout.token_ids).long()
            rows = rollout.prompt_length + np.flatnonzero(rollout.loss_mask)
            p = torch.func.functional_call(model, weights, (ids[None],)).logits[0, rows - 1].log_softmax(1)
            hidden = torch.from_numpy(scores.hidden[rollout.loss_mask]).double()
            total = total + (p.exp() * (p - (hidden @ head.T).log_softmax(1))).sum()
            count += len(rows)
        optimizer.zero_grad()
        (total / count).backward()
        losses.append(float(total.detach()) / count)
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves.values(), CLIP)))
        optimizer.step()
    return losses, norms, {name: leaf.detach() for name, leaf in leaves.items()}


def published(actors: list[Any], version: int) -> dict[str, torch.Tensor]:
    streams = [actor.publish.options(num_returns="streaming").remote(version) for actor in actors]
    (*buckets, _manifest), *_ = ([ray.get(ref) for ref in stream] for stream in streams)
    return {name: tensor for bucket in buckets for name, tensor in read_bucket(bucket)}


def train_steps(actors: list[Any], data: list[list[tuple[Rollout, TeacherScores]]]) -> list[Any]:
    reports = []
    for step, pairs in enumerate(data):
        batches = [encode(Rollout, [r for r, _ in pairs]), encode(TeacherScores, [s for _, s in pairs])]
        rows = [(len(r.token_ids), TrainRow(batch=0, row=i)) for i, (r, _) in enumerate(pairs)]
        plans = [
            StepPlan(step=step, version=step, rollout_batches=1, score_batches=1, updates=updates)
            for updates in plan_updates(rows, len(actors), 48)
        ]
        reports.append(ray.get([a.step.remote(plan, *batches) for a, plan in zip(actors, plans, strict=True)])[0])
    return reports


def test_adapters_train_as_in_a_plain_loop(models: Path, address: str, tmp_path: Path) -> None:
    """ZeRO 0 to 3 with two ranks; an export merges, and a second learner starts as the first did."""
    student, teacher = str(models / "student"), str(models / "teacher")
    data = make_pairs(teacher, 20261121)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        actors = [ray.remote(num_cpus=0.5)(Host).remote() for _ in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"learning_rate": RATE, "weight_decay": 0.1, "max_grad_norm": CLIP, "tokens_per_batch": 48}
        starts = []
        for stage in (0, 1, 2, 3):
            arguments = {
                "world_size": 2,
                "master_port": port,
                "student": student,
                "heads": {"teacher": (teacher, "fp32")},
                "config": Learner(ranks=2, zero_stage=stage, **options),
                "terms": (Term(name="exact_divergence"),),
                "steps": STEPS,
                "correction": Correction(),
                "lora": LORA,
                "seed": 3,
            }
            ray.get([actor.build.remote(rank=rank, **arguments) for rank, actor in enumerate(actors)])
            starts.append(published(actors, 0))
            losses, norms, final = plain_loop(student, teacher, data, starts[0])
            reports = train_steps(actors, data)
            found = published(actors, 1)
            assert list(found) == list(final) and all(".lora_" in name for name in found)
            np.testing.assert_allclose([report.loss for report in reports], losses, rtol=1e-5)
            np.testing.assert_allclose([report.metrics["grad_norm"] for report in reports], norms, rtol=1e-4)
            apart = sum(float((found[name] - final[name]).square().sum()) for name in final) ** 0.5
            way = sum(float((starts[0][name] - final[name]).square().sum()) for name in final) ** 0.5
            print(f"stage {stage}: weights apart by {apart / way:.1e} of their way")
            assert apart < 1e-3 * way
            ray.get([actor.export.remote(str(tmp_path / str(stage))) for actor in actors])
            check_export(Path(student), tmp_path / str(stage))
        for start in starts[1:]:
            assert all(torch.equal(start[name], tensor) for name, tensor in starts[0].items())
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()


# ---- whole runs ------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, Any] = {
    "student": {"lora": LORA.model_dump()},
    "rollout": {"replicas": 2},
    "learner": {"ranks": 2, "zero_stage": 2},
    "verifier": {"kind": "none"},
    "checkpoint": {"every": 2, "keep": 9},
}


def checkpoint_elements(folder: Path) -> int:
    shapes = Saved.of(folder / "checkpoints" / "step-000004" / "learner").shapes
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.sweep
def test_a_run_with_adapters_resumes_bit_for_bit(models: Path, tmp_path: Path, address: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = train(recipe(models, whole, **SETTINGS), address)
    assert summary["steps"] == 4 and summary["weight_versions"] == 5
    kls = [row["learner"]["reverse_kl"] for row in steps_of(whole)]
    assert kls[-1] < kls[0]
    check_export(models / "student", whole / "final")
    adapter = load_file(whole / "final" / "adapter" / "adapter_model.safetensors")
    assert checkpoint_elements(whole) == sum(tensor.numel() for tensor in adapter.values())

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "final")
    train(recipe(models, cut, **SETTINGS), address, resume=True)
    assert steps_of(cut) == steps_of(whole)
    assert weights_of(cut) == weights_of(whole)


@pytest.mark.sweep
def test_sharded_bf16_adapters_run_beside_an_averaging_self_teacher(models: Path, tmp_path: Path, address: str) -> None:
    """ZeRO 3; generators and the teacher prove each version; a second stage starts anew from the merged model."""
    teacher = {"model": str(models / "student"), "signal": "topk", "follows": "ema", "dtype": "bf16"}
    stages = [{"method": "opd", "steps": 2, "method_options": {"top_k": 8}}] * 2
    settings = SETTINGS | {"learner": {"ranks": 2, "zero_stage": 3, "dtype": "bf16"}, "rollout": {}}
    config = recipe(models, tmp_path / "run", **settings, teacher=teacher, stages=stages, method="", steps=0)
    assert train(config, address)["steps"] == 4
    final, left = tmp_path / "run" / "final", tmp_path / "run" / "stages" / "0"
    assert (final / "adapter").is_dir() and (left / "adapter").is_dir()
    settings = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(left) and settings["r"] == LORA.rank
