"""A synchronous run's figures and weights do not depend, to the last bit, on how many rollout replicas there are.

That holds where the batch size alone decides the calls of generate. With more replicas than that gives calls, a step is
cut finer, so that none is idle: the same rollouts are asked for, but a model rounds otherwise in another batch.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[2]
SMALL = ["eval.path=", "eval.ood_path=", "checkpoint.every=0", "max_staleness=0", "steps=3", "learner.warmup_steps=0"]
SMALL += ["prompts_per_step=6", "rollout.batch_size=8"]  # three calls of generate
CLOCKED = ("seconds", "wall_seconds", "pools", "score_cache")
CASES = {  # what is asked on top; a teacher that answers too; a teacher that is shown verdicts
    "dapo": ["rollout.samples_per_prompt=4", "method_options.max_refills=3"],
    "sg_opd": ["rollout.samples_per_prompt=4"],
    "sdpo": ["rollout.samples_per_prompt=4"],
}


MARKS = {"sg_opd": pytest.mark.sweep, "sdpo": pytest.mark.sweep}


def figures(name: str, folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    config = load_config(ROOT / "recipes" / f"{name}.yaml", [f"output_dir={folder}", *SMALL, *CASES[name], *overrides])
    assert run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows if row["kind"] == "step"]
    weights = load_file(folder / "final" / "model.safetensors")
    return steps, {name: tensor.tobytes() for name, tensor in weights.items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES])
def test_the_number_of_replicas_changes_nothing(name: str, tmp_path: Path) -> None:
    first = figures(name, tmp_path / "1", "rollout.replicas=1")
    assert any(row["learner"].get("grad_norm", 0) > 0 for row in first[0])
    for replicas in (2, 3):
        again = figures(name, tmp_path / f"{replicas}", f"rollout.replicas={replicas}")
        assert again[0] == first[0] and again[1] == first[1]
