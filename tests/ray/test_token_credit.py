"""Services that credit single tokens, on Ray: strategies, and one of a recipe's own."""

import io
import json
from pathlib import Path

from loop_cases import steps_of, weights_of
from own_service import credited_run
from rich.console import Console
from strategy_runs import fit_lab, small_sgpo

from tutorloop.cluster import run


def test_sgpo_with_two_strategy_replicas_is_that_of_one_process_bit_for_bit(tmp_path: Path, address: str) -> None:
    strategies = fit_lab(tmp_path / "strategies")
    for way in ("ray", "here"):
        config = small_sgpo(tmp_path / way, strategies, "steps=3", "strategies.replicas=2", "rollout.batch_size=8")
        assert run.train(config, False, address, Console(file=io.StringIO(), width=100), local=way == "here")
    ours, theirs = (steps_of(tmp_path / way) for way in ("ray", "here"))
    assert ours == theirs and len(ours) == 3
    assert all(row["method"]["neutral_share"] < 1 for row in ours)
    assert weights_of(tmp_path / "ray") == weights_of(tmp_path / "here")
    *_, last = (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["pools"]["strategies"]["replicas"] == 2


def test_a_service_of_ones_own_credits_tokens(tmp_path: Path, address: str) -> None:
    credited_run(tmp_path, address)
