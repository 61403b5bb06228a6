"""What a person sees while a run goes on, and when it ends.

On a terminal it is one live panel: how far, how well, how fast each pool, how stale, how long still, what the driver is
doing now, and the newest rollout. In a pipe it is a plain line now and then, without a control character, so that a log
stays readable. What was not measured is not shown. Text that comes from models, data or errors is hostile: it is shown
with its control characters escaped, and never read as markup.
"""

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .metrics import EvalRow, StepRow

SECONDS_BETWEEN_LINES = 10.0
SHARE_BETWEEN_LINES = 0.05  # of all steps
STARTING = "starting"
KEPT_NOTES = 20
SPLITS = {"in_distribution": "in distribution", "out_of_distribution": "out of distribution"}


class Progress:
    """Shows a run's rows as they come: `with Progress(steps) as progress: progress.step(row)`.

    `phase` names what the driver does now; in a pipe it is a line the first time, whatever its numbers. `note` leaves a
    line that stays; `notes` has the last of them.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total = total_steps
        self._console = console or Console()
        self._live: Live | None = None
        self._phase = STARTING
        self.notes: deque[str] = deque(maxlen=KEPT_NOTES)
        self._first: StepRow | None = None
        self._row: StepRow | None = None
        self._accuracy: EvalRow | None = None
        self._printed: StepRow | None = None
        self._sample: Mapping[str, Any] | None = None
        self._phases: set[str] = set()

    def __enter__(self) -> "Progress":
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self.phase("stopped" if error else "done")
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        self._phase = text
        if self._live:
            self._live.update(self._panel())  # drawn at the next refresh: phases may change fast
        elif (kind := re.sub(r"\d+", "", text)) not in self._phases:
            self._phases.add(kind)
            self._print(text)

    @property
    def phase_now(self) -> str:
        return self._phase

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._print(text)

    def step(self, row: StepRow, sample: Mapping[str, Any] | None = None) -> None:
        """`sample`: the newest line of rollouts.jsonl."""
        self._sample = sample
        self._first = self._first or row
        self._row = row
        self._phase = "training" if self._phase == STARTING else self._phase
        self._refresh()
        if not self._live and self._due(row):
            self._printed = row
            self._print(self._line(row))
        self._warn(row)

    def _warn(self, row: StepRow | EvalRow) -> None:
        for text in row.warnings:
            self.note(f"warning: {text}")

    def eval(self, row: EvalRow) -> None:
        if row.model == "student" and row.split == "in_distribution":
            self._accuracy = row
        avg, passed, voted = row.stats["avg_at_k"], row.stats["pass_at_k"], row.stats.get("maj_at_k")
        k = row.stats["samples"]
        text = f"eval at step {row.step}: {row.model} {SPLITS[row.split]} avg@{k} {interval(avg)}"
        if k > 1:
            text += f", pass@{k} {percent(passed['value'])}"
            text += f", maj@{k} {percent(voted['value'])}" if voted else ""
        for name, share in (("answered", row.answered_share), ("cut off", row.truncated_share)):
            text += f", {name} {percent(share, 0)}" if share is not None else ""
        text += f", {row.response_length:.0f} tokens" if row.response_length is not None else ""
        self._print(f"{text}, {row.stats['problems']} problems in {row.seconds:.0f} s")
        self._warn(row)
        self._refresh()

    def seconds_left(self) -> float | None:
        """Steps still to do at this process's mean pace, evaluations and checkpoints included."""
        if not self._row or not self._first:
            return None
        done = self._row.step - self._first.step
        if not done:
            return None
        pace = (self._row.wall_seconds - self._first.wall_seconds) / done
        return pace * (self._total - self._row.step)

    def _due(self, row: StepRow) -> bool:
        last = self._printed
        if last is None or row.step >= self._total:
            return True
        seconds, steps = row.wall_seconds - last.wall_seconds, row.step - last.step
        return seconds >= SECONDS_BETWEEN_LINES and steps >= SHARE_BETWEEN_LINES * self._total

    def _line(self, row: StepRow) -> str:
        pools = "  ".join(f"{name} {_speed(p.tokens_per_second, p.busy_fraction)}" for name, p in row.pools.items())
        parts = [f"step {row.step}/{self._total}", *_figures(row, self._accuracy), pools, f"left {self._left()}"]
        return "  ".join(part for part in parts if part)

    def _left(self) -> str:
        left = self.seconds_left()
        return "–" if left is None else clock(left)

    def _print(self, text: str) -> None:
        if self._live:
            self._live.console.print(Text(plain(text)))
            return
        file = self._console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        line = plain(text).encode(encoding, "backslashreplace").decode(encoding)
        print(line, file=file, flush=True)

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._panel(), refresh=True)

    def _panel(self) -> Panel:
        row = self._row
        done = row.step if row else 0
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text.assemble(("step ", "dim"), (f"{done}/{self._total}", "bold")),
            ProgressBar(total=self._total, completed=done),
            Text.assemble(("left ", "dim"), self._left()),
        )
        parts: list[RenderableType] = [bar]
        if row:
            parts.append(_spaced(_figures(row, self._accuracy)))
            parts.append(_pool_table(row))
        if self._sample:
            parts.append(_sample(self._sample))
        return Panel(Group(*parts), title=Text(plain(self._phase)), title_align="left", border_style="dim")


