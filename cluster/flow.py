"""Work in flight: prompt groups become shards, shards are answered, scored and verified, and wait for their step.

Step s trains the prompt groups at positions [s·P, (s+1)·P): what a step consumes is known before it runs, so a resumed
run asks for the same prompts. `admit` is the whole of asynchrony: with `max_staleness` N and s steps done, the groups
of steps up to s + N may be in flight. A shard is one call of generate; it flows on to its teachers and to the verifier
as soon as it is generated, and what its verdicts ask for on top (`follow_up`) joins the same step as a shard of its
own. The ready shards are the queue: references only, refused and counted when too old.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

import numpy as np
from ray import ObjectRef

from ..contracts.config import REFERENCE, Config
from ..contracts.errors import NotFinite
from ..contracts.records import Receipt, SampleRequest, ScoreRequest, TrainRow, seed_of
from .data import PromptOrder
from .interrupt import Interrupt
from .methods.composition import Ask, Composition, Credit, Facts, natural
from .pool import Call, Pool, pump


@dataclass(slots=True)
class Shard:
    """Some rollouts of one step and source, by reference, and what is known about them."""

    step: int
    requests: tuple[SampleRequest, ...]
    attempt: int = 1  # 2 and more: a follow-up
    rollouts: ObjectRef | None = None
    generated: Receipt | None = None
    scored: dict[str, ObjectRef] = field(default_factory=dict)  # by teacher
    skills: ObjectRef | None = None  # the skill-mistake pairs of its prompts
    held: list[Callable[[], None]] = field(default_factory=list)  # what waits for them
    verdicts: ObjectRef | None = None
    judged: Receipt | None = None
    awaited: int = 0  # answers of services still to come
    outcomes: list[Credit | str] = field(default_factory=list)  # what each rollout trains with, or why it does not

    @property
    def source(self) -> str:
        return self.requests[0].source

    @property
    def scores(self) -> list[ObjectRef]:
        """What the teachers said, in an order that is not that of their answers."""
        return [self.scored[name] for name in sorted(self.scored)]

    @property
    def ready(self) -> bool:
        return self.generated is not None and self.awaited == 0

    def staleness(self, step: int) -> int:
        """Weight versions between its sampling and `step`; 0 for what the student did not sample."""
        assert self.generated is not None
        return step - self.generated.weight_version if self.source == "student" else 0

    def facts(self) -> list[Facts]:
        """What the receipts say about each rollout."""
        assert self.generated is not None
        counts = zip(self.requests, self.generated.response_lengths, self.generated.finish_reasons, strict=True)
        known = [
            {
                "rollout_id": request.rollout_id,
                "group_id": request.group_id,
                "source": request.source,
                "context": request.context,
                "length": length,
                "truncated": reason == "length",
            }
            for request, length, reason in counts
        ]
        if self.judged is None:
            return [Facts(**facts) for facts in known]
        columns = ("rewards", "passed", "abstained", "answers", "paths")
        verdicts = zip(*(getattr(self.judged, column) for column in columns), strict=True)
        names = ("reward", "passed", "abstained", "answer", "path")
        return [
            Facts(**facts, **dict(zip(names, verdict, strict=True)))
            for facts, verdict in zip(known, verdicts, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The pools that a stage's work flows through. `generators` by the source of the rollouts they make."""

    generators: Mapping[str, Pool]
    teachers: dict[str, Pool]  # the reference model among them, under its own name
    verifiers: Pool | None
    skills: Pool | None = None  # retrieves what views are made of

    @property
    def rollouts(self) -> Pool:
        return self.generators["student"]

    @property
    def pools(self) -> list[Pool]:
        pools = [*self.generators.values(), *self.teachers.values(), self.verifiers, self.skills]
        return list(dict.fromkeys(pool for pool in pools if pool))


