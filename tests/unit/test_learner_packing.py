"""plan_micro_batches on random lengths, and the learning rate's shape."""

import itertools

import numpy as np
import pytest

from tutorloop.contracts.config import Learner
from tutorloop.learner.engine import learning_rate
from tutorloop.learner.packing import plan_micro_batches


@pytest.mark.parametrize("seed", range(50))
def test_plans_hold_every_row_once_within_bounds_and_balanced(seed):
    rng = np.random.default_rng(seed)
    batches, ranks, bound = int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(1, 200))
    lengths = [[int(n) for n in rng.integers(0, 100, rng.integers(0, 30))] for _ in range(batches)]
    print(f"seed {seed}: {ranks} ranks, bound {bound}, {lengths}")
    plans = plan_micro_batches(lengths, ranks, bound)

    assert len(plans) == ranks
    assert len({len(plan) for plan in plans}) == 1, "ranks run equally many micro-batches"
    rows = [row for plan in plans for micro_batch in plan for row in micro_batch]
    assert sorted(rows) == [(b, r) for b, batch in enumerate(lengths) for r, n in enumerate(batch) if n]
    for micro_batch in itertools.chain(*plans):
        sizes = [lengths[b][r] for b, r in micro_batch]
        assert sum(sizes) <= bound or len(sizes) == 1
    loads = [sum(lengths[b][r] for b, r in itertools.chain(*plan)) for plan in plans]
    longest = max((n for batch in lengths for n in batch), default=0)
    assert max(loads) - min(loads) <= longest
    assert plans == plan_micro_batches(lengths, ranks, bound)


def test_neighbours_in_a_micro_batch_are_of_like_length():
    lengths = [list(np.random.default_rng(3).permutation(np.arange(1, 101)))]
    (plan,) = plan_micro_batches(lengths, 1, 500)
    for before, after in itertools.pairwise(plan):
        assert min(lengths[b][r] for b, r in before) >= max(lengths[b][r] for b, r in after)


def test_nothing_to_train_is_no_micro_batch():
    assert plan_micro_batches([[0, 0], []], 2, 100) == [(), ()]


def test_the_learning_rate_warms_up_and_decays():
    def rates(**options):
        config = Learner(learning_rate=1.0, **options)
        return [learning_rate(step, 10, config) for step in range(10)]

    assert rates() == [1.0] * 10
    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = rates(warmup_steps=2, decay="linear", min_learning_rate=0.2)
    np.testing.assert_allclose(linear, [0.5, 1, *np.linspace(1, 0.2, 9)[:-1]])
    cosine = rates(decay="cosine", min_learning_rate=0.2)
    np.testing.assert_allclose(cosine, 0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(10) / 10)))
    assert rates(warmup_steps=20)[-1] == 0.5, "a run shorter than its warm-up"
