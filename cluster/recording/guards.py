"""Guards: what notices a run that trains itself to pieces. Each step's figures against limits of the run's own start.

A limit is made of the stage's first `guards.warmup` steps: the median of a figure, and from there the farthest of a
share of it, some spreads of those steps (median absolute deviations), and a distance that no healthy run needs. Only
the gradient's norm, which falls as a run goes on, is compared with its own last steps. A guard trips once
`guards.patience` steps in a row were beyond a limit, and at once where a single step has left the policy that it began
with. What then happens is `guards.action`: a warning, the run's end, or a rollback (`Recovery.go_back`). A figure that
was not measured says nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from ...contracts.config import Config
from ...contracts.errors import GuardTripped, NotFinite, TutorloopError
from ...contracts.reliability import Action, GuardName
from .metrics import StepRow

SPREADS = 4.0  # of its start that noise may take a figure away; ours
WINDOW = 20  # gradient norms, of which the median is the usual one
EXPLODED = 10.0  # times the usual norm; ours
GRAVITY = ("warn", "rollback", "stop")
RATE = "a lower learner.learning_rate or a longer learner.warmup_steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How far a figure may go. `times`: above or below its start by so many times; `room`: in the figure's own unit.
    `usual`: where a figure begins by its nature, so that no first steps need be seen. `at_once`: one step is enough.
    `mends`: a rollback may help."""

    guard: GuardName
    kind: str
    what: str
    read: Callable[[StepRow, Mapping[str, int]], float | None]
    above: bool
    times: float = 1.0
    room: float = 0.0
    usual: float | None = None
    at_once: bool = False
    mends: bool = True
    remedy: str = RATE

    def limit(self, start: list[float]) -> tuple[float, float, str]:
        """The start's median, the limit, and how that came about."""
        middle = median(start)
        spread = median(abs(value - middle) for value in start)
        share = abs(middle) * (self.times - 1 if self.above else 1 - 1 / self.times)
        sign = "+" if self.above else "−"
        distance, how = max(
            (share, f"{'×' if self.above else '÷'} {self.times:g}"),
            (SPREADS * spread, f"{sign} {SPREADS:g} spreads of {spread:.3g}"),
            (self.room, f"{sign} {self.room:g}"),
        )
        limit = middle + distance if self.above else middle - distance
        if self.usual is not None:
            how = "in any run"
        else:
            how = f"{middle:.4g}, the median of the first {len(start)} steps, {how}"
        return middle, limit, how


@dataclass(frozen=True, slots=True)
class Tripped:
    """What a guard found, and what is to be done."""

    action: Action
    text: str
    remedy: str

    def error(self) -> GuardTripped:
        rule = "a run goes on while what its guards watch stays within their limits"
        error = GuardTripped(rule, self.text, f"what helps is {self.remedy}")
        error.rolls_back = self.action == "rollback"
        return error


