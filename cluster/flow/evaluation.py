"""Evaluate a model through the pools: sample k responses per problem, judge them, summarise with intervals."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ...contracts.arrow import encode
from ...contracts.errors import BatchLost, Quarantined
from ...contracts.receipts import RolloutReceipt
from ...contracts.records import Prompt, SampleRequest, Sampling, seed_of
from ..pools.failure import first_of
from ..pools.pool import Pool
from ..pools.replica import Backend
from ..recording.metrics import EvalRow
from ..recording.recorder import Lines, Recorder
from ..recording.statistics import summarise
from .shard import MOST_BEGINNINGS


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Held-out problems, `prompts` by reference."""

    split: Literal["in_distribution", "out_of_distribution"]
    prompts: Any
    count: int

    @classmethod
    def of(
        cls, split: Literal["in_distribution", "out_of_distribution"], prompts: Sequence[Prompt], backend: Backend
    ) -> "ProblemSet":
        return cls(split, backend.put(encode(Prompt, prompts)), len(prompts))


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
    generated: list[RolloutReceipt] = field(default_factory=list)
    lines: dict[tuple[int, ...], Lines] = field(default_factory=dict)  # for rollouts.jsonl, by part


async def evaluate(
    problem_sets: Sequence[ProblemSet],
    plan: EvalPlan,
    generators: Pool,
    verifiers: Pool,
    model: Literal["student", "teacher"],
    step: int,
    recorder: Recorder | None = None,
) -> list[EvalRow]:
    """Accuracy of whatever weights `generators` hold. What `recorder` takes of it is written down once all of it is
    whole."""
    rows, lines = [], []
    for problems in problem_sets:
        start = time.monotonic()
        known = {"kind": "eval", "step": step, "model": model, "split": problems.split}
        found = await _judged(problems, plan, generators, verifiers, recorder, known)
        responses = max(1, sum(receipt.rows for receipt in found.generated))
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


async def _judged(
    problems: ProblemSet,
    plan: EvalPlan,
    generators: Pool,
    verifiers: Pool,
    recorder: Recorder | None,
    known: dict[str, Any],
) -> Found:
    """Every sample of every problem, judged; the parts side by side."""
    correct = np.zeros((problems.count, plan.samples), bool)
    found = Found(correct=correct, answers=[[""] * plan.samples for _ in range(problems.count)])

    async def judge(number: tuple[int, ...], part: tuple[SampleRequest, ...], begun: int = 1) -> None:
        """As a shard goes its way: once more where a batch is lost, cut where it takes replicas down. A single response
        that does is a wrong one."""
        try:
            await judge_whole(number, part)
        except BatchLost:
            if begun == MOST_BEGINNINGS:
                raise
            await judge(number, part, begun + 1)
        except Quarantined as error:
            if len(part) == 1:
                generators.members.tell(f"{part[0].rollout_id} counts as wrong: {error.short}")
            for i, request in enumerate(part if len(part) > 1 else ()):
                await judge((*number, i), (request,))

    async def judge_whole(number: tuple[int, ...], part: tuple[SampleRequest, ...]) -> None:
        asked = {"prompts": problems.prompts, "requests": part, "sampling": plan.sampling}
        rollouts, generated = await generators.call("generate", len(part), counted=False, **asked)
        generated.check_rows(len(part))
        read = {"rollouts": rollouts, "prompts": problems.prompts}
        verdicts, judged = await verifiers.call("judge", len(part), counted=False, **read)
        judged.check_rows(len(part))
        found.generated.append(generated)
        for request, passed, answer in zip(part, judged.passed, judged.answers, strict=True):
            correct[request.row, request.sample_index] = passed
            found.answers[request.row][request.sample_index] = answer
        if recorder:
            batches = (problems.prompts, rollouts, verdicts)
            found.lines[number] = recorder.of_evaluation(known, part, plan.samples, batches)

    size, requests = plan.batch_size, _requests(problems, plan)
    try:
        async with asyncio.TaskGroup() as group:
            for number, start in enumerate(range(0, len(requests), size)):
                group.create_task(judge((number,), tuple(requests[start : start + size])))
    except ExceptionGroup as errors:
        raise first_of(errors) from None
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
