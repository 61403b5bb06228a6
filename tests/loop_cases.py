"""Runs of a tiny student, for the tests of the whole loop: on Ray (tests/ray) and in one process (tests/runs)."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_qwen3

from tutorloop.cluster import run
from tutorloop.contracts.config import Config
from tutorloop.contracts.recipe import parse_config

PROBLEMS = [{"id": f"p{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]


def make_models(folder: Path) -> Path:
    """A student, a teacher of another width, another of the student's, and problems."""
    tiny_qwen3(folder / "student")
    tiny_qwen3(folder / "teacher", seed=1, hidden=48)
    tiny_qwen3(folder / "other", seed=2)
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return folder


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


def train(config: Config, address: str | None, resume: bool = False, allow: Sequence[str] = ()) -> dict[str, Any]:
    """On the cluster at `address`, or (None) in this process. The run's summary."""
    console = Console(file=io.StringIO(), width=100)
    assert run.train(config, resume, address, console, local=address is None, allow=allow)
    return json.loads((Path(config.output_dir) / "summary.json").read_text())


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What a step computed, without what a clock said."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    clocked = ("seconds", "wall_seconds", "pools", "score_cache")
    return [{k: v for k, v in row.items() if k not in clocked} for row in rows if row["kind"] == "step"]


def weights_of(folder: Path) -> dict[str, bytes]:
    """The final model's, and its adapter's where it has one."""
    tensors = load_file(folder / "final" / "model.safetensors")
    adapter = folder / "final" / "adapter" / "adapter_model.safetensors"
    tensors |= load_file(adapter) if adapter.is_file() else {}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
