"""Work in flight: prompt groups become shards, each shard goes its way, and a step takes those that are its own.

Step s trains the prompt groups at positions [s·P, (s+1)·P): what a step consumes is known before it runs, so a resumed
run asks for the same prompts. `admit` is the whole of asynchrony: with `max_staleness` N and s steps done, the groups
of steps up to s + N may be in flight. A shard's way is one coroutine, `_way`. What its verdicts ask for on top
(`follow_up`) joins the same step as a shard of its own. The ready shards are the queue: references only, refused and
counted when too old.
"""

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np

from ...contracts.config import Config
from ...contracts.errors import NotFinite
from ...contracts.records import SampleRequest, TrainRow, seed_of
from ..data import PromptOrder
from ..methods.parts.annotations import PROMPTS, ROLLOUTS, ROWS, VERDICTS, Annotation
from ..methods.parts.composition import Composition, SampleSpec, natural
from ..pools.failure import Failure, first_of
from ..pools.pool import Pool
from .shard import Shard, summaries_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The pools that a stage's work flows through: `generators` by the source of the rollouts that they make,
    `annotators` by service and, within it, by name. Of a service that is not there nobody is asked."""

    generators: Mapping[str, Pool]
    annotators: Mapping[str, Mapping[str, Pool]]

    @property
    def rollouts(self) -> Pool:
        return self.generators["student"]

    @property
    def pools(self) -> list[Pool]:
        annotators = [pool for pools in self.annotators.values() for pool in pools.values()]
        return list(dict.fromkeys([*self.generators.values(), *annotators]))


class Flow:
    """Keeps a stage's rollouts in flight within the staleness bound and hands each step its shards.

    `first` and `last`: the run's steps at which the stage begins and must end. `prompts`: a reference to the run's.
    """

    def __init__(
        self,
        config: Config,
        composition: Composition,
        services: Services,
        prompts: Any,
        teacher_of_row: Sequence[str],
        first: int,
    ) -> None:
        self.config, self.composition, self.services = config, composition, services
        self.annotations = [one for one in composition.annotations if services.annotators.get(one.service)]
        self.prompts, self.teacher_of_row = prompts, teacher_of_row
        self.order = PromptOrder(len(teacher_of_row), config.seed)
        self.first, self.last = first, first + config.steps
        self.admitted = first  # steps whose prompt groups have been asked for
        self.shards: dict[int, list[Shard]] = {}
        self.dropped: Counter[str] = Counter()
        self.stale: list[Shard] = []  # of the step last taken
        self.scored_by_rollouts = 0  # tokens, by a teacher that shares the rollout pool
        self.failure = Failure()
        self._steps: dict[int, asyncio.Task[None]] = {}  # done once all shards of a step are ready

    @property
    def pools(self) -> list[Pool]:
        return self.services.pools

    @property
    def queue_depth(self) -> int:
        """Shards that are ready and not yet taken."""
        return sum(shard.ready for shards in self.shards.values() for shard in shards)

    # ---- asking ----

    def admit(self, steps_done: int) -> None:
        """Ask for the prompt groups of every step that the staleness bound allows."""
        until = min(steps_done + self.config.max_staleness, self.last - 1)
        while self.admitted <= until:
            step, self.admitted = self.admitted, self.admitted + 1
            self.shards[step] = []
            self._steps[step] = asyncio.create_task(self._step(step))

    async def _step(self, step: int) -> None:
        """All shards of a step, those among them that others ask for on top."""
        try:
            async with asyncio.TaskGroup() as group:
                for part in self._parts(step):
                    requests = [request for position in part for request in self._requests(step, int(position))]
                    self._begin(step, requests, group)
        except Exception as error:  # heard by whoever waits, whatever step that is for
            self.failure.set(first_of(error))

    def _parts(self, step: int) -> list[np.ndarray]:
        """The step's positions, split evenly over as many calls of generate as batch size and replicas ask for."""
        groups, samples = self.config.prompts_per_step, self.config.rollout.samples_per_prompt
        groups_per_call = max(1, self.config.rollout.batch_size // samples)
        calls = max(-(-groups // groups_per_call), min(self.config.rollout.replicas, groups))
        return np.array_split(np.arange(step * groups, (step + 1) * groups), calls)

    def _requests(self, step: int, position: int) -> list[SampleRequest]:
        row, group = self.order.row(position), str(position)
        requests: list[SampleRequest] = []
        numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
        for spec in self.composition.samples(step - self.first, position):
            mark = _mark(spec.source)
            for sample in islice(numbers[mark], spec.samples):
                name = (position, sample) if not mark else (position, mark, sample)
                seed = seed_of(self.config.seed, "sample", *name)
                requests.append(_request(f"{group}-{mark}{sample}", group, len(requests), row, seed, spec))
        return requests

    def _begin(self, step: int, requests: Iterable[SampleRequest], group: asyncio.TaskGroup, attempt: int = 1) -> None:
        """A shard for the requests of each source."""
        by_source: dict[str, list[SampleRequest]] = {}
        for request in requests:
            by_source.setdefault(request.source, []).append(request)
        for own in by_source.values():
            shard = Shard(step, tuple(own), attempt)
            self.shards[step].append(shard)
            group.create_task(self._way(shard, group))

    # ---- a shard's way ----

    async def _way(self, shard: Shard, step: asyncio.TaskGroup) -> None:
        """Generated, then annotated, each annotation as soon as what it reads is there; then what its verdicts ask for
        on top begins a way of its own."""
        made: dict[str, asyncio.Task[Any]] = {}  # batches by name, or what is still to make them
        async with asyncio.TaskGroup() as group:
            made[ROLLOUTS] = group.create_task(self._generate(shard))
            for annotation in [one for one in self.annotations if shard.source in one.sources]:
                made[annotation.name] = group.create_task(self._annotate(shard, annotation, made))
            if VERDICTS in made and self.composition.follow_up:
                await made[VERDICTS]
                self._follow_up(shard, step)
        shard.ready = True

    async def _generate(self, shard: Shard) -> Any:
        given = {"prompts": self.prompts, "requests": shard.requests, "sampling": self.composition.sampling}
        pool = self.services.generators[shard.source]
        rollouts, receipt = await pool.call("generate", len(shard.requests), **given)
        shard.add(ROLLOUTS, rollouts, receipt)
        return rollouts

    async def _annotate(self, shard: Shard, annotation: Annotation, made: Mapping[str, asyncio.Task[Any]]) -> Any:
        """Once all that it reads is there, ask the service's pools side by side; its batch, if one was asked."""
        own = {PROMPTS: self.prompts, ROWS: [request.row for request in shard.requests]}
        there = [name for name in annotation.reads if name in own or name in made]
        read = {name: own[name] if name in own else await made[name] for name in there}
        pools = self.services.annotators[annotation.service]
        if annotation.routed:
            named = {self.teacher_of_row[request.row] for request in shard.requests}
            pools = {name: pool for name, pool in pools.items() if name in named}
        asked = [self._ask(shard, annotation, name, pool, read) for name, pool in pools.items()]
        batches = await asyncio.gather(*asked)
        return batches[0] if len(batches) == 1 else None

    async def _ask(self, shard: Shard, annotation: Annotation, name: str, pool: Pool, read: Mapping[str, Any]) -> Any:
        tokens = sum(shard.generated.lengths) if shard.generated and ROLLOUTS in read else len(shard.requests)
        shared = pool is self.services.rollouts  # whose own figures are those of generating
        given = {**read, **annotation.given}
        batch, receipt = await pool.call(annotation.method, annotation.cost * tokens, counted=not shared, **given)
        shard.add(f"{annotation.name}.{name}" if name else annotation.name, batch, receipt, annotation)
        self.scored_by_rollouts += receipt.tokens if shared else 0
        return batch

    def _follow_up(self, shard: Shard, step: asyncio.TaskGroup) -> None:
        """Ask for what the method wants on top of a judged shard."""
        assert self.composition.follow_up
        row_of = {request.group_id: request.row for request in shard.requests}
        numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
        requests = []
        for group, spec in self.composition.follow_up(shard.summaries(), shard.attempt):
            # Of the group alone, since shards may be cut otherwise where there are other replicas.
            name = f"{group}+{shard.attempt}{_mark(shard.source)}.{next(numbers[group])}"
            fresh = np.random.default_rng(seed_of(self.config.seed, "fresh", name)).integers(len(self.teacher_of_row))
            row = int(fresh) if spec.fresh else row_of[group]
            for sample in range(spec.samples):
                rollout_id = f"{name}-{sample}"
                seed = seed_of(self.config.seed, "sample", rollout_id)
                requests.append(_request(rollout_id, name if spec.fresh else group, sample, row, seed, spec))
        self._begin(shard.step, requests, step, shard.attempt + 1)

    # ---- handing over ----

    async def take(self, step: int) -> list[Shard]:
        """Wait for the step's shards; those that exceed the staleness bound are refused and counted.

        They come in the order of their first rollouts' ids. Where the generators get new weights only every round, the
        steps inside a round are no staleness.
        Raises whatever a shard of any step failed with.
        """
        await self.failure.beside(asyncio.wait({self._steps[step]}))
        self.failure.check()
        del self._steps[step]
        bound = self.config.max_staleness + self.composition.round_steps - 1
        shards = sorted(self.shards.pop(step), key=lambda shard: natural(shard.requests[0].rollout_id))
        self.stale = [shard for shard in shards if shard.staleness(step) > bound]
        for shard in self.stale:
            shard.outcomes = ["stale"] * len(shard.requests)
            self.dropped["stale"] += len(shard.requests)
        return [shard for shard in shards if shard.staleness(step) <= bound]

    def trainable(self, step: int, shards: Sequence[Shard]) -> list[tuple[int, TrainRow]]:
        """Tokens and credit of each row that the method trains; the others are counted with their reason.

        Rows are in the order of their rollouts' ids: neither who answered first nor how many replicas there are, which
        decides how a step is cut into shards, changes the last bit of what trains.
        """
        places = [(batch, row) for batch, shard in enumerate(shards) for row in range(len(shard.requests))]
        lengths = [length for shard in shards if shard.generated for length in shard.generated.lengths]
        known = list(zip(places, lengths, summaries_of(shards), strict=True))
        known.sort(key=lambda own: natural(own[2].rollout_id))
        for shard in shards:
            shard.outcomes = [""] * len(shard.requests)
        rows = []
        credits = self.composition.credit([rollout for _, _, rollout in known], step - self.first)
        for ((batch, row), length, rollout), credit in zip(known, credits, strict=True):
            outcome = credit if rollout.length else "empty_response"
            shards[batch].outcomes[row] = outcome
            if isinstance(outcome, str):
                self.dropped[outcome] += 1
            elif not math.isfinite(outcome.advantage) or not math.isfinite(outcome.weight):
                rule = f"{self.config.method} credits a rollout with finite numbers"
                raise NotFinite(rule, f"rollout {rollout.rollout_id}: {outcome}", "correct the method's credit")
            else:
                own = {"advantage": outcome.advantage, "weight": outcome.weight}
                rows.append((length, TrainRow(batch=batch, row=row, **own)))
        return rows

    def abandon(self, reason: str) -> None:
        """Nothing in flight will be trained: count what was generated. A resumed run generates it again."""
        for task in self._steps.values():
            task.cancel()
        for shard in (shard for shards in self.shards.values() for shard in shards):
            self.dropped[reason] += shard.generated.rows if shard.generated else 0
        self._steps.clear()
        self.shards.clear()


def _mark(source: str) -> str:
    """Of a source in the ids of what it answers."""
    return "" if source == "student" else source[0]


def _request(rollout_id: str, group: str, sample: int, row: int, seed: int, spec: SampleSpec) -> SampleRequest:
    return SampleRequest(
        rollout_id=rollout_id,
        group_id=group,
        sample_index=sample,
        row=row,
        seed=seed,
        source=spec.source,
        context=spec.context,
    )
