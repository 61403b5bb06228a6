"""What a run has counted so far: tokens, drops, staleness, evaluations. Saved with checkpoints, summed up at last."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..contracts.records import StepReport
from .flow import Flow, Shard
from .methods.composition import Facts
from .metrics import EvalRow, PoolRow, StepRow
from .pool import Pool


@dataclass(slots=True)
class Tally:
    """Counts over the whole run, resumed parts included. `before` is the wall time of the parts before this one."""

    tokens: Counter[str] = field(default_factory=Counter)  # generated, scored, trained
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # "pool:error class"
    busy: dict[str, float] = field(default_factory=dict)  # pool → seconds
    pool_tokens: Counter[str] = field(default_factory=Counter)
    staleness_sum: float = 0.0
    staleness_rows: int = 0
    staleness_max: int = 0
    training_seconds: float = 0.0
    before: float = 0.0
    evals: list[EvalRow] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    _seen: dict[Pool, tuple[int, float, Counter[str]]] = field(default_factory=dict)  # pool → its counters last time

    @property
    def wall_seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def evaluated(self, step: int) -> bool:
        return any(row.step == step and row.model == "student" for row in self.evals)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        plain = {name: getattr(self, name) for name in PLAIN}
        return {**counters, **plain, "before": self.wall_seconds, "evals": [asdict(row) for row in self.evals]}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        for name in COUNTERS:
            setattr(self, name, Counter(state[name]))
        for name in (*PLAIN, "before"):
            setattr(self, name, state[name])
        self.evals = [EvalRow(**row) for row in state["evals"]]

    def count(self, flow: Flow) -> dict[str, tuple[int, float]]:
        """Take over what the flow and its pools have counted since the last time: tokens and busy seconds by pool."""
        done = {pool.name: self._advance(pool) for pool in flow.pools}
        for name, (tokens, _) in done.items():
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
        total = seconds["total"] - seconds.get("evaluate", 0.0) - seconds.get("checkpoint", 0.0)
        self.training_seconds += total
        before = Counter(self.tokens)
        flow.dropped.update(report.dropped)
        done = self.count(flow)
        given = (shard.generated for shard in shards if shard.source == "dataset" and shard.generated)
        self.tokens["given"] += sum(sum(receipt.response_lengths) for receipt in given)
        self.tokens["trained"] += report.tokens
        self.busy["learner"] = self.busy.get("learner", 0.0) + report.seconds
        self.pool_tokens["learner"] += report.tokens
        pools = {
            pool.name: PoolRow(
                replicas=len(pool.replicas),
                tokens_per_second=done[pool.name][0] / total,
                busy_fraction=min(1.0, done[pool.name][1] / (total * len(pool.replicas))),
                queue_depth=pool.queue_depth,
            )
            for pool in flow.pools
        }
        pools["learner"] = PoolRow(
            replicas=flow.config.learner.ranks,
            tokens_per_second=report.tokens / total,
            busy_fraction=min(1.0, report.seconds / total),
            queue_depth=flow.queue_depth,
        )
        return StepRow(
            step=step - 1,
            version=step,
            wall_seconds=self.wall_seconds,
            seconds=dict(seconds),
            loss=report.loss,
            learner=report.metrics,
            rollouts={"taken": sum(len(shard.requests) for shard in shards), "trained": report.rollouts},
            tokens={name: self.tokens[name] - before[name] for name in TOKENS},
            pools=pools,
            dropped=dict(self.dropped),
            failed=dict(self.failed),
            **self._rollout_figures(step - 1, shards),
        )

    def _advance(self, pool: Pool) -> tuple[int, float]:
        """What a pool did since it was last asked; a later stage's pools of the same name add to the same counts."""
        old_tokens, old_busy, old_errors = self._seen.get(pool, (0, 0.0, Counter()))
        self._seen[pool] = (pool.tokens, pool.busy_seconds, Counter(pool.errors))
        tokens, busy = pool.tokens - old_tokens, pool.busy_seconds - old_busy
        self.busy[pool.name] = self.busy.get(pool.name, 0.0) + busy
        self.pool_tokens[pool.name] += tokens
        for error, count in (pool.errors - old_errors).items():
            self.failed[f"{pool.name}:{error}"] += count
        return tokens, busy

    def _rollout_figures(self, step: int, shards: Sequence[Shard]) -> dict[str, Any]:
        generated = [shard.generated for shard in shards if shard.generated]
        judged = [shard.judged for shard in shards if shard.judged]
        rows = sum(receipt.rows for receipt in generated)
        lengths = [length for receipt in generated for length in receipt.response_lengths]
        rewards = [reward for receipt in judged for reward in receipt.rewards]
        abstained = sum(count for receipt in judged for count in receipt.errors.values())
        parts: Counter[str] = Counter()
        for receipt in judged:
            parts.update(receipt.parts)
        counted = max(1, len(rewards) - abstained)
        stale = [(shard.staleness(step), shard.generated.rows) for shard in shards if shard.generated]
        self.staleness_sum += sum(age * count for age, count in stale)
        self.staleness_rows += rows
        self.staleness_max = max([self.staleness_max, *(age for age, _ in stale)])
        return {
            "reward": sum(rewards) / counted,
            "reward_parts": {name: total / counted for name, total in parts.items()},
            "pass_rate": pass_rate(shards),
            "abstained": abstained,
            "response_length": sum(lengths) / max(1, len(lengths)),
            "truncated_share": sum(receipt.truncated for receipt in generated) / max(1, rows),
            "staleness_mean": sum(age * count for age, count in stale) / max(1, rows),
            "staleness_max": max([0, *(age for age, _ in stale)]),
            "sampler_entropy": sampler_entropy(shards),
            "groups": group_shares([fact for shard in shards for fact in shard.facts()]),
        }

    def summary(self) -> dict[str, Any]:
        """The counted part of summary.json."""
        seconds = max(self.training_seconds, 1e-9)
        return {
            "wall_seconds": self.wall_seconds,
            "accuracy": {
                "before": self._accuracy("in_distribution", "student"),
                "after": self._accuracy("in_distribution", "student", last=True),
                "teacher": self._accuracy("in_distribution", "teacher"),
                "ood_before": self._accuracy("out_of_distribution", "student"),
                "ood_after": self._accuracy("out_of_distribution", "student", last=True),
                "ood_teacher": self._accuracy("out_of_distribution", "teacher"),
            },
            "tokens": {name: self.tokens[name] for name in TOKENS},
            "pools": {
                name: {"tokens_per_second": self.pool_tokens[name] / seconds, "busy_fraction": busy / seconds}
                for name, busy in self.busy.items()
            },
            "staleness": {"mean": self.staleness_sum / max(1, self.staleness_rows), "max": self.staleness_max},
            "dropped": dict(self.dropped),
            "verifier_errors": {
                name.removeprefix("verifier:"): count
                for name, count in self.failed.items()
                if name.startswith("verifier:")
            },
            "evals": [asdict(row) for row in self.evals],
        }

    def _accuracy(self, split: str, model: str, last: bool = False) -> float | None:
        """avg@k of the first evaluation, or of the last one after a step; None where there was none."""
        rows = [row for row in self.evals if (row.split, row.model) == (split, model) and (row.step > 0 or not last)]
        return rows[-1 if last else 0].stats["avg_at_k"]["value"] if rows else None


