"""An audit's page and lines: whole, of bounded size, and harmless whatever was written; and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hostile_texts import STEERS, SURROGATES, TEXTS
from html_pages import Page
from run_rows import fresh_rng
from strategy_runs import chains, fit_chains, line, lines_of, metric_rows, write_run
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.cluster.recording.strategy_audit import audit
from tutorloop.cluster.recording.strategy_checks import checks_of
from tutorloop.cluster.recording.strategy_export import figures_of
from tutorloop.cluster.recording.strategy_page import write_audit
from tutorloop.cluster.recording.strategy_rollouts import LONG
from tutorloop.lab.strategies.problems import STUDENT, work

ALARM = "strategies: 2.0 strategies are in use, of 8.0 at first"
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "article", "figure"),
    *("figcaption", "h1", "h2", "h3", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "div", "span"),
    *("b", "i", "ul", "li", "bdi", "details", "summary", "svg", "g", "path", "rect", "text", "defs", "use", "clippath"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("shown"), fresh_rng()
    problems = chains(int(rng.integers(1000)))
    fit_chains(place / "strategies", problems)
    return write_run(place / "run", place / "strategies", lines_of(problems, rng), metric_rows(rng, ALARM))


@pytest.fixture(scope="module")
def found(run):
    return audit(run)


def read(path):
    """The page's text; what no page of a run may have is not there."""
    written = path.read_text()
    page = Page(written)
    assert set(page.tags) <= TAGS, set(page.tags) - TAGS
    assert {name for name, _ in page.attributes if name.startswith("on")} == set()
    assert not [value for name, value in page.attributes if name in ("src", "srcset", "data")]
    assert not [value for name, value in page.attributes if name == "href" and not value.startswith("#")]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not STEERS.search(" ".join(page.text))
    assert page.tags.count("details") == page.tags.count("summary")
    assert len(written.encode()) < 4 * 2**20
    return " ".join(page.text)


def test_the_page_shows_each_figure_and_what_is_alarming(found, tmp_path):
    page, _ = write_audit(found, tmp_path)
    text = read(page)
    for check in checks_of(found):
        assert check.name in text and check.means in text and check.alarm in text
    for use in found.codes:
        assert " ".join(use.name.split()) in text
    for title in (
        "Figures",
        "The run's alarms",
        "Strategies in use",
        "Codebook",
        "Timelines",
        "Plan",
        f"step 9: {ALARM}",
    ):
        assert title in text
    assert "144 of 144 of training, 8 of 8 in distribution, 12 of 12 out of distribution (record: all" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strategies.html", "strategies.jsonl"]
    assert page.stat().st_size < 200_000


def test_the_lines_have_every_rollout_whole(run, found, tmp_path):
    _, lines = write_audit(found, tmp_path)
    recorded = [json.loads(text) for text in (run / "rollouts.jsonl").read_text().splitlines()]
    told_lines = [json.loads(text) for text in lines.read_text().splitlines()]
    for row, told, one in zip(recorded, told_lines, found.followed, strict=True):
        assert told["rollout_id"] == row["rollout_id"] and told["passed"] == row["passed"]
        assert "".join(step["text"] for step in told["steps"]) == row["response"]
        ends = [step["end"] for step in told["steps"]]
        assert [0, *ends][:-1] == [step["start"] for step in told["steps"]]
        assert ends[-1] == len(row["token_ids"]) - row["prompt_length"]
        assert told["codes"] == list(one.codes) and len(told["codes"]) == len(told["steps"])
        best = (one.best.found.alignment, one.best.solution) if one.best else (None, None)
        assert (told["alignment"], told["solution"]) == best


def test_hostile_texts_are_shown_and_do_nothing(tmp_path):
    """In solutions, answers, ids, the run's name and its alarms; and a line of 10 MB."""
    rng, texts = fresh_rng(), [*TEXTS, SURROGATES, "<details><table><!--<svg><style>*{display:none}", "<b " * 9000]
    problems = chains(int(rng.integers(1000)))
    names = list(problems)[: len(texts)]
    mixed = {}
    for name, text in zip(names, texts, strict=True):
        worked = work(problems[name], "decompose", STUDENT).split("\n")
        mixed[name] = "\n\n".join(f"{step} {text[:500]}" for step in worked)
    fit_chains(tmp_path / "strategies", problems, mixed)
    lines = lines_of(problems, rng)[:24]
    for name, text in zip(names, texts, strict=True):
        asked = f"What is {problems[name].expression}?"
        lines.append(line(f"{name} {text[:500]}", name, asked, mixed[name], step=12, passed=bool(rng.random() < 0.5)))
    huge = {"response": "<b>" * 3_300_000, "token_ids": [5] * 3_300_000}
    lines += [line("huge", names[0], asked, "<i>" * 4_000, step=12), {**lines[0], **huge}]
    rows = metric_rows(rng)
    rows[0]["warnings"] = [*texts, "<i>" * 2_000_000]
    found = audit(write_run(tmp_path / "<script>run", tmp_path / "strategies", lines, rows))
    assert found.chosen.left_out == {LONG: 1}
    shown = [one for one in found.followed if one.best and one.recorded.prompt_id in names and one.recorded.step == 12]
    assert len(shown) >= len(texts)
    plans = [read(write_audit(replace(found, shown=one, rows=[], followed=[]), tmp_path)[0]) for one in shown]
    whole = read(write_audit(found, tmp_path)[0])
    for wanted in ("<script>alert(1)</script>", "\\x1b[31mred", "\\u202e", "\\ud800", "<details><table>"):
        assert any(wanted in text for text in plans) and wanted in whole
    for written in (json.dumps(figures_of(found)), (tmp_path / "strategies.jsonl").read_text().replace("\n", "")):
        assert not STEERS.search(written) and "\\u202e" in written


def test_the_command_prints_and_writes(run, tmp_path):
    said = CliRunner().invoke(app, ["strategies", "show", str(run), "--to", str(tmp_path)])
    assert (
        said.exit_code == 0
        and "Drop with shuffled strategies" in said.output
        and (tmp_path / "strategies.html").exists()
    )
    printed = CliRunner().invoke(app, ["strategies", "show", str(run), "--to", str(tmp_path), "--json", "--most", "20"])
    figures = json.loads(printed.stdout)
    assert figures["found"]["train"] == 144 and figures["auc"]["in_distribution"]["of"] == "in_distribution"
    assert Path(figures["page"]).parent == tmp_path and figures["alarms"] == [f"step 9: {ALARM}"]
    assert {"read", "drop", "own", "others", "leakage", "codes", "checks"} <= set(figures)
    refused = CliRunner().invoke(app, ["strategies", "show", str(tmp_path)])
    assert refused.exit_code == 2 and "config.yaml" in refused.stderr