@dataclass(slots=True)
class Guards:
    """All of it stands in checkpoints. Kinds are those of RULES."""

    stage: int = 0
    starts: dict[str, list[float]] = field(default_factory=dict)  # kind → the figures of its first steps
    norms: list[float] = field(default_factory=list)  # of the gradient, the last that were no explosion
    beyond: dict[str, list[int]] = field(default_factory=dict)  # kind → since which step, for how many
    said: dict[str, str] = field(default_factory=dict)  # stage and kind → its alarm, in order
    rollbacks: list[str] = field(default_factory=list)  # what was said of each
    news: list[str] = field(default_factory=list)  # for the next step's row
    rate: float = 1.0  # what rollbacks have made of the learning rate
    skipped: list[int] = field(default_factory=list)  # steps that do not train, by the steps done before them

    def begin(self, stage: int) -> None:
        """A stage has its own figures, and its own rate."""
        if stage != self.stage:
            self.stage, self.rate, self.starts, self.norms, self.beyond, self.skipped = stage, 1.0, {}, [], {}, []

    def observe(self, config: Config, row: StepRow, dropped: Mapping[str, int]) -> Tripped | None:
        """Of a finished step, with its drops by reason, the gravest that has tripped. What is new is in `news`."""
        return self.judge(config, row.step, figures_of(row, dropped))

    def judge(self, config: Config, step: int, figures: Mapping[str, float]) -> Tripped | None:
        """As `observe`, of what `figures_of` makes of a row."""
        settings, found = config.guards, []
        for rule in RULES:
            action, value = settings.action_of(rule.guard), figures.get(rule.kind)
            if action == "off" or value is None:
                continue
            if action == "rollback" and not rule.mends:
                action = "stop"
            if (known := self.limit(rule, config)) is None:
                self._usual(rule).append(value)
                continue
            _, limit, how = known
            within = value <= limit if rule.above else value >= limit
            since, steps = self.beyond.get(rule.kind, [step, 0])
            self.beyond.pop(rule.kind, None)
            if not within:
                self.beyond[rule.kind] = [since, steps := steps + 1]
            if rule.kind == "gradient" and within:
                self.norms = [*self.norms, value][-WINDOW:]
            if not within and steps >= (1 if rule.at_once else settings.patience):
                side = "above" if rule.above else "below"
                times = f"{steps} steps in a row" if steps > 1 else "a step"
                text = f"{rule.what} is {value:.4g} in step {step}, {times} {side} its limit {limit:.4g} ({how})"
                found.append(Tripped(action, f"{rule.guard} guard: {text}", rule.remedy))
                self._say(rule.kind, f"{rule.guard} guard: {text}. What helps: {rule.remedy}")
        return max(found, key=lambda tripped: GRAVITY.index(tripped.action), default=None)

    def limit(self, rule: Rule, config: Config) -> tuple[float, float, str] | None:
        """What is usual, the limit, and how it came about; None while the first steps are still to be seen."""
        if rule.usual is not None:
            return rule.limit([rule.usual])
        usual = self._usual(rule)
        if len(usual) < config.guards.warmup:
            return None
        if rule.kind != "gradient":
            return rule.limit(usual)
        middle, clip = median(usual), config.learner.max_grad_norm
        how = f"{EXPLODED:g} times {middle:.4g}, the median of the last {len(usual)} usual steps"
        return middle, *max((EXPLODED * middle, how), (clip, f"learner.max_grad_norm; {middle:.4g} is usual"))

    def _usual(self, rule: Rule) -> list[float]:
        return self.norms if rule.kind == "gradient" else self.starts.setdefault(rule.kind, [])

    def _say(self, kind: str, text: str) -> None:
        key = f"{self.stage} {kind}"
        if key not in self.said:
            self.said[key] = text
            self.news.append(text)

    def take_news(self) -> list[str]:
        news, self.news = self.news, []
        return news

    def proven(self, config: Config, step: int, behind: int) -> int:
        """The last weights, by the steps done, that are known to be well after `step` steps: a step's figures are of
        weights up to `behind` steps older than those that it began with. No rollback goes back to newer ones."""
        acting = [rule.kind for rule in RULES if config.guards.action_of(rule.guard) in ("stop", "rollback")]
        began = min([steps[0] for kind in acting if (steps := self.beyond.get(kind))], default=step + 1)
        return began - 2 - behind

    def go_back(self, config: Config, error: TutorloopError, reached: int, batch: int | None) -> bool:
        """Whether the run goes back after `error`, at `reached` steps done, and then does something otherwise.
        `batch`: the steps done before that whose rollouts the learner was given last.

        A guard trips over many steps, so none of their batches is to blame: they are trained again, at a lower rate. A
        figure that is not finite most often comes of one batch: that one is left out, and the rate is lowered only
        where it happens again.
        """
        settings = config.guards
        of_batch = isinstance(error, NotFinite) and batch is not None and settings.action_of("gradient") == "rollback"
        if not of_batch and not (isinstance(error, GuardTripped) and error.rolls_back):
            return False
        if len(self.rollbacks) >= settings.rollbacks:
            error.found += f"; guards.rollbacks={settings.rollbacks} are used up" if settings.rollbacks else ""
            return False
        changes = []
        if not of_batch or self.skipped:
            self.rate *= settings.rate
            changes.append(f"the learning rate is {self.rate:.4g} of the recipe's")
        if of_batch:
            assert batch is not None
            self.skipped.append(batch)
            changes.append(f"step {batch + 1} trains nothing")
        number = f"rollback {len(self.rollbacks) + 1} of at most {settings.rollbacks}"
        self.rollbacks.append(f"{number}, after step {reached}: from here {' and '.join(changes)}. {error.found}")
        self.news.append(self.rollbacks[-1])
        return True

    def keep(self, other: "Guards") -> None:
        """What `other` has decided and said outlasts the way back to these figures."""
        self.rate, self.skipped, self.rollbacks = other.rate, other.skipped, other.rollbacks
        self.said, self.news = other.said, other.news


def _sampled(figure: float | None, row: StepRow) -> float | None:
    """A figure of responses, where the student sampled some."""
    return None if row.sampler_entropy is None else figure


def _of_teachers(row: StepRow, name: str, worst: Callable[..., float]) -> float | None:
    """The worst of a learner's metric, which several teachers have each under a name of its own."""
    own = [value for key, value in row.learner.items() if key == name or key.startswith(f"{name}.")]
    return worst(own, default=None)


