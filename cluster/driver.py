"""The driver: one loop. Prompts → rollouts → scores and verdicts → ready shards → learn → broadcast.

It holds references and receipts, never tokens. Everything it needs to continue is a step number and what has been
counted so far, because prompts and seeds are functions of the step. Shards go their ways beside it (flow/flow.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..contracts.config import Config
from ..contracts.errors import TutorloopError
from ..contracts.records import StepReport
from ..models.digests import Written
from .checkpoints import Checkpoints
from .entropy_collapse import EntropyCollapse
from .flow.evaluation import EvalPlan, ProblemSet, evaluate
from .flow.flow import Flow
from .flow.kept_shards import Kept, kept, read_shards, write_shards
from .flow.shard import Shard
from .interrupt import Interrupt, Interrupted
from .learner_group import LearnerGroup
from .pools.autoscaler import Autoscaler
from .pools.pool import UNPUBLISHED, Pool
from .pools.weight_broadcast import WeightBroadcast
from .recording.counters import RunCounters, pass_rate, sampler_entropy
from .recording.metrics import MetricsLog
from .recording.progress import Progress
from .recording.recorder import Recorder
from .recording.run_folder import RunFolder
from .recording.stopwatch import Stopwatch
from .recovery import Recovery
from .resume_keys import settings_of
from .skill_bank import SkillBank

T = TypeVar("T")
LEARNER = "learner"  # its part of a checkpoint


@dataclass(slots=True, kw_only=True)
class Driver:
    """Drives one stage of a run, whose parts have been started. `step` counts the run's steps that are done; it is the
    weight version. `self_teachers`: pools of self-teachers, which take the student's weights too; `averages`: those of
    them whose weights are an average, which a checkpoint must hold.
    """

    config: Config  # of the stage
    stage: int
    folder: RunFolder
    flow: Flow
    learner: LearnerGroup
    skills: SkillBank | None
    verifiers: Pool | None  # of evaluations
    broadcasts: WeightBroadcast | None  # to the rollout pool, in place of the object store
    autoscaler: Autoscaler | None
    self_teachers: Sequence[Pool]
    averages: Sequence[Pool]
    problems: Sequence[ProblemSet]
    plan: EvalPlan
    trigger: EntropyCollapse | None
    log: MetricsLog
    progress: Progress
    interrupt: Interrupt
    counters: RunCounters
    recorder: Recorder
    checkpoints: Checkpoints
    step: int
    start_learner: Callable[[], Awaitable[LearnerGroup]]  # again, once it has died
    recovery: Recovery = field(init=False)
    settings: str = field(init=False)  # a digest of what its shards depend on
    owed: bool = False  # a checkpoint, at the end of the round
    _saved: float = 0.0  # when the last checkpoint was, by the monotonic clock; first, when training started

    def __post_init__(self) -> None:
        self.recovery, self.settings = Recovery(self), settings_of(self.config)

    async def train(self) -> bool:
        """The stage. Returns whether it came to its end (False: interrupted). A checkpoint stands then."""
        self._saved = time.monotonic()
        self.counters.watch.begin(self.flow.pools)
        self.counters.guards.begin(self.stage)
        while True:
            clock = Stopwatch()
            try:
                await self._train(clock)
                return not self.interrupt.requested
            except Interrupted:
                self.progress.note(f"interrupted after step {self.step}")
                self.flow.stop()
                await self.finish(clock)
                return False
            except TutorloopError as error:
                if not (final := await self.recovery.final(error)):
                    continue
                await self.recovery.rescue(final, clock)
                raise final from final.__cause__
            except Exception:  # a fault in the code, of which the checkpoint that is being written knows nothing
                with suppress(TutorloopError):  # the fault is what is told
                    await self.checkpoints.finish()
                raise

    async def _train(self, clock: Stopwatch) -> None:
        """The loop."""
        await self.publish(clock)
        due = self.step == self.flow.first or self._due(self.config.eval.every)
        if due and not self.counters.evaluated(self.step):
            await self.evaluate(clock)
        self.recovery.start = self.recovery.start or await self._state()
        if self.owed:  # what a rollback has changed is not forgotten by a death
            await self.save(clock)
        while not self.ended:
            self.progress.phase("training")
            self.interrupt.check()
            self.folder.check_claim()
            self.checkpoints.check()
            self.flow.admit(self.step)
            with clock("wait"):
                shards = await self._beside(self.flow.take(self.step))
            with clock("learn"):
                report = await self.learn(shards)
            self.step += 1
            try:
                self.flow.failure.check()  # a shard that failed while the learner was at its step
                await self.watch(shards, report)
                await self.publish(clock)
            finally:  # a step that was learnt is written down, whatever came after it
                await self.record(shards, report, clock)
            if self.counters.tripped and self.counters.tripped.action != "warn":
                raise self.counters.tripped.error()
            clock = Stopwatch()
            if self._due(self.config.eval.every):
                await self.evaluate(clock)
            if self._unsaved():
                await self.save(clock)
        self.flow.abandon("stage_ended")
        if not self.counters.evaluated(self.step):
            await self.evaluate(clock)
        await self.finish(clock)

    async def finish(self, clock: Stopwatch) -> None:
        """A checkpoint of all that was counted."""
        self.counters.count(self.flow)
        await self.save(clock)
        await self.checkpoints.finish()

    def in_a_round(self, step: int) -> bool:
        """Whether the generators then hold older weights than the learner's, which no checkpoint has."""
        return (step - self.flow.first) % self.flow.composition.round_steps > 0

    @property
    def restarts(self) -> int:
        """Of the learner."""
        return self.recovery.deaths.total()

    @property
    def ended(self) -> bool:
        """The stage's steps are done, or its trigger has fired."""
        return self.step >= self.flow.last or (self.trigger is not None and self.trigger.fired)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and not self.ended

    def _unsaved(self) -> bool:
        """Whether a checkpoint is due: by its steps, or since a death now would lose more than `checkpoint.minutes`, on
        which nothing that trains depends. In a round it waits for its end."""
        long = not self.ended and time.monotonic() - self._saved >= 60 * self.config.checkpoint.minutes
        self.owed = self.owed or long or self._due(self.config.checkpoint.every)
        return self.owed and not self.in_a_round(self.step)

    async def learn(self, shards: list[Shard]) -> StepReport:
        """One step on every trainable row, while the pools go on with what is in flight."""
        guards = self.counters.guards
        if self.step in guards.skipped:
            rows = self.flow.leave_out(shards, "not_finite")
        else:
            rows = self.flow.trainable(self.step, shards)
        return await self.learner.step(self.step - self.flow.first, self.step, shards, rows, guards.rate)

    async def watch(self, shards: list[Shard], report: StepReport) -> None:
        """Show a finished step to the skill bank and to the stage's trigger."""
        if self.skills:
            self.skills.record(shards, report)
            if said := await self.skills.grow(self.step, shards):
                self.progress.note(f"the skill bank after step {self.step}: {said}")
        if self.trigger and self.trigger.observe(sampler_entropy(shards), pass_rate(shards) or 0.0):
            self.progress.note(f"the entropy has collapsed: stage {self.stage} ends after step {self.step}")

    async def publish(self, clock: Stopwatch) -> None:
        """Send the learner's weights to everyone who runs them. A synchronous run waits until all have proved them.

        A method of rounds publishes at the end of each; one that restarts then begins again from its first weights. A
        method that trains given answers alone publishes what is evaluated. What the learner will not hold until it
        publishes again goes by the object store too: a replica that comes later finds it there.
        """
        done, composition = self.step - self.flow.first, self.flow.composition
        rollouts = self.flow.services.rollouts
        takers = [*([] if self.broadcasts else [rollouts]), *self.self_teachers]
        given = "student" not in composition.generators
        unread = done > 0 and given and not self.self_teachers
        in_a_round = self.in_a_round(self.step)
        # After its start, a resume or a death of the learner nobody holds weights of this stage.
        holds = rollouts.version not in (None, UNPUBLISHED)
        if not self.ended and holds and (in_a_round or (unread and not self._due(self.config.eval.every))):
            return
        with clock("publish"):
            if self.broadcasts:
                await self.broadcasts.send(self.learner, self.step)
            lasts = given or composition.round_steps > 1 or composition.restart
            stored = takers or lasts or rollouts.lacking
            manifest, buckets = await self.learner.publish(self.step) if stored else (None, [])
        with clock("load"):
            for pool in takers:
                pool.publish(self.step, "load_weights", manifest, *buckets)
            if self.broadcasts and stored:
                rollouts.supply("load_weights", manifest, *buckets)
            if self.config.max_staleness == 0:
                for pool in (rollouts, *self.self_teachers):
                    await pool.loaded()
        if composition.restart and done and not in_a_round and not self.ended:
            await self.learner.restart()

    async def _beside(self, work: Awaitable[T]) -> T:
        """The result of `work`, for which the learner waits idle. Raises Interrupted, and what the learner dies of."""
        if self.broadcasts:
            work = self.broadcasts.beside(work, self.learner, self.step)
        return await self.interrupt.beside(self.learner.beside(work))

    async def evaluate(self, clock: Stopwatch) -> None:
        """Evaluate the student's published weights; written down whole, or not at all if interrupted."""
        if not self.problems or self.verifiers is None:
            return
        self.progress.phase("evaluating the student")
        pools = (self.flow.services.rollouts, self.verifiers)
        with clock("evaluate"), self.counters.paused(self.flow):
            found = evaluate(self.problems, self.plan, *pools, "student", self.step, self.recorder)
            for row in await self._beside(found):
                row = self.counters.eval_row(self.config, row)
                self.log.log_eval(row)
                self.progress.eval(row)
                if (state := self.flow.composition.state) and row.split == "in_distribution":
                    state.evaluated(row.stats["avg_at_k"]["value"])

    async def save(self, clock: Stopwatch) -> None:
        """A checkpoint of what is now; it is written while the run goes on. Raises what the one before failed with."""
        with clock("checkpoint"), self.counters.paused(self.flow):
            shards, proven = kept(self.flow.shards), self.recovery.proven() if self.config.guards.act else None
            await self.checkpoints.begin(await self._state(), self._take, partial(self._written, shards), proven)
            self._saved, self.owed = time.monotonic(), False

    async def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, optimizer and shards."""
        return {
            "step": self.step,
            "stage": self.stage,
            "first": self.flow.first,
            "settings": self.settings,
            "trigger": self.trigger.state() if self.trigger else None,
            "skills": await self.skills.save() if self.skills else None,
            "method": state.save() if (state := self.flow.composition.state) else None,
            "tally": self.counters.state(),  # a name that checkpoints of older releases have
        }

    async def _take(self, folder: Path) -> None:
        """What the next step changes."""
        await self.learner.save(folder / LEARNER)
        for pool in self.averages:
            await pool.first("save_average", str(folder / f"{pool.name}.safetensors"))

    async def _written(self, shards: Kept, folder: Path) -> Written:
        await self.recorder.collect(wait=True)  # a resumed run goes on from a file that is whole
        await write_shards(folder, shards, self.recorder.backend)
        return {f"{LEARNER}/{name}": written for name, written in (await self.learner.saved()).items()}

    async def resume(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on in another process from a checkpoint of this stage, with the shards that it holds, unless what made
        them has changed. What is missing of them waits for the first weights that are published."""
        await self.load(checkpoint, state)
        for pool in (self.flow.services.rollouts, *self.self_teachers):
            pool.withdraw()
        known = read_shards(checkpoint, self.recorder.backend)
        self.flow.restore(known, changed=state.get("settings") != self.settings)

    async def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Weights, optimizer, averages and counts of a checkpoint of this stage."""
        await self.learner.load(checkpoint / LEARNER)
        for pool in self.averages:
            await pool.ask("load_average", str(checkpoint / f"{pool.name}.safetensors"))
        await self.load_state(state)

    async def load_state(self, state: dict[str, Any]) -> None:
        if self.trigger:
            self.trigger.resume(state["trigger"])
        if self.skills:
            await self.skills.load(state["skills"])
        if self.flow.composition.state:
            self.flow.composition.state.load(state.get("method") or {})
        self.step = self.flow.admitted = state["step"]

    async def record(self, shards: list[Shard], report: StepReport, clock: Stopwatch) -> None:
        clock.seconds["total"] = time.monotonic() - clock.start
        await asyncio.sleep(0)  # what has ended meanwhile is busy no more
        row = self.counters.step_row(self.step, shards, report, clock.seconds, self.flow)
        self.log.log_step(row)
        self.recorder.step(self.step, [*shards, *self.flow.stale], report.untrained)
        await self.recorder.collect()
        self.progress.step(row, self.recorder.newest)
        if self.autoscaler:
            self.autoscaler.step(row)
