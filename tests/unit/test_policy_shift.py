"""How far a step has moved the policy, against a slow count over the same tokens."""

import numpy as np
import pytest
import torch
from learner_cases import Bigram, Engine, make_example, own_logprobs
from run_rows import fresh_rng

from tutorloop.learner.policy_shift import ONE_OF, TOKENS, policy_shift

VOCAB = 11


def drawn(rng, number, source):
    prompt, rows = int(rng.integers(1, 5)), int(rng.integers(1, 2 * TOKENS))
    tokens, mask = rng.integers(0, VOCAB, prompt + rows), rng.random(rows) < 0.8
    return make_example(f"r{number}", tokens, -rng.random(rows) * 3, prompt=prompt, mask=mask, source=source)


@pytest.mark.parametrize("trial", range(4))
def test_it_is_the_k3_estimate_over_the_first_tokens_of_some_rollouts(trial):
    rng = fresh_rng()
    examples = [drawn(rng, i, rng.choice(["student", "student", "dataset"])) for i in range(int(rng.integers(1, 150)))]
    student = Bigram(rng.normal(size=(VOCAB, VOCAB)))
    own = sorted((e.rollout.rollout_id, e.rollout) for e in examples if e.sampled)
    chosen = [rollout for _, rollout in own][::ONE_OF]
    total, count = 0.0, 0
    for rollout in chosen:
        ratios = np.exp(own_logprobs(student, rollout) - rollout.logprobs)
        kept = [ratio for ratio, on in zip(ratios[:TOKENS], rollout.loss_mask, strict=False) if on]
        total, count = total + sum(ratio - 1 - np.log(ratio) for ratio in kept), count + len(kept)
    found, tokens = policy_shift(Engine(student), examples, "cpu")
    assert tokens == count
    np.testing.assert_allclose(found, total, rtol=1e-4)


def test_a_rank_without_sampled_rollouts_takes_part():
    asked = []
    engine = Engine(Bigram(np.eye(VOCAB)))
    engine.module.register_forward_pre_hook(lambda *_: asked.append(1))
    rng = fresh_rng()
    assert policy_shift(engine, [drawn(rng, 0, "dataset")], "cpu") == (0.0, 0)
    assert policy_shift(engine, [], "cpu") == (0.0, 0)
    assert len(asked) == 2


def test_a_weight_that_explodes_is_a_number():
    example = make_example("r", [1, 2, 3], [-50.0, -1e4])
    found, tokens = policy_shift(Engine(Bigram(100 * torch.eye(VOCAB))), [example], "cpu")
    assert tokens == 2 and np.isfinite(found) and found > 1
