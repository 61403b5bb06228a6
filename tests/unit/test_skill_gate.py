"""The skill gate against SGSD's golden numbers, gradient included, and against slow references on random rollouts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import OneProcess, World, check_gradients
from term_cases import PRECISIONS, close, golden, rows_of

from tutorloop.contracts.records import Term
from tutorloop.learner.terms import bind_terms
from tutorloop.learner.terms.base import StudentChunk
from tutorloop.learner.terms.skill_gate import SkillGate, local_divergence, local_support

TERM = SkillGate(tau=1.0, delta_clip=3.0, confidence=0.05)


def case(dtype):
    """The golden rollouts: student [B,R], views [B,R,W], mask, outcome signs and the weights of retrieval."""
    inputs, expected = golden("sgsd_multi_teacher_gate")
    student = torch.tensor(inputs["student_logp"], dtype=dtype, requires_grad=True)
    views = torch.tensor(inputs["teacher_logp"], dtype=dtype).transpose(1, 2)
    mask = torch.tensor(inputs["token_mask"], dtype=dtype).bool()
    signs = [1.0 if reward > 0 else -1.0 for reward in inputs["reward"]]
    return inputs, expected, student, views, mask, signs


def softmax(scores):
    raised = np.exp(np.asarray(scores) - np.max(scores))
    return raised / raised.sum()


def run(student_C, views_CW, gate_CW, **options):
    bound = bind_terms((Term(name="skill_gate", options=options),))[0]
    rows = replace(rows_of(student_C), views_CW=views_CW, view_gate_CW=gate_CW)
    return bound(StudentChunk(logprobs_CV=student_C[:, None], sampled_C=student_C), rows)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_the_golden_rollouts(dtype, tolerance):
    inputs, expected, student, views, mask, signs = case(dtype)
    total = student.new_zeros(())
    for b, sign in enumerate(signs):
        weights = softmax(inputs["retrieval_scores"][b])
        np.testing.assert_allclose(weights, expected["weights"][b], atol=1e-9)
        d = (views[b] - student[b, :, None]).detach().double().numpy()
        gated = TERM.gate(d[mask[b].numpy()], sign)
        np.testing.assert_array_equal(gated.factors, expected["polarity"][b])
        assert gated.polarities == tuple(int(p) for p in expected["polarity"][b])
        score = np.clip(d[mask[b].numpy()], -3, 3).mean(0)
        np.testing.assert_allclose(score, expected["support_score"][b], atol=tolerance)
        np.testing.assert_allclose(
            gated.figures["skill_support"], np.mean(expected["support_score"][b]), atol=tolerance
        )
        gate = torch.tensor(weights * gated.factors, dtype=dtype).expand_as(views[b])
        loss = run(student[b], views[b], gate).loss_C
        total = total + loss[mask[b]].mean() / len(signs)
        for k in range(views.shape[2]):
            alone = torch.zeros_like(gate)
            alone[:, k] = 1.0
            token = run(student[b], views[b], alone).loss_C
            close(token, expected["token_loss"][b][k], tolerance)
            close(token[mask[b]].mean(), expected["row_loss"][b][k], tolerance)
    close(total, expected["loss"], tolerance)
    (gradient,) = torch.autograd.grad(total, student)
    close(gradient, expected["grad_student_logp"], tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_the_gate_s_curve_and_its_bound(dtype, tolerance):
    _, expected = golden("sgsd_multi_teacher_gate")
    delta = torch.tensor(expected["gate_curve_delta"], dtype=dtype)
    student = torch.zeros_like(delta, requires_grad=True)
    loss = run(student, delta[:, None], torch.ones_like(delta)[:, None]).loss_C
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    close(gradient.abs(), expected["gate_curve_grad_magnitude"], tolerance)
    assert (loss >= 0).all() and (loss <= math.log(2)).all()


def local_case(inputs, dtype):
    """The shared toy: student's and view's logprobs [C,V], the sampled tokens, and K."""
    toy = inputs["shared_toy"]
    models = (torch.tensor(toy[name], dtype=dtype).log_softmax(1) for name in ("student_logits", "teacher_logits"))
    return *models, torch.tensor(toy["sampled_tokens"]), inputs["local_support_top_k"]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_the_local_support_of_a_view(dtype, tolerance):
    inputs, expected = golden("sgsd_multi_teacher_gate")
    student, teacher, targets, k = local_case(inputs, dtype)
    top = teacher.topk(k, 1)
    sampled = teacher.gather(1, targets[:, None])
    rows = replace(
        rows_of(student[:, 0]),
        targets_C=targets,
        views_CW=sampled,
        view_gate_CW=torch.ones_like(sampled),
        topk_ids_CK=top.indices,
        topk_logprobs_CK=top.values,
    )
    _, logprobs = local_support(rows)
    assert (~logprobs.isneginf()).sum((1, 2)).tolist() == expected["local_support_size"]
    close(local_divergence(student, rows)[:, 0], expected["local_support_divergence"], tolerance)
    chunk = StudentChunk(logprobs_CV=student, sampled_C=student.gather(1, targets[:, None])[:, 0])
    bound = bind_terms((Term(name="skill_gate", options={"support": "local"}),))[0]
    close(bound(chunk, rows).loss_C, expected["local_gate_token_loss"], tolerance)


def test_polarity_is_outcome_times_stance_on_random_rollouts():
    rng = np.random.default_rng()
    for _ in range(50):
        d = rng.normal(0, rng.choice([0.02, 0.3, 4.0]), (rng.integers(1, 30), 5))
        sign = rng.choice([-1.0, 0.0, 1.0])
        gated = TERM.gate(d, sign)
        for k in range(5):
            mean = sum(min(3.0, max(-3.0, value)) for value in d[:, k]) / len(d)
            stance = 0 if abs(mean) <= 0.05 else 1 if mean > 0 else -1
            assert gated.factors[k] == sign * stance == gated.polarities[k]
        shares = [gated.figures[f"skill_{name}"] for name in ("helpful", "harmful", "neutral")]
        assert math.isclose(sum(shares), 1.0)
        trusted = replace(TERM, validated=False).gate(d, sign)
        assert (trusted.factors == 1).all() and trusted.polarities == gated.polarities


def test_a_rollout_without_a_token_that_counts_has_no_stance():
    gated = TERM.gate(np.zeros((0, 3)), 1.0)
    assert gated.polarities == (0, 0, 0) and not gated.factors.any()


def with_views(world, examples, count):
    """Each example with random views of its own, the student's logprobs off by something, and random weights."""
    seen = []
    for example in examples:
        own = example.scores["big"].logprobs
        views = own[:, None] + world.rng.normal(0, 1.5, (len(own), count)).astype(np.float32)
        weights = softmax(world.rng.normal(size=count)).astype(np.float32)
        scores = replace(example.scores["big"], views=views, view_weights=weights)
        seen.append(replace(example, scores={**example.scores, "big": scores}, weight=1.0))
    return seen


