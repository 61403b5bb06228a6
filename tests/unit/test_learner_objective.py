"""The learner's step from records to gradients, as training runs it: Selection → collate → Objective → ChunkedLoss.

The golden numbers come through a bigram student that has their distributions; the rest is compared with loops in
float64 over fresh random rollouts. `collate` makes everything float32, so 1e-5 is the bound throughout.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import (
    Bigram,
    OneProcess,
    World,
    check_gradients,
    check_step,
    make_example,
    paths_of,
    slow_losses,
)
from term_cases import golden

from tutorloop.contracts.config import REFERENCE
from tutorloop.contracts.errors import NotFinite
from tutorloop.contracts.records import Correction, TeacherScores, Term
from tutorloop.learner import loss_head
from tutorloop.models import logits as chunks

BEHAVIOUR = Correction(proximal="behaviour")
MIXED = (
    Term(name="nll", weight=0.9, sources=("dataset", "teacher"), of_batch=True),
    Term(name="clipped_policy_gradient", weight=0.7, reduction="sequences"),
    Term(
        name="policy_gradient", weight=0.5, teacher="big", reference=True, options={"extrapolation": 1.4}, label="past"
    ),
    Term(name="topk_divergence", weight=0.3, teacher="small"),
    Term(name="topk_divergence", weight=0.2, teacher="big", sources=("student", "teacher"), of_batch=True),
    Term(name="exact_divergence", weight=0.6, reduction="length", length=5),
    Term(name="exact_divergence", weight=0.4, teacher="small", sources=("teacher",), reduction="sequences"),
    Term(name="reference_kl", weight=0.1, reference=True, of_batch=True),
)


def mixed_examples(world, count=14):
    """Of all sources; each lacks some of its scores."""
    teachers = ("big", "small", REFERENCE)
    return [
        world.example(
            f"r{i}",
            source=("student", "student", "teacher", "dataset")[i % 4],
            teachers=[name for name in teachers if world.rng.random() < 0.8],
        )
        for i in range(count)
    ]


def loss_of(report, key):
    return report.metrics[f"loss_{key}"]


# ---- golden numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduction, length, key",
    [
        ("tokens", 0, "loss_token_mean"),
        ("sequences", 0, "loss_seq_mean_token_mean"),
        ("length", 4, "loss_dr_grpo_const_norm_Lmax4"),
        ("length", 1, "loss_seq_mean_token_sum"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_grpo_under_every_reduction(reduction, length, key, parts):
    inputs, expected = golden("grpo")
    sequences, table = paths_of(inputs["new_logp"])
    examples = [
        make_example(f"r{i}", sequences[i], inputs["old_logp"][i], advantage=inputs["advantages_for_clip"][i])
        for i in range(2)
    ]
    options = {"clip_low": inputs["eps_low"], "clip_high": inputs["eps_high"], "dual_clip": inputs["dual_clip_c"]}
    term = Term(name="clipped_policy_gradient", options=options, reduction=reduction, length=length)
    report = OneProcess(Bigram(table), (term,), BEHAVIOUR).learn(examples, [[[0, 1]] if parts == 1 else [[1], [0]]])
    assert report.loss == pytest.approx(expected[key], abs=1e-5)
    ratios = np.concatenate(expected["ratios"])
    assert report.metrics["ratio"] == pytest.approx(ratios.mean(), abs=1e-5)


def toy_student(inputs):
    """The golden toy as a bigram: its three tokens follow the prompt's token 0, and tokens 1 and 3."""
    logits = np.zeros((4, 4))
    logits[[0, 1, 3]] = inputs["student_logits"]
    assert inputs["sampled_tokens"] == [1, 3, 2]
    return Bigram(logits)


