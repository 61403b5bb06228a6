"""What a run has counted so far: tokens, drops, staleness, evaluations. Saved with checkpoints, summed up at last."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...contracts.config import Config
from ...contracts.data_config import GIVEN, REPLAY
from ...contracts.receipts import ScoreReceipt
from ...contracts.records import StepReport
from ...models.contexts import PLAIN
from ..flow.flow import Flow
from ..flow.shard import Shard, summaries_of
from ..methods.parts.composition import Credit, RolloutSummary
from ..pools.busy import Watch
from ..pools.pool import Pool
from .alarms import Alarms
from .guards import Guards, Tripped
from .metrics import EvalRow, PoolRow, StepRow


@dataclass(slots=True)
class RunCounters:
    """Counts over the whole run, resumed parts included. `before` is the wall time of the parts before this one."""

    tokens: Counter[str] = field(default_factory=Counter)  # generated, scored, trained
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # "pool:error class"
    response_faults: Counter[str] = field(default_factory=Counter)  # of the steps' rollouts, by error class
    busy: Counter[str] = field(default_factory=Counter)  # pool → seconds of all its replicas while the run trained
    available: Counter[str] = field(default_factory=Counter)  # the same if they had always been busy
    present: Counter[str] = field(default_factory=Counter)  # pool → seconds of training that it was there for
    pool_tokens: Counter[str] = field(default_factory=Counter)
    score_cache: Counter[str] = field(default_factory=Counter)  # of the steps' rollouts: CACHE
    staleness_sum: float = 0.0
    staleness_rows: int = 0
    staleness_max: int = 0
    training_seconds: float = 0.0
    before: float = 0.0
    evals: list[EvalRow] = field(default_factory=list)
    alarms: Alarms = field(default_factory=Alarms)
    guards: Guards = field(default_factory=Guards)
    tripped: Tripped | None = None  # by the last step
    started: float = field(default_factory=time.monotonic)
    watch: Watch = field(default_factory=Watch)
    _seen: dict[Pool, tuple[int, Counter[str]]] = field(default_factory=dict)  # pool → its counters last time

    @property
    def wall_seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def kind_of(self, warning: str) -> str:
        """Of an alarm, by its text."""
        return self.alarms.kind_of(warning)

    def evaluated(self, step: int) -> bool:
        return any(row.step == step and row.model == "student" for row in self.evals)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        plain = {name: getattr(self, name) for name in TALLIES}
        evals = [asdict(row) for row in self.evals]
        watchers = {"alarms": asdict(self.alarms), "guards": asdict(self.guards)}
        return {**counters, **plain, "before": self.wall_seconds, "evals": evals, **watchers}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts. Of 0.4.0's, busy time starts anew: it was counted otherwise."""
        for name in COUNTERS:
            known = "available" in state or name not in BUSY
            setattr(self, name, Counter(state.get(name, {}) if known else {}))
        for name in (*TALLIES, "before"):
            setattr(self, name, state[name])
        self.evals = [EvalRow(**row) for row in state["evals"]]
        self.alarms, self.guards = Alarms(**state.get("alarms", {})), Guards(**state.get("guards", {}))

    @contextmanager
    def paused(self, flow: Flow) -> Iterator[None]:
        """What the pools do meanwhile is no part of training."""
        self.watch.pause()
        yield
        self.watch.begin(flow.pools)

    def eval_row(self, config: Config, row: EvalRow) -> EvalRow:
        """Count an evaluation; the row with the alarms that it raises."""
        row = replace(row, warnings=self.alarms.eval(config, row))
        self.evals.append(row)
        return row

    def count(self, flow: Flow) -> dict[str, int]:
        """Take over what the flow and its pools have counted since the last time: tokens by pool."""
        done = {pool.name: self._advance(pool) for pool in flow.pools}
        for name, tokens in done.items():
            if name != "verifier":  # its work is rollouts
                self.tokens[TOKENS_OF.get(name, "scored")] += tokens
        self.dropped.update(flow.dropped)
        flow.dropped.clear()
        self.tokens["scored"] += flow.scored_by_rollouts
        flow.scored_by_rollouts = 0
        return done

    def step_row(
        self, step: int, shards: Sequence[Shard], report: StepReport, seconds: dict[str, float], flow: Flow
    ) -> StepRow:
        """Count a finished step (`step` steps are done with it) and describe it."""
        before, dropped, state = Counter(self.tokens), Counter(self.dropped), flow.composition.state
        flow.dropped.update(report.dropped)
        moved = report.metrics.get("grad_norm", 0.0) != 0
        if report.rollouts and not moved:
            flow.dropped["no_gradient"] += report.rollouts
        done = self.count(flow)
        given = (shard.generated for shard in shards if shard.source in GIVEN and shard.generated)
        self.tokens["given"] += sum(sum(receipt.response_lengths) for receipt in given)
        self.tokens["trained"] += report.tokens
        row = StepRow(
            step=step,
            wall_seconds=self.wall_seconds,
            seconds=dict(seconds),
            loss=report.loss,
            learner=report.metrics,
            rollouts={
                "taken": sum(len(shard.requests) for shard in shards),
                "trained": report.rollouts if moved else 0,
            },
            tokens={name: self.tokens[name] - before[name] for name in TOKENS},
            pools=self._pool_rows(flow, report, done),
            dropped=dict(self.dropped),
            failed=dict(self.failed),
            score_cache=cache_figures(shards),
            method=dict(state.figures) if state else {},
            **self._rollout_figures(step - 1, [shard for shard in shards if shard.source != REPLAY]),
        )
        self.response_faults.update(row.response_faults)
        self.score_cache.update(row.score_cache)
        of_step, of_method = self.dropped - dropped, _of_method(row, shards)
        alarms = self.alarms.step(flow.config, of_method, shards, of_step, state.alarm if state else "")
        self.tripped = self.guards.observe(flow.config, of_method, of_step)
        return replace(row, warnings=[*alarms, *self.guards.take_news()])

    def _pool_rows(self, flow: Flow, report: StepReport, tokens: dict[str, int]) -> dict[str, PoolRow]:
        """What each pool did since the step before, and the learner in this one."""
        seen, ranks = self.watch.take(), flow.config.learner.ranks
        self.training_seconds += seen.seconds
        replicas = {pool.name: len(pool.replicas) for pool in flow.pools}
        depths = {pool.name: pool.queue_depth for pool in flow.pools}
        seen.busy["learner"], seen.available["learner"] = ranks * report.seconds, ranks * seen.seconds
        replicas["learner"], depths["learner"] = ranks, flow.queue_depth
        tokens = {**tokens, "learner": report.tokens}
        self.pool_tokens["learner"] += report.tokens
        self.busy.update(seen.busy)
        self.available.update(seen.available)
        self.present.update(dict.fromkeys(replicas, seen.seconds))
        return {
            name: PoolRow(
                replicas=count,
                tokens_per_second=tokens[name] / max(seen.seconds, INSTANT),
                busy_seconds=seen.busy.get(name, 0.0),
                busy_fraction=seen.busy.get(name, 0.0) / max(seen.available.get(name, 0.0), INSTANT),
                queue_depth=depths[name],
            )
            for name, count in replicas.items()
        }

    def _advance(self, pool: Pool) -> int:
        """Tokens of a pool since it was last asked; a later stage's pools of the same name add to the same counts."""
        old_tokens, old_errors = self._seen.get(pool, (0, Counter()))
        self._seen[pool] = (pool.tokens, Counter(pool.errors))
        tokens = pool.tokens - old_tokens
        self.pool_tokens[pool.name] += tokens
        for error, count in (pool.errors - old_errors).items():
            self.failed[f"{pool.name}:{error}"] += count
        return tokens

    def _rollout_figures(self, step: int, shards: Sequence[Shard]) -> dict[str, Any]:
        """Of the method's rollouts of a step; None where there was nothing to measure."""
        generated = [shard.generated for shard in shards if shard.generated]
        rows = sum(receipt.rows for receipt in generated)
        lengths = [length for receipt in generated for length in receipt.response_lengths]
        stale = [(shard.staleness(step), len(shard.requests)) for shard in shards if shard.source == "student"]
        sampled = sum(count for _, count in stale)
        self.staleness_sum += sum(age * count for age, count in stale)
        self.staleness_rows += sampled
        self.staleness_max = max([self.staleness_max, *(age for age, _ in stale)])
        return {
            **_judged_figures(shards),
            "response_length": sum(lengths) / len(lengths) if lengths else None,
            "truncated_share": sum(receipt.truncated for receipt in generated) / rows if rows else None,
            "staleness_mean": sum(age * count for age, count in stale) / sampled if sampled else None,
            "staleness_max": max(age for age, _ in stale) if stale else None,
            "sampler_entropy": sampler_entropy(shards),
            "groups": group_shares(shards),
        }

    def summary(self) -> dict[str, Any]:
        """The counted part of summary.json; what was not measured is not there."""
        accuracy = {
            "before": self._accuracy("in_distribution", "student"),
            "after": self._accuracy("in_distribution", "student", last=True),
            "teacher": self._accuracy("in_distribution", "teacher"),
            "ood_before": self._accuracy("out_of_distribution", "student"),
            "ood_after": self._accuracy("out_of_distribution", "student", last=True),
            "ood_teacher": self._accuracy("out_of_distribution", "teacher"),
        }
        summary: dict[str, Any] = {
            "wall_seconds": self.wall_seconds,
            "accuracy": {name: value for name, value in accuracy.items() if value is not None},
            "tokens": {name: self.tokens[name] for name in TOKENS},
            "pools": {
                name: {
                    "tokens_per_second": self.pool_tokens[name] / max(seconds, INSTANT),
                    "busy_seconds": self.busy[name],
                    "busy_fraction": self.busy[name] / max(self.available[name], INSTANT),
                }
                for name, seconds in self.present.items()
            },
            "dropped": dict(self.dropped),
            "verifier_errors": {
                name.removeprefix("verifier:"): count
                for name, count in self.failed.items()
                if name.startswith("verifier:")
            },
            "response_faults": dict(self.response_faults),
            **({"score_cache": dict(self.score_cache)} if self.score_cache else {}),
            "warnings": [*self.alarms.said.values(), *self.guards.said.values(), *self.guards.rollbacks],
            "evals": [asdict(row) for row in self.evals],
        }
        if self.guards.rollbacks:
            summary["rollbacks"] = len(self.guards.rollbacks)
        if self.staleness_rows:
            summary["staleness"] = {"mean": self.staleness_sum / self.staleness_rows, "max": self.staleness_max}
        return summary

    def _accuracy(self, split: str, model: str, last: bool = False) -> float | None:
        """avg@k of the first evaluation, or of the last one after a step; None where there was none."""
        rows = [row for row in self.evals if (row.split, row.model) == (split, model) and (row.step > 0 or not last)]
        return rows[-1 if last else 0].stats["avg_at_k"]["value"] if rows else None


