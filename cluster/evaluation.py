"""Evaluate a model through the pools: sample k responses per problem, judge them, summarise with intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import ray
from ray import ObjectRef

from ..contracts.arrow import encode
from ..contracts.records import Prompt, Receipt, SampleRequest, Sampling, seed_of
from .interrupt import Interrupt
from .metrics import EvalRow
from .pool import Call, Pool, pump
from .recording import Recorder
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
    """`samples` is k; the same seed draws the same responses from the same weights. `reads_answers`: the verifier says
    which answer it read."""

    samples: int
    sampling: Sampling
    batch_size: int
    seed: int
    reads_answers: bool = True


@dataclass(slots=True, kw_only=True)
class Found:
    """What has come back of an evaluation of N problems at k samples."""

    correct: np.ndarray  # bool [N, k]
    answers: list[list[str]]
    generated: list[Receipt] = field(default_factory=list)
    lines: dict[int, list[ObjectRef]] = field(default_factory=dict)  # for rollouts.jsonl, by part


def evaluate(
    problem_sets: Sequence[ProblemSet],
    plan: EvalPlan,
    generators: Pool,
    verifiers: Pool,
    others: Sequence[Pool],
    model: Literal["student", "teacher"],
    step: int,
    interrupt: Interrupt,
    recorder: Recorder | None = None,
) -> list[EvalRow]:
    """Accuracy of whatever weights `generators` hold. `others` are pools whose finished work is taken meanwhile. What
    `recorder` takes of it is written down once all of it is whole."""
    rows, lines = [], []
    for problems in problem_sets:
        start = time.monotonic()
        known = {"kind": "eval", "step": step, "model": model, "split": problems.split}
        found = _judged(problems, plan, generators, verifiers, others, interrupt, recorder, known)
        responses = sum(receipt.rows for receipt in found.generated)
        answered = sum(bool(answer) for row in found.answers for answer in row)
        rows.append(
            EvalRow(
                step=step,
                split=problems.split,
                model=model,
                stats=summarise(found.correct, found.answers),
                seconds=time.monotonic() - start,
                response_length=sum(sum(receipt.response_lengths) for receipt in found.generated) / responses,
                truncated_share=sum(receipt.truncated for receipt in found.generated) / responses,
                answered_share=answered / responses if plan.reads_answers else None,
            )
        )
        lines += [line for part in sorted(found.lines) for line in found.lines[part]]
    if recorder:
        recorder.add(lines)
    return rows


def _judged(
    problems: ProblemSet,
    plan: EvalPlan,
    generators: Pool,
    verifiers: Pool,
    others: Sequence[Pool],
    interrupt: Interrupt,
    recorder: Recorder | None,
    known: dict[str, Any],
) -> Found:
    """Every sample of every problem, judged."""
    correct = np.zeros((problems.count, plan.samples), bool)
    found = Found(correct=correct, answers=[[""] * plan.samples for _ in range(problems.count)])
    open_calls = 0

    def dispatch(number: int, part: tuple[SampleRequest, ...]) -> None:
        def generated(payload: ObjectRef, receipt: Receipt) -> None:
            found.generated.append(receipt)
            done = partial(judged, payload)
            verifiers.submit(Call("judge", (payload, problems.prompts), len(part), done, counted=False))

        def judged(rollouts: ObjectRef, verdicts: ObjectRef, receipt: Receipt) -> None:
            nonlocal open_calls
            open_calls -= 1
            for request, passed, answer in zip(part, receipt.passed, receipt.answers, strict=True):
                correct[request.row, request.sample_index] = passed
                found.answers[request.row][request.sample_index] = answer
            if recorder:
                batches = (problems.prompts, rollouts, verdicts)
                found.lines[number] = recorder.of_evaluation(known, part, plan.samples, batches)

        generators.submit(
            Call("generate", (problems.prompts, part, plan.sampling), len(part), generated, counted=False)
        )

    size, requests = plan.batch_size, _requests(problems, plan)
    parts = [tuple(requests[i : i + size]) for i in range(0, len(requests), size)]
    open_calls = len(parts)
    for number, part in enumerate(parts):
        dispatch(number, part)
    while open_calls:
        interrupt.check()
        pump({generators, verifiers, *others})
    return found


def _requests(problems: ProblemSet, plan: EvalPlan) -> list[SampleRequest]:
    return [
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
