"""Panels as inline SVG for a page that follows the reader's light or dark theme.

matplotlib draws each panel with the inks below, then every ink becomes a CSS variable and text stays text in the page's
own font. What would reach outside the page (document type, metadata, namespaces) is cut off, and ids are made unique.
Labels never reach matplotlib: the page writes them as an HTML legend.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter

# name of the CSS variable → (light, dark). matplotlib draws the light one; the series' colours keep apart for
# colour-blind readers and against both backgrounds.
INKS = {
    "ink": ("#1c2024", "#e6e8eb"),
    "soft": ("#60686f", "#9ba3ab"),
    "grid": ("#e3e6e9", "#33383e"),
    "c0": ("#2166ac", "#6cb0f2"),
    "c1": ("#c4580c", "#f2a05a"),
    "c2": ("#1a7f5a", "#4fc59a"),
    "c3": ("#8250c4", "#bd9bf0"),
    "c4": ("#b0305f", "#f089ae"),
    "c5": ("#6b6b1f", "#c9c566"),
}
SERIES_INKS = [name for name in INKS if name.startswith("c")]

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tutorloop",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INKS["ink"][0],
    "axes.edgecolor": INKS["grid"][0],
    "axes.labelcolor": INKS["soft"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INKS["grid"][0],
    "grid.linewidth": 0.6,
    "xtick.color": INKS["soft"][0],
    "ytick.color": INKS["soft"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "lines.linewidth": 1.3,
    "lines.solid_joinstyle": "round",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One named curve: `steps` done and `values`, both float [S], with an interval at each point if there is one."""

    label: str
    ink: str  # a name of INKS
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    level: bool = False  # measured once, drawn as a dashed line across


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes."""

    unit: str
    series: Sequence[Series]
    share: bool = False  # values are fractions, shown as percent
    bars: bool = False  # stacked


def svg(panel: Panel, alt: str, last_step: float, key: str) -> str:
    """The panel as an `<svg>` element with `alt` (escaped already) as its title. `key` is unique in the page."""
    with rc_context(RC):
        figure = Figure(figsize=(5.4, 2.1))
        figure.subplots_adjust(left=0.1, right=0.98, bottom=0.2, top=0.97)  # equal for all, so that axes line up
        axes = figure.add_subplot()
        if panel.bars:
            _stack(axes, panel.series)
        else:
            for series in panel.series:
                _curve(axes, series)
        axes.set_xlim(0, last_step)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _scale(axes, panel)
        axes.set_xlabel("step")
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(drawing.getvalue(), alt, key)


def _scale(axes: Axes, panel: Panel) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
    if panel.share and any(np.nanmax(series.values) > 0.5 for series in panel.series):
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_locator(MultipleLocator(0.25))
    elif all(np.nanmin(series.values) >= 0 for series in panel.series):
        axes.set_ylim(bottom=0)


def _curve(axes: Axes, series: Series) -> None:
    colour = INKS[series.ink][0]
    if series.level:
        axes.axhline(series.values[-1], color=colour, linestyle=(0, (4, 3)))
        return
    marker = "o" if series.low is not None or len(series.steps) == 1 else None
    axes.plot(series.steps, series.values, color=colour, marker=marker, markersize=3.5, clip_on=False)
    if series.low is not None and series.high is not None:
        axes.vlines(series.steps, series.low, series.high, color=colour, linewidth=1, alpha=0.6, clip_on=False)


def _stack(axes: Axes, stages: Sequence[Series]) -> None:
    bottom = np.zeros(len(stages[0].steps))
    steps = stages[0].steps
    width = 0.9 * (np.diff(steps).mean() if len(steps) > 1 else 0.6)
    for series in stages:
        heights = np.nan_to_num(series.values)
        axes.bar(steps, heights, width, bottom, color=INKS[series.ink][0])
        bottom = bottom + heights


def _for_page(text: str, alt: str, key: str) -> str:
    found = re.search(r'<svg[^>]* viewBox="([^"]*)"[^>]*>(.*)</svg>', text, re.DOTALL)
    assert found, "matplotlib writes one svg element with a viewBox"
    box, body = found.groups()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # only clip paths and markers are referred to
    body = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{key}-", body).replace(" xlink:href=", " href=")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)  # 1/100 point
    for name, (light, _) in INKS.items():
        body = body.replace(light, f"var(--{name})")
    title = f'<title id="{key}-alt">{alt}</title>'
    return f'<svg role="img" aria-labelledby="{key}-alt" viewBox="{box}">{title}{body}</svg>'
