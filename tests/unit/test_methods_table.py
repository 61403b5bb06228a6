"""The lab's table of methods: what is run again, the budget's steps, the figures over seeds, the text and the plot."""

import json
import random
import statistics
import sys
from pathlib import Path

import pytest

from tutorloop.cluster.methods import compose
from tutorloop.contracts.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import methods
from methods_table import TOLERANCE, Results, Row, by_name, finite, middle, plot, steps_for, table


def row(name: str, seed: int, inside: float, outside: float, **own) -> Row:
    """A finished row whose intervals are two points wide on each side."""
    figures = {"in_distribution": inside, "out_of_distribution": outside}
    accuracy = {
        split: {
            "avg_at_k": {"value": value, "low": value - 0.02, "high": value + 0.02},
            "pass_at_k": {"value": value + 0.1, "low": value + 0.05, "high": value + 0.15},
        }
        for split, value in figures.items()
    }
    tokens = {"student": 1000, "teacher": 0, "given": 0, "scored": 0, "trained": 900}
    return Row(**{"name": name, "seed": seed, "steps": 100, "tokens": tokens, "accuracy": accuracy, **own})


def results(*rows: Row) -> Results:
    return Results(first_steps=100, budget=1000, samples=8, problems=400, rows=list(rows))


def test_what_is_finished_is_not_run_again_and_seeds_come_outermost():
    made = results(row("opd", 0, 0.5, 0.4), Row(name="sft", seed=0, error="LearnerError: lost"))
    assert made.pending(["opd", "sft"], [0, 1]) == [("sft", 0), ("opd", 1), ("sft", 1)]
    made.put(row("sft", 0, 0.6, 0.5))
    assert made.pending(iter(["opd", "sft"]), [0, 1]) == [("opd", 1), ("sft", 1)]
    assert [(r.name, r.seed, r.error) for r in made.rows] == [("opd", 0, ""), ("sft", 0, "")]


def test_results_are_read_as_they_were_written_a_row_a_line(tmp_path: Path):
    made = results(row("opd", 0, 0.5, 0.4, dropped={"stale": 3}), Row(name="sft", seed=0, error='E: "→"\nlost'))
    made.steps["opd"] = 97
    file = tmp_path / "methods.json"
    made.save(file)
    assert Results.load(file) == made
    lines = [line for line in file.read_text().splitlines() if line.startswith('{"name"')]
    assert [json.loads(line.rstrip(","))["name"] for line in lines] == ["opd", "sft"]
    assert [path.name for path in tmp_path.iterdir()] == ["methods.json"]
    for text in ("", "{}", '{"rows": [{"nome": 1}]}'):
        file.write_text(text)
        with pytest.raises(DataError, match=r"methods\.json"):
            Results.load(file)


def test_steps_follow_the_budget():
    assert steps_for(1000, 100, 1000) == steps_for(1000, 100, 1090) == steps_for(1000, 100, 910) == 100
    assert steps_for(1000, 100, 2000) == 50
    assert steps_for(1000, 100, 500) == 200
    assert steps_for(1000, 100, 300_000) == 1
    assert steps_for(1000, 100, 0) == 100
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        budget, steps, used = rng.randrange(1000, 10**6), rng.randrange(1, 300), rng.randrange(100, 10**6)
        new = steps_for(budget, steps, used)
        if new != steps and new > 1:  # the most steps that stay inside, at the same tokens a step
            assert new * used <= steps * budget < (new + 1) * used
        elif new == steps and steps > 1:
            assert abs(used - budget) <= TOLERANCE * budget or new * used <= steps * budget < (new + 1) * used


def test_the_middle_seed_brings_its_own_interval():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for count in (1, 2, 3, 4, 5):
        values = [rng.random() for _ in range(count)]
        figure = middle([row("m", s, value, 0.1) for s, value in enumerate(values)], "in_distribution", "avg_at_k")
        assert figure["value"] == statistics.median_low(values)
        assert (figure["least"], figure["most"]) == (min(values), max(values))
        assert (figure["low"], figure["high"]) == (figure["value"] - 0.02, figure["value"] + 0.02)


def test_methods_stand_in_the_order_of_their_accuracy_without_failures():
    rows = [
        row("low", 0, 0.2, 0.9),
        row("high", 0, 0.7, 0.1),
        Row(name="lost", seed=0, error="E"),
        row("low", 1, 0.3, 0),
    ]
    assert {name: len(group) for name, group in by_name(rows).items()} == {"high": 1, "low": 2}
    assert list(by_name(rows)) == ["high", "low"]


def test_the_table_says_what_was_measured():
    tokens = {"student": 1200, "teacher": 3400, "given": 0, "scored": 5600, "trained": 7800}
    seeds = [
        row("opd", 0, 0.5, 0.4, tokens=tokens, wall_seconds=60.4, entropy=0.05, length=25.0, dropped={"stale": 4}),
        row("opd", 1, 0.6, 0.3, tokens=tokens, wall_seconds=61.4, entropy=0.06, length=26.0),
        row("opd", 2, 0.7, 0.2, tokens=tokens, wall_seconds=99.4, entropy=0.04, length=27.0, dropped={"stale": 2}),
    ]
    lost = Row(name="sft", seed=1, error="LearnerError: the `learner`\n  File <x>\nTypeError: no")
    text = table(results(*seeds, row("student", 0, 0.1, 0.1, tokens={}, steps=0), lost))
    grids = [line for line in text.splitlines() if line.startswith("|")]
    assert grids[2] == (
        "| opd | 3 | **60.0** [58.0–62.0] (50.0 – 70.0) | **70.0** [65.0–75.0] (60.0 – 80.0) "
        "| **30.0** [28.0–32.0] (20.0 – 40.0) | **40.0** [35.0–45.0] (30.0 – 50.0) |"
    )
    assert grids[6] == "| opd | 100 | 1 | 3 | – | 460% | 6 | 8 | 61 | 0.050 | 26.0 | stale 2 |"
    assert grids[7].startswith("| student | 0 | – | – | – | 0% |")
    assert [line.count("|") for line in grids] == [7] * 4 + [13] * 4
    assert "- sft, seed 1: `LearnerError: the 'learner' … TypeError: no`" in text
    assert "a budget of 1,000 response tokens" in text


def test_the_plot_is_written_whatever_there_is(tmp_path: Path):
    rows = [row(f"m{i}", s, 0.1 + 0.03 * i + 0.01 * s, 0.1 + 0.02 * i) for i in range(20) for s in range(3)]
    for made in (results(), results(row("student", 0, 0.1, 0.1)), results(*rows, row("teacher", 0, 0.9, 0.8))):
        plot(made, tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_are_finite():
    assert finite(1.5) == 1.5
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="finite"):
            finite(value)


@pytest.mark.parametrize("name", methods.recipes())
def test_every_recipe_is_a_method_at_any_number_of_steps(name: str):
    whole = methods.configure(name, 0, 100)
    assert whole.steps == 100
    for steps in (5, 47, 100, 130):
        config = methods.configure(name, 3, steps)
        compose(config)
        rounds = config.method_options.get("round_steps")
        assert config.steps == (steps if not rounds else 4 * max(2, steps // 4))
        assert not rounds or config.steps % rounds == 0
        assert config.learner.warmup_steps == whole.learner.warmup_steps * config.steps // 100
        assert (config.seed, config.eval.path, config.checkpoint.every) == (3, "", 0)
        assert config.prompts_per_step * _answers(config) == 96


def _answers(config) -> int:
    return 1 if compose(config).generators == ("dataset",) else config.rollout.samples_per_prompt
