"""What following a strategy is worth beside being right, and when it has become a trick.

Pure functions of one step, and what is remembered between steps. The formulas are ours (docs/strategies.md): no paper
has this method. With rewards of 1 and 0 a right answer outranks a wrong one, whatever either followed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .annotations import STRATEGIES
from .composition import RolloutSummary

WARM = 3  # first steps, whose mean is how it began
PATIENCE = 2  # steps in a row
REST = 10  # steps before the weight is halved again
EVALUATIONS = 3
COLLAPSED, DOMINANT, GROWN = 0.3, 0.6, 1.2  # shares: of the strategies at first; of one code; of its share at first
RISE = 0.02  # of the mean alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Weights of alignment and diversity in the reward."""

    correct: float = 0.3
    wrong: float = 0.1
    diversity: float = 0.05

    def reward(self, reward: float, passed: bool, alignment: float, diversity: float, scale: float = 1.0) -> float:
        """r + α·R_align + δ·div: α is `correct` where it passed and `wrong` elsewhere; only what passed is paid for
        being different. `scale` multiplies all that is not r."""
        if passed:
            return reward + scale * (self.correct * alignment + self.diversity * diversity)
        return reward + scale * self.wrong * alignment


def said_of(rollout: RolloutSummary) -> dict[str, Any]:
    """What the strategy service says of a rollout; where it was not asked, nothing."""
    return dict(rollout.said.get(STRATEGIES, {}))


def alignment_of(rollout: RolloutSummary) -> float | None:
    """None: neutral."""
    return said_of(rollout).get("alignment")


def code_shares(rollouts: Sequence[RolloutSummary]) -> dict[int, float]:
    """Each code's share of all steps."""
    counts = Counter(code for rollout in rollouts for code in said_of(rollout).get("codes", ()))
    return {code: count / counts.total() for code, count in counts.items()}


def effective(shares: Sequence[float]) -> float:
    """e^H of a distribution: how many strategies are as good as in use; 0 of none."""
    p = np.asarray([share for share in shares if share > 0], np.float64)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def capped(codes: Sequence[int], shares: dict[int, float], cap: float) -> float:
    """Mean of min(1, cap / share) over a rollout's steps: what its strategy earns less where it is the fashion."""
    return float(np.mean([min(1.0, cap / shares[code]) for code in codes])) if codes else 1.0


@dataclass(slots=True)
class StrategyState:
    """A `MethodState`: watches for a collapse, and halves what strategies are worth when one is seen. Wrong answers
    then earn nothing by them."""

    scale: float = 1.0
    at_first: list[tuple[float, float]] = field(default_factory=list)  # effective strategies and the top code's share
    low: int = 0  # steps in a row that looked collapsed
    rest: int = 0  # steps before the next alarm may come
    evaluations: list[tuple[float, float]] = field(default_factory=list)  # mean alignment and accuracy
    alarm: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        return self.scale < 1.0

    def observe(self, rollouts: Sequence[RolloutSummary]) -> None:
        """One step's plain answers."""
        known = [value for rollout in rollouts if (value := alignment_of(rollout)) is not None]
        shares = list(code_shares(rollouts).values())
        self.figures = {
            "neutral_share": 1 - len(known) / max(1, len(rollouts)),
            "effective_strategies": effective(shares),
            "top_code_share": max(shares, default=0.0),
            "strategy_scale": self.scale,
        }
        for name, passed in (("right", True), ("wrong", False)):
            own = [alignment_of(rollout) for rollout in rollouts if rollout.passed == passed]
            values = [value for value in own if value is not None]
            self.figures |= {f"alignment_{name}": math.fsum(values) / len(values)} if values else {}
        if known:
            self.figures["alignment"] = math.fsum(known) / len(known)
            self._watch(self.figures["effective_strategies"], self.figures["top_code_share"])

    def _watch(self, strategies: float, top: float) -> None:
        if len(self.at_first) < WARM:
            self.at_first.append((strategies, top))
            return
        first, first_top = (sum(values) / WARM for values in zip(*self.at_first, strict=True))
        few, one = strategies < COLLAPSED * first, top > max(DOMINANT, GROWN * first_top)
        self.low = self.low + 1 if few or one else 0
        self.rest = max(0, self.rest - 1)
        if self.low >= PATIENCE and not self.rest:
            what = f"{strategies:.1f} strategies are in use, of {first:.1f} at first"
            self._halve(
                what if few else f"one code is {100 * top:.0f} % of all steps ({100 * first_top:.0f} % at first)"
            )

    def evaluated(self, accuracy: float) -> None:
        """Alignment that rises while the accuracy on held-out problems does not is a trick."""
        if "alignment" not in self.figures:
            return
        self.evaluations = [*self.evaluations, (self.figures["alignment"], accuracy)][-EVALUATIONS - 1 :]
        if len(self.evaluations) <= EVALUATIONS:
            return
        (aligned, before), (now_aligned, now) = self.evaluations[0], self.evaluations[-1]
        if now_aligned - aligned > RISE and now <= before:
            self.evaluations = self.evaluations[-1:]
            self._halve(
                f"the alignment rose from {aligned:.2f} to {now_aligned:.2f} over {EVALUATIONS} evaluations, and the "
                f"accuracy did not ({100 * before:.1f} to {100 * now:.1f} %)"
            )

    def _halve(self, why: str) -> None:
        self.scale, self.low, self.rest = self.scale / 2, 0, REST
        self.alarm = f"strategies: {why}; what they are worth is halved, and wrong answers earn nothing by them"

    def save(self) -> dict[str, Any]:
        return asdict(self)

    def load(self, values: dict[str, Any]) -> None:
        fresh = StrategyState(**values)
        for name in self.__slots__:
            setattr(self, name, getattr(fresh, name))
        self.at_first = [(a, b) for a, b in self.at_first]
        self.evaluations = [(a, b) for a, b in self.evaluations]
