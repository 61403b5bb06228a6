"""What a run does after a failure: go back to the last checkpoint and on from there, or save what stands and end."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..contracts.errors import (
    BatchLost,
    GuardTripped,
    LearnerError,
    NotFinite,
    RunFolderError,
    StorageError,
    TutorloopError,
)
from .recording.run_folder import Checkpoint
from .recording.samples import truncate_samples
from .recording.stopwatch import Stopwatch

if TYPE_CHECKING:
    from .driver import Driver

MOST_DEATHS = 2  # of the learner, of one step


@dataclass(slots=True)
class Recovery:
    """Of one stage."""

    driver: "Driver"
    start: dict[str, Any] | None = None  # the state in which the stage began
    deaths: Counter[int] = field(default_factory=Counter)  # of the learner, by the steps that were done

    async def final(self, error: TutorloopError) -> TutorloopError | None:
        """None once the learner goes on from before, else what ends the stage: it may die again of its start."""
        while True:
            try:
                return None if await self.go_back(error) else error
            except LearnerError as again:
                if not again.lost:
                    raise
                error = again

    async def go_back(self, error: TutorloopError) -> bool:
        """After the learner's death, or where a guard rolls the run back: return to the last checkpoint, or to where
        the stage began, and take up the learner from there.

        Nothing else starts again. After a death shards that are ready stay; after a rollback, which also starts the
        learner again where it must, they are of weights that the run will not have. False where something else has
        failed, the learner dies of the same step for the third time, or there were as many rollbacks as may be.
        """
        driver = self.driver
        guards, reached, proven = driver.counters.guards, driver.step, self.proven()
        rolls_back = guards.go_back(driver.config, error, reached, driver.flow.last_taken)
        died = error.lost and isinstance(error, LearnerError) and self.deaths[reached] < MOST_DEATHS
        if not died and not rolls_back:
            return False
        self.deaths[reached] += died
        driver.progress.note(f"{'the learner is lost' if died else 'going back'} after step {reached}: {error.short}")
        driver.progress.phase("starting the learner again" if died else "going back")
        checkpoint, state = self._last_checkpoint(proven if rolls_back else reached) or (None, self.start)
        keep = died and not isinstance(error.__cause__, BatchLost)
        driver.flow.rewind(state["step"] if state else reached, keep=keep)
        if rolls_back:
            driver.flow.abandon("rolled_back")
        for pool in (driver.flow.services.rollouts, *driver.self_teachers):
            pool.withdraw()
        await driver.recorder.collect(wait=True)
        if died:
            await driver.checkpoints.drop()
        else:
            await driver.checkpoints.finish()
        if died or not checkpoint or isinstance(error, NotFinite):  # else its weights and gradients are whole
            driver.learner.close()
            driver.learner = await driver.start_learner()
            await driver.learner.ready()
        if state is None:
            return True  # nothing has been learnt or counted
        if checkpoint:
            await driver.load(checkpoint, state)
        else:
            for pool in driver.averages:
                pool.renew()
            await driver.load_state(state)
        driver.counters.resume(state["tally"])
        driver.counters.guards.keep(guards)
        driver.log.truncate_after(driver.step)
        truncate_samples(driver.folder.path, driver.step)
        if rolls_back:
            driver.folder.remove_after(driver.step)
            driver.owed = True
        driver.progress.note(f"the learner goes on from step {driver.step}")
        return True

    def proven(self) -> int:
        """Of weights, the last that the guards have seen to be well."""
        driver = self.driver
        behind = driver.config.max_staleness + driver.flow.composition.round_steps - 1
        return driver.counters.guards.proven(driver.config, driver.step, behind)

    def _last_checkpoint(self, most: int) -> Checkpoint | None:
        """Of this stage, between two rounds, with at most so many steps done."""
        driver = self.driver
        newest = driver.folder.latest_checkpoint(
            driver.progress.note, lambda step: driver.flow.first <= step <= most and not driver.in_a_round(step)
        )
        return newest if newest and newest[1]["stage"] == driver.stage else None

    async def rescue(self, error: TutorloopError, clock: Stopwatch) -> None:
        """Before a failure ends the run: save the last finished step, where the learner can, and say what stands."""
        driver = self.driver
        well = self._last_checkpoint(self.proven()) if isinstance(error, GuardTripped) else None
        cannot = isinstance(error, LearnerError | StorageError | RunFolderError)
        if well:
            driver.folder.remove_after(well[1]["step"])  # a resume goes on from it
        elif not cannot and driver.step > driver.flow.first:
            driver.progress.phase("saving a checkpoint before the run ends")
            driver.flow.stop()
            try:
                await driver.finish(clock)
            except TutorloopError as second:  # what has failed holds a part of the checkpoint
                driver.progress.note(f"no checkpoint of step {driver.step}: {second.rule}")
        stands = driver.folder.standing
        if isinstance(error, GuardTripped) and not well:
            stands = "no checkpoint stands from before the trouble: begin again"
        error.remedy = "; ".join(part for part in (error.remedy, stands) if part)
