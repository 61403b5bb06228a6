"""A run as `tutorloop status` and `tutorloop scale` meet it: read from any thread, told on the run's own loop."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

from ...contracts.errors import InputError, TutorloopError
from ...contracts.status import RunStatus
from ..driver import Driver
from ..learner_group import need_of_learner
from ..pools.pool import UNPUBLISHED, Pool
from ..pools.replica import Backend
from ..recording.progress import Progress

PATIENCE = 10.0  # seconds that the run's loop may be busy with something else


class LiveRun:
    """See contracts/status.py: Controlled. Made inside the run's loop; `driver` is of the stage that runs."""

    def __init__(self, method: str, steps: int, backend: Backend, progress: Progress) -> None:
        self.method, self.steps, self.backend, self.progress = method, steps, backend, progress
        self.driver: Driver | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def pools(self) -> list[Pool]:
        driver = self.driver
        if driver is None:
            return []
        return list(dict.fromkeys([*driver.flow.pools, *([driver.verifiers] if driver.verifiers else [])]))

    def status(self) -> RunStatus:
        driver = self.driver
        if driver is None:
            raise TutorloopError("a run that has started can be asked", self.progress.phase_now, "ask again later")
        version = driver.flow.services.rollouts.version
        return RunStatus(
            method=self.method,
            phase=self.progress.phase_now,
            step=driver.step,
            steps=self.steps,
            version=version if version != UNPUBLISHED else None,
            seconds=driver.counters.wall_seconds,
            pools=[pool.status() for pool in self.pools],
            in_flight=driver.flow.in_flight(),
            dropped=dict(driver.counters.dropped + driver.flow.dropped),
            learner_ranks=len(driver.learner.ranks),
            learner_restarts=driver.restarts,
            notes=list(self.progress.notes),
            decisions=list(driver.autoscaler.decisions) if driver.autoscaler else [],
        )

    def scale(self, wanted: Mapping[str, int]) -> dict[str, int]:
        done: Future[dict[str, int]] = Future()

        def resize() -> None:
            try:
                done.set_result(self._resize(wanted))
            except Exception as error:  # for whoever asked
                done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(resize)
            return done.result(PATIENCE)
        except (RuntimeError, TimeoutError) as error:  # its loop has ended, or is in the middle of something
            if isinstance(error, TutorloopError):
                raise
            remedy = "see tutorloop status before you ask again"
            raise TutorloopError(
                "a run obeys between two calls", f"it has not within {PATIENCE:.0f} s", remedy
            ) from None

    def _resize(self, wanted: Mapping[str, int]) -> dict[str, int]:
        pools = {pool.name: pool for pool in self.pools}
        if unknown := sorted(wanted.keys() - pools.keys()):
            raise InputError("scale names pools of the run", ", ".join(unknown), f"it has {', '.join(sorted(pools))}")
        assert self.driver
        for name, replicas in wanted.items():
            pools[name].check_size(replicas)
        if any(replicas > pools[name].members.wanted for name, replicas in wanted.items()):
            needs = [replace(pool.need, replicas=wanted.get(name, pool.members.wanted)) for name, pool in pools.items()]
            self.backend.check_room([*needs, need_of_learner(self.driver.config)])
        before = {name: pools[name].members.wanted for name in wanted}
        held = self.driver.autoscaler.hold(wanted) if self.driver.autoscaler else ()
        for name, replicas in wanted.items():
            pools[name].resize(replicas)
            alone = "; the autoscaler leaves it alone from now on" if name in held else ""
            self.progress.note(f"{name}: {before[name]} → {replicas} replicas, as asked{alone}")
        return before
