"""How far a step has moved the policy, against a slow count over the same tokens."""

import math

import numpy as np
import pytest
import torch
from learner_cases import Bigram, Engine, make_example, own_logprobs
from run_rows import fresh_rng

from tutorloop.learner.policy_shift import ONE_OF, TOKENS, policy_shift, watched

VOCAB = 11


def drawn(rng, number):
    prompt, rows = int(rng.integers(1, 5)), int(rng.integers(1, 2 * TOKENS))
    tokens, mask = rng.integers(0, VOCAB, prompt + rows), rng.random(rows) < 0.8
    return make_example(f"r{number}", tokens, -rng.random(rows) * 3, prompt=prompt, mask=mask)


@pytest.mark.parametrize("trial", range(4))
def test_it_is_the_k1_estimate_over_the_first_tokens(trial):
    rng = fresh_rng()
    student, total, count = Bigram(rng.normal(size=(VOCAB, VOCAB))), 0.0, 0
    chosen = [drawn(rng, i).rollout for i in range(int(rng.integers(1, 9)))]
    for rollout in chosen:
        lost = rollout.logprobs - own_logprobs(student, rollout)
        kept = [nats for nats, on in zip(lost[:TOKENS], rollout.loss_mask, strict=False) if on]
        total, count = total + sum(kept), count + len(kept)
    found, tokens = policy_shift(Engine(student), chosen, "cpu")
    assert tokens == count
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-3)


def test_one_rollout_of_so_many_is_watched_however_they_come():
    rng = fresh_rng()
    for many in (1, 5, ONE_OF - 1, ONE_OF, 3 * ONE_OF + 1):
        names = [f"r{i}" for i in range(many)]
        for step in range(2 * ONE_OF):
            found = watched([names[i] for i in rng.permutation(many)], step)
            assert found == watched(names, step) and found <= set(names)
            every = max(1, ONE_OF // many)
            assert len(found) == (0 if step % every else math.ceil(many / ONE_OF))
    assert watched([], 0) == set()


def test_a_rank_without_sampled_rollouts_takes_part():
    asked = []
    engine = Engine(Bigram(np.eye(VOCAB)))
    engine.module.register_forward_pre_hook(lambda *_: asked.append(1))
    assert policy_shift(engine, [], "cpu") == (0.0, 0)
    assert len(asked) == 1


def test_a_weight_that_explodes_is_a_number():
    example = make_example("r", [1, 2, 3], [-0.1, -0.1])
    found, tokens = policy_shift(Engine(Bigram(100 * torch.eye(VOCAB))), [example.rollout], "cpu")
    assert tokens == 2 and np.isfinite(found) and found > 100