@pytest.mark.parametrize("parts", [1, 3])
def test_the_learner_gates_each_rollout_by_its_own_views(parts):
    """Loss, gradient and stances of a step against one rollout and one view at a time, in float64."""
    world = World()
    examples = with_views(world, [world.example(f"r{i}") for i in range(7)], 4)
    examples = [replace(e, advantage=float(np.sign(e.advantage))) for e in examples]
    term = Term(name="skill_gate", teacher="big", reduction="sequences", label="gate")
    learner = OneProcess(world.student(), (term,))
    report = learner.learn(examples, [world.cut(len(examples), parts)])

    slow = world.student(torch.float64)
    logprobs, total, stances = slow.logprobs(), 0.0, {}
    for example in examples:
        rollout, scores = example.rollout, example.scores["big"]
        tokens = torch.from_numpy(rollout.token_ids).long()
        last, targets = tokens[rollout.prompt_length - 1 : -1], tokens[rollout.prompt_length :]
        on = torch.from_numpy(rollout.loss_mask)
        current = logprobs[last, targets][on]
        own = []
        for k, weight in enumerate(scores.view_weights):
            delta = torch.from_numpy(scores.views[:, k]).double()[on] - current
            mean = float(delta.detach().clamp(-3, 3).mean())
            stance = 0 if abs(mean) <= 0.05 else 1 if mean > 0 else -1
            own.append(int(example.advantage) * stance)
            bounded = math.log(2) - torch.nn.functional.softplus(-(delta**2) / 2)
            total = total + float(weight) * own[-1] * bounded.mean() / len(examples)
        stances[rollout.rollout_id] = tuple(own)
    assert report.polarities == stances
    np.testing.assert_allclose(report.loss, total.item(), atol=1e-5)
    check_gradients(learner.engine.gradients[0], torch.autograd.grad(total, list(slow.parameters())))
    helpful = np.mean([[p > 0 for p in row] for row in stances.values()])
    np.testing.assert_allclose(report.metrics["skill_helpful"], helpful, atol=1e-9)


