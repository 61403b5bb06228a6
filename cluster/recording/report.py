"""One run as one page: reads a run folder's rows, summary and configuration, and writes `report.html` beside them.

The page opens anywhere without a network: plots are inline SVG, styles are inline, and its content-security policy
forbids everything else. It shows what is there: a run of one step, one without evaluations, or one that was cut off
before it wrote a summary. Long runs are drawn as means over bins, so the page stays small. Every text that comes from
the run is escaped; legends are HTML, so no such text reaches the plotting library.
"""

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from ...contracts.errors import RunFolderError
from ..resume_keys import written
from .curves import Rows, keys_of, plots_of
from .metrics import METRICS_FILE, read_rows
from .plots import INKS, Panel, Series, svg
from .progress import (
    SPLITS,
    accuracy_cells,
    accuracy_figures,
    clock,
    excerpt,
    interval,
    percent,
    plain,
    run_facts,
    sample_facts,
)
from .samples import shown_samples

MOST_CHARACTERS = 4000  # of a prompt or response


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
h3{{font-size:.85rem;font-weight:500;color:var(--soft);margin:1.25rem 0 0;overflow-wrap:anywhere}}
article pre{{margin:.35rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere}}
.said{{border-left:3px solid var(--c0)}}
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
    recipe = config.read_text(encoding="utf-8") if config.exists() else ""
    page = folder / "report.html"
    aside = folder / ".report.html.tmp"
    samples = shown_samples(folder)
    changed = [(f"{c['step']}", c["key"], f"{c['before']!r}", f"{c['now']!r}") for c in written(folder)]
    aside.write_text(_page(folder.resolve().name, steps, evals, samples, summary, changed, recipe), encoding="utf-8")
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