def toy_scores(inputs, ids=None):
    logprobs = torch.tensor(inputs["teacher_logits"], dtype=torch.float64).log_softmax(1)
    targets = torch.tensor(inputs["sampled_tokens"])
    given = {} if ids is None else {"topk_ids": np.int32(ids), "topk_logprobs": logprobs.gather(1, torch.tensor(ids))}
    return TeacherScores(
        rollout_id="",
        teacher_id="teacher",
        logprobs=logprobs[torch.arange(3), targets].numpy().astype(np.float32),
        **{name: np.asarray(array, np.int32 if name == "topk_ids" else np.float32) for name, array in given.items()},
    )


def test_on_policy_distillation_with_the_advantage_of_the_current_student():
    inputs, expected = golden("opd_thinking_machines")
    example = make_example("r", [0, 1, 3, 2], inputs["sampling_logprobs"], scores=[toy_scores(inputs)])
    learner = OneProcess(toy_student(inputs), (Term(name="policy_gradient"),), Correction(kind="truncated", high=2.0))
    report = learner.learn([example])
    assert report.loss == pytest.approx(expected["recomputed_tis2_loss_token_mean"], abs=1e-5)
    assert report.metrics["importance_weight"] == pytest.approx(np.mean(expected["tis2_weight"]), abs=1e-5)
    assert report.metrics["mismatch"] == pytest.approx(np.mean(expected["stale_bias_term"]), abs=1e-5)
    assert -report.metrics["reverse_kl"] == pytest.approx(
        np.mean(expected["advantages_recomputed_current_policy"]), abs=1e-5
    )


def test_importance_sampled_distillation_has_the_golden_gradient():
    """The blog's loss, Σ −(π_θ/μ) A with A of the sampler, from the parts that we have: r = π_θ/μ, one A a token."""
    inputs, expected = golden("opd_thinking_machines")
    term = Term(name="clipped_policy_gradient", options={"clip": False}, reduction="length", length=1)
    total, gradient = 0.0, torch.zeros(4, 4)
    for t, advantage in enumerate(expected["advantages_gamma0"]):
        example = make_example(
            "r", [0, 1, 3, 2], inputs["sampling_logprobs"], mask=np.arange(3) == t, advantage=advantage
        )
        learner = OneProcess(toy_student(inputs), (term,), BEHAVIOUR)
        total += learner.learn([example]).loss
        gradient += learner.engine.gradients[0][0]
    assert total == pytest.approx(expected["importance_sampling_loss_sum"], abs=1e-5)
    np.testing.assert_allclose(gradient[[0, 1, 3]], expected["grad_wrt_student_logits"], atol=1e-5)


@pytest.mark.parametrize("token", range(3))
def test_self_distillation_weighs_its_divergence(token):
    inputs, expected = golden("sdpo")
    example = make_example(
        "r",
        [0, 1, 3, 2],
        inputs["old_logp"],
        mask=np.arange(3) == token,
        scores=[toy_scores(inputs, expected["topk_idx"])],
    )
    term = Term(name="topk_divergence", options={"direction": "jsd", "beta": inputs["alpha"]})
    correction = Correction(kind="truncated", high=inputs["is_clip"])
    report = OneProcess(toy_student(inputs), (term,), correction).learn([example])
    assert report.loss == pytest.approx(expected["per_token_loss"][token], abs=1e-5)
    assert report.metrics["importance_weight"] == pytest.approx(expected["is_weight"][token], abs=1e-5)


def three_policies(inputs):
    """Examples of the sampler μ, and the students π_old and π_θ. They share no last token, nor do their tables."""
    sequences, current = paths_of(inputs["current_logp"])
    examples = [
        make_example(
            f"r{i}",
            sequences[i],
            inputs["rollout_logp"][i],
            mask=inputs["mask"][i],
            advantage=inputs["advantage"][i][0],
        )
        for i in range(2)
    ]
    return examples, Bigram(paths_of(inputs["train_old_logp"])[1]), Bigram(current)


