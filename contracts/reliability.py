"""What a run does about its own troubles: guards, who is told, and where replicas go. Imports neither torch nor Ray."""

import shlex
from typing import Literal

from pydantic import Field, model_validator

from .sections import Section

Action = Literal["off", "warn", "stop", "rollback"]
GuardName = Literal[
    "pass_rate", "eos", "length", "entropy", "overlap", "reverse_kl", "coverage", "staleness", "update", "gradient"
]


class Guards(Section):
    """What watches a run that trains for its collapse (docs/reliability.md)."""

    action: Action = Field(default="warn", description="of each guard: say so, stop with a checkpoint, or roll back")
    actions: dict[GuardName, Action] = Field(default_factory=dict, description="of single guards, by their names")
    warmup: int = Field(default=10, ge=1, description="first steps, of whose figures the limits are made")
    patience: int = Field(default=3, ge=1, description="steps in a row beyond its limit, for a guard to act")
    rollbacks: int = Field(default=2, ge=0, description="most of them; the next one stops the run")
    rate: float = Field(default=0.5, gt=0, le=1, description="each rollback multiplies the learning rate by it")

    @property
    def act(self) -> bool:
        """Whether any of them does more than to warn."""
        return bool({self.action, *self.actions.values()} & {"stop", "rollback"})

    def action_of(self, guard: GuardName) -> Action:
        return self.actions.get(guard, self.action)


class Notify(Section):
    """Who is told of alarms and of the run's end, beside the log, the metrics and `tutorloop status`."""

    command: str = Field(default="", description="run with each of them as JSON on its standard input; no shell")
    webhook_env: str = Field(
        default="", description="environment variable that holds the address which each is posted to, as JSON"
    )

    @model_validator(mode="after")
    def _readable(self) -> "Notify":
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"notify.command reads as a shell's words do: {error}") from None
        if self.command and not words[:1]:
            raise ValueError("notify.command names a program")
        if self.webhook_env and not self.webhook_env.isidentifier():
            # Whatever stands there may be the address itself: it is not shown.
            raise ValueError("notify.webhook_env names a variable, which holds the address: that is a secret")
        return self


class Autoscale(Section):
    """Replicas of rollout, teacher and verifier pools go to where the run waits, within a budget; none: as given."""

    cpus: float = Field(default=0.0, ge=0, description="CPUs that these pools may take together; 0: not by CPUs")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that these pools may take together; 0: not by GPUs")

    @property
    def on(self) -> bool:
        return self.cpus > 0 or self.gpus > 0
