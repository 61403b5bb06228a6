"""Alignment of steps: the golden figures, exact transport by trying all assignments, soft-DTW by trying all paths.

The golden file's `r_align_dtw` is exp of minus its hard path's cost, which for 4 steps and τ = 0.25 is our mean over
max(N, M) cells. Its total reward and advantages are the method's, its InfoNCE the extractor's: tested there.
"""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from run_rows import fresh_rng

from tutorloop.contracts.errors import RecordError
from tutorloop.verifier_service.strategies.alignment import (
    BLOCK,
    align,
    coverage,
    diversity,
    shaping,
    sinkhorn,
    soft_dtw,
    step_cost,
    token_credit,
)

CASE = json.loads((Path(__file__).parents[1] / "golden" / "sgpo_alignment.json").read_text())
GIVEN, EXPECTED, TOLERANCE = CASE["inputs"], CASE["expected"], CASE["tol"]
STUDENT, TEACHER = (np.array(GIVEN[k]) for k in ("student_step_embeddings", "teacher_strategy_vectors"))
EPSILON, GAMMA = GIVEN["sinkhorn_eps"], GIVEN["softdtw_gamma"]


def matches(found, key):
    np.testing.assert_allclose(found, EXPECTED[key], rtol=0, atol=TOLERANCE)


def one_plan(cost, epsilon):
    return sinkhorn(cost[None], np.array([cost.shape[0]]), np.array([cost.shape[1]]), epsilon)[0]


def one_dtw(cost, gamma):
    value, expected, hard = soft_dtw(cost[None], np.array([cost.shape[0]]), np.array([cost.shape[1]]), gamma)
    return value[0], expected[0], hard[0]


def solution(rng, steps, near=None, size=8):
    """Vectors of any length; where `near` is given, steps of it and some noise."""
    vectors = rng.normal(size=(steps, size)) * rng.uniform(0.1, 10, size=(steps, 1))
    if near is not None:
        vectors = near[rng.integers(len(near), size=steps)] + 0.3 * rng.random() * rng.normal(
            size=(steps, near.shape[1])
        )
    return vectors


def cosine(u, v):
    return 0.0 if not u.any() or not v.any() else float(u @ v / np.sqrt(u @ u) / np.sqrt(v @ v))


# ---- the golden figures ------------------------------------------------------------------------------------------


def test_free_alignment_matches_golden():
    matches(step_cost(STUDENT, TEACHER, GIVEN["eta_position"]), "cost")
    (found,) = align([STUDENT], [TEACHER], eta=GIVEN["eta_position"], epsilon=EPSILON, tau=GIVEN["tau_reward"])
    matches(found.plan, "sinkhorn_plan")
    matches(found.distance, "ot_cost")
    matches(found.alignment, "r_align_ot")
    matches(found.credit, "per_step_credit")
    matches(1 - 2 * step_cost(STUDENT, TEACHER, 0), "cosine")


def test_ordered_alignment_matches_golden():
    cost = step_cost(STUDENT, TEACHER, 0)
    matches(cost, "softdtw_cost_matrix")
    value, expected, hard = one_dtw(cost, GAMMA)
    matches(value, "softdtw_value")
    matches(expected, "softdtw_expected_alignment")
    matches(hard, "dtw_hard")
    own = [one_dtw(step_cost(vectors, vectors, 0), GAMMA)[0] for vectors in (STUDENT, TEACHER)]
    matches(value - sum(own) / 2, "softdtw_divergence")
    brute, _, least, paths = all_paths(cost, GAMMA)
    matches(brute, "softdtw_bruteforce")
    matches(least, "dtw_hard")
    assert paths == EXPECTED["n_paths"]
    (found,) = align([STUDENT], [TEACHER], order="ordered", gamma=GAMMA, tau=GIVEN["tau_reward"])
    matches(found.alignment, "r_align_dtw")
    matches(found.plan, "softdtw_expected_alignment")


