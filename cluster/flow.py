"""Work in flight: prompt groups become shards, shards are generated, scored and verified, and wait for their step.

Step s trains the prompt groups at positions [s·P, (s+1)·P): what a step consumes is known before it runs, so a resumed
run asks for the same prompts. `admit` is the whole of asynchrony: with `max_staleness` N and s steps done, the groups
of steps up to s + N may be in flight. A shard is one call of generate; it flows on to its teachers and to the verifier
as soon as it is generated. The ready shards are the queue: references only, refused and counted when too old.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from ray import ObjectRef

from ..contracts.config import Config
from ..contracts.records import Receipt, SampleRequest, seed_of
from .data import PromptOrder
from .interrupt import Interrupt
from .methods.composition import Composition
from .pool import Call, Pool, pump


@dataclass(slots=True)
class Shard:
    """Some rollouts of one step, by reference, and what is known about them."""

    step: int
    requests: tuple[SampleRequest, ...]
    rollouts: ObjectRef | None = None
    generated: Receipt | None = None
    scores: list[ObjectRef] = field(default_factory=list)
    scored_ids: set[str] = field(default_factory=set)
    verdicts: ObjectRef | None = None
    judged: Receipt | None = None
    awaited: int = 0  # answers of services still to come

    @property
    def ready(self) -> bool:
        return self.generated is not None and self.awaited == 0

    def staleness(self, step: int) -> int:
        assert self.generated is not None
        return step - self.generated.weight_version


class Flow:
    """Keeps rollouts in flight within the staleness bound and hands each step its shards."""

    def __init__(
        self,
        config: Config,
        composition: Composition,
        prompts: ObjectRef,
        teacher_of_row: Sequence[str],
        rollouts: Pool,
        teachers: dict[str, Pool],
        verifiers: Pool,
        first_step: int,
        interrupt: Interrupt,
    ) -> None:
        self.interrupt = interrupt
        self.config, self.composition = config, composition
        self.prompts, self.teacher_of_row = prompts, teacher_of_row
        self.order = PromptOrder(len(teacher_of_row), config.seed)
        self.rollouts, self.teachers, self.verifiers = rollouts, teachers, verifiers
        self.admitted = first_step  # steps whose prompt groups have been dispatched
        self.shards: dict[int, list[Shard]] = {}
        self.dropped: Counter[str] = Counter()

    @property
    def pools(self) -> list[Pool]:
        return [self.rollouts, *self.teachers.values(), self.verifiers]

    @property
    def queue_depth(self) -> int:
        """Shards that are ready and not yet taken."""
        return sum(shard.ready for shards in self.shards.values() for shard in shards)

    def admit(self, steps_done: int) -> None:
        """Dispatch the prompt groups of every step that the staleness bound allows."""
        last = min(steps_done + self.config.max_staleness, self.config.steps - 1)
        while self.admitted <= last:
            self.shards[self.admitted] = [self._dispatch(self.admitted, part) for part in self._parts(self.admitted)]
            self.admitted += 1

    def _parts(self, step: int) -> list[np.ndarray]:
        """The step's positions, split evenly over as many calls of generate as batch size and replicas ask for."""
        count, samples = self.config.prompts_per_step, self.config.rollout.samples_per_prompt
        groups_per_call = max(1, self.config.rollout.batch_size // samples)
        calls = max(-(-count // groups_per_call), min(self.config.rollout.replicas, count))
        return np.array_split(np.arange(step * count, (step + 1) * count), calls)

    def _dispatch(self, step: int, positions: np.ndarray) -> Shard:
        requests = tuple(
            SampleRequest(
                rollout_id=f"{position}-{sample}",
                group_id=str(position),
                sample_index=sample,
                row=self.order.row(int(position)),
                seed=seed_of(self.config.seed, "sample", position, sample),
            )
            for position in positions
            for sample in range(self.config.rollout.samples_per_prompt)
        )
        shard = Shard(step, requests)

        def generated(payload: ObjectRef, receipt: Receipt) -> None:
            shard.rollouts, shard.generated = payload, receipt
            self._annotate(shard, payload, receipt)

        args = (self.prompts, requests, self.composition.sampling)
        self.rollouts.submit(Call("generate", args, len(requests), generated))
        return shard

    def _annotate(self, shard: Shard, rollouts: ObjectRef, generated: Receipt) -> None:
        """Send a generated shard to the teachers that its prompts name and to the verifier."""
        cost = sum(generated.lengths)
        asked = {self.teacher_of_row[request.row] for request in shard.requests}
        shard.awaited = len(asked) + 1

        def scored(payload: ObjectRef, receipt: Receipt) -> None:
            shard.scores.append(payload)
            shard.scored_ids.update(receipt.rollout_ids)
            shard.awaited -= 1

        def judged(payload: ObjectRef, receipt: Receipt) -> None:
            shard.verdicts, shard.judged = payload, receipt
            shard.awaited -= 1

        for name in sorted(asked):
            self.teachers[name].submit(Call("score", (rollouts, self.composition.scoring), cost, scored))
        self.verifiers.submit(Call("judge", (rollouts,), len(shard.requests), judged))

    def take(self, step: int) -> list[Shard]:
        """Wait for the step's shards; those that exceed the staleness bound are refused and counted."""
        while not all(shard.ready for shard in self.shards[step]):
            self.interrupt.check()
            pump(self.pools)
        fresh = []
        for shard in self.shards.pop(step):
            if shard.staleness(step) > self.config.max_staleness:
                self.dropped["stale"] += len(shard.requests)
            else:
                fresh.append(shard)
        return fresh

    def abandon(self) -> None:
        """The run stops here: count what was generated and will not be trained; a resumed run generates it again."""
        for shard in (shard for shards in self.shards.values() for shard in shards):
            self.dropped["interrupted"] += shard.generated.rows if shard.generated else 0
        self.shards.clear()

    def trainable(self, shard: Shard) -> tuple[int, ...]:
        """Tokens of each row of a taken shard, 0 for one that cannot be trained (counted with its reason)."""
        assert shard.generated is not None
        lengths = []
        served = shard.generated
        for rollout_id, length, response in zip(
            served.rollout_ids, served.lengths, served.response_lengths, strict=True
        ):
            reason = "empty_response" if response == 0 else "" if rollout_id in shard.scored_ids else "teacher_refused"
            if reason:
                self.dropped[reason] += 1
            lengths.append(0 if reason else length)
        return tuple(lengths)