def _of_method(row: StepRow, shards: Sequence[Shard]) -> StepRow:
    """The row for alarms and guards, which count no replayed answers."""
    replayed = [shard for shard in shards if shard.source == REPLAY]
    trained = sum(isinstance(outcome, Credit) for shard in replayed for outcome in shard.outcomes)
    counts = {"taken": sum(len(shard.requests) for shard in replayed), "trained": trained}
    return replace(row, rollouts={name: max(0, many - counts[name]) for name, many in row.rollouts.items()})


def cache_figures(shards: Sequence[Shard]) -> dict[str, int]:
    """What the caches of teacher scores did for the rollouts; nothing where none is kept."""
    scored = [receipt for shard in shards for receipt in shard.receipts.values() if isinstance(receipt, ScoreReceipt)]
    figures = {name: sum(getattr(receipt, name) for receipt in scored) for name in CACHE}
    return figures if any(figures.values()) else {}


def pass_rate(shards: Sequence[Shard]) -> float | None:
    """Share of the judged answers to plain prompts that passed; None where none was judged."""
    judged = [shard.judged for shard in shards if shard.judged and shard.context == PLAIN]
    counted = sum(not abstained for receipt in judged for abstained in receipt.abstained)
    return sum(passed for receipt in judged for passed in receipt.passed) / counted if counted else None


