"""An audit of strategies as a page for a person.

It is as the run's report: it opens without a network, needs no script, follows the reader's theme, and escapes every
text of the run. It stays below 4 MiB, whatever was written: texts, codes, solutions and alarms are cut to bounded
lengths and numbers.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import strategy_drawings as drawings
from .curves import MOST_POINTS, curves
from .plots import Panel
from .progress import percent
from .report import STYLE, figure, text
from .strategy_audit import Audit, CodeUse, Followed, shares_of, thirds
from .strategy_checks import Check, checks_of
from .strategy_drawings import LINE_CHARACTERS, NAME_CHARACTERS, Palette, one_line
from .strategy_export import alarms_of, lines_of, read_of
from .strategy_rollouts import TRAIN

PAGE, LINES = "strategies.html", "strategies.jsonl"
MOST_CODES, MOST_ALARMS, PLOTTED_CODES = 64, 50, 3
ALARM_CHARACTERS = 500
BINS = 30  # of the steps that codes' shares are plotted over
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

FIGURES = (
    "Whether alignment measures what it should, and whether the student has collapsed; 95 % intervals over problems."
)
IN_USE = (
    f"The {PLOTTED_CODES} most used codes: shares of the student's recorded steps, and dashed of the teacher's. One "
    "that takes the place of all others is alarming."
)
ALIGNMENT = "Of all rollouts, with the best of the problem's solutions. Wrong answers that catch up are alarming."
DIVERSITY = "Of all rollouts. Few strategies, or one code above all others, are a collapse."
WORTH = "What the weight of strategies is multiplied by, and how many rollouts earn nothing by it: a rise is alarming."
CODEBOOK = (
    "Every code in use, the most used first: its share of the teacher's steps and of the student's in training; of "
    "these early (the first third of the steps: {early:,} rollouts) and late (the last: {late:,}); and how many of the "
    "judged rollouts with it passed. Alarming is a code that grows and seldom passes, or that the teacher never uses."
)
TIMELINES = (
    "The codes of some answers, a block a step, over those of the teacher's solution that each is aligned with best. "
    "Each opens to its steps. A wrong answer with all of the teacher's codes is alarming: they say little of the work."
)
PLAN = (
    "With which of the teacher's steps each of the student's was matched, in percent. A row with nearly all in one "
    "cell is a step that was followed; one that is spread evenly follows none. High alignment far from the diagonal is "
    "alarming: the steps are there, and in no order."
)


def write_audit(audit: Audit, folder: Path) -> tuple[Path, Path]:
    """Write the page, and the lines of strategy_export.py, into `folder`; their paths. Each is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    page, lines = folder / PAGE, folder / LINES
    _replace(lines, lines_of(audit))
    _replace(page, [page_of(audit)])
    return page, lines


def _replace(path: Path, parts: Iterable[str]) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    os.replace(aside, path)