def _reverse_kl(row: StepRow) -> float | None:
    figures = [_of_teachers(row, name, max) for name in ("reverse_kl", "topk_reverse_kl")]
    return max((figure for figure in figures if figure is not None), default=None)


def _ended(row: StepRow) -> float | None:
    return None if row.truncated_share is None else 1 - row.truncated_share


def _shift(row: StepRow) -> float | None:
    """Of methods that sample with a round's first weights it is as small as of others, step by step."""
    shift = row.learner.get("mismatch_k3")
    return None if shift is None else shift / max(1.0, row.staleness_mean or 0.0)


def _moved(row: StepRow) -> float | None:
    """Of one step, where the sampler was older than what the step began with."""
    moved = row.learner.get("policy_shift")
    return None if moved is None else moved / (1.0 + (row.staleness_mean or 0.0))


def _stale_share(row: StepRow, dropped: Mapping[str, int]) -> float | None:
    stale = dropped.get("stale", 0)
    return stale / (row.rollouts["taken"] + stale) if row.rollouts["taken"] + stale else None


def figures_of(row: StepRow, dropped: Mapping[str, int]) -> dict[str, float]:
    """By kind, what was measured of a step and is a number."""
    figures = {rule.kind: rule.read(row, dropped) for rule in RULES}
    return {kind: value for kind, value in figures.items() if value is not None and math.isfinite(value)}


RULES = (
    Rule(
        guard="pass_rate",
        kind="pass_rate",
        what="the pass rate of the rollouts",
        read=lambda row, _: _sampled(row.pass_rate, row),
        above=False,
        times=1.4,
        room=0.1,
    ),
    Rule(
        guard="eos",
        kind="eos",
        what="the share of responses that end by themselves",
        read=lambda row, _: _sampled(_ended(row), row),
        above=False,
        times=2.0,
        room=0.2,
    ),
    Rule(
        guard="length",
        kind="length_up",
        what="the mean response length",
        read=lambda row, _: _sampled(row.response_length, row),
        above=True,
        times=2.0,
        room=8.0,
    ),
    Rule(
        guard="length",
        kind="length_down",
        what="the mean response length",
        read=lambda row, _: _sampled(row.response_length, row),
        above=False,
        times=3.0,
    ),
    Rule(
        guard="entropy",
        kind="entropy_up",
        what="the sampler's entropy (nats a token)",
        read=lambda row, _: row.sampler_entropy,
        above=True,
        times=1.5,
        room=0.01,
    ),
    Rule(
        guard="entropy",
        kind="entropy_down",
        what="the sampler's entropy (nats a token)",
        read=lambda row, _: row.sampler_entropy,
        above=False,
        times=20.0,
    ),
    Rule(
        guard="overlap",
        kind="overlap",
        what="the share of tokens at which student and teacher have the same first choice",
        read=lambda row, _: _of_teachers(row, "top1_agreement", min),
        above=False,
        times=1.25,
        room=0.1,
    ),
    Rule(
        guard="reverse_kl",
        kind="reverse_kl",
        what="the reverse KL (nats a token)",
        read=lambda row, _: _reverse_kl(row),
        above=True,
        times=3.0,
        room=0.1,
    ),
    Rule(
        guard="coverage",
        kind="coverage",
        what="the share of tokens for which a teacher was asked and has answered",
        read=lambda row, _: _of_teachers(row, "teacher_coverage", min),
        above=False,
        times=1.5,
        room=0.2,
        remedy=f"a teacher that answers (`failed` in metrics.jsonl); where it is shown what the student solved, {RATE}",
    ),
    Rule(
        guard="staleness",
        kind="staleness",
        what="the share of rollouts dropped as stale",
        read=_stale_share,
        above=True,
        room=0.2,
        usual=0.0,
        mends=False,
        remedy="more rollout replicas, or a larger max_staleness",
    ),
    Rule(
        guard="staleness",
        kind="shift",
        what="the KL of the policy that sampled from the one that trains (nats a token, for each step between them)",
        read=lambda row, _: _shift(row),
        above=True,
        room=0.05,
        usual=0.0,
        remedy=f"{RATE}, or a smaller max_staleness",
    ),
    Rule(
        guard="update",
        kind="update",
        what="the KL of the policy that sampled from the one after the step (nats a token)",
        read=lambda row, _: _moved(row),
        above=True,
        room=0.2,
        usual=0.0,
        at_once=True,
    ),
    Rule(
        guard="gradient",
        kind="gradient",
        what="the gradient's norm",
        read=lambda row, _: row.learner.get("grad_norm") or None,
        above=True,
    ),
)
