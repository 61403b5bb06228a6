"""What `benchmarks/methods.py` measured: its rows, what is still to run, and the table and plot made of the rows alone.

Every figure of a model comes from an evaluation of its own, so a method that never samples is measured as the others
are. Where several seeds are shown as one, it is by the lower median of that figure alone.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from tutorloop.cluster.recording.plots import INKS, RC
from tutorloop.contracts.errors import DataError

SPLITS = {"in_distribution": "in distribution", "out_of_distribution": "out of distribution"}
BASELINES = {"student": "lab:student", "teacher": "lab:teacher"}  # rows that nothing trains: the start and the goal
TOLERANCE = 0.1  # a run may use this much more or less than the budget
JSON_FILE, TABLE_FILE, PLOT_FILE = "methods.json", "methods.md", "methods.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method at one seed: what it took and what came out; or the error that ended it, and no figures."""

    name: str
    seed: int
    error: str = ""
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=dict)  # student, teacher, given, scored, trained
    wall_seconds: float = 0.0  # of the training run, its start included
    dropped: dict[str, int] = field(default_factory=dict)  # reason → rollouts
    # split → avg_at_k, pass_at_k → value, low, high (95 %, problems drawn again)
    accuracy: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    entropy: float = 0.0  # nats a token, of the trained model's own answers
    length: float = 0.0  # tokens, mean over the same answers

    @property
    def used(self) -> int:
        """Response tokens that the run took as material: what the budget bounds."""
        return sum(self.tokens.get(source, 0) for source in ("student", "teacher", "given"))


@dataclass(slots=True, kw_only=True)
class Results:
    """The content of methods.json. `steps`: what the budget allows each method, once its first run has shown it."""

    first_steps: int
    budget: int
    samples: int
    problems: int
    machine: str = ""
    commands: list[str] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, file: Path) -> "Results":
        """Raises DataError where the file is none of ours."""
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**tree, "rows": [Row(**row) for row in tree["rows"]]})
        except (ValueError, TypeError, KeyError) as error:
            rule = "methods.json is as benchmarks/methods.py wrote it"
            raise DataError(rule, f"{file}: {error!r}", "move it away, or give another --results") from error

    def save(self, file: Path) -> None:
        """Replaces the file as a whole; a row a line."""
        tree = {**asdict(self), "rows": "ROWS"}
        rows = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in self.rows)
        text = json.dumps(tree, indent=1, ensure_ascii=False).replace('"ROWS"', f"[\n{rows}\n]")
        aside = file.with_suffix(".tmp")
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(file)

    def put(self, row: Row) -> None:
        """In place of what stood for the same method and seed."""
        self.rows = [old for old in self.rows if (old.name, old.seed) != (row.name, row.seed)] + [row]

    def pending(self, names: Iterable[str], seeds: Iterable[int]) -> list[tuple[str, int]]:
        """What has no finished row, every method at one seed before any at the next. Failed ones are tried again."""
        done = {(row.name, row.seed) for row in self.rows if not row.error}
        names = list(names)
        return [(name, seed) for seed in seeds for name in names if (name, seed) not in done]


