"""A fifth service from outside the package, whose worker credits single tokens; and a run with it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[1]
OWN = """
import time

import numpy as np

from tutorloop.cluster.methods.parts.annotations import PROMPTS, ROLLOUTS, VERDICTS, Annotation
from tutorloop.cluster.methods.parts.composition import Composition, Credit, sampling_of, student_group
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.receipts import Receipt
from tutorloop.contracts.records import Rollout, Term, TokenCredit, Verdict


class Counter:
    '''Credits token t of a response with t + 1, halved where it passed; it refuses every third response.'''

    def count(self, rollouts, verdicts, half):
        start = time.perf_counter()
        credits = []
        for i, (rollout, verdict) in enumerate(zip(decode(Rollout, rollouts), decode(Verdict, verdicts), strict=True)):
            values = np.arange(1, rollout.response_length + 1, dtype=np.float32) * (half if verdict.passed else 1.0)
            own = {"rollout_id": rollout.rollout_id, "service": "counter"}
            refused = i % 3 == 2
            credits.append(TokenCredit(**own, error_class="third") if refused else TokenCredit(**own, values=values))
        errors, seconds = {"third": sum(bool(credit.error_class) for credit in credits)}, time.perf_counter() - start
        return encode(TokenCredit, credits), Receipt(rows=len(credits), seconds=seconds, errors=errors)


def compose(config):
    counted = Annotation(
        name="counts", service="counter", method="count", reads=(ROLLOUTS, VERDICTS), given={"half": 0.5},
        to_learner="credits", worker=Counter,
    )
    return Composition(
        terms=(Term(name="clipped_policy_gradient", credit="counter"),),
        samples=student_group(config),
        sampling=sampling_of(config),
        needs_verdicts=True,
        credit=lambda rollouts, step: [Credit(advantage=-3.0) for _ in rollouts],
        own_annotations=(counted,),
    )
"""


def rows_of(file: Path, **wanted: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def credited_run(tmp_path: Path, address: str | None) -> None:
    """A run with it, on the cluster at `address` or (None) in this process: its loss is that of the credits."""
    (tmp_path / "mine.py").write_text(OWN)
    small = ["eval.path=", "eval.ood_path=", "checkpoint.every=0", "steps=1", "prompts_per_step=5", "record=all"]
    own = [f"method={tmp_path / 'mine.py'}", "method_options=", f"output_dir={tmp_path / 'run'}", "max_staleness=0"]
    config = load_config(ROOT / "recipes" / "grpo.yaml", [*own, *small, "rollout.samples_per_prompt=2"])
    assert run.train(config, False, address, Console(file=io.StringIO(), width=100), local=address is None)

    (step,) = rows_of(tmp_path / "run" / "metrics.jsonl", kind="step")
    losses, refused = [], 0
    for rollout in rows_of(tmp_path / "run" / "rollouts.jsonl", kind="train"):
        length = len(rollout["token_ids"]) - rollout["prompt_length"]
        if not rollout["trained"]:
            assert rollout["dropped"] == "credit_missing"
            refused += 1
            continue
        credit = [(t + 1) * (0.5 if rollout["passed"] else 1.0) for t in range(length)]
        losses += [-(-3.0 + value) for value in credit]  # the policy that sampled is the one that learns: ratio 1
    assert step["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert step["dropped"] == {"credit_missing": refused} and step["failed"] == {"counter:third": refused}
    assert step["learner"]["missing_credit"] == refused > 0 and step["tokens"]["trained"] == len(losses)
    assert step["pools"]["counter"]["replicas"] == 1