def _judged_figures(shards: Sequence[Shard]) -> dict[str, Any]:
    """Of the rollouts that were sent to the verifier; None where none were."""
    judged = [shard.judged for shard in shards if shard.judged]
    rewards = [reward for receipt in judged for reward in receipt.rewards]
    abstained = sum(abstains for receipt in judged for abstains in receipt.abstained)
    parts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for receipt in judged:
        parts.update(receipt.parts)
        faults.update(receipt.faults)
    counted = len(rewards) - abstained
    return {
        "reward": sum(rewards) / counted if counted else None,
        "reward_parts": {name: total / counted for name, total in parts.items()} if counted else {},
        "pass_rate": pass_rate(shards),
        "abstained": abstained if rewards else None,
        "response_faults": dict(faults),
    }


def sampler_entropy(shards: Sequence[Shard]) -> float | None:
    """−mean log μ over all tokens that the student sampled, nats; None where there are none.

    At temperature 1 it estimates the entropy of the policy that sampled, also over rollouts that a filter will drop,
    which the learner's own entropy (of the tokens that train) does not see. What is sampled under another template is
    another policy's.
    """
    plain = [shard for shard in shards if shard.source == "student" and shard.context == PLAIN]
    sampled = [shard.generated for shard in plain if shard.generated]
    tokens = sum(sum(receipt.response_lengths) for receipt in sampled)
    return sum(receipt.surprisal for receipt in sampled) / tokens if tokens else None


