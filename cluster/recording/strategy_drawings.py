"""Solutions as HTML: their codes as blocks, the plan between two of them as a map, their steps side by side.

Every text of a run is cut to a bounded length and escaped, and no script is needed: what is folded is `details`.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...verifier_service.strategies.solutions import Solutions
from .progress import excerpt, percent, plain
from .strategy_audit import Audit, CodeUse, Followed

STEP_CHARACTERS, LINE_CHARACTERS, NAME_CHARACTERS = 400, 160, 60
GOLDEN_ANGLE = 137.508  # degrees: hues far from those before
CELL, MARGIN = 30, 40  # of the map, pixels
SEEN, NAMED = 0.005, 0.1  # shares of a step, from which a cell is drawn, and has its number

STYLE = """
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem}
.card{padding:1rem;background:var(--card);border-radius:.5rem;border-left:3px solid var(--grid)}
.card.alarming{border-left-color:var(--c1)}
.card p{margin:.35rem 0 0;overflow-wrap:anywhere}
.card .figure{font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums}
.card h3{margin:0}
.note,.card .soft{color:var(--soft);font-size:.85rem}
.note{max-width:60rem;overflow-wrap:anywhere}
.alarming strong{color:var(--c1)}
i.code{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:.15em;vertical-align:-.05em}
i.code,.blocks b{--colour:hsl(var(--hue) 60% 50%)}
i.code{background:var(--colour)}
.blocks{display:flex;flex-wrap:wrap;gap:2px;margin:.3rem 0 0}
.blocks b{flex:1 0 1.9rem;max-width:8rem;padding:0 .2rem;border-top:6px solid var(--colour);background:var(--page);
text-align:center;font:12px/1.6 ui-monospace,monospace;color:var(--ink)}
.who{display:block;margin-top:.35rem;color:var(--soft);font-size:.8rem}
details.solution{margin:.75rem 0 0;padding:.75rem 1rem;background:var(--card);border-radius:.5rem}
summary{cursor:pointer;overflow-wrap:anywhere}
summary:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
.wide{min-width:44rem;width:100%;table-layout:fixed}
.wide td,.wide th,.codes td:nth-child(2){white-space:normal;text-align:left;vertical-align:top;overflow-wrap:anywhere}
.wide th:nth-child(1){width:3.4rem}
.wide th:nth-child(3){width:6rem}
.codes td,.codes th{vertical-align:top}
.codes th:nth-child(2){text-align:left}
.codes td:nth-child(2){min-width:16rem;max-width:34rem}
@media(max-width:40rem){
.codes td:nth-child(2){min-width:10rem}
.wide{min-width:0}
.wide thead{display:none}
.wide tr{display:grid;grid-template-columns:3.4rem 1fr;border-bottom:1px solid var(--grid)}
.wide td,.wide tbody th{border:0}
.wide td:nth-child(3){grid-column:1;padding-right:.25rem}
}
.codes details{color:var(--soft);font-size:.85rem}
.codes ul{margin:.25rem 0;padding-left:1.1rem}
.step{display:block;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.step{font:13px/1.5 ui-monospace,monospace}
.map svg{margin-top:.75rem;font-size:11px}
.map text{fill:var(--ink);text-anchor:middle;dominant-baseline:central}
"""


def one_line(text: str, most: int) -> str:
    """A text, escaped, on one line of bounded length."""
    return html.escape(plain(" ".join(excerpt(text, most).split())))


def step_text(text: str) -> str:
    """A step, escaped, with its lines."""
    shown = "\n".join(map(plain, excerpt(text.strip(), STEP_CHARACTERS).split("\n")))
    return f"<span class='step'>{html.escape(shown)}</span>"


@dataclass(frozen=True, slots=True)
class Palette:
    """A hue for each code, by how much it is used, and its name."""

    hues: Mapping[int, int]
    names: Mapping[int, str]

    @classmethod
    def of(cls, uses: Sequence[CodeUse]) -> "Palette":
        hues = {use.code: round(210 + GOLDEN_ANGLE * rank) % 360 for rank, use in enumerate(uses)}
        return cls(hues, {use.code: use.name for use in uses})

    def mark(self, code: int) -> str:
        return f"<i class='code' style='--hue:{self.hues.get(code, 0)}'></i>{code}"

    def named(self, code: int) -> str:
        return f"{self.mark(code)} {one_line(self.names.get(code, ''), NAME_CHARACTERS)}"

    def blocks(self, who: str, codes: Sequence[int]) -> str:
        """A solution's codes, one block a step."""
        blocks = "".join(f"<b style='--hue:{self.hues.get(code, 0)}'>{code}</b>" for code in codes)
        return f"<span class='who'>{who}, {len(codes)} steps</span><span class='blocks'>{blocks}</span>"


def solution(title: str, one: Followed, audit: Audit, palette: Palette) -> str:
    """A rollout's codes over its best solution's; opened, their steps side by side."""
    taught = _taught(one, audit.solutions)
    facts = f"<strong>{title}</strong>: {about(one)}"
    blocks = palette.blocks("student", one.codes)
    if taught:
        blocks += palette.blocks("teacher", taught[0])
    problem = audit.solutions.problem(one.recorded.prompt_id)
    shown = f"<p class='note'>{one_line(problem, STEP_CHARACTERS)}</p>" if problem else ""
    return f"<details class='solution'><summary>{facts}{blocks}</summary>{shown}{steps(one, audit, palette)}</details>"


def about(one: Followed) -> str:
    """What became of a rollout, in a line."""
    own = one.recorded
    verdict = {True: "right", False: "wrong", None: "not judged"}[own.passed]
    aligned = f"alignment {one.best.found.alignment:.2f}" if one.best else "neutral: not aligned"
    return one_line(f"{verdict}, step {own.step}, {own.rollout_id}, {aligned}", LINE_CHARACTERS)


def _taught(one: Followed, solutions: Solutions) -> tuple[list[int], list[str]] | None:
    """Codes and steps of a rollout's best solution."""
    if not one.best:
        return None
    prompt_id, number = one.recorded.prompt_id, one.best.solution
    return solutions.codes(prompt_id)[number].tolist(), solutions.texts(prompt_id)[number]


def steps(one: Followed, audit: Audit, palette: Palette) -> str:
    """A table: each step of a rollout, and the teacher's step that it is matched with most."""
    taught = _taught(one, audit.solutions)
    head, rows = ("", "the student's step"), []
    shares_NM = _shares(one.best.found.plan) if one.best else None
    for number, (step, code) in enumerate(zip(one.recorded.steps, one.codes, strict=True)):
        cells = [f"<td>{palette.named(code)}{step_text(step.text)}</td>"]
        if taught and shares_NM is not None:
            other = int(shares_NM[number].argmax())
            matched = f"T{other + 1} {100 * shares_NM[number, other]:.0f}&nbsp;%"
            cells += [f"<td>{matched}</td>", f"<td>{palette.named(taught[0][other])}{step_text(taught[1][other])}</td>"]
        rows.append(f"<tr><th scope='row'>S{number + 1}</th>{''.join(cells)}</tr>")
    head += ("matched", "the teacher's step that it is matched with most") if taught else ()
    top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    return scrolled(
        "steps side by side", f"<table class='wide'><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _shares(plan_NM: np.ndarray) -> np.ndarray:
    """Of each of the student's steps what goes to each of the teacher's."""
    return plan_NM / np.maximum(plan_NM.sum(1, keepdims=True), np.finfo(float).tiny)


def plan_map(one: Followed, audit: Audit) -> str:
    """The plan between a rollout, down, and its best solution, across."""
    assert one.best
    shares_NM = _shares(one.best.found.plan)
    rows, columns = shares_NM.shape
    width, height = (MARGIN + CELL * count for count in (columns, rows))
    ends = [f"<text x='{MARGIN + CELL * (j + 0.5)}' y='{MARGIN / 2}'>T{j + 1}</text>" for j in range(columns)]
    ends += [f"<text x='{MARGIN / 2}' y='{MARGIN + CELL * (i + 0.5)}'>S{i + 1}</text>" for i in range(rows)]
    cells = [_cell(i, j, float(share)) for (i, j), share in np.ndenumerate(shares_NM)]
    drawing = (
        f"<svg role='img' aria-labelledby='map-alt' viewBox='0 0 {width} {height}' style='width:{width}px'>"
        "<title id='map-alt'>The plan: the student's steps down, the teacher's across; the table below has it in words"
        f"</title>{''.join(ends)}{''.join(cells)}</svg>"
    )
    return f"<div class='map'>{scrolled('map of the plan', drawing)}</div>"


def _cell(i: int, j: int, share: float) -> str:
    x, y = MARGIN + CELL * j, MARGIN + CELL * i
    size = f"x='{x}' y='{y}' width='{CELL - 2}' height='{CELL - 2}'"
    frame = f"<rect {size} fill='var(--grid)' fill-opacity='.5'/>"
    if share < SEEN:
        return frame
    title = f"<title>S{i + 1} with T{j + 1}: {percent(share, 0)}</title>"
    filled = f"<rect {size} fill='var(--c0)' fill-opacity='{0.6 * share:.3f}'/>"
    number = f"<text x='{x + CELL / 2 - 1}' y='{y + CELL / 2 - 1}'>{100 * share:.0f}</text>" if share >= NAMED else ""
    return f"<g>{title}{frame}{filled}{number}</g>"


def scrolled(label: str, body: str) -> str:
    """What may be wider than a page, for a keyboard too."""
    return f"<div class='scroll' role='region' aria-label='{label}' tabindex='0'>{body}</div>"