def test_coverage_shaping_and_diversity_match_golden():
    potentials = coverage(STUDENT, TEACHER, GIVEN["kappa"])
    matches(potentials, "coverage_potential")
    matches(np.diff(potentials), "shaping_F")
    matches(shaping(potentials), "shaping_F_terminal_zeroed")
    matches(diversity(np.array(GIVEN["group_mean_vectors"])), "diversity_bonus")


def test_exact_transport_matches_golden():
    matches(exact_transport(np.array(EXPECTED["cost"])[:3, :3]), "exact_ot_first3x3")


# ---- in any order ------------------------------------------------------------------------------------------------


def exact_transport(cost):
    """Least cost of any plan, by trying every assignment; the one side has a multiple of the other's steps."""
    n, m = cost.shape
    square = np.repeat(np.repeat(cost, max(1, m // n), axis=0), max(1, n // m), axis=1)
    rows = np.arange(len(square))
    return min(square[rows, list(order)].mean() for order in permutations(range(len(square))))


def plain_sinkhorn(cost, epsilon, iterations):
    """Both potentials in turns, in the log domain."""
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(iterations):
        f = -epsilon * (np.logaddexp.reduce((g - cost) / epsilon, axis=1) + np.log(n))
        g = -epsilon * (np.logaddexp.reduce((f[:, None] - cost) / epsilon, axis=0) + np.log(m))
    return np.exp((f[:, None] + g - cost) / epsilon)


@pytest.mark.parametrize("trial", range(4))
def test_the_plan_is_what_thousands_of_plain_iterations_reach(trial):
    rng = fresh_rng()
    n, m = rng.integers(1, 9, 2)
    cost = [rng.random((n, m)), step_cost(solution(rng, n), solution(rng, m))][trial % 2]
    np.testing.assert_allclose(one_plan(cost, 0.1), plain_sinkhorn(cost, 0.1, 20_000), rtol=0, atol=1e-9)


@pytest.mark.parametrize("trial", range(20))
def test_the_plan_has_its_marginals_and_the_form_of_an_optimum(trial):
    """log P + C/ε is the sum of a row's and a column's number, which only the optimum's is."""
    rng = fresh_rng()
    n, m = rng.integers(1, 33, 2)
    teacher = solution(rng, m)
    cost = step_cost(solution(rng, n, near=teacher if trial % 2 else None), teacher)
    plan = one_plan(cost, EPSILON)
    np.testing.assert_allclose(plan.sum(1), 1 / n, rtol=0, atol=1e-15)
    assert np.abs(plan.sum(0) - 1 / m).sum() < 1e-9
    form = np.log(plan) + cost / EPSILON
    np.testing.assert_allclose(form - form[:1] - form[:, :1] + form[0, 0], 0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (6, 6), (2, 6), (6, 3), (1, 4), (5, 1)])
def test_with_little_entropy_it_is_exact_transport(shape):
    rng, epsilon = fresh_rng(), 0.005
    for _ in range(3):
        cost = rng.random(shape)
        found = (one_plan(cost, epsilon) * cost).sum()
        assert -1e-9 < found - exact_transport(cost) <= epsilon * np.log(min(shape)) + 1e-9


def test_credit_is_one_less_what_a_step_costs():
    rng = fresh_rng()
    student, teacher = solution(rng, 7), solution(rng, 4)
    (found,) = align([student], [teacher])
    cost = step_cost(student, teacher)
    for i in range(7):
        assert found.credit[i] == pytest.approx(
            7 * sum(found.plan[i, j] * (1 - cost[i, j]) for j in range(4)), abs=1e-12
        )
    assert found.distance == pytest.approx((found.plan * cost).sum(), abs=1e-12)
    assert found.alignment == pytest.approx(np.exp(-found.distance / 0.25), abs=1e-12)


def test_without_positions_order_does_not_matter_when_free():
    rng = fresh_rng()
    student, teacher, order = solution(rng, 9), solution(rng, 6), rng.permutation(9)
    (one,), (other,) = align([student], [teacher], eta=0), align([student[order]], [teacher], eta=0)
    np.testing.assert_allclose(one.credit[order], other.credit, atol=1e-10)
    np.testing.assert_allclose(one.plan[order], other.plan, atol=1e-10)


def test_the_teachers_own_steps_align_best_and_turned_around_only_when_free():
    rng = fresh_rng()
    teacher = solution(rng, 8, size=64)
    students = [teacher, teacher[::-1], solution(rng, 8, size=64)]
    same, turned, other = (found.alignment for found in align(students, [teacher] * 3))
    assert same > 0.97 and 0.75 < turned < 0.9 and other < 0.3  # turned: exp(−0.1 · ½ / 0.25) = 0.82
    same, turned, other = (found.alignment for found in align(students, [teacher] * 3, order="ordered"))
    assert same == pytest.approx(1, abs=1e-12) and turned < 0.3 and other < 0.3


# ---- in the teacher's order --------------------------------------------------------------------------------------


def all_paths(cost, gamma):
    """Of the paths from the first cell to the last: soft value, how often each cell is on one, least cost, number."""
    n, m = cost.shape

    def onward(i, j):
        if (i, j) == (n - 1, m - 1):
            yield [(i, j)]
        for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1)):
            if a < n and b < m:
                yield from ([(i, j), *rest] for rest in onward(a, b))

    paths = list(onward(0, 0))
    costs = np.array([sum(cost[cell] for cell in path) for path in paths])
    weights = np.exp(-(costs - costs.min()) / gamma)
    expected = np.zeros_like(cost)
    for path, weight in zip(paths, weights / weights.sum(), strict=True):
        for cell in path:
            expected[cell] += weight
    return costs.min() - gamma * np.log(weights.sum()), expected, costs.min(), len(paths)


