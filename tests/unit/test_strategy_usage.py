"""Use of strategies: the golden figures, and slow loops on fresh random vectors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_rows import fresh_rng

from tutorloop.verifier_service.strategies.usage import code_assignment, dpp_logdet, usage

CASE = json.loads((Path(__file__).parents[1] / "golden" / "sgpo_alignment.json").read_text())
GIVEN, EXPECTED, TOLERANCE = CASE["inputs"], CASE["expected"], CASE["tol"]
MEANS, CODES = (np.array(GIVEN[k]) for k in ("group_mean_vectors", "teacher_strategy_vectors"))
KEYS = ("code_usage_entropy", "conditional_entropy", "mutual_information", "effective_strategies")


def test_usage_matches_golden():
    assignment = code_assignment(MEANS, CODES, GIVEN["nce_temperature"])
    np.testing.assert_allclose(assignment, EXPECTED["code_assignment"], rtol=0, atol=TOLERANCE)
    found = usage(assignment)
    assert {key: getattr(found, key) for key in KEYS} == pytest.approx({k: EXPECTED[k] for k in KEYS}, abs=TOLERANCE)
    assert dpp_logdet(MEANS) == pytest.approx(EXPECTED["dpp_logdet"], abs=TOLERANCE)


def test_usage_by_loops():
    rng = fresh_rng()
    vectors, codes = rng.normal(size=(30, 6)), rng.normal(size=(9, 6))
    assignment = code_assignment(vectors.astype(np.float32), codes, 0.2)
    for vector, own in zip(vectors.astype(np.float32).astype(float), assignment, strict=True):
        weights = [
            math.exp(vector @ code / math.dist(vector, [0] * 6) / math.dist(code, [0] * 6) / 0.2) for code in codes
        ]
        np.testing.assert_allclose(own, [weight / sum(weights) for weight in weights], atol=1e-12)
    shares = [sum(row[k] for row in assignment) / 30 for k in range(9)]
    found = usage(assignment)
    assert found.code_usage_entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
    each = [-sum(p * math.log(p) for p in row) for row in assignment]
    assert found.conditional_entropy == pytest.approx(sum(each) / 30, abs=1e-12)
    assert found.mutual_information == pytest.approx(found.code_usage_entropy - sum(each) / 30, abs=1e-12)
    assert found.top_code_share == pytest.approx(max(shares), abs=1e-12)


def test_usage_of_extremes():
    assert usage(np.eye(4)) == pytest.approx((math.log(4), 0, math.log(4), 4, 0.25), abs=1e-12)
    assert usage(np.eye(4)[[1, 1, 1]]) == pytest.approx((0, 0, 0, 1, 1), abs=1e-12)
    assert usage(np.full((3, 4), 0.25)) == pytest.approx((math.log(4), math.log(4), 0, 4, 0.25), abs=1e-12)
    np.testing.assert_allclose(code_assignment(np.zeros((1, 3)), np.eye(3)), 1 / 3)


def test_the_determinant_is_low_where_answers_are_alike():
    same, apart = np.ones((3, 3)), np.eye(3)
    assert dpp_logdet(apart) == pytest.approx(3 * math.log(1.001), abs=1e-12)
    assert dpp_logdet(same) == pytest.approx(math.log(3.001) + 2 * math.log(0.001), abs=1e-9)
    assert dpp_logdet(5 * apart) == pytest.approx(dpp_logdet(apart), abs=1e-12)
    assert math.isfinite(dpp_logdet(np.zeros((3, 3))))
