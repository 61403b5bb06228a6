"""The report opens with no network, says what the run wrote, and escapes all of it."""

import json
import math
import re
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
from html_pages import Page
from run_rows import eval_row, fresh_rng, step_row, summary_of

from tutorloop.cluster.recording.curves import _bins, curves
from tutorloop.cluster.recording.metrics import EvalRow, StepRow
from tutorloop.cluster.recording.plots import Panel, Series, svg
from tutorloop.cluster.recording.report import write_report
from tutorloop.contracts.errors import RunFolderError

HOSTILE = "<script>alert('x')</script>&\"' \x1b[31m $\\frac{"


def write_run(folder, rows, summary=None, config=None):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"kind": "eval" if isinstance(row, EvalRow) else "step", **asdict(row)}) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines).replace("NaN", "null"))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (folder / "config.yaml").write_text(config)


def read_page(path):
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not [value for name, value in page.attributes if name in ("src", "srcset", "data")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = [value for name, value in page.attributes if name == "href"]
    wanted += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)]
    wanted += [f"#{value}" for name, value in page.attributes if name == "aria-labelledby"]
    assert set(wanted) <= {f"#{name}" for name in ids}
    assert page.tags.count("svg") == page.tags.count("title") - 1
    return page, " ".join(page.text)


def test_a_whole_run(tmp_path):
    rng = fresh_rng()
    splits = ("in_distribution", "out_of_distribution")
    evals = [eval_row(rng, 0, split, model) for split in splits for model in ("student", "teacher")]
    evals += [eval_row(rng, 40, split) for split in splits]
    rows = [*evals[:4], *(step_row(rng, step) for step in range(1, 41)), *evals[4:]]
    write_run(tmp_path / "run", rows, summary_of(evals), "method: opd\nseed: 0\n")
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    page, text = read_page(path)
    titles = ("Accuracy", "Loss", "Entropy", "Verifier", "Responses", "Pools", "A step's time")
    for title in (*titles, "Staleness", "Optimizer", "Summary", "Evaluations", "Configuration", "method: opd\nseed: 0"):
        assert title in text
    assert page.tags.count("svg") == 17
    for row in evals:
        figure = row.stats["avg_at_k"]
        assert f"{100 * figure['value']:.1f} % ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})" in text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]


def test_stage_times_add_up(tmp_path):
    rng = fresh_rng()
    seconds = {"wait": 1.0, "learn": 2.5, "evaluate": 0.5, "total": 5.0}
    write_run(tmp_path, [step_row(rng, step, seconds=seconds) for step in range(1, 5)])
    _, text = read_page(write_report(tmp_path))
    for cells in (
        "wait 4.0 s 20.0 % 1.000 s",
        "learn 10.0 s 50.0 %",
        "everything else 4.0 s 20.0 %",
        "all steps 20.0 s",
    ):
        assert cells in re.sub(r"\s+", " ", text)


def test_warnings_and_the_start_are_shown(tmp_path):
    rng = fresh_rng()
    rows = [eval_row(rng, 0), *(step_row(rng, step, warnings=[f"{HOSTILE} {step}"] * (step > 1)) for step in (1, 2, 3))]
    seconds = {"wait": 1.0, "total": 5.0}
    rows = [replace(row, seconds=seconds) if isinstance(row, StepRow) else row for row in rows]
    write_run(tmp_path, rows, summary_of([], startup_seconds={"ray": 2.0, "pools": 3.0}))
    _, text = read_page(write_report(tmp_path))
    assert text.count("warning: <script>alert('x')</script>") == 2
    assert "start: pools 3.0 s 15.0 %" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("evaluated", [True, False])
