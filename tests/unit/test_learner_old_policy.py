"""The pass before the first gradient: π_old, what corrections reject, gates, and updates that follow an update.

Bigram students make every log-probability known; the loops below decide by rollout, in float64, what the pass decides.
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import RATE, OneProcess, World, check_gradients, check_step, own_logprobs, slow_losses, slow_weights

from tutorloop.contracts.records import Correction, Term
from tutorloop.learner.examples import OldPolicy
from tutorloop.learner.terms.sign_gate import SoftGate

PG = (Term(name="clipped_policy_gradient"),)


def mixed(world, count=12, spread=0.6):
    sources = ("student", "student", "student", "dataset")
    return [world.example(f"r{i}", source=sources[i % 4], spread=spread) for i in range(count)]


def updates_of(examples, cuts):
    return [[[examples[i] for i in part] for part in cuts]]


def run_pass(learner, updates, over_ranks=list, version=0):
    found = learner.old_policy_pass.run(updates, version, over_ranks, lambda own: [own])
    return found.rollouts, found.metrics


def test_there_is_no_pass_where_nothing_needs_one():
    world = World()
    examples = mixed(world)
    cases = [(PG, Correction(), 1), (PG, Correction(kind="truncated"), 1), (PG, Correction(proximal="behaviour"), 3)]
    for terms, correction, updates in cases:
        learner = OneProcess(world.student(), terms, correction, updates=updates)
        assert run_pass(learner, [[examples]]) == (None, {})


@pytest.mark.parametrize("parts", [1, 4])
def test_the_pass_gives_the_logprobs_of_a_plain_forward(parts):
    world = World()
    examples, student = mixed(world), world.student()
    learner = OneProcess(student, (*PG, Term(name="nll", sources=("dataset",))), updates=2)
    found, metrics = run_pass(learner, updates_of(examples, world.cut(len(examples), parts)))
    assert set(found) == {example.rollout.rollout_id for example in examples}
    for rollout in (example.rollout for example in examples):
        known, on = found[rollout.rollout_id], rollout.loss_mask
        np.testing.assert_allclose(known.logprobs[on], own_logprobs(student, rollout)[on], atol=1e-5)
        assert known.keep.all() and (known.weights == 1).all()
    assert metrics == {"rejected_tokens": 0, "rejected_sequences": 0}
    assert not any(parameter.grad is not None for parameter in student.parameters())


CORRECTIONS = {
    "masked tokens": Correction(kind="masked", low=0.7, high=1.5),
    "masked sequences": Correction(kind="masked", low=0.5, high=2.0, level="sequence"),
    "geometric": Correction(kind="masked", low=0.8, high=1.25, level="geometric"),
    "truncated sequences": Correction(kind="truncated", high=1.2, level="sequence"),
    "veto": Correction(veto=0.5),
    "masked with veto": Correction(kind="masked", low=0.6, high=3.0, veto=0.4),
    "probability gap": Correction(kind="truncated", high=1.5, probability_gap=0.02),
    "normalised": Correction(kind="truncated", high=1.5, normalise=True),
    "all of it": Correction(kind="masked", low=0.5, high=2.0, veto=0.3, probability_gap=0.1, normalise=True),
}


@pytest.mark.parametrize("name", list(CORRECTIONS))
@pytest.mark.parametrize("of_batch", [False, True])
def test_rejected_tokens_leave_every_denominator(name, of_batch):
    """A step under each correction, by the report, the gradients and what was dropped."""
    world, correction = World(), CORRECTIONS[name]
    examples, slow = mixed(world), world.student(torch.float64)
    terms = (
        Term(name="policy_gradient", weight=0.5, of_batch=of_batch),
        Term(name="clipped_policy_gradient", weight=0.3, reduction="sequences"),
        Term(name="exact_divergence", weight=0.4, reduction="length", length=6),
        Term(name="nll", weight=0.2, sources=("dataset",), of_batch=of_batch),
    )
    learner = OneProcess(world.student(), terms, correction, heads=world.heads)
    report = learner.learn(examples, [world.cut(len(examples), 3)])
    weights = slow_weights(examples, slow, correction)
    check_step(learner, report, terms, slow_losses(world, slow, examples, terms, weights=weights), slow)

    own = [e.rollout for e in examples if e.rollout.source == "student"]
    on = sum(int(rollout.loss_mask.sum()) for rollout in own)
    kept = [np.count_nonzero(~np.isnan(weights[rollout.rollout_id])) for rollout in own]
    assert report.metrics["rejected_tokens"] == pytest.approx(1 - sum(kept) / on)
    assert report.metrics["rejected_sequences"] == pytest.approx(kept.count(0) / len(own))
    assert report.dropped.get("off_policy", 0) == kept.count(0)
    assert report.tokens == sum(np.count_nonzero(~np.isnan(array)) for array in weights.values())


def test_a_step_whose_every_token_is_rejected_leaves_the_weights():
    world = World()
    examples = [world.example(f"r{i}", spread=0.0) for i in range(4)]
    learner = OneProcess(world.student(), PG, Correction(kind="masked", low=2.0, high=3.0))
    report = learner.learn(examples)
    assert report.tokens == 0 and report.loss == 0 and not learner.engine.gradients
    assert report.dropped == {"off_policy": 4} and report.metrics["rejected_tokens"] == 1


class TwoRanks:
    """Sums over two ranks, each in a thread of its own."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2, timeout=20), [[], []]

    def of(self, rank):
        def over_ranks(values):
            self.given[rank] = list(values)
            self.barrier.wait()
            total = np.sum(self.given, axis=0).tolist()
            self.barrier.wait()
            return total

        return over_ranks


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_two_ranks_find_what_one_does(name):
    """The batch's mean weight is that of both ranks, however unlike their shares; so are the metrics."""
    world = World()
    examples, ranks, found = mixed(world), TwoRanks(), [None, None]
    learner = OneProcess(world.student(), PG, CORRECTIONS[name])
    whole, metrics = run_pass(learner, [[examples]])

    def run(rank, share):
        found[rank] = run_pass(learner, [[share, []]], ranks.of(rank))

    threads = [threading.Thread(target=run, args=(r, share)) for r, share in enumerate((examples[:3], examples[3:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (one, metrics_one), (two, metrics_two) = found
    assert metrics_one == metrics_two == pytest.approx(metrics)
    assert set(one).isdisjoint(two)
    for key, expected in whole.items():
        known: OldPolicy = (one | two)[key]
        np.testing.assert_allclose(known.weights, expected.weights, rtol=1e-6)
        assert (known.keep == expected.keep).all()


@pytest.mark.parametrize("correction", [Correction(), Correction(kind="truncated", high=1.3)])
def test_the_second_update_is_clipped_against_the_policy_before_the_first(correction):
    """The loop beside it does both updates by itself: one plain SGD step between them, π_old of before."""
    world = World()
    examples, slow = mixed(world), world.student(torch.float64)
    terms = (*PG, Term(name="policy_gradient", teacher="small", weight=0.5))
    learner = OneProcess(world.student(), terms, correction, updates=2)
    order = world.rng.permutation(len(examples))
    halves = [order[0::2].tolist(), order[1::2].tolist()]
    report = learner.learn(examples, [[half[:2], half[2:]] for half in halves])

    old = {e.rollout.rollout_id: own_logprobs(slow, e.rollout) for e in examples}
    weights = slow_weights(examples, slow, correction)
    ratios = []
    for update, half in enumerate(halves):
        part = [examples[i] for i in half]
        losses = slow_losses(world, slow, part, terms, old=old, weights=weights)
        total = sum(term.weight * losses[term.key] for term in terms)
        gradients = torch.autograd.grad(total, list(slow.parameters()))
        check_gradients(learner.engine.gradients[update], gradients)
        ratios += [
            np.exp(own_logprobs(slow, e.rollout) - old[e.rollout.rollout_id])[e.rollout.loss_mask]
            for e in part
            if e.rollout.source == "student"
        ]
        with torch.no_grad():
            for parameter, gradient in zip(slow.parameters(), gradients, strict=True):
                parameter -= RATE * gradient
    flat = np.concatenate(ratios)
    assert np.abs(flat - 1).max() > 1e-3, "the second update sees a policy that has moved"
    assert report.metrics["ratio"] == pytest.approx(flat.mean(), rel=1e-5)
    for found, wanted in zip(learner.engine.module.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def of_version(rollout, version):
    return replace(rollout, weight_versions=np.full(rollout.response_length, version, np.int32))


def test_interpolation_takes_the_share_of_each_rollouts_age():
    """Version v_μ to v_θ; before the second of two updates v_θ is half a version further (AReaL's α)."""
    world = World()
    examples = [world.example(f"r{i}") for i in range(4)]
    aged = [replace(e, rollout=of_version(e.rollout, 3 + i % 2)) for i, e in enumerate(examples)]
    learner = OneProcess(world.student(), PG, Correction(proximal="interpolate"), updates=2)
    learner.learn(aged, [[[0, 1]], [[2, 3]]], version=5)

    slow = world.student(torch.float64)
    for update, half in enumerate(([0, 1], [2, 3])):
        old = {}
        for rollout in (aged[i].rollout for i in half):
            share = (5 - rollout.oldest_version) / (5 + update / 2 - rollout.oldest_version)
            mu = rollout.logprobs.astype(np.float64)
            old[rollout.rollout_id] = mu + share * (own_logprobs(slow, rollout) - mu)
        losses = slow_losses(world, slow, [aged[i] for i in half], PG, old=old)
        gradients = torch.autograd.grad(sum(losses.values()), list(slow.parameters()))
        check_gradients(learner.engine.gradients[update], gradients)
        with torch.no_grad():
            for parameter, gradient in zip(slow.parameters(), gradients, strict=True):
                parameter -= RATE * gradient


@pytest.mark.parametrize("parts", [1, 3])
def test_a_gate_sees_the_whole_rollout_and_no_masked_token(parts):
    world = World()
    examples, slow = mixed(world), world.student(torch.float64)
    teacher = Term(name="soft_gate", teacher="big", options={"sharpness": 0.7}, label="gated")
    terms = (teacher, *PG)
    learner = OneProcess(world.student(), terms)
    report = learner.learn(examples, [world.cut(len(examples), parts)])
    gates = {}
    for example in examples:
        rollout, on = example.rollout, example.rollout.loss_mask
        gate = np.ones(len(on))
        d = example.scores["big"].logprobs[on] - own_logprobs(slow, rollout)[on]
        gate[on] = SoftGate(sharpness=0.7).gate(d, example.advantage).factors
        gates[rollout.rollout_id] = gate
    check_step(learner, report, terms, slow_losses(world, slow, examples, terms, gates=gates), slow)
