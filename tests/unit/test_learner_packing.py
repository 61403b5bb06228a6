"""The plans of a step on random lengths, and the learning rate's shape."""

import itertools

import numpy as np
import pytest

from tutorloop.contracts.config import Learner
from tutorloop.contracts.records import TrainRow
from tutorloop.learner.engine import learning_rate
from tutorloop.learner.packing import plan_micro_batches, plan_updates


def random_rows(rng, batches):
    """(length, row) of every row of some batches, in an order of its own."""
    rows = [
        (int(length), TrainRow(batch=b, row=r, advantage=float(rng.normal()), weight=float(rng.random())))
        for b in range(batches)
        for r, length in enumerate(rng.integers(1, 100, rng.integers(0, 30)))
    ]
    return [rows[i] for i in rng.permutation(len(rows))]


def rows_in(plan):
    return [row for micro_batch in plan for row in micro_batch]


@pytest.mark.parametrize("seed", range(50))
def test_plans_hold_every_row_once_within_bounds_and_balanced(seed):
    rng = np.random.default_rng(seed)
    ranks, bound = int(rng.integers(1, 5)), int(rng.integers(1, 200))
    rows = random_rows(rng, int(rng.integers(1, 5)))
    print(f"seed {seed}: {ranks} ranks, bound {bound}, {rows}")
    length_of = {(row.batch, row.row): length for length, row in rows}
    plans = plan_micro_batches(rows, ranks, bound)

    assert len(plans) == ranks
    assert len({len(plan) for plan in plans}) == 1, "ranks run equally many micro-batches"
    found = [row for plan in plans for row in rows_in(plan)]
    assert sorted(found, key=repr) == sorted((row for _, row in rows), key=repr), "with their advantages and weights"
    for micro_batch in itertools.chain(*plans):
        sizes = [length_of[row.batch, row.row] for row in micro_batch]
        assert sum(sizes) <= bound or len(sizes) == 1
    loads = [sum(length_of[row.batch, row.row] for row in rows_in(plan)) for plan in plans]
    assert max(loads) - min(loads) <= max(length_of.values(), default=0)
    assert plans == plan_micro_batches([rows[i] for i in rng.permutation(len(rows))], ranks, bound)


@pytest.mark.parametrize("seed", range(20))
def test_updates_share_the_rows_out_and_spread_a_group(seed):
    """Neighbours are a prompt group: each update gets every `updates`-th of them."""
    rng = np.random.default_rng(seed)
    ranks, updates, bound = int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.integers(50, 300))
    rows = random_rows(rng, 3)
    print(f"seed {seed}: {ranks} ranks, {updates} updates, {len(rows)} rows")
    plans = plan_updates(rows, ranks, bound, updates)
    assert [len(plan) for plan in plans] == [updates] * ranks
    for u in range(updates):
        parts = [plan[u] for plan in plans]
        assert len({len(part) for part in parts}) == 1, "in each update ranks run equally many micro-batches"
        found = {(row.batch, row.row) for part in parts for row in rows_in(part)}
        assert found == {(row.batch, row.row) for i, (_, row) in enumerate(rows) if i % updates == u}


def test_neighbours_in_a_micro_batch_are_of_like_length():
    lengths = np.random.default_rng(3).permutation(np.arange(1, 101))
    (plan,) = plan_micro_batches([(int(n), TrainRow(batch=0, row=r)) for r, n in enumerate(lengths)], 1, 500)
    for before, after in itertools.pairwise(plan):
        assert min(lengths[row.row] for row in before) >= max(lengths[row.row] for row in after)


def test_nothing_to_train_is_no_micro_batch():
    assert plan_micro_batches([], 2, 100) == [(), ()]
    assert plan_updates([], 2, 100, 3) == [((), (), ())] * 2


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
