"""avg@k, pass@k, maj@k and their intervals, against the golden figures and against slow references."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from run_rows import fresh_rng

from tutorloop.cluster.recording.statistics import intervals, majority, pass_at_k, summarise
from tutorloop.contracts.errors import RecordError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "eval_metrics.json").read_text())


@pytest.mark.parametrize(("case", "expected"), GOLDEN["expected"]["pass_at_k"].items())
def test_pass_at_k_golden(case, expected):
    samples, correct, k = (int(part[1:]) for part in case.split("_"))
    assert pass_at_k(np.array([correct]), samples, k)[0] == pytest.approx(expected, abs=GOLDEN["tol"])


def test_summary_golden():
    inputs, expected = GOLDEN["inputs"], GOLDEN["expected"]
    correct = np.array(inputs["correctness"], bool)
    stats = summarise(correct, [[""] * 4] * 3)
    assert stats["avg_at_k"]["value"] == pytest.approx(expected["avg_at_k"], abs=GOLDEN["tol"])
    assert stats["pass_at"]["2"]["value"] == pytest.approx(expected["pass_at_2_mean"], abs=GOLDEN["tol"])
    assert stats["pass_at_k"]["value"] == pytest.approx(expected["pass_at_4_any"], abs=GOLDEN["tol"])

    answers = [[answer or "" for answer in row] for row in inputs["answers"]]
    judged = np.array([[a == gold for a in row] for row, gold in zip(answers, inputs["gold"], strict=True)])
    assert judged.tolist() == np.array(expected["correct_matrix"], bool).tolist()
    per_problem = [majority(c, a) for c, a in zip(judged, answers, strict=True)]
    assert [expected_value for expected_value, _ in per_problem] == expected["maj_at_5_expected_tie_split"]
    assert [first_seen for _, first_seen in per_problem] == expected["maj_at_5_first_seen_tiebreak"]
    stats = summarise(judged, answers)
    assert stats["avg_at_k"]["value"] == pytest.approx(expected["avg_at_5"], abs=GOLDEN["tol"])
    assert stats["maj_at_k"]["value"] == pytest.approx(expected["maj_at_5_mean_expected"], abs=GOLDEN["tol"])
    assert stats["maj_at_k_first_seen"]["value"] == pytest.approx(0.5, abs=GOLDEN["tol"])


def test_pass_at_k_is_the_mean_over_all_subsets():
    rng = fresh_rng()
    for samples in range(1, 8):
        draws = rng.random((5, samples)) < rng.random((5, 1))
        for k in range(1, samples + 1):
            slow = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in draws]
            np.testing.assert_allclose(pass_at_k(draws.sum(axis=1), samples, k), slow, atol=1e-12)


def test_majority_is_the_mean_over_all_ways_to_break_a_tie():
    rng = fresh_rng()
    for _ in range(200):
        answers = rng.choice(["", "a", "b", "c", "d"], size=rng.integers(1, 9)).tolist()
        gold = rng.choice(["a", "b", "e"])
        counts = {a: answers.count(a) for a in answers if a}
        winners = [a for a, count in counts.items() if count == max(counts.values())]
        slow = float(np.mean([w == gold for w in winners])) if winners else 0.0
        first = next((a for a in answers if a in winners), None) == gold
        assert majority([a == gold for a in answers], answers) == (pytest.approx(slow), float(first))


def test_an_answer_that_was_once_judged_wrong_does_not_win_the_vote():
    assert majority([True, False, True], ["4", "4", "5"]) == (0.0, 0.0)


def test_intervals_cover_the_true_mean():
    rng = fresh_rng()
    trials, problems, truth = 150, 80, 0.4
    covered = 0
    for _ in range(trials):
        rates = rng.beta(2 * truth, 2 * (1 - truth), size=problems)
        figures = (rng.random((problems, 4)) < rates[:, None]).mean(axis=1)
        (interval,) = intervals(figures[:, None], samples=4)
        assert interval["low"] <= interval["value"] <= interval["high"]
        covered += interval["low"] <= truth <= interval["high"]
    assert covered / trials >= 0.86  # 95 % nominal


def test_interval_has_the_width_of_the_normal_approximation():
    rng = fresh_rng()
    figures = rng.random((1000, 1))
    (interval,) = intervals(figures, samples=1000)
    half = 1.96 * figures.std(ddof=1) / np.sqrt(len(figures))
    assert (interval["high"] - interval["low"]) / 2 == pytest.approx(half, rel=0.12)


def test_a_summary_is_a_function_of_the_verdicts_and_json():
    rng = fresh_rng()
    correct = rng.random((20, 6)) < 0.5
    answers = [["x" if c else "" for c in row] for row in correct]
    first = summarise(correct, answers)
    assert json.loads(json.dumps(first)) == summarise(correct, answers)
    assert list(first["pass_at"]) == ["1", "2", "4"]
    assert first["pass_at"]["1"]["value"] == pytest.approx(first["avg_at_k"]["value"])


# Wilson's 95 % score interval of x in n (Newcombe 1998, Stat. Med. 17, table I, method 3, to 4 decimals).
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("right", "problems"), WILSON)
def test_with_one_sample_a_problem_the_interval_is_wilsons(right, problems):
    correct = np.arange(problems)[:, None] < right
    stats = summarise(correct, [["x" if c else ""] for (c,) in correct])
    for name in ("avg_at_k", "pass_at_k", "maj_at_k", "maj_at_k_first_seen"):
        assert (stats[name]["low"], stats[name]["high"]) == pytest.approx(WILSON[right, problems], abs=5e-5)
    mirrored = summarise(~correct, [[""]] * problems)["avg_at_k"]
    assert (1 - mirrored["high"], 1 - mirrored["low"]) == pytest.approx(WILSON[right, problems], abs=5e-5)


@pytest.mark.parametrize("samples", [1, 4])
def test_all_right_and_all_wrong_are_not_certain(samples):
    wrong = summarise(np.zeros((8, samples), bool), [[""] * samples] * 8)
    right = summarise(np.ones((8, samples), bool), [["9"] * samples] * 8)
    for name in ("avg_at_k", "pass_at_k", "maj_at_k"):
        assert wrong[name] == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.3244, abs=5e-5)}
        assert right[name] == {"value": 1.0, "low": pytest.approx(0.6756, abs=5e-5), "high": 1.0}


def test_problems_that_agree_leave_an_interval():
    half = summarise(np.tile([True, False], (6, 1)), [["a", "b"]] * 6)["avg_at_k"]  # each problem right once of two
    assert half["low"] < 0.4 < half["value"] == 0.5 < 0.6 < half["high"]


@pytest.mark.parametrize("truth", [0.05, 0.5])
def test_few_problems_of_several_samples_are_covered_too(truth):
    rng, trials, covered = fresh_rng(), 400, 0
    for _ in range(trials):
        rates = rng.beta(2 * truth, 2 * (1 - truth), size=12)
        (interval,) = intervals((rng.random((12, 4)) < rates[:, None]).mean(axis=1)[:, None], samples=4)
        covered += interval["low"] <= truth <= interval["high"]
    assert covered / trials >= 0.86


@pytest.mark.parametrize(
    ("correct", "answers"),
    [
        (np.zeros((0, 3), bool), []),
        (np.zeros(3, bool), [["a"]] * 3),
        (np.zeros((2, 2), bool), [["a", "b"]]),
        (np.zeros((2, 2), bool), [["a", "b"], ["a"]]),
    ],
)
def test_misaligned_input_is_refused(correct, answers):
    with pytest.raises(RecordError):
        summarise(correct, answers)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_draws_than_samples(k):
    with pytest.raises(RecordError):
        pass_at_k(np.array([1]), 4, k)


def test_without_answers_nothing_is_voted_on():
    """A reward function of one's own passes responses and reads no answer out of them."""
    passed = np.array([[True, False], [False, True]])
    stats = summarise(passed, [["", ""], ["", ""]])
    assert stats["avg_at_k"]["value"] == 0.5 and "maj_at_k" not in stats and "maj_at_k_first_seen" not in stats
    assert summarise(passed & False, [["", ""], ["", ""]])["maj_at_k"]["value"] == 0
    assert summarise(passed, [["3", ""], ["", ""]])["maj_at_k"]["value"] == 0.5
