"""One tree of errors, named after what failed.

Every error says three things: the rule that was broken, the value that was found, and the remedy. They stay picklable,
so an actor's error reaches the driver as itself. `InputError` and its children are the user's to mend (exit code 2);
`GuardTripped` is what a run has come to (3); everything else is ours or the machine's (exit code 1).
"""

from typing import Self

SHORT = 300  # characters


class TutorloopError(Exception):
    """Rule, value found, remedy. Example: `DataError("every row needs a prompt", "row 7 has keys ['q']", "set …")`."""

    lost = False  # of a call: its replica has died, or its answer can no longer be read
    again = False  # of a call: another replica may manage it

    def __init__(self, rule: str, found: str = "", remedy: str = "") -> None:
        super().__init__(rule, found, remedy)
        self.rule, self.found, self.remedy = rule, found, remedy

    def as_lost(self) -> Self:
        """It, as what a call failed with whose replica is gone, or counts as gone."""
        self.lost = self.again = True
        return self

    @property
    def short(self) -> str:
        """What was found, in one line, for a log."""
        return (self.found or self.rule).split("\n", maxsplit=1)[0][:SHORT]

    def __str__(self) -> str:
        parts = [self.rule, f"found: {self.found}" if self.found else "", self.remedy]
        return "\n  ".join(part for part in parts if part)


class InputError(TutorloopError, ValueError):
    """Something that the user gave us cannot be used."""


class ConfigError(InputError):
    """The recipe or an override."""


class ModelError(InputError):
    """A model folder or hub id."""


class DataError(InputError):
    """A dataset or one of its rows."""


class TokenizerMismatch(InputError):
    """Two models that must share token ids do not."""


class ResourceError(InputError):
    """The cluster has less than the recipe asks for."""


class RunFolderError(InputError):
    """The output folder cannot take this run."""


class CheckpointError(InputError):
    """A checkpoint that cannot be resumed from."""


class SkillError(InputError):
    """A skill bank, or a file that should hold one."""


class StrategyError(InputError):
    """A folder of strategies, or the solutions that one is fitted to."""


class RecordError(TutorloopError, ValueError):
    """A record whose parts do not align: caught where it is made."""


class RolloutError(TutorloopError, RuntimeError):
    """The rollout pool failed."""


class TeacherError(TutorloopError, RuntimeError):
    """A teacher pool failed."""


class VerifierError(TutorloopError, RuntimeError):
    """The verifier pool failed."""


class ServiceError(TutorloopError, RuntimeError):
    """A service of a method's own failed."""


class LearnerError(TutorloopError, RuntimeError):
    """The learner failed."""


class BatchLost(TutorloopError, RuntimeError):
    """A batch that a call was to read is gone with the machine that held it."""


class Quarantined(TutorloopError, RuntimeError):
    """A call has taken down as many replicas as it may."""


class NotFinite(TutorloopError, ArithmeticError):
    """A loss, a gradient or a weight is infinite or no number: training stops before it spreads."""


class GuardTripped(TutorloopError, RuntimeError):
    """What is measured of a run says that it trains itself to pieces."""

    rolls_back = False  # to a checkpoint from before, if it may


class StorageError(TutorloopError, RuntimeError):
    """The disk cannot take what the run has to keep."""


class BroadcastBroken(TutorloopError, RuntimeError):
    """A broadcast of weights, or the meeting before it, did not come to its end: one of the group is gone."""


class WeightsMismatch(TutorloopError, RuntimeError):
    """A rollout replica does not run the weights that the learner published."""