@pytest.mark.parametrize(
    "correction, updates, key",
    [
        (Correction(kind="truncated", high=2.0), 2, "decoupled_ppo_tis_loss"),
        (Correction(kind="truncated", high=2.0, proximal="behaviour"), 1, "coupled_ppo_loss"),
        (Correction(kind="masked", low=0.5, high=5.0), 1, "icepop_loss_kept_denominator"),
    ],
)
@pytest.mark.parametrize("cuts", [[[0, 1]], [[1], [], [0]]])
def test_three_policies_match_golden(correction, updates, key, cuts):
    inputs, expected = golden("offpolicy_corrections")
    examples, before, student = three_policies(inputs)
    options = {"clip_low": inputs["eps_low"], "clip_high": inputs["eps_high"]}
    term = Term(name="clipped_policy_gradient", options=options)
    learner = OneProcess(student, (term,), correction, updates=updates, before=before)
    assert learner.learn(examples, [cuts]).loss == pytest.approx(expected[key], abs=1e-5)


def test_normalised_weights_match_golden_token_by_token():
    """A token's weight is read off its gradient: w (1 − π)/N for the nll of a token that no other shares."""
    inputs, expected = golden("offpolicy_corrections")
    examples, before, student = three_policies(inputs)
    correction = Correction(kind="truncated", high=inputs["C"], normalise=True)
    learner = OneProcess(student, (Term(name="nll"),), correction, before=before)
    report = learner.learn(examples)
    (gradient, _), found, wanted = learner.engine.gradients[0], [], []
    for i, example in enumerate(examples):
        for t in np.flatnonzero(example.rollout.loss_mask):
            last, token = example.rollout.token_ids[t : t + 2]
            found.append(-gradient[last, token] * report.tokens / -np.expm1(inputs["current_logp"][i][t]))
            wanted.append(expected["batch_normalised_tis"][i][t])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    loss = np.mean([w * -np.concatenate(inputs["current_logp"])[n] for n, w in enumerate(wanted)])
    assert report.loss == pytest.approx(loss, abs=1e-5)


# ---- against the slow loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [None, 1.3])
def test_all_terms_together_match_the_slow_loops(high, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 13 * 7)  # seven rows a chunk: teachers and terms share chunks
    monkeypatch.setattr(loss_head, "BLOCK_BYTES", 4 * 13 * 3)  # and blocks of three rows, three and one
    world = World()
    examples, slow = mixed_examples(world), world.student(torch.float64)
    correction = Correction(kind="truncated", high=high) if high else Correction()
    learner = OneProcess(world.student(), MIXED, correction, heads=world.heads)
    report = learner.learn(examples, [world.cut(len(examples), 4)])

    weights, current = {}, slow.logprobs().detach().numpy()
    for rollout in (example.rollout for example in examples):
        last, own = rollout.token_ids[rollout.prompt_length - 1 : -1], rollout.token_ids[rollout.prompt_length :]
        ratio = np.exp(current[last, own] - rollout.logprobs)
        corrected = high is not None and rollout.source == "student"
        weights[rollout.rollout_id] = np.minimum(ratio, high) if corrected else np.ones(len(ratio))
    losses = slow_losses(world, slow, examples, MIXED, weights=weights)
    check_step(learner, report, MIXED, losses, slow)
    lacking = [e for e in examples if any(e.asked_by(t) and not e.has(t) for t in learner.terms)]
    assert report.metrics["missing_scores"] == len(lacking)


@pytest.mark.parametrize("reduction", ["tokens", "sequences", "length"])
@pytest.mark.parametrize("of_batch", [False, True])
def test_each_reduction_matches_the_slow_loops(reduction, of_batch):
    world = World()
    examples, slow = mixed_examples(world), world.student(torch.float64)
    terms = (
        Term(name="clipped_policy_gradient", reduction=reduction, length=7, weight=0.6),
        Term(name="policy_gradient", teacher="small", sources=("student", "teacher"), of_batch=of_batch, weight=0.4),
    )
    learner = OneProcess(world.student(), terms, BEHAVIOUR)
    report = learner.learn(examples, [world.cut(len(examples), 3)])
    old = {e.rollout.rollout_id: e.rollout.logprobs for e in examples}
    check_step(learner, report, terms, slow_losses(world, slow, examples, terms, old=old), slow)