def _figures(row: StepRow, accuracy: EvalRow | None) -> list[str]:
    """The headline: `name figure` each, of what was measured."""
    learner = row.learner
    figures = {
        "passed": row.pass_rate if row.pass_rate is None else percent(row.pass_rate),
        "reward": _number(row.reward, 3),
        "length": _number(row.response_length, 0),
        "cut off": percent(row.truncated_share, 0) if row.truncated_share else None,
        "reverse KL": _number(learner.get("reverse_kl"), 4),
        "top-k reverse KL": _number(learner.get("topk_reverse_kl"), 4),
        "teacher's mass": percent(learner["teacher_mass"]) if "teacher_mass" in learner else None,
        "loss": _number(row.loss, 4),
        "grad norm": _number(learner.get("grad_norm"), 3),
        "staleness": _number(row.staleness_mean, 1),
    }
    first = f"accuracy {percent(accuracy.stats['avg_at_k']['value'])} (step {accuracy.step})" if accuracy else ""
    return [first, *(f"{name} {figure}" for name, figure in figures.items() if figure is not None)]


def _number(value: float | None, digits: int) -> str | None:
    """With so many digits; a zero has no sign."""
    return None if value is None else f"{value:z.{digits}f}"


def _sample(line: Mapping[str, Any]) -> Text:
    """The newest rollout: what was asked, what came, and what became of it."""
    text = Text()
    for name, part, most in (("prompt ", line["prompt"], 160), ("response ", line["response"], 320)):
        text.append(name, "dim")
        text.append(f"{plain(excerpt(part, most))}\n")
    return text.append(sample_facts(line), "dim")


def sample_facts(line: Mapping[str, Any]) -> str:
    """What became of a recorded rollout, on one line."""
    facts = [f"step {line['step']}", line["source"]]
    if line.get("abstained"):
        facts.append(f"not judged: {line.get('error_class')}")
    elif "passed" in line:
        why = f"incorrect: {line['error_class']}" if line.get("error_class") else "did not pass"
        facts.append("passed" if line["passed"] else why)
    facts += [f"answer {line['answer']}"] if line.get("answer") else []
    facts += [f"gold {line['golds'][0]}"] if line.get("golds") else []
    facts += [f"{len(line['token_ids']) - line['prompt_length']} tokens, ended by {line['finish_reason']}"]
    facts += [f"dropped: {line['dropped']}"] if line.get("dropped") else []
    return plain(excerpt(" · ".join(facts), 400))


def excerpt(text: str, most: int) -> str:
    """Begin and end of a text that is too long to show, and how much is left out."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _spaced(parts: list[str]) -> Text:
    """`name figure` pairs with the name dim, wrapped between pairs."""
    text = Text()
    for part in filter(None, parts):
        name, _, figure = part.rpartition(" ") if "(" not in part else part.partition(" ")
        text.append(f"{name} ", "dim")
        text.append(figure.replace(" ", "\u00a0"))
        text.append("   ")
    return text


def _pool_table(row: StepRow) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
    for _ in range(4):
        table.add_column(justify="right", no_wrap=True)
    for name, pool in row.pools.items():
        table.add_row(
            Text(plain(name)),
            Text(f"× {pool.replicas}", "dim"),
            f"{_rate(pool.tokens_per_second)} tok/s" if pool.tokens_per_second else "",
            f"{percent(pool.busy_fraction, 0)} busy",
            Text(f"queue {pool.queue_depth}", "dim"),
        )
    return table


# ---- after the run ---------------------------------------------------------------------------------------------------


def final_table(summary: Mapping[str, Any]) -> RenderableType:
    """The before-and-after table of a run's `summary.json`, ready for `console.print`."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, fact in run_facts(summary):
        facts.add_row(name, Text(plain(fact)))
    found = accuracy_figures(summary)
    if not any(any(figures.values()) for figures in found.values()):
        return facts
    accuracy = Table(title="accuracy, with 95 % intervals over problems", title_justify="left", title_style="dim")
    accuracy.add_column("split", no_wrap=True)
    for name in ("before", "after", "teacher", "of teacher"):
        accuracy.add_column(name, justify="right")
    for split, figures in found.items():
        if any(figures.values()):
            accuracy.add_row(SPLITS[split], *accuracy_cells(figures))
    return Group(accuracy, facts)


