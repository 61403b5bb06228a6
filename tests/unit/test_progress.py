"""What a terminal and a pipe get to see, through a real pseudo-terminal and a real text file."""

import io
import itertools
import os
import pty
import re
import threading
import unicodedata
from dataclasses import replace

import pytest
from rich.console import Console
from run_rows import eval_row, fresh_rng, step_row, summary_of

from tutorloop.cluster.recording.progress import Progress, accuracy_figures, clock, final_table, plain

SAMPLE = {
    "step": 3,
    "source": "student",
    "prompt": "1 + 1 =",
    "response": "[bold red]free[/] \x1b[31m \u202e\n" * 400,
    "passed": False,
    "answer": "\x07[/]",
    "golds": ["2"],
    "token_ids": [1, 2, 3],
    "prompt_length": 1,
    "finish_reason": "length",
}
HOSTILE = "[bold red]free[/] \x1b[31mred\x1b[0m\x07\r\n\u202eesrever \x9b2J ünï"


def piped(rows, total, notes=(), encoding="utf-8"):
    """The lines that a run prints when its output is not a terminal."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    with Progress(total, Console(file=file, force_terminal=True)) as progress:  # colour asked for: still a pipe
        progress.phase("starting the pools")
        for note in notes:
            progress.note(note)
        for row in rows:
            progress.step(row) if hasattr(row, "loss") else progress.eval(row)
    return raw.getvalue().decode(encoding).splitlines()


def on_terminal(width, show):
    """All bytes that reach a terminal of that width."""
    leader, follower = pty.openpty()
    seen = []

    def read():
        while True:
            try:
                seen.append(os.read(leader, 65536))
            except OSError:  # the other side closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as file:
        show(Console(file=file, width=width, height=30, _environ={"TERM": "xterm-256color"}))
    reader.join()
    os.close(leader)
    return b"".join(seen).decode()


def test_a_pipe_gets_plain_lines():
    rng = fresh_rng()
    rows = [eval_row(rng, 0), *(step_row(rng, step) for step in range(1, 101)), eval_row(rng, 100)]
    lines = piped(rows, 100, [HOSTILE])
    assert not [c for line in lines for c in line if unicodedata.category(c)[0] == "C"]
    assert lines[0] == "starting the pools"
    assert lines[1] == "[bold red]free[/] \\x1b[31mred\\x1b[0m\\x07\\r\\n\\u202eesrever \\x9b2J ünï"
    steps = [line for line in lines if line.startswith("step")]
    evals = [line for line in lines if line.startswith("eval")]
    assert [line.split()[1] for line in steps] == [f"{n}/100" for n in (*range(1, 100, 5), 100)]
    assert len(evals) == 2 and len(lines) == 2 + len(steps) + len(evals)
    stats = rows[0].stats["avg_at_k"]
    assert f"{100 * stats['value']:.1f} % ({100 * stats['low']:.1f}–{100 * stats['high']:.1f})" in evals[0]
    kl = next(row for row in rows if hasattr(row, "loss") and row.step == 51).learner["reverse_kl"]
    assert f"reverse KL {kl:.4f}" in next(line for line in steps if line.startswith("step 51/"))
    assert all(
        name in steps[3]
        for name in (
            "accuracy",
            "reward",
            "length",
            "loss",
            "grad norm",
            "staleness",
            "rollout",
            "tok/s",
            "% busy",
            "left",
        )
    )


@pytest.mark.parametrize(("total", "pace", "lines"), [(20, 0.1, [1, 20]), (20, 5.0, [1, *range(3, 20, 2), 20])])
def test_a_line_waits_for_time_and_for_steps(total, pace, lines):
    rng = fresh_rng()
    rows = [step_row(rng, step, wall_seconds=pace * step) for step in range(1, total + 1)]
    assert [int(line.split()[1].split("/")[0]) for line in piped(rows, total)[1:]] == lines


def test_phases_are_told_once_and_warnings_at_once():
    rng, file = fresh_rng(), io.StringIO()
    with Progress(9, Console(file=file)) as progress:
        for number in range(3):
            progress.phase("starting the learner")
            progress.phase(f"waiting for {number} CPUs")
            progress.step(step_row(rng, number + 1, warnings=[f"w{number} {HOSTILE}"]))
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["starting the learner", "waiting for 0 CPUs"]
    assert sum(line.startswith(("starting", "waiting")) for line in lines) == 2
    assert [line.split()[1] for line in lines if line.startswith("warning: ")] == ["w0", "w1", "w2"]


def test_what_was_not_measured_is_not_in_the_line_and_a_zero_has_no_sign():
    rng = fresh_rng()
    nothing = dict.fromkeys(("reward", "pass_rate", "response_length", "truncated_share", "staleness_mean"))
    learner = {"grad_norm": 0.0, "topk_reverse_kl": 0.57, "teacher_mass": 0.875}
    line = piped([step_row(rng, 1, **nothing, loss=-1e-9, learner=learner)], 3)[-1]
    assert not any(name in line for name in ("reward", "passed", "length", "cut off", "staleness", "accuracy"))
    assert "loss 0.0000" in line and "grad norm 0.000" in line
    assert "top-k reverse KL 0.5700" in line and "teacher's mass 87.5 %" in line


def test_an_ascii_pipe_is_no_error():
    _, line = piped([], 10, ["naïve – 数"], encoding="ascii")
    assert line == "na\\xefve \\u2013 \\u6570"


def test_time_left_follows_the_mean_pace():
    rng = fresh_rng()
    progress = Progress(100, Console(file=io.StringIO()))
    assert progress.seconds_left() is None
    for step, wall in ((41, 1000.0), (42, 1002.0), (43, 1010.0)):  # resumed after step 40
        progress.step(step_row(rng, step, wall_seconds=wall))
    assert progress.seconds_left() == pytest.approx(5.0 * 57)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_one_panel_that_fits(width):
    rng = fresh_rng()

    def show(console):
        with Progress(3, console) as progress:
            progress.note(f"note {HOSTILE}")
            progress.phase(f"phase {HOSTILE}")
            progress.eval(eval_row(rng, 0))
            for step in (1, 2, 3):
                progress.step(step_row(rng, step), SAMPLE)

    seen = on_terminal(width, show)
    assert "\x1b[31mred" not in seen and "\x07" not in seen and "\u202e" not in seen
    assert all(f"{place} [bold red]free[/] \\x1b[31mred" in seen for place in ("note", "phase"))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    final = text[text.rindex("╭") :].replace("\r", "").splitlines()
    last = next(i for i, line in enumerate(final) if line.startswith("╰"))
    assert {len(line) for line in final[: last + 1]} == {width} and last < 22
    panel = "\n".join(final)
    assert "done" in final[0] and "step 3/3" in panel
    for part in ("accuracy", "reverse KL", "staleness", "rollout", "teacher", "verifier", "learner", "% busy", "left"):
        assert part in panel.replace("\u00a0", " ")
    for part in ("prompt 1 + 1 =", "did not pass", "answer \\x07[/]", "gold 2", "ended by length", "characters …"):
        assert part in re.sub(r" *│\n│ *", " ", panel)


def test_an_error_leaves_the_terminal_usable():
    def show(console):
        with pytest.raises(RuntimeError, match="boom"), Progress(3, console):
            raise RuntimeError("boom")

    seen = on_terminal(80, show)
    assert "stopped" in seen and seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is back


def test_the_final_table_says_before_after_teacher():
    rng = fresh_rng()
    measured = itertools.product(
        ((0, "student"), (0, "teacher"), (3, "student")), ("in_distribution", "out_of_distribution")
    )
    evals = [eval_row(rng, step, split, model) for (step, model), split in measured]
    summary = summary_of(evals, dropped={HOSTILE: 2}, interrupted=True)
    console = Console(file=io.StringIO(), width=120)
    console.print(final_table(summary))
    text = console.file.getvalue()
    for row in evals:
        figure = row.stats["avg_at_k"]
        assert f"{100 * figure['value']:.1f} % ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})" in text
    for part in ("1:15", "12,345 generated", "1,234 tok/s, 50 % busy", "timeout 1", "2.00 GiB", "--resume"):
        assert part in text
    assert "\x1b" not in text and "[bold red]free" in text


def test_before_is_the_first_evaluation_and_after_the_last():
    rows = [eval_row(fresh_rng(), 0) for _ in range(3)]
    equal = [{"avg_at_k": {"value": 0.5, "low": low, "high": 1.0}} for low in (0.0, 0.1, 0.2)]
    rows = [replace(row, stats={**row.stats, **figure}) for row, figure in zip(rows, equal, strict=True)]
    figures = accuracy_figures(summary_of(rows))["in_distribution"]
    assert (figures["before"]["low"], figures["after"]["low"]) == (0.0, 0.2)


def test_a_summary_without_evaluations_says_nothing_of_accuracy():
    figures = accuracy_figures(summary_of([]))
    assert figures == {
        split: {"before": None, "after": None, "teacher": None} for split in ("in_distribution", "out_of_distribution")
    }
    console = Console(file=io.StringIO(), width=80)
    console.print(final_table({"method": "opd", "seed": 1, "steps": 0, "accuracy": None, "evals": None}))
    assert "method" in console.file.getvalue() and "accuracy" not in console.file.getvalue()


def test_warnings_and_the_start_stand_in_the_final_table():
    console = Console(file=io.StringIO(), width=200)
    start = {"ray": 5.0, "pools": 7.0}
    console.print(
        final_table(summary_of([], warnings=[f"look {HOSTILE}"], startup_seconds=start, dropped={"stale": 0}))
    )
    text = console.file.getvalue()
    assert (
        "look [bold red]free[/] \\x1b[31m" in text and "1:15, of it 0:12 of starting" in text and "stale 0" not in text
    )


def test_plain_and_clock():
    assert plain("a\tb\u00a0c\u200b\ud800") == "a\\tb\\xa0c\\u200b\\ud800"
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3599, 3600, 36061)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:00:00",
        "10:01:01",
    ]
