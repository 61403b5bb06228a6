"""One run as one page: reads a run folder's rows, summary and configuration, and writes `report.html` beside them.

The page opens anywhere without a network: plots are inline SVG, styles are inline, and its content-security policy
forbids everything else. It shows what is there: a run of one step, one without evaluations, or one that was cut off
before it wrote a summary. Long runs are drawn as means over bins, so the page stays small. Every text that comes from
the run is escaped; legends are HTML, so no such text reaches the plotting library.
"""

import html
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.errors import RunFolderError
from .metrics import METRICS_FILE, read_rows
from .plots import INKS, SERIES_INKS, Panel, Series, svg
from .progress import SPLITS, accuracy_figures, clock, interval, percent, plain, run_facts

MOST_POINTS = 150  # of a line
MOST_BARS = 60
BETWEEN_STEPS = ("evaluate", "checkpoint")  # stages that happen now and then: in the table, not in the plot of a step

Rows = Sequence[dict[str, Any]]
Place = tuple[str, ...]  # keys into a row, outermost first


OUTCOMES = ("all_right", "mixed", "all_wrong")  # of a prompt group
POLARITIES, STANCES = ("helpful", "harmful", "neutral"), ("for", "against", "silent")  # of views


def _variables(theme: int) -> str:
    return "".join(f"--{name}:{inks[theme]};" for name, inks in INKS.items())


