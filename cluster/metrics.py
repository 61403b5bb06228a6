"""A run's figures, in three places at once: `metrics.jsonl`, TensorBoard events, and a Prometheus endpoint.

The driver makes one `StepRow` a learner step and one `EvalRow` an evaluation, and hands each to `MetricsLog`. The JSON
lines are the record that reports and tests read; TensorBoard and Prometheus are views of the same rows. A figure that
is not finite becomes `null` in the JSON line, which then names it under `nonfinite`, and is counted: it is never lost
in silence. Prometheus names start with `tutorloop_` and use base units; the registry and the server belong to one
object, so two runs in one process do not mix and a closed run leaves no port behind.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary, start_http_server

from ..contracts.errors import ConfigError, RunFolderError
from .tensorboard import TensorBoard

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
# Whose work each count of tokens is.
TOKEN_POOLS = {
    "generated": "rollout",
    "teacher_generated": "teacher_rollout",
    "given": "dataset",
    "scored": "teacher",
    "trained": "learner",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRow:
    """One pool as it stands at the end of a step."""

    replicas: int
    tokens_per_second: float  # since the last step
    busy_fraction: float  # of the replicas' time since the last step
    queue_depth: int  # batches handed out or waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One learner step. Means are over the rollouts that it trained on; `learner` holds the learner's own metrics."""

    step: int  # from 0
    version: int  # of the weights that this step published
    wall_seconds: float  # since the run started
    seconds: dict[str, float]  # stage (wait, learn, publish, load, checkpoint, evaluate, total) → seconds
    loss: float
    learner: dict[str, float]  # reverse_kl, entropy (nats), grad_norm, learning_rate, importance_weight, …
    reward: float  # mean verifier score of those that were judged
    pass_rate: float  # of those that were judged
    abstained: int  # rollouts that the verifier did not judge
    response_length: float  # mean, tokens
    truncated_share: float  # ended by the token limit
    staleness_mean: float  # weight versions between sampling and training
    staleness_max: int
    sampler_entropy: (
        float | None
    )  # −mean log μ of all tokens that the student sampled, nats; what a stage's trigger sees
    rollouts: dict[str, int]  # taken from the queue, and trained; the others were dropped
    reward_parts: dict[str, float]  # mean score of each part of the reward, over the judged rollouts
    groups: dict[str, float]  # shares of the student's prompt groups: all_right, all_wrong, mixed, …
    tokens: dict[str, int]  # generated, teacher_generated, given, scored, trained: of this step
    pools: dict[str, PoolRow]
    dropped: dict[str, int]  # reason → rollouts dropped since the run started
    failed: dict[str, int]  # "pool:error" → failures since the run started


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One evaluation of one model on one split. `stats` is `statistics.summarise`'s result."""

    step: int  # learner steps done before it
    split: str  # in_distribution | out_of_distribution
    model: str  # student | teacher
    stats: dict[str, Any]
    seconds: float


class MetricsLog:
    """Writes rows for one run folder and serves them to Prometheus.

    An existing folder is continued. `port` 0 takes a free one; `url` says which. Raises ConfigError where the port
    cannot be had. `close` flushes everything and frees the port; it may be called twice.
    """

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self._path = folder / METRICS_FILE
        self._tensorboard_folder = folder / TENSORBOARD_FOLDER
        self._prometheus = _Prometheus()
        try:
            self._server, self._thread = start_http_server(port, host, self._prometheus.registry)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "metrics.host and metrics.port must be free to listen on", f"{host}:{port}: {error}", "metrics.port=0"
            ) from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/metrics"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(self._tensorboard_folder, None)

    def log_step(self, row: StepRow) -> None:
        self._write("step", asdict(row))
        self._prometheus.step(row)

    def log_eval(self, row: EvalRow) -> None:
        self._write("eval", asdict(row))
        self._prometheus.eval(row)

    def truncate_after(self, step: int) -> None:
        """Forget what a run that resumes with `step` steps done will log again: later steps and later evaluations.

        The file is replaced whole or not at all, and a last line that was cut off by a crash goes with it. TensorBoard,
        whose axis is the steps done, is told to hide what comes after.
        """
        kept = [row for row in read_rows(self._path) if _steps_done(row) <= step]
        aside = self._path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file.close()
        os.replace(aside, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard.close()
        self._tensorboard = TensorBoard(self._tensorboard_folder, step + 1)

    def close(self) -> None:
        if self._file.closed:
            return
        self._tensorboard.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._file.close()  # last: a full disk is heard here

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        figures = dict(_numbers(row))
        nonfinite = sorted(name for name, value in figures.items() if not math.isfinite(value))
        line = {"kind": kind, **_finite(row)}
        if nonfinite:
            line["nonfinite"] = nonfinite
            self._prometheus.nonfinite.inc(len(nonfinite))
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        prefix = f"eval/{row['split']}/{row['model']}/" if kind == "eval" else ""
        shown = {prefix + n.removeprefix("stats/"): v for n, v in figures.items() if n != "step" and math.isfinite(v)}
        self._tensorboard.add(shown, _steps_done(line))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; none if there is no file. A last line that a crash cut off is left out.

    Raises RunFolderError where any other line is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(
        b"\n"
    )  # a complete file ends with a newline: what follows the last one is a torn row
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunFolderError("every line of metrics.jsonl is a JSON row", f"{path}:{number}: {error}") from error
        if not isinstance(row, dict) or row.get("kind") not in ("step", "eval") or not isinstance(row.get("step"), int):
            raise RunFolderError("a row of metrics.jsonl has a kind and a step", f"{path}:{number}: {line[:80]!r}")
        rows.append(row)
    return rows


def _steps_done(row: dict[str, Any]) -> int:
    """When a row was written: step s is row s, and an evaluation counts the steps before it."""
    return row["step"] + (row["kind"] == "step")


def _numbers(node: Any, name: str = "") -> list[tuple[str, float]]:
    """All numbers of a tree with their slash-joined names."""
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _numbers(value, f"{name}/{key}" if name else str(key))]
    return [(name, node)] if isinstance(node, int | float) else []


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node