def test_a_rollout_without_views_is_left_out_and_counted():
    world = World()
    examples = with_views(world, [world.example(f"r{i}") for i in range(3)], 2)
    examples[1] = replace(examples[1], scores={})
    term = Term(name="skill_gate", teacher="big", reduction="sequences")
    report = OneProcess(world.student(), (term,)).learn(examples)
    assert report.rollouts == 2 and report.dropped == {"teacher_refused": 1} and len(report.polarities) == 2


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_stances_on_the_local_support_read_renormalised_logprobs(dtype, tolerance):
    inputs, expected = golden("sgsd_multi_teacher_gate")
    student, teacher, targets, k = local_case(inputs, dtype)
    top, sampled = teacher.topk(k, 1), teacher.gather(1, targets[:, None])
    known = {"topk_ids_CK": top.indices, "topk_logprobs_CK": top.values, "views_CW": sampled}
    rows = replace(rows_of(student[:, 0]), targets_C=targets, **known)
    chunk = StudentChunk(logprobs_CV=student, sampled_C=student.gather(1, targets[:, None])[:, 0])
    wanted = np.subtract(expected["local_teacher_logp_sampled"], expected["local_student_logp_sampled"])
    close(SkillGate(support="local").gap(chunk, rows)[:, 0], wanted, tolerance)
    close(TERM.gap(chunk, rows)[:, 0], (sampled[:, 0] - chunk.sampled_C).double(), tolerance)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_learner_on_the_local_support(parts):
    """Two views with top-k ids of their own: stances, loss and gradient against one token at a time."""
    world, k, views = World(), 3, 2
    examples = []
    for example in (world.example(f"r{i}") for i in range(5)):
        rollout = example.rollout
        tokens = torch.from_numpy(rollout.token_ids).long()
        last, targets = tokens[rollout.prompt_length - 1 : -1], tokens[rollout.prompt_length :]
        full = world.normal(len(targets), views, world.vocab).log_softmax(2)
        top = full.topk(k, 2)
        scores = replace(
            example.scores["big"],
            views=full.gather(2, targets[:, None, None].expand(-1, views, 1))[:, :, 0].numpy(),
            view_weights=np.asarray([0.7, 0.3], np.float32),
            topk_ids=top.indices.flatten(1).int().numpy(),
            topk_logprobs=top.values.flatten(1).numpy(),
        )
        sign = float(np.sign(example.advantage))
        examples.append((replace(example, scores={"big": scores}, weight=1.0, advantage=sign), full, last, targets))
    term = Term(name="skill_gate", teacher="big", reduction="sequences", options={"support": "local"})
    learner = OneProcess(world.student(), (term,))
    report = learner.learn([case[0] for case in examples], [world.cut(len(examples), parts)])

    slow = world.student(torch.float64)
    logprobs, total, stances = slow.logprobs(), 0.0, {}
    for example, full, last, targets in examples:
        own = []
        on = np.flatnonzero(example.rollout.loss_mask)
        for w, weight in enumerate((0.7, 0.3)):
            gaps, losses = [], []
            for t in on:
                best = full[t, w].topk(k).indices.tolist()
                ids = sorted({*best, int(targets[t])})
                p, q = logprobs[last[t]][ids].log_softmax(0), full[t, w, ids].double().log_softmax(0)
                at = ids.index(int(targets[t]))
                gaps.append(float((q[at] - p[at]).detach()))
                divergence = (q.exp() * (q - p)).sum()
                losses.append(math.log(2) - torch.nn.functional.softplus(-(divergence**2) / 2))
            mean = float(np.clip(gaps, -3, 3).mean())
            own.append(int(example.advantage) * (0 if abs(mean) <= 0.05 else 1 if mean > 0 else -1))
            total = total + weight * own[-1] * torch.stack(losses).mean() / len(examples)
        stances[example.rollout.rollout_id] = tuple(own)
    assert report.polarities == stances
    np.testing.assert_allclose(report.loss, total.item(), atol=1e-5)
    check_gradients(learner.engine.gradients[0], torch.autograd.grad(total, list(slow.parameters())))


def test_a_view_that_was_not_shown_has_no_stance_no_loss_and_no_figure():
    """Beside a view of weight 0, in its midst, the step is that of the others alone."""
    world = World()
    alone = with_views(world, [world.example(f"r{i}") for i in range(4)], 2)
    alone = [replace(e, advantage=float(np.sign(e.advantage))) for e in alone]
    beside = []
    for example in alone:
        scores = example.scores["big"]
        views = np.insert(scores.views, 1, -9.0, axis=1)
        weights = np.insert(scores.view_weights, 1, 0.0)
        own = {**example.scores, "big": replace(scores, views=views, view_weights=weights)}
        beside.append(replace(example, scores=own))
    term = Term(name="skill_gate", teacher="big", reduction="sequences")
    for options in ({}, {"validated": False}):
        terms = (replace(term, options=options),)
        learners = [OneProcess(world.student(), terms) for _ in range(2)]
        one, other = (learner.learn(given) for learner, given in zip(learners, (alone, beside), strict=True))
        np.testing.assert_allclose(one.loss, other.loss, atol=1e-6)
        check_gradients(learners[1].engine.gradients[0], [g.double() for g in learners[0].engine.gradients[0]])
        assert other.polarities == {name: (first, None, last) for name, (first, last) in one.polarities.items()}
        names = [name for name in one.metrics if name.startswith(("skill_helpful", "skill_support", "skill_right"))]
        assert {n: other.metrics[n] for n in names} == pytest.approx({n: one.metrics[n] for n in names})