def test_the_cut_into_micro_batches_and_their_order_change_nothing():
    world = World()
    examples = mixed_examples(world)
    runs = []
    for parts in (1, 5, len(examples)):
        learner = OneProcess(world.student(), MIXED, Correction(kind="truncated", high=1.3), heads=world.heads)
        runs.append((learner.learn(examples, [world.cut(len(examples), parts)]), learner.engine))
        assert learner.engine.micro_batches == parts
    (whole, one), *others = runs
    for report, engine in others:
        assert report.tokens == whole.tokens
        for name, value in whole.metrics.items():
            assert report.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        check_gradients(engine.gradients[0], one.gradients[0])


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_a_rows_weight_multiplies_its_loss_and_does_not_count():
    world = World()
    examples = [world.example(f"r{i}") for i in range(5)]
    term = (Term(name="clipped_policy_gradient"),)

    def run(*weights):
        rows = [replace(example, weight=weight) for example, weight in zip(examples, weights, strict=True)]
        learner = OneProcess(world.student(), term)
        return learner.learn(rows), learner.engine.gradients[0]

    (plain, gradient), (doubled, twice) = run(*[1.0] * 5), run(*[2.0] * 5)
    assert doubled.loss == pytest.approx(2 * plain.loss, rel=1e-5)
    check_gradients(twice, [2 * g for g in gradient])
    lone = OneProcess(world.student(), term).learn([replace(examples[0], weight=1.0)])
    silenced, _ = run(1.0, 0.0, 0.0, 0.0, 0.0)
    assert silenced.tokens == plain.tokens
    assert silenced.loss == pytest.approx(lone.loss * lone.tokens / plain.tokens, rel=1e-5)


def test_terms_that_nothing_can_train_add_nothing():
    world = World()
    examples = [world.example(f"r{i}", teachers=("small",)) for i in range(6)]
    absent = (
        Term(name="policy_gradient", teacher="big"),
        Term(name="exact_divergence", teacher="big", of_batch=True),
        Term(name="topk_divergence", teacher="big", reduction="sequences"),
        Term(name="reference_kl", reference=True, reduction="length", length=9),
        Term(name="nll", sources=("dataset",), of_batch=True),
    )
    present = (Term(name="topk_divergence", teacher="small", weight=0.5),)
    both, alone = (OneProcess(world.student(), terms, heads=world.heads) for terms in (present + absent, present))
    cuts = [world.cut(6, 3)]
    report, expected = both.learn(examples, cuts), alone.learn(examples, cuts)
    assert report.loss == expected.loss and np.isfinite(list(report.metrics.values())).all()
    assert {name for name in report.metrics if name.startswith("loss_")} == {"loss_topk_divergence.small"}
    check_gradients(both.engine.gradients[0], alone.engine.gradients[0])


@pytest.mark.parametrize("cuts", [[[]], [[[]]], [[], []], [[[0]], []]])
def test_a_step_or_an_update_without_rows_leaves_the_weights(cuts):
    world = World()
    learner = OneProcess(world.student(), (Term(name="nll"),), updates=len(cuts))
    rows = sum(len(part) for update in cuts for part in update)
    report = learner.learn([world.example("r")], cuts)
    assert len(learner.engine.gradients) == rows and (report.tokens > 0) == (rows > 0)
    assert ("grad_norm" in report.metrics) == (rows > 0)


def test_rows_that_train_in_no_term_are_counted():
    world = World()
    examples = [world.example("scored"), world.example("refused", teachers=()), world.example("other", "dataset")]
    report = OneProcess(world.student(), (Term(name="policy_gradient"),)).learn(examples)
    assert report.dropped == {"teacher_refused": 2} and report.metrics["missing_scores"] == 1
    assert report.tokens == examples[0].rollout.loss_mask.sum()