def pass_rate(shards: Sequence[Shard]) -> float:
    """Share of the judged rollouts that passed; 0 where none was judged."""
    judged = [shard.judged for shard in shards if shard.judged]
    counted = sum(not abstained for receipt in judged for abstained in receipt.abstained)
    return sum(passed for receipt in judged for passed in receipt.passed) / max(1, counted)


def sampler_entropy(shards: Sequence[Shard]) -> float | None:
    """−mean log μ over all tokens that the student sampled, nats; None where there are none.

    At temperature 1 it estimates the entropy of the policy that sampled, also over rollouts that a filter will drop,
    which the learner's own entropy (of the tokens that train) does not see.
    """
    sampled = [shard.generated for shard in shards if shard.source == "student" and shard.generated]
    tokens = sum(sum(receipt.response_lengths) for receipt in sampled)
    return sum(receipt.surprisal for receipt in sampled) / tokens if tokens else None


def group_shares(facts: Sequence[Facts]) -> dict[str, float]:
    """Of the student's judged prompt groups those all right, all wrong and mixed; distinct answers and paths a rollout;
    and the share of all rollouts that the student did not sample."""
    groups: dict[str, list[Facts]] = {}
    for fact in facts:
        if fact.source == "student" and not fact.abstained:
            groups.setdefault(fact.group_id, []).append(fact)
    count, rollouts = max(1, len(groups)), max(1, sum(map(len, groups.values())))
    right = sum(all(fact.passed for fact in group) for group in groups.values())
    wrong = sum(not any(fact.passed for fact in group) for group in groups.values())
    return {
        "all_right": right / count,
        "all_wrong": wrong / count,
        "mixed": (len(groups) - right - wrong) / count,
        "distinct_answers": sum(len({fact.answer for fact in group}) for group in groups.values()) / rollouts,
        "distinct_paths": sum(len({fact.path for fact in group}) for group in groups.values()) / rollouts,
        "given_share": sum(fact.source != "student" for fact in facts) / max(1, len(facts)),
    }


TOKENS = ("generated", "teacher_generated", "given", "scored", "trained")
TOKENS_OF = {"rollout": "generated", "teacher_rollout": "teacher_generated"}  # by pool; the teachers' are scored
COUNTERS = ("tokens", "dropped", "failed", "pool_tokens")
PLAIN = ("busy", "staleness_sum", "staleness_rows", "staleness_max", "training_seconds")
