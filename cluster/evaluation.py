"""Evaluate a model through the pools: sample k responses per problem, judge them, summarise with intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import ray
from ray import ObjectRef

from ..contracts.arrow import encode
from ..contracts.records import Prompt, Receipt, SampleRequest, Sampling, seed_of
from .interrupt import Interrupt
from .metrics import EvalRow
from .pool import Call, Pool, pump
from .statistics import summarise


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Held-out problems in the object store."""

    split: Literal["in_distribution", "out_of_distribution"]
    prompts: ObjectRef
    count: int

    @classmethod
    def of(cls, split: Literal["in_distribution", "out_of_distribution"], prompts: Sequence[Prompt]) -> "ProblemSet":
        return cls(split, ray.put(encode(Prompt, prompts)), len(prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPlan:
    """`samples` is k; the same seed draws the same responses from the same weights."""

    samples: int
    sampling: Sampling
    batch_size: int
    seed: int


def evaluate(
    problems: ProblemSet,
    plan: EvalPlan,
    generators: Pool,
    verifiers: Pool,
    others: Sequence[Pool],
    model: Literal["student", "teacher"],
    step: int,
    interrupt: Interrupt,
) -> EvalRow:
    """Accuracy of whatever weights `generators` hold. `others` are pools whose finished work is taken meanwhile."""
    start = time.monotonic()
    correct = np.zeros((problems.count, plan.samples), bool)
    answers = [[""] * plan.samples for _ in range(problems.count)]
    requests = [
        SampleRequest(
            rollout_id=f"eval-{row}-{sample}",
            group_id=str(row),
            sample_index=sample,
            row=row,
            seed=seed_of(plan.seed, "eval", problems.split, row, sample),
        )
        for row in range(problems.count)
        for sample in range(plan.samples)
    ]
    open_calls = 0

    def dispatch(part: tuple[SampleRequest, ...]) -> None:
        def generated(payload: ObjectRef, _: Receipt) -> None:
            verifiers.submit(Call("judge", (payload, problems.prompts), len(part), judged, counted=False))

        def judged(_: ObjectRef, receipt: Receipt) -> None:
            nonlocal open_calls
            open_calls -= 1
            for request, passed, answer in zip(part, receipt.passed, receipt.answers, strict=True):
                correct[request.row, request.sample_index] = passed
                answers[request.row][request.sample_index] = answer

        generators.submit(
            Call("generate", (problems.prompts, part, plan.sampling), len(part), generated, counted=False)
        )

    size = plan.batch_size
    parts = [tuple(requests[i : i + size]) for i in range(0, len(requests), size)]
    open_calls = len(parts)
    for part in parts:
        dispatch(part)
    while open_calls:
        interrupt.check()
        pump({generators, verifiers, *others})
    stats = summarise(correct, answers, seed=plan.seed)
    seconds = time.monotonic() - start
    return EvalRow(step=step, split=problems.split, model=model, stats=stats, seconds=seconds)