def group_shares(shards: Sequence[Shard]) -> dict[str, float]:
    """Of the student's judged prompt groups, in plain answers, those all right, all wrong and mixed; distinct answers
    (where a verifier names any) and paths a rollout; and the share of all rollouts that the student did not sample."""
    groups: dict[str, list[RolloutSummary]] = {}
    for rollout in summaries_of([shard for shard in shards if shard.judged and shard.context == PLAIN]):
        if rollout.source == "student" and not rollout.abstained:
            groups.setdefault(rollout.group_id, []).append(rollout)
    total = sum(len(shard.requests) for shard in shards)
    given = sum(len(shard.requests) for shard in shards if shard.source != "student")
    shares = {"given_share": given / max(1, total)}
    if not groups:
        return shares
    count, answers = len(groups), sum(map(len, groups.values()))
    right = sum(all(rollout.passed for rollout in group) for group in groups.values())
    wrong = sum(not any(rollout.passed for rollout in group) for group in groups.values())
    if wrong == count or any(rollout.answer for group in groups.values() for rollout in group):
        distinct = sum(len({rollout.answer for rollout in group}) for group in groups.values())
        shares["distinct_answers"] = distinct / answers
    return {
        "all_right": right / count,
        "all_wrong": wrong / count,
        "mixed": (count - right - wrong) / count,
        "distinct_paths": sum(len({rollout.path for rollout in group}) for group in groups.values()) / answers,
        **shares,
    }


INSTANT = 1e-9  # seconds
TOKENS = ("generated", "teacher_generated", "given", "scored", "trained")
TOKENS_OF = {"rollout": "generated", "teacher_rollout": "teacher_generated"}  # by pool; the teachers' are scored
BUSY = ("busy", "available", "present")
CACHE = ("hits", "misses", "bytes_read", "bytes_written")
COUNTERS = ("tokens", "dropped", "failed", "response_faults", "pool_tokens", "score_cache", *BUSY)
TALLIES = ("staleness_sum", "staleness_rows", "staleness_max", "training_seconds")


def deaths_of(pools: Iterable[Pool], learner: int) -> dict[str, dict[str, int]]:
    """For the summary: replicas that were replaced, calls that were made again; nothing where nothing died. `learner`:
    how often it was started again."""
    pools = list(pools)
    restarts = {pool.name: pool.members.restarts for pool in pools} | {"learner": learner}
    found = {"restarts": restarts, "retries": {pool.name: pool.retries for pool in pools}}
    own = {name: {pool: many for pool, many in counts.items() if many} for name, counts in found.items()}
    return {name: counts for name, counts in own.items() if counts}