STYLE = f"""
:root{{color-scheme:light dark;--page:#ffffff;--card:#f7f8f9;{_variables(0)}}}
@media(prefers-color-scheme:dark){{:root{{--page:#14171a;--card:#1b1f23;{_variables(1)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}}
header,main{{max-width:76rem;margin:0 auto;padding:0 1.25rem}}
header{{padding-top:2rem}}
h1{{font-size:1.6rem;font-weight:650;margin:0 0 .5rem;overflow-wrap:anywhere}}
.over{{color:var(--soft);margin:0}}
h2{{font-size:1rem;font-weight:650;margin:0}}
.state{{border-left:3px solid var(--c1);padding-left:.75rem;overflow-wrap:anywhere}}
.tiles{{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem;margin:1rem 0 0}}
.tiles dt{{color:var(--soft);font-size:.85rem}}
.tiles dd{{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}}
section{{margin:2rem 0}}
.plots{{columns:2 24rem;column-gap:1rem}}
figure{{break-inside:avoid;margin:0 0 1rem;padding:1rem;background:var(--card);border-radius:.5rem}}
figcaption p,.unit{{margin:0;color:var(--soft);font-size:.85rem}}
.unit{{margin-top:.6rem;color:var(--ink)}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:0 1rem;margin:0;padding:0;font-size:.8rem}}
.legend i{{display:inline-block;width:1em;margin-right:.35em;border-top:3px solid var(--c);vertical-align:middle}}
.legend i.level{{border-top-style:dashed}}
svg{{display:block;width:100%;height:auto;stroke-linejoin:round;font-family:inherit;overflow:visible}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;margin-top:.5rem;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.3rem 1rem .3rem 0;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}}
th{{font-weight:500;color:var(--soft)}}
th:first-child{{text-align:left}}
.facts td{{text-align:left;white-space:normal;overflow-wrap:anywhere}}
pre{{background:var(--card);padding:1rem;border-radius:.5rem;overflow-x:auto;font:13px/1.5 ui-monospace,monospace}}
"""


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path. Raises RunFolderError where the folder holds no readable run."""
    if not folder.is_dir():
        raise RunFolderError("a report needs a run's folder", f"{folder} is not a folder", "give an output_dir")
    if not (folder / METRICS_FILE).exists():
        raise RunFolderError(f"a report needs a run's {METRICS_FILE}", f"{folder} has none", "give an output_dir")
    rows = read_rows(folder / METRICS_FILE)
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    summary = _read_summary(folder / "summary.json")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    page = folder / "report.html"
    aside = folder / ".report.html.tmp"
    aside.write_text(_page(folder.resolve().name, steps, evals, summary, text), encoding="utf-8")
    aside.replace(page)
    return page


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError("summary.json is JSON", f"{path}: {error}", "remove it to report without it") from error
    if not isinstance(summary, dict):
        raise RunFolderError("summary.json is a mapping", f"{path}: {type(summary).__name__}")
    return summary


# ---- the page --------------------------------------------------------------------------------------------------------


def _page(name: str, steps: Rows, evals: Rows, summary: dict[str, Any] | None, config: str) -> str:
    title = f"tutorloop: {name}"
    state = "no summary: the run was cut off" if summary is None else ""
    if summary and summary.get("interrupted"):
        state = "interrupted"
    last_step = max([1, *(row["step"] + 1 for row in steps), *(row["step"] for row in evals)])
    plots = [_figure(number, *plot, last_step) for number, plot in enumerate(_plots(steps, evals))]
    facts = run_facts(summary) if summary else []
    run = f" · {facts[0][1]}" if facts else ""
    body = [
        f"<header><p class='over'>tutorloop{_text(run)}</p><h1>{_text(name)}</h1>",
        f"<p class='state'>{_text(state)}</p>" if state else "",
        _tiles(steps, summary),
        "</header><main>",
        _accuracy_table(summary) if summary and any(map(_has_value, accuracy_figures(summary).values())) else "",
        f"<section class='plots'>{''.join(plots)}</section>",
        _stage_table(steps),
        _table("Summary", (), facts) if facts else "",
        _eval_table(evals) if evals else "",
        _nonfinite(steps),
        f"<section><h2>Configuration</h2><pre tabindex='0'>{html.escape(config)}</pre></section>" if config else "",
        "</main>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _has_value(figures: dict[str, Any]) -> bool:
    return any(figures.values())


def _text(value: object) -> str:
    return html.escape(plain(str(value)))


def _tiles(steps: Rows, summary: dict[str, Any] | None) -> str:
    accuracy = (summary or {}).get("accuracy") or {}
    before, after, teacher = (accuracy.get(key) for key in ("before", "after", "teacher"))
    tiles = []
    if before is not None and after is not None:
        tiles.append(("accuracy", f"{percent(before)} → {percent(after)}"))
    if after is not None and teacher:
        tiles.append(("of the teacher's", percent(after / teacher)))
    if steps:
        tiles.append(("steps", f"{steps[-1]['step'] + 1:,}"))
        tiles.append(("wall time", clock((summary or {}).get("wall_seconds") or steps[-1]["wall_seconds"])))
        tiles.append(("tokens trained", f"{sum(row['tokens'].get('trained', 0) for row in steps):,}"))
    cells = [f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles]
    return f"<dl class='tiles'>{''.join(cells)}</dl>"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with row headers; without `head` it is a list of facts."""
    top = "".join(f"<th scope='col'>{_text(cell)}</th>" for cell in head)
    lines = [
        f"<tr><th scope='row'>{_text(first)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    kind = "figures" if head else "facts"
    return (
        f"<section><h2>{_text(title)}</h2><div class='scroll' role='region' aria-label='{_text(title)}' tabindex='0'>"
        f"<table class='{kind}'>{thead}<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _accuracy_table(summary: dict[str, Any]) -> str:
    rows = []
    for split, figures in accuracy_figures(summary).items():
        after, teacher = figures["after"], figures["teacher"]
        share = percent(after["value"] / teacher["value"]) if after and teacher and teacher["value"] else "–"
        rows.append((SPLITS[split], *(interval(figure) if figure else "–" for figure in figures.values()), share))
    head = ("split", "student before", "student after", "teacher", "of the teacher's")
    return _table("Accuracy, with 95 % intervals over problems", head, rows)


def _stage_table(steps: Rows) -> str:
    totals = {stage: sum(row["seconds"].get(stage) or 0.0 for row in steps) for stage in _keys(steps, "seconds")}
    whole = totals.pop("total", 0.0) or sum(totals.values())
    if not whole:
        return ""
    rest = whole - sum(totals.values())
    rows = [
        (stage, f"{seconds:,.1f} s", percent(seconds / whole), f"{seconds / len(steps):.3f} s")
        for stage, seconds in [*totals.items(), ("everything else", max(rest, 0.0)), ("total", whole)]
    ]
    return _table("Where the time went", ("stage", "total", "share", "mean of a step"), rows)


def _eval_table(evals: Rows) -> str:
    rows = []
    for row in evals:
        stats = row["stats"]
        figures = [interval(stats[name]) for name in ("avg_at_k", "pass_at_k", "maj_at_k")]
        who = (str(row["step"]), row["model"], SPLITS.get(row["split"], row["split"]))
        rows.append((*who, *figures, f"{stats['problems']} × {stats['samples']}", f"{row['seconds']:.1f} s"))
    head = ("step", "model", "split", "avg@k", "pass@k", "maj@k", "problems × k", "took")
    return _table("Evaluations", head, rows)


def _nonfinite(steps: Rows) -> str:
    found = [(row["step"], name) for row in steps for name in row.get("nonfinite", ())]
    if not found:
        return ""
    first = ", ".join(f"{name} at step {step}" for step, name in found[:10])
    return (
        f"<p class='state'>Figures that were not finite: {len(found):,} ({_text(first)}{' …' * (len(found) > 10)})</p>"
    )


def _figure(number: int, title: str, note: str, panels: Sequence[Panel], last_step: float) -> str:
    parts = [_panel(panel, f"p{number}{letter}", last_step) for letter, panel in zip("abc", panels, strict=False)]
    return f"<figure><figcaption><h2>{_text(title)}</h2><p>{_text(note)}</p></figcaption>{''.join(parts)}</figure>"


def _panel(panel: Panel, key: str, last_step: float) -> str:
    legend = ""
    if len(panel.series) > 1:
        swatches = [
            f"<li><i class='{'level' if s.level else 'line'}' style='--c:var(--{s.ink})'></i>{_text(s.label)}</li>"
            for s in panel.series
        ]
        legend = f"<ul class='legend'>{''.join(swatches)}</ul>"
    alt = "; ".join(_described(series, panel.share) for series in panel.series)
    drawing = svg(panel, _text(f"{panel.unit}: {alt}"), last_step, key)
    return f"<div class='panel'><p class='unit'>{_text(panel.unit)}</p>{legend}{drawing}</div>"


def _described(series: Series, share: bool) -> str:
    seen = series.values[np.isfinite(series.values)]
    first, last = (percent(value) if share else f"{value:.4g}" for value in (seen[0], seen[-1]))
    return f"{series.label} {last}" if len(seen) == 1 else f"{series.label} from {first} to {last}"


# ---- what is plotted -------------------------------------------------------------------------------------------------


def _plots(steps: Rows, evals: Rows) -> Iterable[tuple[str, str, list[Panel]]]:
    """Title, one line of explanation, and panels; a panel without a figure to show is left out."""
    pools = _keys(steps, "pools")
    stages = {name: ("seconds", name) for name in _keys(steps, "seconds") if name not in ("total", *BETWEEN_STEPS)}
    speed, busy = ({name: ("pools", name, key) for name in pools} for key in ("tokens_per_second", "busy_fraction"))

    def panel(unit: str, places: dict[str, Place], share: bool = False, bars: bool = False) -> Panel:
        most = MOST_BARS if bars else MOST_POINTS
        return Panel(unit=unit, series=_curves(steps, places, most), share=share, bars=bars)

    plots = {
        ("Accuracy", "Evaluations with 95 % intervals over problems; the teacher's dashed."): [
            Panel(unit="avg@k of held-out problems", series=_accuracy(evals), share=True)
        ],
        ("Loss", "What the optimizer sees; and the distance from the teacher, where there is one."): [
            panel("reverse KL, nats per token", {"reverse KL": ("learner", "reverse_kl")}),
            panel("loss", {"loss": ("loss",)}),
        ],
        ("Entropy", "The student's, of the tokens that trained and (−log μ) of all that were sampled."): [
            panel("nats per token", {"trained": ("learner", "entropy"), "sampled": ("sampler_entropy",)})
        ],
        ("Verifier", "Of the rollouts that could be judged, whether they trained or not."): [
            panel("mean reward", {"reward": ("reward",)}),
            panel("share that passed", {"passed": ("pass_rate",)}, share=True),
            panel("parts of the reward", {name: ("reward_parts", name) for name in _keys(steps, "reward_parts")}),
            panel("prompt groups", {name.replace("_", " "): ("groups", name) for name in OUTCOMES}, share=True),
        ],
        ("Skills", "What the teachers' views of the answers were: verdict × stance, as shares."): [
            panel("of all views", {name: ("learner", f"skill_{name}") for name in POLARITIES}, share=True),
            panel(
                "of right answers' views", {name: ("learner", f"skill_right_{name}") for name in STANCES}, share=True
            ),
            panel(
                "of wrong answers' views", {name: ("learner", f"skill_wrong_{name}") for name in STANCES}, share=True
            ),
        ],
        ("Responses", "Of all rollouts of the step."): [
            panel("mean length, tokens", {"length": ("response_length",)}),
            panel("share ended by the token limit", {"truncated": ("truncated_share",)}, share=True),
        ],
        ("Pools", "Since the step before."): [
            panel("tokens per second", speed),
            panel("busy share of the replicas' time", busy, share=True),
        ],
        ("A step's time", f"By stage; {' and '.join(BETWEEN_STEPS)} stand in the table below."): [
            panel("seconds, stacked", stages, bars=True)
        ],
        ("Staleness", "Weight versions between sampling a rollout and training on it."): [
            panel("versions", {"mean": ("staleness_mean",), "max": ("staleness_max",)})
        ],
        ("Optimizer", "The gradient's global norm is taken before clipping."): [
            panel("gradient norm", {"norm": ("learner", "grad_norm")}),
            panel("learning rate", {"rate": ("learner", "learning_rate")}),
        ],
    }
    for (title, note), panels in plots.items():
        shown = [replace(p, series=[s for s in p.series if np.isfinite(s.values).any()]) for p in panels]
        shown = [p for p in shown if p.series]
        if shown:
            yield title, note, shown


def _keys(rows: Rows, field: str) -> list[str]:
    """All keys that `field` has in any row, in order of first sight."""
    return list(dict.fromkeys(key for row in rows for key in row.get(field, ())))


def _curves(rows: Rows, places: dict[str, Place], most: int) -> list[Series]:
    """A curve of at most `most` points for each label and its place in a row."""
    done = _bins(np.array([row["step"] + 1.0 for row in rows]), most)
    inks = itertools.cycle(SERIES_INKS)
    return [
        Series(label=label, ink=next(inks), steps=done, values=_bins(_values(rows, place), most))
        for label, place in places.items()
    ]


def _values(rows: Rows, place: Place) -> np.ndarray:
    """float [S]; NaN where a row has no such figure or it was not finite."""

    def read(row: Any) -> float:
        for key in place:
            row = row.get(key) if isinstance(row, dict) else None
        return math.nan if row is None else float(row)

    return np.array([read(row) for row in rows])


def _bins(values: np.ndarray, most: int) -> np.ndarray:
    """Means of at most `most` runs of neighbours, without their NaN; NaN where there is nothing else."""
    parts = np.array_split(values, min(most, len(values))) if len(values) else []
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else math.nan for part in parts])


def _accuracy(evals: Rows) -> list[Series]:
    series = []
    for (split, label), ink in zip(SPLITS.items(), SERIES_INKS, strict=False):
        for model in ("student", "teacher"):
            rows = sorted((r for r in evals if (r["split"], r["model"]) == (split, model)), key=lambda r: r["step"])
            if not rows:
                continue
            figures = [row["stats"]["avg_at_k"] for row in rows]
            value, low, high = (np.array([figure[key] for figure in figures]) for key in ("value", "low", "high"))
            steps = np.array([float(row["step"]) for row in rows])
            name, level = f"{model}, {label}", model == "teacher"
            series.append(Series(label=name, ink=ink, steps=steps, values=value, low=low, high=high, level=level))
    return series