class _Prometheus:
    """The metrics of one run in a registry of their own. Cumulative counts of a row become increments here."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seen: dict[tuple[str, str], int] = {}

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tutorloop_{name}", text, labels, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tutorloop_{name}", text, labels, registry=self.registry)

        self._gauges = {
            "step": gauge("step", "Number of the last learner step, from 0."),
            "version": gauge("weight_version", "Version of the weights last published to the rollout pool."),
            "wall_seconds": gauge("run_seconds", "Seconds since the run started."),
            "loss": gauge("loss", "Loss of the last step."),
            "reward": gauge("reward", "Mean verifier score of the last step's judged rollouts."),
            "pass_rate": gauge("pass_ratio", "Share of the last step's judged rollouts that passed."),
            "response_length": gauge("response_length_tokens", "Mean response length of the last step."),
            "truncated_share": gauge("truncated_ratio", "Share of responses that the token limit ended."),
            "staleness_mean": gauge("staleness_mean_versions", "Mean weight versions between sampling and training."),
            "staleness_max": gauge("staleness_max_versions", "Most weight versions between sampling and training."),
        }
        self._named_learner = {
            "reverse_kl": gauge("reverse_kl_nats", "Reverse KL of student from teacher, per trained token."),
            "entropy": gauge("entropy_nats", "The student's entropy, per trained token."),
            "grad_norm": gauge("grad_norm", "Global gradient norm before clipping."),
            "learning_rate": gauge("learning_rate", "Learning rate of the last step."),
        }
        self._sampler_entropy = gauge("sampler_entropy_nats", "Mean −log μ of all tokens that the student sampled.")
        self._parts = gauge("reward_part", "Mean score of a part of the reward, unweighted.", "part")
        self._groups = gauge("prompt_groups_ratio", "Shares of the last step's prompt groups, by outcome.", "share")
        self._learner = gauge("learner_metric", "The learner's other metrics, by name.", "metric")
        self._pools = {
            "replicas": gauge("pool_replicas", "Replicas of a pool.", "pool"),
            "tokens_per_second": gauge("pool_tokens_per_second", "Tokens a second over the last step.", "pool"),
            "busy_fraction": gauge("pool_busy_ratio", "Share of its replicas' time that a pool worked.", "pool"),
            "queue_depth": gauge("pool_queue_depth", "Batches handed to a pool and not yet returned.", "pool"),
        }
        self._accuracy = gauge("accuracy_ratio", "avg@k of the last evaluation.", "split", "model")
        self._last_seconds = gauge("stage_last_seconds", "Seconds of the last step by stage.", "stage")
        self._seconds = Summary("tutorloop_stage_seconds", "Seconds by stage.", ["stage"], registry=self.registry)
        self._tokens = counter("tokens_total", "Tokens that a pool worked on.", "pool")
        self._abstained = counter("abstained_total", "Rollouts that the verifier did not judge.")
        self._dropped = counter("dropped_total", "Rollouts that were dropped, by reason.", "reason")
        self._failed = counter("failed_total", "Calls and samples that failed, by pool and error.", "pool", "error")
        self.nonfinite = counter("nonfinite_values_total", "Figures that were NaN or infinite.")

    def step(self, row: StepRow) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(row, name))
        for name, value in row.learner.items():
            (self._named_learner.get(name) or self._learner.labels(name)).set(value)
        if row.sampler_entropy is not None:
            self._sampler_entropy.set(row.sampler_entropy)
        for name, value in row.reward_parts.items():
            self._parts.labels(name).set(value)
        for name, value in row.groups.items():
            self._groups.labels(name).set(value)
        for pool, figures in row.pools.items():
            for name, gauge in self._pools.items():
                gauge.labels(pool).set(getattr(figures, name))
        for stage, seconds in row.seconds.items():
            self._last_seconds.labels(stage).set(seconds)
            self._seconds.labels(stage).observe(seconds)
        for kind, count in row.tokens.items():
            self._tokens.labels(TOKEN_POOLS[kind]).inc(count)
        self._abstained.inc(row.abstained)
        for reason, total in row.dropped.items():
            self._dropped.labels(reason).inc(self._new("dropped", reason, total))
        for place, total in row.failed.items():
            pool, _, error = place.partition(":")
            self._failed.labels(pool, error).inc(self._new("failed", place, total))

    def eval(self, row: EvalRow) -> None:
        self._accuracy.labels(row.split, row.model).set(row.stats["avg_at_k"]["value"])

    def _new(self, name: str, label: str, total: int) -> int:
        before = self._seen.get((name, label), 0)
        self._seen[name, label] = total
        return max(total - before, 0)