def accuracy_cells(figures: Mapping[str, dict[str, float] | None]) -> list[str]:
    """Before, after and teacher with their intervals, and the student's share of the teacher's accuracy."""
    after, teacher = figures["after"], figures["teacher"]
    share = percent(after["value"] / teacher["value"]) if after and teacher and teacher["value"] else "–"
    return [*(interval(figure) if figure else "–" for figure in figures.values()), share]


def accuracy_figures(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float] | None]]:
    """split → before, after, teacher → {value, low, high}; low and high only where the run's evaluations hold them."""
    measured = {"before": ("student", 0), "after": ("student", -1), "teacher": ("teacher", 0)}
    found: dict[str, dict[str, dict[str, float] | None]] = {}
    for split, prefix in (("in_distribution", ""), ("out_of_distribution", "ood_")):
        rows = [row for row in summary.get("evals") or [] if row["split"] == split]
        found[split] = {}
        for key, (model, which) in measured.items():
            value = (summary.get("accuracy") or {}).get(prefix + key)
            stats = [row["stats"]["avg_at_k"] for row in rows if row["model"] == model]
            stats = [figure for figure in stats if figure["value"] == value]
            found[split][key] = None if value is None else (stats[which] if stats else {"value": value})
    return found


def run_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rest of a summary as name and text."""
    facts = [("method", f"{summary.get('method')}, seed {summary.get('seed')}, {summary.get('steps')} steps")]
    facts += [("warning", text) for text in summary.get("warnings") or []]
    if summary.get("wall_seconds") is not None:
        start = summary.get("startup_seconds")
        of_it = f", of it {clock(sum(start.values()))} of starting" if start else ""
        facts.append(("wall time", clock(summary["wall_seconds"]) + of_it))
    if tokens := summary.get("tokens"):
        facts.append(
            ("tokens", ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in tokens.items() if count))
        )
    for name, pool in (summary.get("pools") or {}).items():
        facts.append((f"pool {name}", _speed(pool["tokens_per_second"], pool["busy_fraction"])))
    if staleness := summary.get("staleness"):
        facts.append(("staleness", f"mean {staleness['mean']:.2f}, max {staleness['max']} weight versions"))
    if kept := summary.get("score_cache"):
        asked = kept["hits"] + kept["misses"]
        written = f"{kept['bytes_written'] / 2**20:,.1f} MiB written"
        facts.append(("score cache", f"{kept['hits']:,} of {asked:,} scores were known, {written}"))
    counted = (("dropped", "dropped"), ("verifier errors", "verifier_errors"), ("response faults", "response_faults"))
    for title, key in counted:
        if counts := {name: count for name, count in (summary.get(key) or {}).items() if count}:
            facts.append((title, ", ".join(f"{name} {count:,}" for name, count in counts.items())))
    if summary.get("peak_memory_bytes"):
        facts.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    if summary.get("interrupted"):
        facts.append(("interrupted", "yes: continue it with --resume"))
    return facts


# ---- figures as text -------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """`text` on one line, with every character that could steer a terminal or hide itself as its escape."""
    return "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else _escape(c) for c in str(text))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def clock(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def percent(ratio: float, digits: int = 1) -> str:
    return f"{100 * ratio:.{digits}f} %"


def interval(figure: Mapping[str, float]) -> str:
    if "low" not in figure:
        return percent(figure["value"])
    return f"{percent(figure['value'])} ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})"


def _speed(tokens_per_second: float, busy_fraction: float) -> str:
    busy = f"{percent(busy_fraction, 0)} busy"
    return f"{_rate(tokens_per_second)} tok/s, {busy}" if tokens_per_second else busy


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second < 100_000 else f"{per_second / 1000:,.0f}k"
