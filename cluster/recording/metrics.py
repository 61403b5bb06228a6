"""A run's figures, in three places at once: `metrics.jsonl`, TensorBoard events, and a Prometheus endpoint.

The driver makes one `StepRow` a learner step and one `EvalRow` an evaluation, and hands each to `MetricsLog`. The JSON
lines are the record that reports and tests read; TensorBoard and Prometheus are views of the same rows. A figure that
is not finite becomes `null` in the JSON line, which then names it under `nonfinite`, and is counted: it is never lost
in silence. The Prometheus registry (prometheus.py) and the server belong to one object, so two runs in one process do
not mix and a closed run leaves no port behind.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import start_http_server

from ...contracts.errors import ConfigError, RunFolderError
from .prometheus import Prometheus
from .tensorboard import TensorBoard

if TYPE_CHECKING:
    from .notify import Notifier

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRow:
    """One pool as it stands at the end of a step. Rates and times are of the time since the step before in which the
    run trained: evaluations and checkpoints are left out."""

    replicas: int
    tokens_per_second: float
    busy_seconds: float  # of all replicas together
    busy_fraction: float  # of the replicas' time
    queue_depth: int  # batches handed out or waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One learner step. Figures are of all its rollouts; `learner` holds the learner's own metrics, of those that
    trained. What was not measured is None, and stands in no file."""

    step: int  # steps done with it, from 1: the version of the weights that it made
    wall_seconds: float  # since the run started
    seconds: dict[str, float]  # stage (wait, learn, publish, load, checkpoint, evaluate, total) → seconds
    loss: float
    learner: dict[str, float]  # reverse_kl, entropy (nats), grad_norm, learning_rate, importance_weight, …
    reward: float | None  # mean verifier score of those that were judged
    pass_rate: float | None  # of those that were judged
    abstained: int | None  # rollouts that the verifier did not judge, of those that it was sent
    response_length: float | None  # mean, tokens
    truncated_share: float | None  # ended by the token limit
    staleness_mean: float | None  # weight versions between sampling and training, of what the student sampled
    staleness_max: int | None
    sampler_entropy: (
        float | None
    )  # −mean log μ of all tokens that the student sampled, nats; what a stage's trigger sees
    rollouts: dict[str, int]  # taken from the queue, and trained with a gradient; the others were dropped
    reward_parts: dict[str, float]  # mean score of each part of the reward, over the judged rollouts
    groups: dict[str, float]  # shares of the student's prompt groups: all_right, all_wrong, mixed, …
    tokens: dict[str, int]  # generated, teacher_generated, given, scored, trained: of this step
    pools: dict[str, PoolRow]
    dropped: dict[str, int]  # reason → rollouts dropped since the run started
    failed: dict[str, int]  # "pool:error" → failures since the run started
    response_faults: dict[str, int] = field(default_factory=dict)  # incorrect: too large, over their budget, …
    # Teacher scores of its rollouts that were known (hits) and that were not (misses), bytes_read and bytes_written;
    # empty where none are kept.
    score_cache: dict[str, int] = field(default_factory=dict)
    method: dict[str, float] = field(default_factory=dict)  # what the method says of its own step
    warnings: list[str] = field(default_factory=list)  # raised by this step (alarms.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """One evaluation of one model on one split. `stats` is `statistics.summarise`'s result."""

    step: int  # learner steps done before it
    split: str  # in_distribution | out_of_distribution
    model: str  # student | teacher
    stats: dict[str, Any]
    seconds: float
    response_length: float | None = None  # mean, tokens
    truncated_share: float | None = None  # of the responses, ended by the token limit
    answered_share: float | None = None  # of the responses, in which the verifier read an answer
    warnings: list[str] = field(default_factory=list)


class MetricsLog:
    """Writes rows for one run folder and serves them to Prometheus.

    An existing folder is continued. `port` 0 takes a free one; `url` says which. Raises ConfigError where the port
    cannot be had. `notifier` tells people what rows warn of. `close` flushes everything and frees the port; it may be
    called twice.
    """

    def __init__(
        self, folder: Path, host: str, port: int, method: str = "", notifier: "Notifier | None" = None
    ) -> None:
        self._notifier = notifier
        self._path = folder / METRICS_FILE
        self._tensorboard_folder = folder / TENSORBOARD_FOLDER
        self._prometheus = Prometheus(method)
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
        self._alarm(row)

    def log_eval(self, row: EvalRow) -> None:
        self._write("eval", asdict(row))
        self._prometheus.eval(row)
        self._alarm(row)

    def _alarm(self, row: StepRow | EvalRow) -> None:
        if self._notifier:
            self._prometheus.alarms(self._notifier.row(row), self._notifier.untold)

    def truncate_after(self, step: int) -> None:
        """Forget what a run that resumes with `step` steps done will log again: later steps and later evaluations.

        The file is replaced whole or not at all, and a last line that was cut off by a crash goes with it. TensorBoard,
        whose axis is the steps done, is told to hide what comes after.
        """
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
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
        line = {"kind": kind, **_finite({name: value for name, value in row.items() if value is not None})}
        if nonfinite:
            line["nonfinite"] = nonfinite
            self._prometheus.nonfinite.inc(len(nonfinite))
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        prefix = f"eval/{row['split']}/{row['model']}/" if kind == "eval" else ""
        shown = {prefix + n.removeprefix("stats/"): v for n, v in figures.items() if n != "step" and math.isfinite(v)}
        self._tensorboard.add(shown, row["step"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; none if there is no file. A last line that a crash cut off is left out.

    Raises RunFolderError where any other line is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")  # what follows the last newline is a torn row
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunFolderError("every line of metrics.jsonl is a JSON row", f"{path}:{number}: {error}") from error
        if not isinstance(row, dict) or row.get("kind") not in ("step", "eval") or not isinstance(row.get("step"), int):
            raise RunFolderError("a row of metrics.jsonl has a kind and a step", f"{path}:{number}: {line[:80]!r}")
        if "version" in row:  # 0.4.0 counted steps from 0, and the version from 1
            row["step"] = row.pop("version")
        rows.append(row)
    return rows


def _numbers(node: Any, name: str = "") -> list[tuple[str, float]]:
    """All numbers of a tree with their slash-joined names."""
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _numbers(value, f"{name}/{key}" if name else str(key))]
    return [(name, node)] if isinstance(node, int | float) else []


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node