def page_of(audit: Audit) -> str:
    palette = Palette.of(audit.codes)
    checks = checks_of(audit)
    alarming = [check.name for check in checks if check.alarming]
    state = f"Alarming: {', '.join(alarming)}." if alarming else "Nothing of what is known is alarming."
    name = one_line(audit.run, LINE_CHARACTERS)
    body = [
        f"<header><p class='over'>tutorloop · strategies</p><h1>{name}</h1><p class='state'>{text(state)}</p>",
        *(f"<p class='note'>{text(sentence)}</p>" for sentence in read_of(audit)),
        "</header><main>",
        _section("Figures", FIGURES, f"<div class='cards'>{''.join(map(_card, checks))}</div>"),
        _alarms(alarms_of(audit)),
        f"<section class='plots'>{''.join(_plots(audit))}</section>",
        _codebook(audit, palette),
        _section("Timelines", TIMELINES, _timelines(audit, palette)),
        _section("Plan", PLAN, _plan(audit, palette)),
        "</main>",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>tutorloop strategies: "
        f"{name}</title><style>{STYLE}{drawings.STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2><p class='note'>{text(note)}</p>{body}</section>"


def _card(check: Check) -> str:
    alarm = text(check.alarm)
    verdict = {
        True: f"<strong>Alarming</strong>: {alarm}.",
        False: f"Not alarming; alarming would be {alarm}.",
        None: f"Not known; alarming would be {alarm}.",
    }[check.alarming]
    return (
        f"<article class='card{' alarming' if check.alarming else ''}'><h3>{text(check.name)}</h3>"
        f"<p class='figure'>{text(check.figure).replace(' %', '&nbsp;%')}</p><p>{text(check.means)}</p>"
        f"<p class='soft'>{verdict}</p></article>"
    )


def _alarms(alarms: Sequence[str]) -> str:
    shown = "".join(f"<p class='state'>{one_line(alarm, ALARM_CHARACTERS)}</p>" for alarm in alarms[:MOST_ALARMS])
    more = f"<p class='note'>… and {len(alarms) - MOST_ALARMS:,} more</p>" if len(alarms) > MOST_ALARMS else ""
    note = "What the run itself warned of while it trained." if alarms else "The run itself has warned of nothing."
    return _section("The run's alarms", note, shown + more)


# ---- over training -----------------------------------------------------------------------------------------------


def _plots(audit: Audit) -> list[str]:
    steps = [row for row in audit.rows if row["kind"] == "step"]
    used = _used(audit)
    last = max([1, *(row["step"] for row in [*steps, *used])])

    def panel(unit: str, share: bool = False, **keys: str) -> Panel:
        places = {name: ("method", key) for name, key in keys.items()}
        return Panel(unit=unit, series=curves(steps, places, MOST_POINTS), share=share)

    plots = {
        ("Strategies in use", IN_USE): [_in_use(audit.codes, used)],
        ("Alignment", ALIGNMENT): [
            panel("mean alignment", all="alignment", right="alignment_right", wrong="alignment_wrong")
        ],
        ("Diversity", DIVERSITY): [
            panel("effective strategies", strategies="effective_strategies"),
            panel("share of all steps", share=True, top="top_code_share"),
        ],
        ("Worth", WORTH): [
            panel("strategy scale", scale="strategy_scale"),
            panel("share of rollouts that are neutral", share=True, neutral="neutral_share"),
        ],
    }
    made: list[str] = []
    for (title, note), panels in plots.items():
        shown = [replace(p, series=[s for s in p.series if np.isfinite(s.values).any()]) for p in panels]
        if shown := [p for p in shown if p.series]:
            made.append(figure(len(made), title, note, shown, last))
    return made


def _used(audit: Audit) -> list[dict[str, Any]]:
    """Each recorded step of training: code → its share of the student's steps."""
    by_step: dict[int, list[Followed]] = {}
    for one in audit.followed:
        if one.recorded.split == TRAIN and one.codes:
            by_step.setdefault(one.recorded.step, []).append(one)
    shares = {step: shares_of(own) for step, own in sorted(by_step.items())}
    codes = [use.code for use in audit.codes]
    return [{"step": step, "share": {str(code): own.get(code, 0.0) for code in codes}} for step, own in shares.items()]


def _in_use(codes: Sequence[CodeUse], used: Sequence[dict[str, Any]]) -> Panel:
    """The most used codes over the recorded steps, and the teacher's shares as levels."""
    series = []
    most = sorted(codes, key=lambda use: -max(use.teacher, use.student))[:PLOTTED_CODES] if used else []
    drawn = curves(used, {str(use.code): ("share", str(use.code)) for use in most}, BINS)
    for use, curve in zip(most, drawn, strict=True):
        name = f"{use.code} {use.name[:NAME_CHARACTERS]}"
        level = replace(curve, label=f"{use.code}, teacher", values=np.array([use.teacher]), level=True)
        series += [replace(curve, label=name), level]
    return Panel(unit="share of the steps", series=series, share=True)


# ---- codes and solutions -----------------------------------------------------------------------------------------


def _codebook(audit: Audit, palette: Palette) -> str:
    head = ("code", "name, and steps of it", "teacher", "student", "early", "late", "passed", "judged")
    rows = []
    for use in audit.codes[:MOST_CODES]:
        shares = ["–" if s is None else percent(s) for s in (use.teacher, use.student, use.early, use.late)]
        figures = [*shares, "–" if use.pass_rate is None else percent(use.pass_rate, 0), f"{use.judged:,}"]
        cells = f"<td>{_described(use)}</td>{''.join(f'<td>{cell}</td>' for cell in figures)}"
        rows.append(f"<tr><th scope='row'>{palette.mark(use.code)}</th>{cells}</tr>")
    top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    table = f"<table class='codes'><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    early, late = thirds([one for one in audit.followed if one.recorded.split == TRAIN])
    note = CODEBOOK.format(early=len(early), late=len(late))
    note += f" The first {MOST_CODES} of {len(audit.codes):,} are shown." if len(audit.codes) > MOST_CODES else ""
    return _section("Codebook", note, drawings.scrolled("codebook", table))


def _described(use: CodeUse) -> str:
    """Name, an exemplar, and folded the others."""
    first, *others = [*use.exemplars, *([f"the student's: {use.example}"] if use.example else [])]
    name = f"<strong>{one_line(use.name, NAME_CHARACTERS)}</strong>"
    items = "".join(f"<li><bdi>{one_line(own, LINE_CHARACTERS)}</bdi></li>" for own in others)
    shown = f"<bdi>{one_line(first, LINE_CHARACTERS)}</bdi>"
    folded = f"<details><summary>{shown}</summary><ul>{items}</ul></details>" if items else f"<p>{shown}</p>"
    return name + folded


def _timelines(audit: Audit, palette: Palette) -> str:
    train = [one for one in audit.followed if one.recorded.split == TRAIN and one.codes]
    found = []
    for passed in (True, False):
        own = [one for one in train if one.recorded.passed is passed]
        own = [one for one in own if one.best] or own
        found += [("Early", own[0])] if own else []
        found += [("Late", own[-1])] if len(own) > 1 else []
    shown = "".join(drawings.solution(title, one, audit, palette) for title, one in found)
    return shown or "<p class='note'>No recorded rollout of training was judged.</p>"


def _plan(audit: Audit, palette: Palette) -> str:
    if audit.shown is None:
        return "<p class='note'>No recorded rollout is aligned with a solution.</p>"
    about, plan = drawings.about(audit.shown), drawings.plan_map(audit.shown, audit)
    return f"<p>{about}</p>{plan}{drawings.steps(audit.shown, audit, palette)}"
