"""Advantages, penalties, weights and choices: against the golden figures, and against slow loops on fresh rewards."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_rows import fresh_rng

from tutorloop.cluster.methods.parts import credit


def golden(name: str) -> tuple[dict, dict, float]:
    read = json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())
    return read["inputs"], read["expected"], read["tol"]


INPUTS, EXPECTED, TOL = golden("grpo")
REJECTION, CHOSEN, _ = golden("rejection_ft")
REWARDS = np.array(INPUTS["rewards"])


@pytest.mark.parametrize(
    ("name", "std", "epsilon"),
    [
        ("adv_verl_sample_std_eps1e_6", "sample", 1e-6),
        ("adv_population_std_eps1e_4", "population", 1e-4),
        ("adv_sample_std_eps1e_4", "sample", 1e-4),
        ("adv_dr_grpo", "none", 1e-6),
    ],
)
def test_group_relative_golden(name, std, epsilon):
    found = [credit.group_relative(group, std, epsilon) for group in REWARDS]
    assert np.array(found) == pytest.approx(np.array(EXPECTED[name]), abs=TOL)


def test_leave_one_out_and_whitening_golden():
    found = np.array([credit.leave_one_out(group) for group in REWARDS])
    assert found == pytest.approx(np.array(EXPECTED["adv_rloo"]), abs=TOL)
    groups = np.repeat(range(len(REWARDS)), REWARDS.shape[1]).tolist()
    for name, own in (("adv_reinforce_pp_global", None), ("adv_reinforce_pp_baseline", groups)):
        found = credit.whitened(REWARDS.ravel(), own).reshape(REWARDS.shape)
        assert found == pytest.approx(np.array(EXPECTED[name]), abs=TOL)


def test_penalties_weights_and_kept_groups_golden():
    overlong = INPUTS["overlong"]
    found = credit.overlong_penalty(
        EXPECTED["overlong_lengths"], overlong["max_len"], overlong["buffer"], overlong["factor"]
    )
    assert found == pytest.approx(np.array(EXPECTED["overlong_penalty"]), abs=TOL)
    for rule, name in (("frontier", "frontier_weight_4p1mp"), ("paced", "paced_weight_p1mp")):
        assert [credit.pace(group, rule) for group in REWARDS] == pytest.approx(EXPECTED[name], abs=TOL)
    assert [credit.pace(group, "none") for group in REWARDS] == [1.0] * 4
    assert [int(not credit.all_equal(group)) for group in REWARDS] == EXPECTED["keep_group_dynamic_sampling"]


def test_rejection_golden():
    rewards = np.array(REJECTION["rewards"])
    passed = rewards == 1
    assert passed.astype(int).tolist() == CHOSEN["raft_positive_mask"]
    assert [credit.plus_minus_one(group).tolist() for group in passed] == CHOSEN["reinforce_rej_adv_pm1"]
    assert [int(not credit.all_equal(group)) for group in passed] == CHOSEN["reinforce_rej_keep_groups"]
    found = [credit.best_of(group, right) for group, right in zip(rewards, passed, strict=True)]
    assert found == CHOSEN["raft_dedup_best_of_n_index"]


def slow_advantage(group: list[float], index: int, rule: str) -> float:
    """Each rule from its words, for one answer."""
    others = [reward for place, reward in enumerate(group) if place != index]
    if rule == "leave_one_out":
        return group[index] - sum(others) / len(others)
    mean = sum(group) / len(group)
    squares = sum((reward - mean) ** 2 for reward in group)
    divisor = {
        "none": 1.0,
        "sample": math.sqrt(squares / len(others)) + 1e-6,
        "population": math.sqrt(squares / len(group)) + 1e-6,
    }
    return (group[index] - mean) / divisor[rule]


@pytest.mark.parametrize("rule", ["none", "sample", "population", "leave_one_out"])
def test_group_rules_against_loops(rule):
    rng = fresh_rng()
    groups = [rng.random(int(rng.integers(2, 12))).tolist() for _ in range(50)]
    fast = credit.leave_one_out if rule == "leave_one_out" else lambda group: credit.group_relative(group, rule)
    for group in groups:
        expected = [slow_advantage(group, index, rule) for index in range(len(group))]
        assert fast(group).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("baseline", [False, True])
def test_whitening_against_loops_with_groups_in_any_order_and_of_any_size(baseline):
    rng = fresh_rng()
    ids = rng.integers(0, 7, 60).tolist()
    rewards = rng.random(60)
    means = {name: np.mean([r for r, g in zip(rewards, ids, strict=True) if g == name]) for name in set(ids)}
    centred = [r - (means[g] if baseline else rewards.mean()) for r, g in zip(rewards, ids, strict=True)]
    deviation = math.sqrt(sum(value**2 for value in centred) / 60)
    expected = [value / (deviation + 1e-8) for value in centred]
    assert credit.whitened(rewards, ids if baseline else None).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_give_exactly_zero_though_their_mean_is_rounded(size):
    rng = fresh_rng()
    for value in (0.1, *rng.random(20)):
        group = [value] * size
        for std in ("sample", "population", "none"):
            assert credit.group_relative(group, std, 1e-300).tolist() == [0.0] * size
        assert credit.leave_one_out(group).tolist() == [0.0] * size
        assert credit.whitened(group, epsilon=1e-300).tolist() == [0.0] * size
        assert credit.whitened(group, ["g"] * size, epsilon=1e-300).tolist() == [0.0] * size


def test_plus_minus_one_against_a_loop():
    rng = fresh_rng()
    for passed in rng.random((100, 4)) < rng.random((100, 1)):
        mixed = any(passed) and not all(passed)
        assert credit.plus_minus_one(passed).tolist() == [(1 if right else -1) * mixed for right in passed]


def test_overlong_penalty_against_its_cases():
    rng = fresh_rng()
    limit, buffer, factor = 100, int(rng.integers(1, 100)), float(rng.random())
    for length in range(130):
        if length <= limit - buffer:
            expected = 0.0
        elif length <= limit:
            expected = factor * ((limit - buffer) - length) / buffer
        else:
            expected = -factor
        assert credit.overlong_penalty([length], limit, buffer, factor)[0] == pytest.approx(expected, abs=1e-12)
    assert credit.overlong_penalty([100, 130], limit, 0).tolist() == [0.0, 0.0]


def test_best_of_takes_the_first_of_the_best_and_only_a_passed_one():
    rng = fresh_rng()
    for _ in range(200):
        rewards = rng.integers(-2, 3, 5).astype(float)
        passed = rng.random(5) < 0.5
        best = -1
        for index in range(5):
            if passed[index] and (best < 0 or rewards[index] > rewards[best]):
                best = index
        assert credit.best_of(rewards, passed) == best


def test_first_of_each_against_a_loop():
    rng = fresh_rng()
    paths = [str(path) for path in rng.integers(0, 5, 30)]
    seen: list[str] = []
    for path, first in zip(paths, credit.first_of_each(paths), strict=True):
        assert first == (path not in seen)
        seen.append(path)
    assert credit.first_of_each([]) == []


def test_thresholds_rise_within_a_round_and_start_again_with_the_next():
    found = [credit.improve_threshold(step, 6, (0.1, 0.5, 0.9)) for step in range(12)]
    assert found == [0.1, 0.1, 0.5, 0.5, 0.9, 0.9] * 2
    assert [credit.improve_threshold(step, 5, (0.1, 0.9)) for step in range(5)] == [0.1, 0.1, 0.1, 0.9, 0.9]


def test_group_rows_keep_order_and_lose_nothing():
    assert credit.group_rows(["b", "a", "b", "c", "a"]) == [[0, 2], [1, 4], [3]]