def _page(
    name: str,
    steps: Rows,
    evals: Rows,
    samples: Rows,
    summary: dict[str, Any] | None,
    changed: Sequence[Sequence[str]],
    config: str,
) -> str:
    """`changed`: the steps after which keys were changed, these, and their values before and from then on."""
    title = f"tutorloop: {name}"
    state = "no summary: the run was cut off" if summary is None else ""
    if summary and summary.get("interrupted"):
        state = "interrupted"
    last_step = max([1, *(row["step"] for row in [*steps, *evals])])
    plots = [figure(number, *plot, last_step) for number, plot in enumerate(plots_of(steps, evals))]
    facts = [fact for fact in run_facts(summary) if fact[0] != "warning"] if summary else []
    run = f" · {facts[0][1]}" if facts else ""
    body = [
        f"<header><p class='over'>tutorloop{text(run)}</p><h1>{text(name)}</h1>",
        f"<p class='state'>{text(state)}</p>" if state else "",
        *(f"<p class='state'>{text(f'warning: {warning}')}</p>" for warning in _warnings([*steps, *evals])),
        _tiles(steps, summary),
        "</header><main>",
        _accuracy_table(summary) if summary else "",
        f"<section class='plots'>{''.join(plots)}</section>",
        _samples(samples),
        _stage_table(steps, summary),
        _table("Summary", (), facts) if facts else "",
        _table("Changed while it ran", ("after step", "key", "before", "from then on"), changed) if changed else "",
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
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _warnings(rows: Rows) -> list[str]:
    """In the order in which they were raised."""
    return list(dict.fromkeys(text for row in rows for text in row.get("warnings", ())))


def _block(text: str) -> str:
    """A text of many lines, for a `pre`."""
    lines = excerpt(text, MOST_CHARACTERS).split("\n")
    return html.escape("\n".join(map(plain, lines)))


def _samples(samples: Rows) -> str:
    """What the model wrote: a few rollouts as they stand in rollouts.jsonl."""
    if not samples:
        return ""
    parts = []
    for line in samples:
        asked = "".join(f"[{turn['role']}]\n{turn['content']}\n\n" for turn in line.get("turns", ()))
        where = "evaluation" if line["kind"] == "eval" else "training"
        parts.append(
            f"<article><h3>{text(where)} · {text(sample_facts(line))}</h3>"
            f"<pre tabindex='0'>{_block(asked + line['prompt'])}</pre>"
            f"<pre class='said' tabindex='0'>{_block(line['response'])}</pre></article>"
        )
    return f"<section><h2>What the model wrote</h2>{''.join(parts)}</section>"


def text(value: object) -> str:
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
        tiles.append(("steps", f"{steps[-1]['step']:,}"))
        tiles.append(("wall time", clock((summary or {}).get("wall_seconds") or steps[-1]["wall_seconds"])))
        tiles.append(("tokens trained", f"{sum(row['tokens'].get('trained', 0) for row in steps):,}"))
    cells = [f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in tiles]
    return f"<dl class='tiles'>{''.join(cells)}</dl>"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with row headers; without `head` it is a list of facts."""
    top = "".join(f"<th scope='col'>{text(cell)}</th>" for cell in head)
    lines = [
        f"<tr><th scope='row'>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    kind = "figures" if head else "facts"
    return (
        f"<section><h2>{text(title)}</h2><div class='scroll' role='region' aria-label='{text(title)}' tabindex='0'>"
        f"<table class='{kind}'>{thead}<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _accuracy_table(summary: dict[str, Any]) -> str:
    measured = [pair for pair in accuracy_figures(summary).items() if any(pair[1].values())]
    rows = [(SPLITS[split], *accuracy_cells(figures)) for split, figures in measured]
    head = ("split", "student before", "student after", "teacher", "of the teacher's")
    return _table("Accuracy, with 95 % intervals over problems", head, rows) if rows else ""


def _stage_table(steps: Rows, summary: dict[str, Any] | None) -> str:
    """Stages of the steps, and before them the start of all processes, where the summary says how long it took."""
    totals = {stage: sum(row["seconds"].get(stage) or 0.0 for row in steps) for stage in keys_of(steps, "seconds")}
    whole = totals.pop("total", 0.0) or sum(totals.values())
    if not whole:
        return ""
    parts = [*totals.items(), ("everything else", max(whole - sum(totals.values()), 0.0))]
    start = (summary or {}).get("startup_seconds") or {}
    everything = whole + sum(start.values())
    rows = [
        (f"start: {stage}", f"{seconds:,.1f} s", percent(seconds / everything), "") for stage, seconds in start.items()
    ]
    rows += [
        (stage, f"{seconds:,.1f} s", percent(seconds / everything), f"{seconds / len(steps):.3f} s")
        for stage, seconds in [*parts, ("all steps", whole)]
    ]
    if start:
        rows.append(("total", f"{everything:,.1f} s", percent(1), ""))
    return _table("Where the time went", ("stage", "total", "share", "mean of a step"), rows)


def _eval_table(evals: Rows) -> str:
    rows = []
    for row in evals:
        stats = row["stats"]
        figures = [interval(stats[name]) if name in stats else "–" for name in ("avg_at_k", "pass_at_k", "maj_at_k")]
        who = (str(row["step"]), row["model"], SPLITS.get(row["split"], row["split"]))
        shares = [row.get(name) for name in ("answered_share", "truncated_share")]
        figures += ["–" if share is None else percent(share) for share in shares]
        figures.append("–" if row.get("response_length") is None else f"{row['response_length']:.0f}")
        rows.append((*who, *figures, f"{stats['problems']} × {stats['samples']}", f"{row['seconds']:.1f} s"))
    of_stats = ("avg@k", "pass@k", "maj@k", "answered", "cut off", "tokens")
    head = ("step", "model", "split", *of_stats, "problems × k", "took")
    return _table("Evaluations", head, rows)


def _nonfinite(steps: Rows) -> str:
    found = [(row["step"], name) for row in steps for name in row.get("nonfinite", ())]
    if not found:
        return ""
    first = ", ".join(f"{name} at step {step}" for step, name in found[:10])
    return (
        f"<p class='state'>Figures that were not finite: {len(found):,} ({text(first)}{' …' * (len(found) > 10)})</p>"
    )


def figure(number: int, title: str, note: str, panels: Sequence[Panel], last_step: float) -> str:
    keys = [f"p{number}{letter}" for letter in ascii_lowercase[: len(panels)]]
    parts = [_panel(panel, key, last_step) for key, panel in zip(keys, panels, strict=True)]
    return f"<figure><figcaption><h2>{text(title)}</h2><p>{text(note)}</p></figcaption>{''.join(parts)}</figure>"


def _panel(panel: Panel, key: str, last_step: float) -> str:
    legend = ""
    if len(panel.series) > 1 or panel.series[0].label not in panel.unit:
        swatches = [
            f"<li><i class='{'level' if s.level else 'line'}' style='--c:var(--{s.ink})'></i>{text(s.label)}</li>"
            for s in panel.series
        ]
        legend = f"<ul class='legend'>{''.join(swatches)}</ul>"
    alt = "; ".join(_described(series, panel.share) for series in panel.series)
    drawing = svg(panel, text(f"{panel.unit}: {alt}"), last_step, key)
    return f"<div class='panel'><p class='unit'>{text(panel.unit)}</p>{legend}{drawing}</div>"


def _described(series: Series, share: bool) -> str:
    seen = series.values[np.isfinite(series.values)]
    first, last = (percent(value) if share else f"{value:.4g}" for value in (seen[0], seen[-1]))
    return f"{series.label} {last}" if len(seen) == 1 else f"{series.label} from {first} to {last}"
