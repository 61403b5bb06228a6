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
GREEDY_TOKENS = 8
ROWS = 32  # of the training data, more than any run here asks for: reading all 3000 takes longer than a step
SHORT = ("rollout.max_new_tokens=8",)  # of the run that CI waits for
CLOCKED = ("seconds", "wall_seconds", "pools", "score_cache")  # of a step's row


def train(
    models: RealModels, folder: Path, recipe: str, *overrides: str, resume: bool = False, local: bool = True
) -> dict[str, Any]:
    """A synchronous run of few and short rollouts, from the damaged student, in this process or on Ray; its summary."""
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(models.train.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]), "utf-8")
    short = {
        "output_dir": folder,
        "record": "all",
        "steps": 2,
        "prompts_per_step": 4,
        "max_staleness": 0,
        "student.model": models.student,
        "data.path": rows,
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
    assert run.train(config, resume, None, Console(file=io.StringIO(), width=100), local)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return [row for row in rows if row["kind"] == "step"]


def rollouts_of(folder: Path, step: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").open(encoding="utf-8")]
    return [row for row in rows if row["kind"] == "train" and row["step"] == step]


def sampled_ids(rollout: dict[str, Any]) -> list[int]:
    return rollout["token_ids"][rollout["prompt_length"] :]


def logprobs_of(folder: Path, rollout: dict[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """log p over the whole vocabulary `[R, V]` of each response token; in float64 they are exact, next to any engine's.

    In float32 transformers is off by up to 4e-4 on the damaged model.
    """
    return logprobs_after(folder, rollout["token_ids"][: rollout["prompt_length"]], sampled_ids(rollout), dtype)


@torch.no_grad()
def logprobs_after(
    folder: Path, prompt: list[int], response: list[int], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The same of a response after any prompt."""
    logits = loaded(folder, dtype)(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def of_sampled(logprobs: torch.Tensor, rollout: dict[str, Any]) -> torch.Tensor:
    """log p `[R]` of the tokens that were sampled."""
    return logprobs.gather(1, torch.tensor(sampled_ids(rollout))[:, None])[:, 0]


@lru_cache(maxsize=2)
def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def near(found: float, expected: float, tolerance: float, what: str) -> None:
    """`found` is what we computed. Each difference is printed: `pytest -rP` shows them."""
    print(f"{what}: {found:.9g}, {found - expected:+.1e} off, {tolerance:.0e} allowed")
    assert abs(found - expected) <= tolerance, f"{what}: {found}, not {expected}"


@torch.no_grad()
def greedy(folder: Path, rollout: dict[str, Any]) -> list[int]:
    """What transformers' own `generate` goes on with after a rollout's prompt, its end included."""
    prompt = torch.tensor([rollout["token_ids"][: rollout["prompt_length"]]])
    mask = torch.ones_like(prompt)
    model = loaded(folder, torch.float32)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    return made[0, prompt.shape[1] :].tolist()


def text_of(folder: Path, ids: list[int]) -> str:
    return AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