class Flow:
    """Keeps a stage's rollouts in flight within the staleness bound and hands each step its shards.

    `first` and `last`: the run's steps at which the stage begins and must end.
    """

    def __init__(
        self,
        config: Config,
        composition: Composition,
        services: Services,
        prompts: ObjectRef,
        teacher_of_row: Sequence[str],
        first: int,
        interrupt: Interrupt,
    ) -> None:
        self.config, self.composition, self.services, self.interrupt = config, composition, services, interrupt
        self.prompts, self.teacher_of_row = prompts, teacher_of_row
        self.order = PromptOrder(len(teacher_of_row), config.seed)
        self.first, self.last = first, first + config.steps
        self.admitted = first  # steps whose prompt groups have been dispatched
        self.shards: dict[int, list[Shard]] = {}
        self.dropped: Counter[str] = Counter()
        self.stale: list[Shard] = []  # of the step last taken
        self.scored_by_rollouts = 0  # tokens, by a teacher that shares the rollout pool

    @property
    def pools(self) -> list[Pool]:
        return self.services.pools

    @property
    def queue_depth(self) -> int:
        """Shards that are ready and not yet taken."""
        return sum(shard.ready for shards in self.shards.values() for shard in shards)

    # ---- asking ----

    def admit(self, steps_done: int) -> None:
        """Dispatch the prompt groups of every step that the staleness bound allows."""
        until = min(steps_done + self.config.max_staleness, self.last - 1)
        while self.admitted <= until:
            step, self.admitted = self.admitted, self.admitted + 1
            self.shards[step] = []
            for part in self._parts(step):
                self._dispatch(step, [request for position in part for request in self._requests(step, int(position))])

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
        for ask in self.composition.asks(step - self.first, position):
            mark = "" if ask.source == "student" else ask.source[0]
            for sample in islice(numbers[mark], ask.samples):
                name = (position, sample) if not mark else (position, mark, sample)
                seed = seed_of(self.config.seed, "sample", *name)
                requests.append(_request(f"{group}-{mark}{sample}", group, len(requests), row, seed, ask))
        return requests

    def _dispatch(self, step: int, requests: Iterable[SampleRequest], attempt: int = 1) -> None:
        """One call of generate for the requests of each source."""
        by_source: dict[str, list[SampleRequest]] = {}
        for request in requests:
            by_source.setdefault(request.source, []).append(request)
        for source, own in by_source.items():
            shard = Shard(step, tuple(own), attempt)
            self.shards[step].append(shard)
            self._retrieve(shard)
            args = (self.prompts, shard.requests, self.composition.sampling)
            self.services.generators[source].submit(Call("generate", args, len(own), self._generated(shard)))

    def _retrieve(self, shard: Shard) -> None:
        """Ask for the skills of its prompts, if its teachers will be shown any, while it is generated."""
        scoring = self.composition.scoring
        if not scoring or not scoring.views or shard.source not in self.composition.scored:
            return

        def retrieved(payload: ObjectRef, receipt: Receipt) -> None:
            shard.skills = payload
            while shard.held:
                shard.held.pop()()

        assert self.services.skills, "a stage whose teachers have views has a bank"
        rows = [request.row for request in shard.requests]
        self.services.skills.submit(Call("retrieve", (self.prompts, rows, scoring.views), len(rows), retrieved))

    def _generated(self, shard: Shard):
        def done(payload: ObjectRef, receipt: Receipt) -> None:
            shard.rollouts, shard.generated = payload, receipt
            self._annotate(shard, payload, sum(receipt.lengths))

        return done

    # ---- annotating ----

    def _annotate(self, shard: Shard, rollouts: ObjectRef, cost: int) -> None:
        """Send a generated shard to the verifier and to its teachers, at once or after the verdicts."""
        asked = self._asked(shard) if shard.source in self.composition.scored else []
        verifiers = self.services.verifiers if shard.source != "dataset" else None
        shard.awaited = len(asked) + (verifiers is not None)

        def judged(payload: ObjectRef, receipt: Receipt) -> None:
            shard.verdicts, shard.judged = payload, receipt
            self._follow_up(shard)
            if self.composition.after_verdicts:
                self._score(shard, rollouts, asked, cost)
            shard.awaited -= 1

        if verifiers:
            verifiers.submit(Call("judge", (rollouts, self.prompts), len(shard.requests), judged))
        if not (verifiers and self.composition.after_verdicts):
            self._score(shard, rollouts, asked, cost)

    def _asked(self, shard: Shard) -> list[tuple[str, ScoreRequest]]:
        """Which teachers score a shard, and what each is asked."""
        scoring, asked = self.composition.scoring, []
        if scoring:
            everyone = [name for name in self.services.teachers if name != REFERENCE]
            named = sorted({self.teacher_of_row[request.row] for request in shard.requests})
            asked += [(name, scoring) for name in (everyone if scoring.everyone else named)]
        if self.composition.reference:
            asked.append((REFERENCE, ScoreRequest(everyone=True)))
        return asked

    def _score(self, shard: Shard, rollouts: ObjectRef, asked: list[tuple[str, ScoreRequest]], cost: int) -> None:
        if shard.skills is None and any(request.views for _, request in asked):
            shard.held.append(partial(self._score, shard, rollouts, asked, cost))
            return

        def scored(payload: ObjectRef, receipt: Receipt, name: str, shared: bool) -> None:
            shard.scored[name] = payload
            shard.awaited -= 1
            self.scored_by_rollouts += receipt.tokens if shared else 0

        for name, request in asked:
            shown = () if request.context == "plain" else (self.prompts, shard.verdicts, shard.skills)
            pool = self.services.teachers[name]
            shared = pool is self.services.rollouts  # whose own figures are those of generating
            done = partial(scored, name=name, shared=shared)
            views = max(1, request.views)
            pool.submit(Call("score", (rollouts, request, *shown), cost * views, done, counted=not shared))

    def _follow_up(self, shard: Shard) -> None:
        """Ask what the method wants on top of a judged shard; the answers join the step."""
        if self.composition.follow_up is None or shard.step not in self.shards:
            return
        row_of = {request.group_id: request.row for request in shard.requests}
        requests = []
        for i, (group, ask) in enumerate(self.composition.follow_up(shard.facts(), shard.attempt)):
            name = f"{shard.requests[0].rollout_id}+{shard.attempt}.{i}"
            fresh = np.random.default_rng(seed_of(self.config.seed, "fresh", name)).integers(len(self.teacher_of_row))
            row = row_of[group] if group else int(fresh)
            for sample in range(ask.samples):
                rollout_id = f"{name}-{sample}"
                seed = seed_of(self.config.seed, "sample", rollout_id)
                requests.append(_request(rollout_id, group or name, sample, row, seed, ask))
        self._dispatch(shard.step, requests, shard.attempt + 1)

    # ---- handing over ----

    def take(self, step: int) -> list[Shard]:
        """Wait for the step's shards; those that exceed the staleness bound are refused and counted.

        They come in the order of their rollouts' ids: what trains, to the last bit, does not depend on who answered
        first.
        Where the generators get new weights only every round, the steps inside a round are no staleness.
        """
        while not all(shard.ready for shard in self.shards[step]):
            self.interrupt.check()
            pump(self.pools)
        bound = self.config.max_staleness + self.composition.round_steps - 1
        shards = sorted(self.shards.pop(step), key=lambda shard: natural(shard.requests[0].rollout_id))
        self.stale = [shard for shard in shards if shard.staleness(step) > bound]
        for shard in self.stale:
            shard.outcomes = ["stale"] * len(shard.requests)
            self.dropped["stale"] += len(shard.requests)
        return [shard for shard in shards if shard.staleness(step) <= bound]

    def trainable(self, step: int, shards: Sequence[Shard]) -> list[tuple[int, TrainRow]]:
        """Tokens and credit of each row that the method trains; the others are counted with their reason."""
        places = [(batch, row) for batch, shard in enumerate(shards) for row in range(len(shard.requests))]
        lengths = [length for shard in shards if shard.generated for length in shard.generated.lengths]
        facts = [fact for shard in shards for fact in shard.facts()]
        rows = []
        credits = self.composition.credit(facts, step - self.first)
        for (batch, row), length, fact, credit in zip(places, lengths, facts, credits, strict=True):
            outcome = credit if fact.length else "empty_response"
            shards[batch].outcomes.append(outcome)
            if isinstance(outcome, str):
                self.dropped[outcome] += 1
            elif not math.isfinite(outcome.advantage) or not math.isfinite(outcome.weight):
                rule = f"{self.config.method} credits a rollout with finite numbers"
                raise NotFinite(rule, f"rollout {fact.rollout_id}: {outcome}", "correct the method's credit")
            else:
                own = {"advantage": outcome.advantage, "weight": outcome.weight}
                rows.append((length, TrainRow(batch=batch, row=row, **own)))
        return rows

    def abandon(self, reason: str) -> None:
        """Nothing in flight will be trained: count what was generated. A resumed run generates it again."""
        for shard in (shard for shards in self.shards.values() for shard in shards):
            self.dropped[reason] += shard.generated.rows if shard.generated else 0
        self.shards.clear()


def _request(rollout_id: str, group: str, sample: int, row: int, seed: int, ask: Ask) -> SampleRequest:
    return SampleRequest(
        rollout_id=rollout_id,
        group_id=group,
        sample_index=sample,
        row=row,
        seed=seed,
        source=ask.source,
        context=ask.context,
    )
