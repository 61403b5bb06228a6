"""When a stage ends before its steps are done: the entropy has collapsed and the pass rate has stopped rising.

Rejection sampling sharpens the student on what it can already do. Once its entropy, over all that it samples and not
over what passes the filter alone, has fallen to a fraction of where it began, and more of the same no longer raises the
pass rate, reinforcement learning takes over. The rule is ours; a stage that has ended is never gone back to.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..contracts.config import Until


@dataclass(slots=True)
class EntropyCollapse:
    """Watches the steps of one stage. `fired` stays once it is set."""

    until: Until
    steps: int = 0  # seen
    entropy_sum: float = 0.0  # of the steps since the last check
    pass_sum: float = 0.0
    pending: int = 0
    warm: list[float] = field(default_factory=list)  # entropies of the first checks, nats
    average: float | None = None  # moving average of the checks' entropies
    last_pass_rate: float | None = None
    low_checks: int = 0  # in a row
    fired: bool = False

    def observe(self, entropy: float | None, pass_rate: float) -> bool:
        """One finished step; returns `fired`. A step that trained nothing has no entropy and counts for nothing."""
        self.steps += 1
        if entropy is not None:
            self.entropy_sum, self.pass_sum = self.entropy_sum + entropy, self.pass_sum + pass_rate
            self.pending += 1
        if self.steps % self.until.every == 0 and self.pending:
            self._check(self.entropy_sum / self.pending, self.pass_sum / self.pending)
            self.entropy_sum, self.pass_sum, self.pending = 0.0, 0.0, 0
        return self.fired

    def _check(self, entropy: float, pass_rate: float) -> None:
        until = self.until
        before = entropy if self.average is None else self.average
        self.average = until.smoothing * entropy + (1 - until.smoothing) * before
        rise = 100 * (pass_rate - (pass_rate if self.last_pass_rate is None else self.last_pass_rate))
        self.last_pass_rate = pass_rate
        if len(self.warm) < until.warmup:
            self.warm.append(entropy)
        low = len(self.warm) == until.warmup and self.average < self.threshold and rise < until.slope
        self.low_checks = self.low_checks + 1 if low else 0
        self.fired = self.fired or self.low_checks >= until.patience

    @property
    def threshold(self) -> float:
        """max(floor, share · mean of the first checks), nats."""
        return max(self.until.floor, self.until.share * sum(self.warm) / len(self.warm))

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        return {name: value for name, value in asdict(self).items() if name != "until"}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Go on; None: from here, where the stage had no trigger before."""
        for name, value in (state or {}).items():
            setattr(self, name, value)