@pytest.mark.parametrize("trial", range(12))
def test_soft_dtw_is_the_sum_over_all_paths(trial):
    rng = fresh_rng()
    cost, gamma = rng.random(rng.integers(1, 6, 2)), float(rng.choice([0.01, 0.1, 1.0]))
    value, expected, hard, _ = all_paths(cost, gamma)
    found = one_dtw(cost, gamma)
    np.testing.assert_allclose(found[0], value, atol=1e-12)
    np.testing.assert_allclose(found[1], expected, atol=1e-12)
    np.testing.assert_allclose(found[2], hard, atol=1e-12)


def test_the_expected_alignment_is_the_gradient():
    rng = fresh_rng()
    cost, by = rng.random((7, 5)), 1e-5
    expected = one_dtw(cost, GAMMA)[1]
    for cell in np.ndindex(*cost.shape):
        moved = np.zeros_like(cost)
        moved[cell] = by
        slope = (one_dtw(cost + moved, GAMMA)[0] - one_dtw(cost - moved, GAMMA)[0]) / (2 * by)
        assert slope == pytest.approx(expected[cell], abs=1e-8)


def test_credit_and_distance_in_order():
    rng = fresh_rng()
    student, teacher = solution(rng, 5), solution(rng, 8)
    (found,) = align([student], [teacher], order="ordered")
    cost = step_cost(student, teacher, 0)
    _, expected, hard, _ = all_paths(cost, GAMMA)
    assert found.distance == pytest.approx(hard / 8, abs=1e-12)
    for i in range(5):
        credit = sum(expected[i, j] * (1 - cost[i, j]) for j in range(8)) / expected[i].sum()
        assert found.credit[i] == pytest.approx(credit, abs=1e-12)


