"""Work in flight: prompt groups become shards, each shard goes its way, and a step takes those that are its own.

Step s trains the prompt groups at positions [s·P, (s+1)·P): what a step consumes is known before it runs, so a resumed
run asks for the same prompts. Replayed answers have an order of their own. `admit` is the whole of asynchrony: with
`max_staleness` N and s steps done, the groups of steps up to s + N may be in flight. A shard's way is one coroutine,
`_way`. What its verdicts ask for on top (`follow_up`) joins the same step as a shard of its own. The ready shards are
the queue: references only, refused and counted when too old.
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
from ...contracts.data_config import REPLAY
from ...contracts.errors import BatchLost, NotFinite, Quarantined
from ...contracts.receipts import ScoreReceipt
from ...contracts.records import SampleRequest, TrainRow, seed_of
from ...contracts.status import StepStatus
from ..data import PromptOrder
from ..methods.parts.annotations import PROMPTS, ROLLOUTS, ROWS, VERDICTS, Annotation
from ..methods.parts.composition import Composition, Credit, natural
from ..pools.failure import Failure, first_of
from ..pools.pool import Pool
from ..pools.room import Tell, say
from .shard import ALONE, MOST_BEGINNINGS, Shard, mark_of, replay_of, request_of, summaries_of


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

    `first` and `last`: the run's steps at which the stage begins and must end. `prompts`: a reference to the run's,
    whose last `replayed` rows, behind those of `teacher_of_row`, are those of the replay.
    """

    def __init__(
        self,
        config: Config,
        composition: Composition,
        services: Services,
        prompts: Any,
        teacher_of_row: Sequence[str],
        first: int,
        tell: Tell = say,
        replayed: int = 0,
    ) -> None:
        self.tell = tell
        self.config, self.composition, self.services = config, composition, services
        self.annotations = [one for one in composition.annotations if services.annotators.get(one.service)]
        self.prompts, self.teacher_of_row = prompts, teacher_of_row
        self.order = PromptOrder(len(teacher_of_row), config.seed)
        self.replay = PromptOrder(replayed, seed_of(config.seed, REPLAY))
        self.first, self.last = first, first + config.steps
        self.split_for = config.rollout.replicas  # generators that a step's calls are to keep busy
        self.admitted = first  # steps whose prompt groups have been asked for
        self.shards: dict[int, list[Shard]] = {}
        self.dropped: Counter[str] = Counter()
        self.stale: list[Shard] = []  # of the step last taken
        self.scored_by_rollouts = 0  # tokens, by a teacher that shares the rollout pool
        self.failure = Failure()
        self.now = asyncio.get_running_loop().time
        self._asked: dict[int, float] = {}  # step → when its prompts were asked for
        self._taken: tuple[int, list[Shard]] | None = None  # what the learner was given last
        self._steps: dict[int, asyncio.Task[None]] = {}  # done once all shards of a step are ready
        self._said = {""}  # notes of receipts

    @property
    def pools(self) -> list[Pool]:
        return self.services.pools

    @property
    def queue_depth(self) -> int:
        """Shards that are ready and not yet taken."""
        return sum(shard.ready for shards in self.shards.values() for shard in shards)

    def in_flight(self) -> list[StepStatus]:
        """What the steps in flight wait for; from any thread."""
        found = []
        for step, shards in sorted(self.shards.items()):
            own = list(shards)
            waits = Counter(name for shard in own if not shard.quarantined for name in self._missing(shard))
            ready = sum(shard.ready or shard.quarantined for shard in own)
            seconds = self.now() - self._asked[step]
            found.append(StepStatus(step=step, seconds=seconds, shards=len(own), ready=ready, waits_for=waits))
        return found

    def _missing(self, shard: Shard) -> list[str]:
        """The services that a shard waits for; while it is generated only the generators."""
        if shard.generated is None:
            return [self.services.generators[shard.source].name]
        asked = [one for one in self.annotations if shard.asks(one)]
        return [own.service for own in asked if not any(name.split(".")[0] == own.name for name in list(shard.batches))]

    # ---- asking ----

    def admit(self, steps_done: int) -> None:
        """Ask for the prompt groups of every step that the staleness bound allows."""
        until = min(steps_done + self.config.max_staleness, self.last - 1)
        while self.admitted <= until:
            step, self.admitted = self.admitted, self.admitted + 1
            if step not in self._steps:  # else it was kept when the run went back
                self.shards[step], self._asked[step] = [], self.now()
                self._steps[step] = asyncio.create_task(self._step(step))

    def restore(self, kept: Mapping[int, list[Shard]], changed: bool = False) -> None:
        """Go on with shards of a checkpoint, each from where it was; where what made them has `changed`, they are
        dropped, and asked for again."""
        if changed:
            self._drop([shard for shards in kept.values() for shard in shards], "settings_changed")
        for step, shards in kept.items() if not changed else ():
            self.shards[step], self._asked[step] = shards, self.now()
            self._steps[step] = asyncio.create_task(self._step(step, list(shards)))

    async def _step(self, step: int, kept: Sequence[Shard] = ()) -> None:
        """All shards of a step, those among them that others ask for on top; or of a checkpoint those it has `kept`."""
        try:
            async with asyncio.TaskGroup() as group:
                for shard in kept:
                    if not shard.ready and not shard.quarantined:
                        group.create_task(self._go(shard, group))
                for part in self._parts(step) if not kept else []:
                    requests = [request for position in part for request in self._requests(step, int(position))]
                    self._begin(step, requests, group)
                self._begin(step, self._replayed(step) if not kept else [], group)
        except Exception as error:  # heard by whoever waits, whatever step that is for
            self.failure.set(first_of(error))

    def _parts(self, step: int) -> list[np.ndarray]:
        """The step's positions, split evenly over as many calls of generate as batch size and replicas ask for."""
        groups = self.config.prompts_per_step
        return np.array_split(np.arange(step * groups, (step + 1) * groups), self.calls_per_step)

    @property
    def calls_per_step(self) -> int:
        """Calls of generate that a step is split into, and so shards, but for those that are asked for on top."""
        groups, samples = self.config.prompts_per_step, self.config.rollout.samples_per_prompt
        groups_per_call = max(1, self.config.rollout.batch_size // samples)
        return max(-(-groups // groups_per_call), min(self.split_for, groups))

    def _requests(self, step: int, position: int) -> list[SampleRequest]:
        row, group = self.order.row(position), str(position)
        requests: list[SampleRequest] = []
        numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
        for spec in self.composition.samples(step - self.first, position):
            mark = mark_of(spec.source)
            for sample in islice(numbers[mark], spec.samples):
                name = (position, sample) if not mark else (position, mark, sample)
                seed = seed_of(self.config.seed, "sample", *name)
                requests.append(request_of(f"{group}-{mark}{sample}", group, len(requests), row, seed, spec))
        return requests

    def _replayed(self, step: int) -> list[SampleRequest]:
        """Given answers for the step to imitate: of R, positions [s·R, (s+1)·R) in the replay's order."""
        rows, behind = self.config.replay.rows_per_step if self.config.replay else 0, len(self.teacher_of_row)
        return [replay_of(at, behind + self.replay.row(at)) for at in range(step * rows, (step + 1) * rows)]

    def _begin(self, step: int, requests: Iterable[SampleRequest], group: asyncio.TaskGroup, attempt: int = 1) -> None:
        """A shard for the requests of each source and context."""
        alike: dict[tuple[str, str], list[SampleRequest]] = {}
        for request in requests:
            alike.setdefault((request.source, request.context), []).append(request)
        for own in alike.values():
            shard = Shard(step, tuple(own), attempt)
            self.shards[step].append(shard)
            group.create_task(self._go(shard, group))

    # ---- a shard's way ----

    async def _go(self, shard: Shard, step: asyncio.TaskGroup) -> None:
        """Its way; once more from the start where a batch was lost with its machine. A shard that takes replicas down
        is cut into its rollouts, so that the one that does can be told from the others."""
        try:
            await self._way(shard, step)
        except Exception as failed:
            error = first_of(failed)
            if isinstance(error, BatchLost) and shard.begun < MOST_BEGINNINGS:
                shard.begin_again()
                await self._go(shard, step)
            elif isinstance(error, Quarantined):
                if self._wanted(shard):
                    self._cut(shard, step, error)
            else:
                raise

    def _wanted(self, shard: Shard) -> bool:
        """Whether its step still is: one that is let go may have a last turn of the loop."""
        return shard in self.shards.get(shard.step, ())

    def _cut(self, shard: Shard, step: asyncio.TaskGroup, error: Quarantined) -> None:
        """In place of a shard, its rollouts one by one; a single one is dropped."""
        if len(shard.requests) == 1:
            shard.quarantined = True
            self.tell(f"rollout {shard.requests[0].rollout_id} is dropped: {error.short}")
            return
        self.shards[shard.step].remove(shard)
        for request in shard.requests:
            self._begin(shard.step, [request], step, ALONE)

    async def _way(self, shard: Shard, step: asyncio.TaskGroup) -> None:
        """Generated, then annotated, each annotation as soon as what it reads is there; then what its verdicts ask for
        on top begins a way of its own."""
        made: dict[str, asyncio.Task[Any]] = {}  # batches by name, or what is still to make them
        async with asyncio.TaskGroup() as group:
            made[ROLLOUTS] = group.create_task(self._generate(shard))
            for annotation in [one for one in self.annotations if shard.asks(one)]:
                made[annotation.name] = group.create_task(self._annotate(shard, annotation, made))
            if VERDICTS in made and self.composition.follow_up and not shard.alone and not shard.followed:
                await made[VERDICTS]
                if self._wanted(shard):
                    shard.followed = True
                    self._follow_up(shard, step)
        shard.ready = True

    async def _generate(self, shard: Shard) -> Any:
        if shard.rollouts is not None:  # kept in a checkpoint
            return shard.rollouts
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
        made = f"{annotation.name}.{name}" if name else annotation.name
        if made in shard.receipts:  # kept in a checkpoint
            return shard.batches[made]
        tokens = sum(shard.generated.lengths) if shard.generated and ROLLOUTS in read else len(shard.requests)
        shared = pool is self.services.rollouts  # whose own figures are those of generating
        given = {**read, **annotation.given, "counted": not shared}
        batch, receipt = await pool.call(annotation.method, annotation.cost * tokens, **given)
        shard.add(made, batch, receipt, annotation)
        self.scored_by_rollouts += receipt.tokens if shared else 0
        if isinstance(receipt, ScoreReceipt) and receipt.note not in self._said:
            self._said.add(receipt.note)
            self.tell(receipt.note)
        return batch

    def _follow_up(self, shard: Shard, step: asyncio.TaskGroup) -> None:
        """Ask for what the method wants on top of a judged shard."""
        assert self.composition.follow_up
        row_of = {request.group_id: request.row for request in shard.requests}
        numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
        requests = []
        for group, spec in self.composition.follow_up(shard.summaries(), shard.attempt):
            # Of the group alone, since shards may be cut otherwise where there are other replicas.
            name = f"{group}+{shard.attempt}{mark_of(shard.source)}.{next(numbers[group])}"
            fresh = np.random.default_rng(seed_of(self.config.seed, "fresh", name)).integers(len(self.teacher_of_row))
            row = int(fresh) if spec.fresh else row_of[group]
            for sample in range(spec.samples):
                rollout_id = f"{name}-{sample}"
                seed = seed_of(self.config.seed, "sample", rollout_id)
                requests.append(request_of(rollout_id, name if spec.fresh else group, sample, row, seed, spec))
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
        self._taken = (step, list(shards))
        for shard in [shard for shard in shards if shard.quarantined]:
            self.dropped["quarantined"] += 1
            shards.remove(shard)
        self.stale = [shard for shard in shards if shard.staleness(step) > bound]
        for shard in self.stale:
            shard.outcomes = ["stale"] * len(shard.requests)
            self.dropped["stale"] += len(shard.requests)
        return [shard for shard in shards if shard.staleness(step) <= bound]

    def trainable(self, step: int, shards: Sequence[Shard]) -> list[tuple[int, TrainRow]]:
        """Tokens and credit of each row that the method trains; the others are counted with their reason.

        Rows are in the order of their rollouts' ids: neither who answered first nor how many replicas there are, which
        decides how a step is cut into shards, changes the last bit of what trains. The method sees no replayed answers,
        which come last.
        """
        places = [(batch, row) for batch, shard in enumerate(shards) for row in range(len(shard.requests))]
        lengths = [length for shard in shards if shard.generated for length in shard.generated.lengths]
        known = list(zip(places, lengths, summaries_of(shards), strict=True))
        known.sort(key=lambda own: (own[2].source == REPLAY, natural(own[2].rollout_id)))
        for shard in shards:
            shard.outcomes = [""] * len(shard.requests)
        rows = []
        of_method = [rollout for _, _, rollout in known if rollout.source != REPLAY]
        replayed = [Credit() for _ in known[len(of_method) :]]
        credits = [*self.composition.credit(of_method, step - self.first), *replayed]
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

    def rewind(self, step: int, keep: bool) -> None:
        """Go back to `step` steps done: those since are asked for again. What the learner was given last stays, where
        `keep`, as does every later step that is ready; of the others those that the bound does not allow yet are let
        go, and counted."""
        self.dropped.clear()  # of steps that are taken again
        bound = step + self.config.max_staleness
        self._taken = self._taken if keep else None
        if self._taken and self._taken[0] >= step:
            taken, self.shards[taken] = self._taken[0], self._taken[1]
            self._steps[taken] = asyncio.create_task(_nothing())
        for later in [later for later, task in self._steps.items() if later > bound and not self._ready(later)]:
            self._steps.pop(later).cancel()
            self._drop(self.shards.pop(later), "learner_restarted")
        self.admitted = step

    @property
    def last_taken(self) -> int | None:
        """The step whose shards the learner was given last."""
        return self._taken[0] if self._taken else None

    def leave_out(self, shards: Sequence[Shard], reason: str) -> list[tuple[int, TrainRow]]:
        """In place of `trainable`: no row of these, all counted with one reason."""
        for shard in shards:
            shard.outcomes = [reason] * len(shard.requests)
            self.dropped[reason] += len(shard.requests)
        return []

    def _ready(self, step: int) -> bool:
        return all(shard.ready or shard.quarantined for shard in self.shards[step]) and bool(self.shards[step])

    def _drop(self, shards: Iterable[Shard], reason: str) -> None:
        for shard in shards:
            if shard.quarantined:
                self.dropped["quarantined"] += 1
            else:
                self.dropped[reason] += shard.generated.rows if shard.generated else 0

    def stop(self) -> None:
        """Ask for nothing more: a checkpoint holds what is in flight."""
        for task in self._steps.values():
            task.cancel()
        self._steps.clear()

    def abandon(self, reason: str) -> None:
        """Nothing in flight will be trained: count what was generated."""
        self.stop()
        for shards in self.shards.values():
            self._drop(shards, reason)
        self.shards.clear()


async def _nothing() -> None:
    """The task of a step whose shards are ready."""
