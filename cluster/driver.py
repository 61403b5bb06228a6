"""The driver: one loop. Prompts → rollouts → scores and verdicts → ready shards → learn → broadcast.

It holds references and receipts, never tokens. Everything it needs to continue is a step number and what has been
counted so far, because prompts and seeds are functions of the step.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import ray

from ..contracts.config import Config
from ..contracts.records import StepReport
from .evaluation import EvalPlan, ProblemSet, evaluate
from .flow import Flow, Shard
from .interrupt import Interrupt, Interrupted
from .learner_group import LearnerGroup
from .metrics import MetricsLog
from .pool import Pool, pump
from .progress import Progress
from .run_folder import RunFolder
from .tally import Tally


@dataclass(slots=True)
class Stopwatch:
    """Seconds by stage of one step."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


@dataclass(slots=True, kw_only=True)
class Driver:
    """Drives a run whose parts have been started. `step` counts the steps that are done; it is the weight version."""

    config: Config
    folder: RunFolder
    flow: Flow
    learner: LearnerGroup
    problems: Sequence[ProblemSet]
    plan: EvalPlan
    log: MetricsLog
    progress: Progress
    interrupt: Interrupt
    tally: Tally
    step: int = 0

    def train(self) -> bool:
        """The loop. Returns whether all steps were done (False: interrupted). A checkpoint stands at its end."""
        clock = Stopwatch()
        try:
            self.publish(clock)
            if not self.tally.evaluated(self.step):
                self.evaluate(clock)
            self.progress.phase("training")
            while self.step < self.config.steps:
                self.interrupt.check()
                self.flow.admit(self.step)
                with clock("wait"):
                    shards = self.flow.take(self.step)
                with clock("learn"):
                    report = self.learn(shards)
                self.step += 1
                self.publish(clock)
                self.record(shards, report, clock)
                clock = Stopwatch()
                if self._due(self.config.eval.every):
                    self.evaluate(clock)
                if self._due(self.config.checkpoint.every):
                    self.save(clock)
            if not self.tally.evaluated(self.step):
                self.evaluate(clock)
        except Interrupted:
            self.progress.note(f"interrupted after step {self.step} of {self.config.steps}")
            self.flow.abandon()
        self.tally.count(self.flow)
        self.save(clock)
        return self.step == self.config.steps and not self.interrupt.requested

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.steps

    def learn(self, shards: list[Shard]) -> StepReport:
        """One optimizer step on every trainable row, while the pools go on with what is in flight."""
        lengths = [self.flow.trainable(shard) for shard in shards]
        reports = self.learner.start_step(self.step, shards, lengths)
        pending = reports
        while pending:
            self.interrupt.notice()
            pump(self.flow.pools, pending)
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
            self.learner.finish_step(done)  # a failed rank is heard at once: the others would wait for it
        return self.learner.finish_step(reports)[0]

    def publish(self, clock: Stopwatch) -> None:
        """Send the learner's weights to every rollout replica. A synchronous run waits until all have proved them."""
        with clock("publish"):
            manifest, buckets = self.learner.publish(self.step)
        with clock("load"):
            self.flow.rollouts.broadcast("load_weights", manifest, *buckets)
            while self.config.max_staleness == 0 and not self.flow.rollouts.settled:
                pump(self.flow.pools)

    def evaluate(self, clock: Stopwatch) -> None:
        with clock("evaluate"):
            self.measure(self.flow.rollouts, "student")

    def measure(self, generators: Pool, model: Literal["student", "teacher"]) -> None:
        """Evaluate what `generators` hold on every problem set; written down whole, or not at all if interrupted."""
        self.progress.phase(f"evaluating the {model}")
        parts = (self.plan, generators, self.flow.verifiers, self.flow.pools, model, self.step, self.interrupt)
        for row in [evaluate(problems, *parts) for problems in self.problems]:
            self.tally.evals.append(row)
            self.log.log_eval(row)
            self.progress.eval(row)

    def save(self, clock: Stopwatch) -> None:
        with clock("checkpoint"):
            state = {"step": self.step, "tally": self.tally.state()}
            self.folder.save_checkpoint(self.step, state, self.learner.save, self.config.checkpoint.keep)

    def record(self, shards: list[Shard], report: StepReport, clock: Stopwatch) -> None:
        clock.seconds["total"] = time.monotonic() - clock.start
        row = self.tally.step_row(self.step, shards, report, clock.seconds, self.flow)
        self.log.log_step(row)
        self.progress.step(row)
