"""The metrics of one run in a Prometheus registry of their own. Cumulative counts of a row become increments here.

Names start with `tutorloop_` and use base units. A figure that was not measured has no sample: its gauge comes with its
first value.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, Summary

from ... import __version__
from ...contracts.reliability import GuardName

if TYPE_CHECKING:
    from .metrics import EvalRow, StepRow

# Whose work each count of tokens is.
TOKEN_POOLS = {
    "generated": "rollout",
    "teacher_generated": "teacher_rollout",
    "given": "dataset",
    "scored": "teacher",
    "trained": "learner",
}
# Reasons that any run may come to know; a counter must be 0 before its first event.
KNOWN_DROPS = (
    "empty_response",
    "teacher_refused",
    "credit_missing",
    "off_policy",
    "no_gradient",
    "stale",
    "interrupted",
    "stage_ended",
)
# Kinds of alarms: of alarms.py, the guards by their names, and what these have done.
KNOWN_ALARMS = (
    *("no_answer", "truncated", "no_gradient", "no_scores", "stale", "abstained", "response_faults", "method"),
    *(*get_args(GuardName), "rollback"),
)
GAUGES = {  # of the row
    "step": ("step", "Learner steps done."),
    "wall_seconds": ("run_seconds", "Seconds since the run started."),
    "loss": ("loss", "Loss of the last step."),
    "reward": ("reward", "Mean verifier score of the last step's judged rollouts."),
    "pass_rate": ("pass_ratio", "Share of the last step's judged rollouts that passed."),
    "response_length": ("response_length_tokens", "Mean response length of the last step."),
    "truncated_share": ("truncated_ratio", "Share of responses that the token limit ended."),
    "staleness_mean": ("staleness_mean_versions", "Mean weight versions between sampling and training."),
    "staleness_max": ("staleness_max_versions", "Most weight versions between sampling and training."),
    "sampler_entropy": ("sampler_entropy_nats", "Mean −log μ of all tokens that the student sampled."),
}
LEARNER_GAUGES = {  # of the learner's metrics
    "reverse_kl": ("reverse_kl_nats", "Reverse KL of student from teacher, per trained token."),
    "topk_reverse_kl": (
        "topk_reverse_kl_nats",
        "A lower bound of it: k ids, and one bucket for the rest.",
    ),
    "entropy": ("entropy_nats", "The student's entropy, per trained token."),
    "grad_norm": ("grad_norm", "Global gradient norm before clipping."),
    "learning_rate": ("learning_rate", "Learning rate of the last step."),
}


class Prometheus:
    """`method` names the run's stages."""

    def __init__(self, method: str) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._seen: dict[tuple[str, str], int] = {}

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tutorloop_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tutorloop_{name}", text, labels, registry=self.registry)

        def summary(name: str, text: str, *labels: str) -> Summary:
            return Summary(f"tutorloop_{name}", text, labels, registry=self.registry)

        run = Info("tutorloop_run", "What runs: its method and tutorloop's version.", registry=self.registry)
        run.info({"method": method, "version": __version__})
        self._parts = gauge("reward_part", "Mean score of a part of the reward, unweighted.", "part")
        self._groups = gauge("prompt_groups_ratio", "Shares of the last step's prompt groups, by outcome.", "share")
        self._learner = gauge("learner_metric", "The learner's other metrics, by name.", "metric")
        self._method = gauge("method_metric", "What the method says of the last step, by name.", "metric")
        self._pools = {
            "replicas": gauge("pool_replicas", "Replicas of a pool.", "pool"),
            "tokens_per_second": gauge("pool_tokens_per_second", "Tokens a second over the last step.", "pool"),
            "busy_fraction": gauge("pool_busy_ratio", "Share of its replicas' time that a pool worked.", "pool"),
            "queue_depth": gauge("pool_queue_depth", "Batches handed to a pool and not yet returned.", "pool"),
        }
        self._busy = counter("pool_busy_seconds_total", "Seconds that a pool's replicas worked, together.", "pool")
        self._accuracy = gauge("accuracy_ratio", "avg@k of the last evaluation.", "split", "model")
        self._last_stage = gauge("stage_last_seconds", "Seconds of the last step by stage.", "stage")
        self._stages = summary("stage_seconds", "Seconds by stage.", "stage")
        self._steps = summary("step_seconds", "Seconds of whole steps.")
        self._tokens = counter("tokens_total", "Tokens that a pool worked on.", "pool")
        self._cached = {
            "hits": counter("score_cache_hits_total", "Teacher scores that had been kept."),
            "misses": counter("score_cache_misses_total", "Teacher scores that had not."),
            "bytes_read": counter("score_cache_read_bytes_total", "Bytes of kept teacher scores that were read."),
            "bytes_written": counter("score_cache_written_bytes_total", "Bytes of teacher scores that were kept."),
        }
        self._abstained = counter("abstained_total", "Rollouts that the verifier did not judge.")
        self._faults = counter("response_faults_total", "Responses incorrect by their own fault, by reason.", "reason")
        self._dropped = counter("dropped_total", "Rollouts that were dropped, by reason.", "reason")
        self._failed = counter("failed_total", "Calls and samples that failed, by pool and error.", "pool", "error")
        self._alarms = counter("alarms_total", "Alarms of the run, by kind.", "kind")
        self._untold = counter("alarms_untold_total", "Alarms that reached nobody, by where they failed.", "where")
        self.nonfinite = counter("nonfinite_values_total", "Figures that were NaN or infinite.")
        for reason in KNOWN_DROPS:
            self._dropped.labels(reason)
        for kind in KNOWN_ALARMS:
            self._alarms.labels(kind)

    def step(self, row: "StepRow") -> None:
        self._set("weight_version", "Version of the weights that the last step made.", row.step)
        self._set("step_last_seconds", "Seconds of the last step.", row.seconds["total"])
        for name, (metric, text) in GAUGES.items():
            if getattr(row, name) is not None:
                self._set(metric, text, getattr(row, name))
        for name, value in row.learner.items():
            if name in LEARNER_GAUGES:
                self._set(*LEARNER_GAUGES[name], value)
            else:
                self._learner.labels(name).set(value)
        for name, value in row.method.items():
            self._method.labels(name).set(value)
        for name, value in row.reward_parts.items():
            self._parts.labels(name).set(value)
        for name, value in row.groups.items():
            self._groups.labels(name).set(value)
        for pool, figures in row.pools.items():
            for name, gauge in self._pools.items():
                gauge.labels(pool).set(getattr(figures, name))
            self._busy.labels(pool).inc(max(0.0, figures.busy_seconds))
        for stage, seconds in row.seconds.items():
            if stage == "total":
                self._steps.observe(seconds)
                continue
            self._last_stage.labels(stage).set(seconds)
            self._stages.labels(stage).observe(seconds)
        for kind, count in row.tokens.items():
            self._tokens.labels(TOKEN_POOLS[kind]).inc(count)
        for name, count in row.score_cache.items():
            self._cached[name].inc(count)
        self._abstained.inc(row.abstained or 0)
        for reason, count in row.response_faults.items():
            self._faults.labels(reason).inc(count)
        for reason, total in row.dropped.items():
            self._dropped.labels(reason).inc(self._new("dropped", reason, total))
        for place, total in row.failed.items():
            pool, _, error = place.partition(":")
            self._failed.labels(pool, error).inc(self._new("failed", place, total))

    def eval(self, row: "EvalRow") -> None:
        self._accuracy.labels(row.split, row.model).set(row.stats["avg_at_k"]["value"])

    def alarms(self, kinds: Iterable[str], untold: Mapping[str, int]) -> None:
        """`kinds` of alarms that are new; `untold`: where → how many failed since the run started."""
        for kind in kinds:
            self._alarms.labels(kind).inc()
        for where, total in untold.items():
            self._untold.labels(where).inc(self._new("untold", where, total))

    def _set(self, metric: str, text: str, value: float) -> None:
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(f"tutorloop_{metric}", text, registry=self.registry)
        self._gauges[metric].set(value)

    def _new(self, name: str, label: str, total: int) -> int:
        before = self._seen.get((name, label), 0)
        self._seen[name, label] = total
        return max(total - before, 0)
