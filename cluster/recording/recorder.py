"""Writes `rollouts.jsonl` (samples.py) while a run goes on.

The driver holds references only. A small task reads a batch where it is and returns its lines, which are written down
when they are there, in their order: no step waits for them. Which rollouts `record: some` takes is a function of the
step: its first prompt groups, whole; of an evaluation the first problems of each split.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...contracts.errors import TutorloopError
from ...contracts.records import SampleRequest
from ..flow.shard import Shard
from ..methods.parts.composition import Credit
from ..pools.replica import Backend
from .samples import ROLLOUTS_FILE, Wanted, lines_of, newest_sample, whole_groups

SOME = 8  # rollouts of a step, and of a split
LONGEST_WAIT = 60  # seconds, for the lines of one batch

Lines = list[asyncio.Future[str]]


class Recorder:
    """Records a run's rollouts in `folder`. `prompts`: a reference to the run's. `lost` counts batches that could
    not be read; `newest` is the last rollout written down."""

    def __init__(self, folder: Path, record: Literal["none", "some", "all"], prompts: Any, backend: Backend) -> None:
        self._path, self._record, self._prompts, self.backend = folder / ROLLOUTS_FILE, record, prompts, backend
        self._waiting: deque[asyncio.Future[str]] = deque()  # lines, in the order in which they are written
        self._collecting = asyncio.Lock()
        self.newest: dict[str, Any] | None = None
        self.lost = 0

    def step(self, step: int, shards: Sequence[Shard], untrained: Mapping[str, str]) -> None:
        """Record a step's rollouts. `untrained`: reasons of those that the learner was given and did not train."""
        first = [request.group_id for shard in shards if shard.attempt == 1 for request in shard.requests]
        groups = whole_groups(first, SOME) if self._record == "some" else None
        for shard in shards if self._record != "none" else []:
            rows = [i for i, request in enumerate(shard.requests) if groups is None or request.group_id in groups]
            wanted = [(i, shard.requests[i].row, _fate(step, shard, i, untrained)) for i in rows]
            if wanted:
                self._waiting.append(self._lines(wanted, self._prompts, shard.rollouts, shard.verdicts))

    def _lines(self, wanted: Wanted, *batches: Any) -> asyncio.Future[str]:
        return asyncio.ensure_future(self.backend.run(lines_of, wanted, *batches))

    def of_evaluation(
        self,
        known: Mapping[str, Any],
        requests: Sequence[SampleRequest],
        samples: int,
        batches: tuple[Any, Any, Any],
    ) -> Lines:
        """The lines of one judged part of an evaluation, for `add` once it is whole. `batches`: prompts, rollouts,
        verdicts; `samples` a problem."""
        problems = {"none": 0, "some": max(1, SOME // samples)}.get(self._record)
        wanted: Wanted = [
            (i, request.row, known) for i, request in enumerate(requests) if problems is None or request.row < problems
        ]
        return [self._lines(wanted, *batches)] if wanted else []

    def add(self, lines: Lines) -> None:
        self._waiting.extend(lines)

    async def collect(self, wait: bool = False) -> None:
        """Write down what is there; with `wait` all that has been asked for by now. Cancelled it loses none."""
        if self._collecting.locked() and not wait:
            return  # by who waits for it
        due = len(self._waiting)
        async with self._collecting:
            while self._waiting and ((wait and due > 0) or self._waiting[0].done()):
                try:
                    text = await asyncio.wait_for(asyncio.shield(self._waiting[0]), LONGEST_WAIT)
                except (TutorloopError, TimeoutError):  # a run does not end because a batch could not be shown
                    text = None
                self._waiting.popleft().cancel()  # one that is late leaves its place to the others
                due -= 1
                if text is None:
                    self.lost += 1
                    continue
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(text)
                self.newest = newest_sample(text) or self.newest


def _fate(step: int, shard: Shard, row: int, untrained: Mapping[str, str]) -> dict[str, Any]:
    """What became of a rollout in the step: trained and how, or the reason why not."""
    outcome = shard.outcomes[row]
    reason = outcome if isinstance(outcome, str) else untrained.get(shard.requests[row].rollout_id, "")
    known: dict[str, Any] = {"kind": "train", "step": step, "trained": not reason}
    if isinstance(outcome, Credit) and not reason:
        return {**known, "advantage": outcome.advantage, "weight": outcome.weight}
    return {**known, "dropped": reason}
