"""Short runs on the real model, and what plain transformers says about the very tokens that they trained on."""

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config
from tutorloop.lab.real import RealModels

RECIPES = Path(__file__).parents[1] / "recipes"
GREEDY_TOKENS = 12


def train(models: RealModels, folder: Path, recipe: str, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """A synchronous run of few and short rollouts, from the damaged student; its summary."""
    short = {
        "output_dir": folder,
        "record": "all",
        "steps": 2,
        "prompts_per_step": 4,
        "max_staleness": 0,
        "student.model": models.student,
        "data.path": models.train,
        "rollout.max_new_tokens": 12,
        "rollout.batch_size": 32,
        "verifier.kind": "tutorloop.lab.real_tasks:passes",
        "learner.tokens_per_batch": 512,
        "learner.learning_rate": 1e-4,
        "learner.warmup_steps": 0,
        "eval.path": "",
        "eval.ood_path": "",
    }
    given = [f"{key}={value}" for key, value in short.items()]
    config = load_config(RECIPES / recipe, [*given, *overrides])
    assert run.train(config, resume, None, Console(file=io.StringIO(), width=100))
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return [row for row in rows if row["kind"] == "step"]


def rollouts_of(folder: Path, step: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").open(encoding="utf-8")]
    return [row for row in rows if row["kind"] == "train" and row["step"] == step]


@torch.no_grad()
def logprobs_of(folder: Path, rollout: dict[str, Any]) -> torch.Tensor:
    """log p over the whole vocabulary, float32 `[R, V]`, of each response token."""
    model = loaded(folder)
    ids = torch.tensor([rollout["token_ids"]])
    return model(input_ids=ids).logits[0, rollout["prompt_length"] - 1 : -1].float().log_softmax(-1)


@lru_cache(maxsize=1)
def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(folder: Path, rollout: dict[str, Any]) -> list[int]:
    """What transformers' own `generate` goes on with after a rollout's prompt, its end included."""
    prompt = torch.tensor([rollout["token_ids"][: rollout["prompt_length"]]])
    mask = torch.ones_like(prompt)
    made = loaded(folder).generate(prompt, attention_mask=mask, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    return made[0, prompt.shape[1] :].tolist()


def text_of(folder: Path, ids: list[int]) -> str:
    return AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
