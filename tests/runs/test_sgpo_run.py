"""Whole runs of SGPO in one process: the loss is that of its rewards and step credits, and a resumed run goes on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from strategy_runs import LAB_ROWS, fit_lab, small_sgpo

from tutorloop.cluster import run
from tutorloop.cluster.methods.parts.credit import group_relative, group_rows
from tutorloop.cluster.methods.parts.strategies import Worth, capped
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import RunFolderError, StrategyError
from tutorloop.contracts.records import Rollout, TokenCredit
from tutorloop.lab import model_path
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.strategies.embedding import make_embedder
from tutorloop.verifier_service.strategies.fit import fit
from tutorloop.verifier_service.strategies.segments import StepLimits
from tutorloop.verifier_service.strategies.solutions import Problem
from tutorloop.verifier_service.strategies.worker import StrategyWorker


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_lab(tmp_path_factory.mktemp("strategies") / "made")


def trained(folder: Path, strategies: Path, *changes: str, resume: bool = False) -> list[dict[str, Any]]:
    config = small_sgpo(folder, strategies, *changes)
    assert run.train(config, resume, None, Console(file=io.StringIO(), width=100), local=True)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def recorded(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train" and row["step"] == 1]


def as_rollout(line: dict[str, Any]) -> Rollout:
    kept = {name: line[name] for name in ("rollout_id", "prompt_id", "group_id", "prompt_length")}
    ids, length = np.array(line["token_ids"], np.int32), len(line["token_ids"]) - line["prompt_length"]
    none = {"logprobs": np.zeros(length, np.float32), "loss_mask": np.ones(length, bool)}
    return Rollout(**kept, **none, sample_index=0, token_ids=ids, text=line["response"])


def test_the_loss_is_that_of_rewards_and_step_credits(tmp_path: Path, strategies: Path) -> None:
    (step,) = trained(tmp_path / "run", strategies, "steps=1")
    lines = recorded(tmp_path / "run")
    assert len(lines) == 24 and all(line["trained"] for line in lines)
    worker = StrategyWorker(path=str(strategies), tokenizer=str(model_path("student")))
    batch, said = worker.align(encode(Rollout, [as_rollout(line) for line in lines]))
    credits = {credit.rollout_id: credit.values for credit in decode(TokenCredit, batch)}
    codes = [code for own in said.codes for code in own]
    shares = {code: codes.count(code) / len(codes) for code in codes}
    known = [value for value in said.alignments if value is not None]
    assert len(known) > 0 and step["method"]["alignment"] == pytest.approx(np.mean(known), abs=1e-4)
    assert step["method"]["neutral_share"] == pytest.approx(1 - len(known) / 24)
    assert step["method"]["top_code_share"] == pytest.approx(max(shares.values()))

    worth, losses = Worth(), []
    for members in group_rows([line["group_id"] for line in lines]):
        of_group = [said.alignments[i] for i in members if said.alignments[i] is not None]
        mean = np.mean(of_group) if of_group else 0.0
        rewards = [
            worth.reward(
                lines[i]["reward"],
                lines[i]["passed"],
                mean if said.alignments[i] is None else said.alignments[i],
                said.diversities[i],
                capped(said.codes[i], shares, 0.4),
            )
            for i in members
        ]
        for i, advantage in zip(members, group_relative(rewards), strict=True):
            losses.append(-(advantage + credits[lines[i]["rollout_id"]].mean(dtype=np.float64)))
    assert step["loss"] == pytest.approx(np.mean(losses), abs=2e-5)  # the policy that sampled is the one that learns
    assert step["pools"]["strategies"]["replicas"] == 1 and step["failed"] == {}


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path, strategies: Path) -> None:
    whole = trained(tmp_path / "whole", strategies, "steps=4")
    trained(tmp_path / "parts", strategies, "steps=2")
    parts = trained(tmp_path / "parts", strategies, "steps=4", resume=True)
    for name in ("loss", "method", "reward"):
        assert [row[name] for row in parts] == [row[name] for row in whole]
    (state,) = (tmp_path / "parts" / "checkpoints").glob("*4/state.json")
    assert len(json.loads(state.read_text())["method"]["at_first"]) == 3


def test_another_extractor_is_refused(tmp_path: Path, strategies: Path) -> None:
    trained(tmp_path / "run", strategies, "steps=1")
    other = tmp_path / "other"
    problems = [Problem(row["id"], row["prompt"], [row["solution"]]) for row in LAB_ROWS[:10]]
    tokenizer = load_tokenizer(str(model_path("teacher")))
    given = {"limits": StepLimits(least=1, most=40), "codes": 8, "frozen": True}
    fit(problems, make_embedder("hidden:lab:teacher"), tokenizer, other, **given)
    with pytest.raises(RunFolderError, match="strategies"):
        trained(tmp_path / "run", other, "steps=2", resume=True)
    problems = [Problem(row["id"], f"Not {row['prompt']}", [row["solution"]]) for row in LAB_ROWS[:10]]
    fit(problems, make_embedder("hidden:lab:teacher"), tokenizer, tmp_path / "wrong", **given)
    with pytest.raises(StrategyError, match="of its own problem"):
        trained(tmp_path / "new", tmp_path / "wrong", "steps=1")