# ---- traps -----------------------------------------------------------------------------------------------------------


def test_the_sampler_is_in_no_advantage():
    """Without a correction the gradient does not know what the sampler said, however stale it is."""
    world = World()
    terms = (
        Term(name="policy_gradient", reference=True, options={"extrapolation": 1.3}),
        Term(name="sign_gate", options={"conflict": 0.5}),
        Term(name="soft_gate"),
        Term(name="clipped_policy_gradient"),
        Term(name="exact_divergence"),
    )
    examples = [world.example(f"r{i}") for i in range(6)]
    stale = []
    for example in examples:
        noise = world.rng.normal(size=example.rollout.response_length).astype(np.float32)
        stale.append(replace(example, rollout=replace(example.rollout, logprobs=example.rollout.logprobs + 2 * noise)))
    learners = [OneProcess(world.student(), terms, heads=world.heads) for _ in range(2)]
    reports = [learner.learn(given) for learner, given in zip(learners, (examples, stale), strict=True)]
    assert reports[0].loss == reports[1].loss
    assert reports[0].metrics["mismatch"] != reports[1].metrics["mismatch"]
    for one, other in zip(*(learner.engine.gradients[0] for learner in learners), strict=True):
        assert one.equal(other)


def test_the_teacher_is_in_the_gradient():
    """Back-propagating log π_θ − log π_T itself would give a gradient that no teacher changes."""
    world = World()
    examples = [world.example(f"r{i}") for i in range(4)]
    gradients = []
    for teacher in ("big", "small"):
        learner = OneProcess(world.student(), (Term(name="policy_gradient", teacher=teacher),))
        learner.learn(examples)
        gradients.append(learner.engine.gradients[0][0])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_hidden_state_t_meets_token_t_plus_1():
    """A student that always counts up: its likelihood of counting is 1, and of anything one token late 0."""
    table = np.full((20, 20), -15.0)
    table[np.arange(19), np.arange(1, 20)] = 15.0
    up = [make_example(f"r{n}", range(n, n + 6), np.zeros(6 - prompt), prompt=prompt) for n, prompt in ((0, 1), (9, 3))]
    assert OneProcess(Bigram(table), (Term(name="nll"),)).learn(up).loss < 1e-5
    stuck = make_example("s", [4, 4, 4], np.zeros(2))
    assert OneProcess(Bigram(table), (Term(name="nll"),)).learn([stuck]).loss == pytest.approx(30, abs=1e-3)


def test_a_teacher_without_entropies_changes_no_loss_and_no_other_metric():
    """Engines that never see the whole vocabulary send none: that is not an entropy of 0."""
    world = World()
    examples = [world.example(f"r{i}", teachers=["big"]) for i in range(6)]
    examples = [replace(e, rollout=replace(e.rollout, teacher="big")) for e in examples]
    silent = [
        replace(e, scores={n: replace(s, entropy=np.zeros(0, np.float32)) for n, s in e.scores.items()})
        for e in examples
    ]
    term = (Term(name="topk_divergence"),)
    reports = [OneProcess(world.student(), term).learn(rows, [[[0, 1, 2], [3, 4, 5]]]) for rows in (examples, silent)]
    whole, without = (dict(report.metrics) for report in reports)
    assert whole.pop("teacher_entropy") > 0 and "teacher_entropy" not in without
    seconds = {name for name in whole if "seconds" in name}
    assert {n: v for n, v in whole.items() if n not in seconds} == {
        n: v for n, v in without.items() if n not in seconds
    }
    gated = (Term(name="topk_divergence", options={"teacher_entropy_above": 0.5}),)
    with pytest.raises(NotFinite, match="loss_topk_divergence is not finite"):
        OneProcess(world.student(), gated).learn(silent, [[[0, 1, 2], [3, 4, 5]]])