def test_one_step_and_an_interrupted_summary(tmp_path, evaluated):
    rng = fresh_rng()
    evals = [eval_row(rng, 0)] if evaluated else []
    summary = summary_of(evals, interrupted=True, steps=1)
    summary["accuracy"]["after"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_run(tmp_path, [*evals, step_row(rng, 1)], summary)
        page, text = read_page(write_report(tmp_path))
    assert "interrupted" in text
    assert ("Evaluations" in text) is evaluated
    assert page.tags.count("svg") == (17 if evaluated else 16)


def test_evaluations_before_any_step(tmp_path):
    write_run(tmp_path, [eval_row(fresh_rng(), 0)])
    page, text = read_page(write_report(tmp_path))
    assert page.tags.count("svg") == 1 and "no summary: the run was cut off" in text


def test_a_run_that_was_stopped_before_its_first_row(tmp_path):
    write_run(tmp_path, [], summary_of([], interrupted=True, steps=0))
    page, text = read_page(write_report(tmp_path))
    assert "svg" not in page.tags and "interrupted" in text and "seed 0, 0 steps" in text


def test_figures_that_were_not_finite_are_gaps_and_named(tmp_path):
    rng = fresh_rng()
    rows = [step_row(rng, step, loss=math.nan) for step in (1, 2, 3)]
    write_run(tmp_path, rows)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"kind": "step"', '"kind": "step", "nonfinite": ["loss"]'))
    page, text = read_page(write_report(tmp_path))
    assert "Figures that were not finite: 3 (loss at step 1, loss at step 2, loss at step 3)" in text
    assert page.tags.count("svg") == 15  # neither accuracy nor loss


def test_every_text_of_a_run_is_escaped(tmp_path):
    rng = fresh_rng()
    row = step_row(rng, 1)
    pools = {HOSTILE: row.pools["rollout"], "a.b": row.pools["teacher"]}
    row = step_row(rng, 0, pools=pools, seconds={HOSTILE: 1.0, "total": 2.0})
    summary = summary_of([], dropped={HOSTILE: 1}, verifier_errors={HOSTILE: 1}, method=HOSTILE)
    folder = tmp_path / "<b>run"
    write_run(folder, [row, eval_row(rng, 1, "in_distribution", "student")], summary, f"name: {HOSTILE}")
    path = write_report(folder)
    page, _ = read_page(path)
    assert "<b>" not in path.read_text() and "b" not in page.tags
    assert "\x1b" not in path.read_text().split("<h2>Configuration")[0]
    assert "&lt;script&gt;" in path.read_text()


def test_what_is_no_run_is_the_users_to_mend(tmp_path):
    with pytest.raises(RunFolderError, match="not a folder"):
        write_report(tmp_path / "none")
    with pytest.raises(RunFolderError, match="metrics"):
        write_report(tmp_path)
    write_run(tmp_path, [step_row(fresh_rng(), 0)])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"summary\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_bins_are_means_without_the_gaps():
    rng = fresh_rng()
    for _ in range(50):
        values = rng.normal(size=rng.integers(1, 40))
        values[rng.random(len(values)) < 0.3] = math.nan
        most = int(rng.integers(1, 12))
        slow, start, count = [], 0, min(most, len(values))
        for part in range(count):
            size = len(values) // count + (part < len(values) % count)
            inside = [v for v in values[start : start + size] if not math.isnan(v)]
            slow.append(sum(inside) / len(inside) if inside else math.nan)
            start += size
        np.testing.assert_allclose(_bins(values, most), slow)
    assert len(_bins(np.zeros(0), 5)) == 0


def test_a_step_stands_where_it_was_done():
    rng = fresh_rng()
    rows = [step_row(rng, step, loss=float(step)) for step in (*range(1, 6), *range(8, 11))]
    (curve,) = curves([asdict(row) for row in rows], {"loss": ("loss",)}, 100)
    assert curve.steps.tolist() == [1, 2, 3, 4, 5, 8, 9, 10]
    assert curve.values.tolist() == [1, 2, 3, 4, 5, 8, 9, 10]


def test_a_curve_passes_through_its_values():
    """The drawn path, read back, is an affine image of the data: nothing is shifted, lost or clipped."""
    rng = fresh_rng()
    values = rng.random(25)
    curve = Series(label="a", ink="c0", steps=np.arange(1.0, 26), values=values)
    drawing = svg(Panel(unit="x", series=[curve]), "", 25, "k")
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\)', drawing)
    points = np.array([[float(n) for n in pair] for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1])])
    assert len(points) == 25
    for drawn, data in ((points[:, 0], np.arange(25)), (points[:, 1], values)):
        slope, shift = np.polyfit(data, drawn, 1)
        np.testing.assert_allclose(slope * data + shift, drawn, atol=0.02)
    assert np.corrcoef(points[:, 1], values)[0, 1] < -0.999  # y grows downwards


def test_a_long_run_stays_a_small_page(tmp_path):
    rng = fresh_rng()
    write_run(tmp_path, [step_row(rng, step) for step in range(1, 1001)])
    path = write_report(tmp_path)
    read_page(path)
    assert path.stat().st_size < 250_000
