"""What a run says about itself while it goes on: `tutorloop status` shows it, and `--json` prints it as it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

ReplicaState = Literal["starting", "loading", "serving", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica. `version`: of the student's weights that it holds, None where it takes none or has none yet;
    `seconds` in this state; `where`: its process and machine, "" while that is not known."""

    number: int
    state: ReplicaState
    seconds: float
    version: int | None
    calls: int  # that it has in flight
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """One pool. `wanted` replicas, between `least` and `most` (None: what the cluster has)."""

    name: str
    wanted: int
    least: int
    most: int | None
    replicas: list[ReplicaStatus]
    waiting: int  # calls that no replica has yet
    oldest_seconds: float  # since the longest waiting or running call was asked for
    restarts: int  # replicas that were replaced
    retries: int  # calls that were made again elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStatus:
    """A step in flight: how many of its shards are ready, and what the others wait for (service → shards)."""

    step: int
    seconds: float  # since its prompts were asked for
    shards: int
    ready: int
    waits_for: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleDecision:
    """What the autoscaler did after `step` steps: replicas before and after, and why; the seconds that a step took, and
    those that it expects."""

    step: int
    seconds: float  # since the run began
    what: str
    why: str
    step_seconds: float
    expected_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run as it stands. `step` of `steps` are done; `version`: of the weights that were published last."""

    method: str
    phase: str
    step: int
    steps: int
    version: int | None
    seconds: float  # since the run began, resumed parts included
    pools: list[PoolStatus]
    in_flight: list[StepStatus]
    dropped: Mapping[str, int]
    learner_ranks: int = 1
    learner_restarts: int = 0
    notes: list[str] = field(default_factory=list)  # the last things that happened to replicas, newest last
    decisions: list[ScaleDecision] = field(default_factory=list)  # the autoscaler's last ones, newest last

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        steps = [replace(step, waits_for=dict(step.waits_for)) for step in self.in_flight]
        return asdict(replace(self, dropped=dict(self.dropped), in_flight=steps))  # of a Counter asdict makes another


class Controlled(Protocol):
    """A run that can be asked and told. Called from another thread than the run's own."""

    def status(self) -> RunStatus: ...

    def scale(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Have pools go to other numbers of replicas, all of `wanted` or nothing; what each pool had before. It
        returns at once, before replicas have come or gone. Raises InputError: no such pool, below its least, beyond its
        most or beyond what the cluster has."""
        ...