def steps_for(budget: int, steps: int, used: int) -> int:
    """Steps that use `budget` tokens where `steps` used `used`; the same ones if that was near enough."""
    if used == 0 or abs(used / budget - 1) <= TOLERANCE:
        return steps
    return max(1, steps * budget // used)


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The finished rows of each method, the best in distribution first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.error:
            groups.setdefault(row.name, []).append(row)
    return dict(sorted(groups.items(), key=lambda pair: -middle(pair[1], "in_distribution", "avg_at_k")["value"]))


def middle(rows: Sequence[Row], split: str, figure: str) -> dict[str, float]:
    """The figure of the seed at the lower median, with its own interval, and `least` and `most` over the seeds."""
    figures = sorted((row.accuracy[split][figure] for row in rows), key=lambda one: one["value"])
    return {**figures[(len(figures) - 1) // 2], "least": figures[0]["value"], "most": figures[-1]["value"]}


# ---- the table ------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """methods.md."""
    groups = by_name(results.rows)
    failed = [row for row in results.rows if row.error]
    k = results.samples
    head = [
        "# Every method on the lab",
        f"{results.machine}. Commands that made the rows of `{JSON_FILE}`:",
        "".join(f"    {command}\n" for command in results.commands).rstrip(),
        _about(results),
        "## Accuracy, %",
        f"avg@{k} and pass@{k} at temperature 1 over {results.problems} problems of each split: the seed at the "
        "median, [its 95 % interval over problems], and (least – most) over the seeds.",
        _grid(_accuracy_columns(k), groups),
        f"![avg@{k} of every method]({PLOT_FILE})",
        "## What it took",
        "Medians over the seeds. Tokens in thousands: answers of the student, of the teacher, and given by the "
        "dataset; their sum over the budget; prompt and response tokens that teachers and reference read; response "
        "tokens trained. `wall`: the training run with its start, without the evaluation. `entropy` (−log π a token, "
        "nats) and `length` (tokens) are of the trained model's own answers to the in-distribution problems. "
        "`dropped`: rollouts that trained in nothing, by reason.",
        _grid(_cost_columns(results.budget), groups),
    ]
    if failed:
        head += ["## Failed", "\n".join(f"- {row.name}, seed {row.seed}: {_plain(row.error)}" for row in failed)]
    return "\n\n".join(head) + "\n"


def _about(results: Results) -> str:
    return (
        f"Each method is its recipe, from the same student, with a budget of {results.budget:,} response tokens as its "
        "material: those that the student or the teacher generates for it and those that the dataset gives, whether or "
        "not they train in the end. What is read only (a teacher's scores) is not counted, nor is the evaluation. "
        f"A method runs {results.first_steps} steps; where that used over {TOLERANCE:.0%} more or less than the "
        "budget, it ran anew with steps in proportion, and every seed has those steps. What a recipe counts in steps "
        "(warm-up, rounds) keeps its share of them. `student` and `teacher` are the models before any training."
    )


Column = Callable[[list[Row]], str]


def _accuracy_columns(k: int) -> dict[str, Column]:
    columns: dict[str, Column] = {"seeds": lambda rows: str(len(rows))}
    for split, name in SPLITS.items():
        columns[f"{name}: avg@{k}"] = lambda rows, split=split: _accuracy(rows, split, "avg_at_k")
        columns[f"{name}: pass@{k}"] = lambda rows, split=split: _accuracy(rows, split, "pass_at_k")
    return columns


def _accuracy(rows: Sequence[Row], split: str, figure: str) -> str:
    one = {name: f"{100 * value:.1f}" for name, value in middle(rows, split, figure).items()}
    return f"**{one['value']}** [{one['low']}–{one['high']}] ({one['least']} – {one['most']})"


def _cost_columns(budget: int) -> dict[str, Column]:
    def tokens(source: str) -> Column:
        return lambda rows: _thousands(_median(row.tokens.get(source, 0) for row in rows))

    return {
        "steps": lambda rows: f"{_median(row.steps for row in rows):.0f}",
        "student": tokens("student"),
        "teacher": tokens("teacher"),
        "given": tokens("given"),
        "of the budget": lambda rows: f"{_median(row.used for row in rows) / budget:.0%}",
        "scored": tokens("scored"),
        "trained": tokens("trained"),
        "wall, s": lambda rows: f"{_median(row.wall_seconds for row in rows):.0f}",
        "entropy": lambda rows: f"{_median(row.entropy for row in rows):.3f}",
        "length": lambda rows: f"{_median(row.length for row in rows):.1f}",
        "dropped": _dropped,
    }


def _dropped(rows: list[Row]) -> str:
    reasons = sorted({reason for row in rows for reason in row.dropped})
    return ", ".join(f"{reason} {_median(row.dropped.get(reason, 0) for row in rows):.0f}" for reason in reasons) or "–"


def _median(values: Iterable[float]) -> float:
    return statistics.median_low(list(values))


def _thousands(tokens: float) -> str:
    return f"{tokens / 1000:.0f}" if tokens else "–"


def _plain(error: str) -> str:
    """Its first line and its last, as code: the rule and the cause."""
    lines = [line.strip().replace("`", "'") for line in error.splitlines() if line.strip()]
    return f"`{' … '.join(dict.fromkeys([lines[0], lines[-1]]))}`"


def _grid(columns: dict[str, Column], groups: dict[str, list[Row]]) -> str:
    lines = [["method", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(cell(rows) for cell in columns.values())] for name, rows in groups.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the plot -------------------------------------------------------------------------------------------------------


def plot(results: Results, file: Path) -> None:
    """methods.png: a line a method, avg@k on both splits, and bars from the worst seed to the best."""
    groups = by_name(results.rows)
    methods = [name for name in groups if name not in BASELINES]
    with rc_context({**RC, "axes.grid": False}):
        figure = Figure(figsize=(8, 1.6 + 0.27 * len(methods)), layout="constrained")
        axes = figure.add_subplot()
        for split, ink, offset in zip(SPLITS, ("c0", "c1"), (-0.14, 0.14), strict=True):
            _dots(axes, [groups[name] for name in methods], split, INKS[ink][0], offset)
            for baseline in BASELINES.keys() & groups.keys():
                value = 100 * middle(groups[baseline], split, "avg_at_k")["value"]
                axes.axvline(value, color=INKS[ink][0], linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.7, zorder=0)
        for line in range(len(methods)):
            axes.axhline(line, color=INKS["grid"][0], linewidth=0.6, zorder=0)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        axes.set_xlabel(f"avg@{results.samples}, %; dashed: the student before training (left) and the teacher (right)")
        seeds = max((len(rows) for rows in groups.values()), default=0)
        over = "one seed" if seeds == 1 else f"median and range over {seeds} seeds"
        axes.set_title(f"After {results.budget:,} response tokens, {over}", loc="left")
        if methods:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(file, dpi=150, metadata={"Software": None})


def _dots(axes: Any, groups: Sequence[list[Row]], split: str, colour: str, offset: float) -> None:
    figures = [middle(rows, split, "avg_at_k") for rows in groups]
    places = [line + offset for line in range(len(figures))]
    values, least, most = ([100 * one[name] for one in figures] for name in ("value", "least", "most"))
    axes.hlines(places, least, most, color=colour, linewidth=1.4)
    axes.plot(values, places, "o", color=colour, markersize=4.5, label=SPLITS[split])


def finite(value: float) -> float:
    """For JSON. Raises DataError for what no JSON holds: such a model is broken, and its row is an error."""
    if not math.isfinite(value):
        raise DataError("a trained model's figures are finite", str(value), "look into its metrics.jsonl")
    return value
