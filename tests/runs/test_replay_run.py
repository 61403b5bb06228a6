"""Whole runs with a replay, in one process: its loss is that of a plain model on the given answers, and it is added to
the method's own; a run that goes on from a checkpoint replays as if it had never stopped."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster import run
from tutorloop.cluster.data import PromptOrder
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.records import seed_of
from tutorloop.models.loading import load_tokenizer, locate_model

ROOT = Path(__file__).parents[2]
SMALL = ["eval.path=", "eval.ood_path=", "prompts_per_step=4", "rollout.batch_size=8", "learner.warmup_steps=0"]
SMALL += ["record=all", "checkpoint.keep=9"]
GIVEN = [{"prompt": f"Name the word number {n}.", "solution": "so " * (n + 1) + "far"} for n in range(5)]
CLOCKED = ("seconds", "wall_seconds", "pools", "tokens", "failed", "score_cache")


def train(name: str, folder: Path, *overrides: str, rows: int = 3, resume: bool = False) -> list[dict[str, Any]]:
    """The rows of the run's steps; with `rows` of GIVEN in each."""
    own = [f"output_dir={folder}", *SMALL, *overrides]
    if rows:
        file = folder.parent / "given.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in GIVEN))
        own += [f"replay.path={file}", f"replay.rows_per_step={rows}", "replay.weight=0.3"]
    config = load_config(ROOT / "recipes" / f"{name}.yaml", own)
    assert run.train(config, resume, None, Console(file=io.StringIO(), width=100), local=True)
    return [row for row in lines(folder / "metrics.jsonl") if row["kind"] == "step"]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: own.tobytes() for name, own in load_file(folder / "final" / "model.safetensors").items()}


def mean_nll(step: int, rows: int, seed: int) -> tuple[float, list[list[int]]]:
    """What the lab's student, loaded by transformers, says of a step's answers, and their token ids."""
    model = AutoModelForCausalLM.from_pretrained(locate_model("lab:student"), dtype=torch.float32)
    tokenizer: Any = load_tokenizer("lab:student")
    order = PromptOrder(len(GIVEN), seed_of(seed, "replay"))
    total, count, ids = 0.0, 0, []
    for at in range(step * rows, (step + 1) * rows):
        row = GIVEN[order.row(at)]
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt_ids, answer = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, row["solution"]))
        ids.append([*prompt_ids, *answer, tokenizer.eos_token_id])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids[-1]])).logits[0].double().log_softmax(1)
        response = range(len(prompt_ids), len(ids[-1]))
        total -= sum(logprobs[t - 1, ids[-1][t]].item() for t in response)
        count += len(response)
    return total / count, ids


CASES = {
    "grpo": ["rollout.samples_per_prompt=8"],
    "opd_exact": [],
    "sft": [],
    "sdpo": ["rollout.samples_per_prompt=4", "method_options.grpo_weight=0.4"],
    "star": ["rollout.samples_per_prompt=2", "method_options.round_steps=2"],
}


SWEEP = {"opd_exact": pytest.mark.sweep, "star": pytest.mark.sweep}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SWEEP.get(name, ())) for name in CASES])
def test_the_loss_is_that_of_the_given_answers_beside_the_methods(name: str, tmp_path: Path) -> None:
    one = ["steps=2", "max_staleness=0", *CASES[name]]
    steps, without = train(name, tmp_path / "beside", *one), train(name, tmp_path / "alone", *one, rows=0)
    rollouts = [row for row in lines(tmp_path / "beside" / "rollouts.jsonl") if row["source"] == "replay"]
    nll, ids = mean_nll(0, 3, 0)
    assert [row["token_ids"] for row in rollouts if row["step"] == 1] == ids
    assert [row["rollout_id"] for row in rollouts] == [f"r{at}-0" for at in range(6)]
    assert all(row["trained"] and row["finish_reason"] == "stop" and "logprobs" not in row for row in rollouts)

    first, alone = steps[0], without[0]
    assert first["learner"]["loss_replay"] == pytest.approx(nll, rel=1e-5)
    assert first["loss"] == pytest.approx(alone["loss"] + 0.3 * nll, rel=1e-5, abs=1e-6)
    own = {key: value for key, value in first["learner"].items() if key not in ("loss_replay", "grad_norm")}
    assert own == pytest.approx({k: v for k, v in alone["learner"].items() if k != "grad_norm"}, rel=1e-4, abs=1e-5)
    tokens = sum(len(row["token_ids"]) - row["prompt_length"] for row in rollouts if row["step"] == 1)
    assert first["tokens"]["given"] - alone["tokens"]["given"] == tokens
    assert first["tokens"]["trained"] - alone["tokens"]["trained"] == tokens
    assert first["rollouts"]["taken"] - alone["rollouts"]["taken"] == 3
    for figure in ("pass_rate", "response_length", "truncated_share", "sampler_entropy", "groups", "staleness_mean"):
        assert first.get(figure) == alone.get(figure), figure
    assert steps[1]["learner"]["loss_replay"] != steps[0]["learner"]["loss_replay"]


def test_a_run_that_goes_on_replays_as_if_it_had_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers in flight in the checkpoint, which are not asked for again."""
    ahead = ["steps=5", "max_staleness=1", "checkpoint.every=2", "rollout.samples_per_prompt=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = train("grpo", whole, *ahead)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    for step in (4, 5):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:06d}")
    shards = json.loads((cut / "checkpoints" / "step-000002" / "shards" / "shards.json").read_text())
    held = {request["rollout_id"] for shard in shards if shard["files"] for request in shard["requests"]}
    assert {f"r{at}-0" for at in range(6, 9)} <= held
    made: list[str] = []
    real = RolloutWorker.generate

    def generate(worker: RolloutWorker, prompts: Any, requests: Any, sampling: Any) -> Any:
        made.extend(request.rollout_id for request in requests)
        return real(worker, prompts, requests, sampling)

    monkeypatch.setattr(RolloutWorker, "generate", generate)
    again = train("grpo", cut, *ahead, resume=True)
    assert {f"r{at}-0" for at in range(9, 15)} <= set(made) and not held & set(made)
    plain = [[{k: v for k, v in row.items() if k not in CLOCKED} for row in rows] for rows in (steps, again)]
    assert plain[0] == plain[1] and weights(cut) == weights(whole)