# ---- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["free", "ordered"])
def test_pairs_together_are_pairs_alone(order):
    rng = fresh_rng()
    teachers = [solution(rng, int(rng.integers(1, 20))) for _ in range(2 * BLOCK + 5)]
    students = [solution(rng, int(rng.integers(1, 20)), near=teacher) for teacher in teachers]
    together = align(students, teachers, order=order)
    for student, teacher, found in zip(students, teachers, together, strict=True):
        (alone,) = align([student], [teacher], order=order)
        assert found.plan.shape == (len(student), len(teacher)) and found.credit.shape == (len(student),)
        for one, other in zip(alone, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    assert align([], [], order=order) == []


@pytest.mark.parametrize("order", ["free", "ordered"])
def test_degenerate_solutions_have_finite_figures(order):
    zeros, one, same = np.zeros((4, 8)), solution(fresh_rng(), 1), np.ones((5, 8))
    mixed = np.concatenate([zeros, one, 1e30 * one, 1e-30 * one]).astype(np.float32)
    for student in (zeros, one, same, mixed):
        for teacher in (zeros, one, same, mixed):
            (found,) = align([student], [teacher], order=order)
            assert 0 < found.alignment <= 1 and found.distance >= 0
            assert all(np.isfinite(part).all() for part in found)
            assert found.credit.min() > -0.11 and found.credit.max() <= 1
            assert np.isfinite(coverage(student, teacher)).all()
    assert align([one], [3 * one], order=order)[0].alignment == pytest.approx(1, abs=1e-12)


def test_a_solution_without_steps_is_refused():
    with pytest.raises(RecordError, match="step"):
        align([np.ones((2, 3)), np.zeros((0, 3))], [np.ones((2, 3))] * 2)


# ---- what a step is worth besides --------------------------------------------------------------------------------


def test_coverage_by_loops():
    rng = fresh_rng()
    student, teacher, kappa = solution(rng, 6), solution(rng, 4), 0.2
    found = coverage(student, teacher, kappa)
    assert found[0] == 0 and len(found) == 7
    for i in range(1, 7):
        best = [max(max(cosine(u, z) - kappa, 0) / (1 - kappa) for u in student[:i]) for z in teacher]
        assert found[i] == pytest.approx(sum(best) / 4, abs=1e-12)


def test_shaping_telescopes():
    rng = fresh_rng()
    potentials = np.concatenate([[0], np.sort(rng.random(9))])
    assert abs(shaping(potentials).sum()) < 1e-15
    found = shaping(potentials, 0.9)
    np.testing.assert_allclose(found[:-1], 0.9 * potentials[1:-1] - potentials[:-2], atol=1e-15)
    assert found[-1] == -potentials[-2]
    discounts = 0.9 ** np.arange(9)  # discounted, they sum to nothing as well
    assert abs((discounts * found).sum()) < 1e-15
    assert shaping(np.array([0.0, 0.7])).tolist() == [0]


def test_diversity_by_loops():
    means = solution(fresh_rng(), 5)
    for g, found in enumerate(diversity(means)):
        others = [cosine(means[g], means[h]) for h in range(5) if h != g]
        assert found == pytest.approx(1 - sum(others) / 4, abs=1e-12)
    assert diversity(means[:1]).tolist() == [0]
    assert diversity(np.zeros((3, 2))).tolist() == [1, 1, 1]
    np.testing.assert_allclose(diversity(np.ones((3, 2))), 0, atol=1e-15)


def test_token_credit_by_loops():
    rng = fresh_rng()
    lengths = rng.integers(1, 30, 8)
    ends = np.cumsum(lengths) + 3
    spans = [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
    credit, moved = rng.random(8), shaping(np.concatenate([[0], rng.random(8)]))
    found = token_credit(spans, int(ends[-1]) + 2, credit, moved, beta=0.3, shaping_weight=0.5)
    assert found.dtype == np.float32 and found.shape == (ends[-1] + 2,)
    for t, value in enumerate(found):
        i = next((i for i, (begin, end) in enumerate(spans) if begin <= t < end), None)
        worth = 0 if i is None else 0.3 * (credit[i] - credit.mean()) + 0.5 * moved[i] / lengths[i]
        assert value == pytest.approx(worth, abs=1e-7)
    assert abs(token_credit(spans, int(ends[-1]), np.ones(8), moved).sum(dtype=np.float64)) < 1e-6
