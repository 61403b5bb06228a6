"""The loss terms against slow references on fresh random input: gradients, identities, and the traps of the field.

References are plain sums over probabilities in float64 numpy, and finite differences; none calls the terms' own maths.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from term_cases import Case, chunk_of, close, random_case, rows_of

from tutorloop.contracts.records import Term
from tutorloop.learner.terms import TERMS, bind_terms
from tutorloop.learner.terms.divergence import Buckets, divergence, entropy, floored
from tutorloop.learner.terms.sign_gate import SoftGate

DIRECTIONS = ["reverse", "forward", "jsd", "skew_forward", "skew_reverse"]
DIRECT = (
    [("exact_divergence", {"direction": d, "beta": 0.3}) for d in DIRECTIONS]
    + [
        ("topk_divergence", {"direction": d, "beta": 0.3, "rest": r})
        for d in DIRECTIONS
        for r in ("tail", "renormalise")
    ]
    + [
        ("exact_divergence", {"direction": "forward", "temperature": 1.7, "hinton": True}),
        ("exact_divergence", {"direction": "jsd", "entry_clip": 0.02, "teacher_entropy_above": 1.2}),
        ("topk_divergence", {"direction": "forward", "entry_clip": 0.02, "teacher_entropy_above": 1.2}),
        ("nll", {}),
        ("reference_kl", {}),
        ("clipped_policy_gradient", {}),
        ("clipped_policy_gradient", {"clip": False}),
        ("clipped_policy_gradient", {"clip_low": 0.5, "clip_high": 0.8, "dual_clip": 3.0}),
    ]
)


def slow_divergence(student, teacher, kind, beta, entry_clip=0.0):
    """[C] from logits, bucket by bucket, from the definitions."""
    found = []
    for s_row, t_row in zip(student.detach().numpy(), teacher.numpy(), strict=True):
        s, t = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (s_row, t_row))
        total = 0.0
        for a, b in zip(s, t, strict=True):
            entry = {
                "reverse": lambda a, b: a * math.log(a / b),
                "forward": lambda a, b: b * math.log(b / a),
                "jsd": lambda a, b: (
                    beta * b * math.log(b / (beta * b + (1 - beta) * a))
                    + (1 - beta) * a * math.log(a / (beta * b + (1 - beta) * a))
                ),
                "skew_forward": lambda a, b: b * math.log(b / (beta * b + (1 - beta) * a)),
                "skew_reverse": lambda a, b: a * math.log(a / ((1 - beta) * b + beta * a)),
            }[kind](a, b)
            total += min(entry, entry_clip) if entry_clip else entry
        found.append(total)
    return np.array(found)


@pytest.mark.parametrize("beta, entry_clip", [(0.1, 0.0), (0.7, 0.0), (0.4, 0.05)])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_every_divergence_matches_its_definition(kind, beta, entry_clip):
    case = random_case()
    options = {"direction": kind, "beta": beta, "entry_clip": entry_clip}
    expected = slow_divergence(case.student, case.teacher, kind, beta, entry_clip)
    close(case.run("exact_divergence", **options).loss_C, expected, 1e-12)
    single = Case(case.student.detach().float(), case.teacher.float(), case.targets, dtype=torch.float32)
    expected = slow_divergence(single.student.double(), single.teacher.double(), kind, beta, entry_clip)
    close(single.run("exact_divergence", **options).loss_C, expected, 1e-5)
    tempered = case.run("exact_divergence", temperature=1.6, hinton=True, **options).loss_C
    expected = slow_divergence(case.student / 1.6, case.teacher / 1.6, kind, beta, entry_clip)
    close(tempered, 1.6**2 * expected, 1e-12)
    ids = case.rows.topk_ids_CK
    inside = slow_divergence(case.student.gather(1, ids), case.teacher.gather(1, ids), kind, beta, entry_clip)
    close(case.run("topk_divergence", rest="renormalise", **options).loss_C, inside, 1e-12)


def test_the_ends_of_beta_are_the_plain_divergences():
    case = random_case()
    p, q = Buckets.of(case.student.log_softmax(1)), Buckets.of(case.teacher.log_softmax(1))
    assert divergence(p, q, "jsd", 0.0).equal(divergence(p, q, "forward"))
    assert divergence(p, q, "jsd", 1.0).equal(divergence(p, q, "reverse"))
    assert divergence(p, q, "skew_forward", 0.0).equal(divergence(p, q, "forward"))
    assert divergence(p, q, "skew_reverse", 0.0).equal(divergence(p, q, "reverse"))
    for kind in ("skew_forward", "skew_reverse"):
        assert not divergence(p, q, kind, 1.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_buckets_without_mass_give_finite_losses_and_gradients(kind, beta, dtype):
    inf = float("inf")
    logits = torch.tensor([[0.0, 1.0, -inf], [0.0, -300.0, 2.0], [0.0, 0.0, -inf]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, -inf, 1.0], [0.5, 1.0, -300.0], [1.0, 0.0, -inf]], dtype=dtype)
    for clip in (0.0, 0.05):
        p, q = (Buckets.of(floored(x.log_softmax(1))) for x in (logits, teacher))
        loss = divergence(p, q, kind, beta, clip)
        (gradient,) = torch.autograd.grad(loss.sum() + 0 * logits[0, 0], logits)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
        assert torch.isfinite(entropy(q)).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_support_of_the_whole_vocabulary_leaves_an_empty_tail(direction):
    case = random_case(vocab=5, k=5)
    loss = case.run("topk_divergence", direction=direction).loss_C
    close(loss, case.run("exact_divergence", direction=direction).loss_C, 1e-9)
    assert torch.isfinite(case.gradient(loss)).all()


@pytest.mark.parametrize("name, options", DIRECT)
def test_gradients_match_finite_differences(name, options):
    case = random_case()
    # A ratio inside, outside and far outside the clips, and none within a finite step of one.
    jumps = torch.tensor([0.0, 0.1, -0.1, 1.5, -1.5, 2.5], dtype=torch.float64)
    case.rows = replace(case.rows, old_C=case.chunk().sampled_C.detach() + jumps)
    (term,) = bind_terms((Term(name=name, options=options, reference=True),))
    assert torch.autograd.gradcheck(lambda x: term(case.chunk(x), case.rows).loss_C, case.student)


def slow_advantage(name, options, d, row):
    """A of one token from the definitions; `row`: teacher, reference, advantage, gate."""
    x = row["teacher"] - row["reference"]
    if name == "soft_gate":
        return row["gate"] * d
    if name == "policy_gradient":
        return d + (options.get("extrapolation", 1.0) - 1) * x
    mode, product = options.get("mode", "live_ref"), row["advantage"] * d
    scale = 1.0 if product == 0 else options.get("agree", 1.8) if product > 0 else options.get("conflict", 1.0)
    if mode == "blend" and product < 0:
        return (d + options["blend"] * row["advantage"]) / (1 + options["blend"])
    if mode != "frozen_ref":
        return scale * d
    advantage = d + (scale - 1) * x
    return d if options.get("guard", True) and advantage * d <= 0 else advantage


@pytest.mark.parametrize(
    "name, options",
    [
        ("policy_gradient", {}),
        ("policy_gradient", {"extrapolation": 1.25}),
        ("sign_gate", {}),
        ("sign_gate", {"conflict": 0.5}),
        ("sign_gate", {"mode": "frozen_ref"}),
        ("sign_gate", {"mode": "frozen_ref", "conflict": 0.0, "guard": False}),
        ("sign_gate", {"mode": "blend", "blend": 0.7}),
        ("soft_gate", {}),
    ],
)
def test_policy_gradients_are_the_advantage_times_the_score(name, options):
    """∂loss/∂logits = −A (onehot − π), with A computed token by token and no gradient through it."""
    case = random_case(tokens=40)
    gradient = case.gradient(case.run(name, **options).loss_C)
    sampled, probabilities = case.chunk().sampled_C.tolist(), case.student.detach().softmax(1)
    rows = {k: getattr(case.rows, f"{k}_C").tolist() for k in ("teacher", "reference", "advantage", "gate")}
    for i, target in enumerate(case.targets.tolist()):
        row = {key: values[i] for key, values in rows.items()}
        advantage = slow_advantage(name, options, row["teacher"] - sampled[i], row)
        score = -probabilities[i]
        score[target] += 1
        close(gradient[i], -advantage * score, 1e-12)


def every_word(student, teacher, reference=None):
    """A case with one token per word of the vocabulary, all with the same prefix: its π_θ-weighted sum is exact."""
    vocab = student.shape[1]
    grown = [None if x is None else x.detach().expand(vocab, -1) for x in (student, teacher, reference)]
    return Case(grown[0], grown[1], torch.arange(vocab), grown[2])


def expected_gradient(case, name, **options):
    probabilities = case.student.detach().softmax(1)[0]
    return case.gradient(case.run(name, **options).loss_C * probabilities).sum(0)


def test_policy_gradient_descends_the_reverse_kl_and_not_the_forward_one():
    """Summed over y ~ π_θ, −A ∇log π is ∇KL(π_θ‖π_T), here by finite differences. The other KL's differs."""
    case = random_case(tokens=1)
    found = expected_gradient(every_word(case.student, case.teacher), "policy_gradient")
    step = 1e-5
    bumps = torch.eye(len(found), dtype=torch.float64) * step

    def slope(kind, bump):
        ahead, behind = (slow_divergence(case.student.detach() + x, case.teacher, kind, 0.5) for x in (bump, -bump))
        return (ahead - behind)[0] / (2 * step)

    close(found, [slope("reverse", bump) for bump in bumps], 1e-8)
    assert (found - torch.tensor([slope("forward", bump) for bump in bumps])).abs().max() > 1e-2


@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 1.0, 1.25, 1.8])
def test_the_extrapolated_optimum_is_the_tilted_teacher(extrapolation):
    """The expected gradient vanishes at π* ∝ π_ref^(1−λ) π_T^λ, and (λ ≠ 1) not at the teacher."""
    case = random_case(tokens=1)
    reference = random_case(tokens=1).teacher
    best = (1 - extrapolation) * reference + extrapolation * case.teacher
    at_best = every_word(best, case.teacher, reference)
    close(expected_gradient(at_best, "policy_gradient", extrapolation=extrapolation), 0.0, 1e-12)
    at_teacher = every_word(case.teacher, case.teacher, reference)
    moves = expected_gradient(at_teacher, "policy_gradient", extrapolation=extrapolation).abs().max() > 1e-3
    assert moves == (extrapolation != 1.0)


def test_extrapolation_from_the_student_itself_is_a_longer_step():
    case = random_case()
    case.rows = replace(case.rows, reference_C=case.chunk().sampled_C.detach())
    close(
        case.run("policy_gradient", extrapolation=1.8).loss_C, 1.8 * case.run("policy_gradient").loss_C.detach(), 1e-12
    )


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.signal not in ("none", "views")])
def test_the_expected_gradient_depends_on_the_teacher(name):
    """Back-propagating a log-ratio itself leaves, on average, a gradient without the teacher in it (AReaL's trap)."""
    case = random_case(tokens=1)
    gradients = []
    for teacher in (case.teacher, case.teacher.roll(1, 1)):
        words = every_word(case.student, teacher)
        gradients.append(expected_gradient(words, name))
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


def test_the_temperature_is_not_ignored_on_either_side():
    """A tempered divergence is that of two tempered models, not of a tempered student and a plain teacher."""
    case = random_case()
    tempered = case.run("exact_divergence", direction="forward", temperature=2.0).loss_C
    half = slow_divergence(case.student / 2, case.teacher, "forward", 0.5)
    assert np.abs(tempered.detach().numpy() - half).min() > 1e-4
    assert not case.run("exact_divergence", direction="forward", temperature=2.0).metrics["reverse_kl"].requires_grad
    plain = slow_divergence(case.student, case.teacher, "reverse", 0.5)
    close(case.run("exact_divergence", temperature=2.0).metrics["reverse_kl"], plain, 1e-12)


def test_the_tail_bucket_counts_mass_outside_the_support():
    """Never negative, never above the full divergence; it sees a student that agrees on the support alone."""
    case = random_case(tokens=40)
    ids = case.rows.topk_ids_CK
    for direction in DIRECTIONS:
        coarse = case.run("topk_divergence", direction=direction).loss_C
        full = case.run("exact_divergence", direction=direction).loss_C
        assert (coarse >= -1e-12).all() and (coarse <= full + 1e-12).all()
        assert (case.run("topk_divergence", direction=direction, rest="renormalise").loss_C >= -1e-12).all()
    agreeing = (case.teacher + 3.0).scatter(1, ids, case.teacher.gather(1, ids))  # same inside, more mass outside
    agreeing = Case(agreeing, case.teacher, case.targets, support=ids)
    assert (agreeing.run("topk_divergence").loss_C > 1e-3).all()
    close(agreeing.run("topk_divergence", rest="renormalise").loss_C, 0.0, 1e-12)
    p, q = (x.log_softmax(1).gather(1, ids) for x in (case.student.detach(), case.teacher))
    partial = (p.exp() * (p - q)).sum(1)
    assert (partial < 0).any(), "the sum that has no form here can be negative"


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_vanishing_tail_keeps_its_gradient(direction):
    """K = V − 1 in float32 with the tail far below machine epsilon, on the student's side, the teacher's, and both:
    the gradient is the exact one in float64 for a teacher whose tail is machine epsilon."""
    epsilon = np.log(torch.finfo(torch.float32).eps)
    flat, peaked = torch.zeros(1, 8), torch.tensor([[0.0] * 7 + [-40.0]])
    for student, teacher in ((flat, peaked), (peaked, flat), (peaked, peaked)):
        case = Case(student, teacher, [0], support=torch.arange(7)[None], dtype=torch.float32)
        gradient = case.gradient(case.run("topk_divergence", direction=direction).loss_C)
        reference = student.double().requires_grad_()
        p, q = reference.log_softmax(1), teacher.double().log_softmax(1).clamp(min=epsilon)
        p, q = (p, q) if direction == "reverse" else (q, p)
        (p.exp() * (p - q)).sum().backward()
        assert reference.grad is not None and reference.grad[0, 7] != 0
        torch.testing.assert_close(gradient[0, 7].double(), reference.grad[0, 7], rtol=1e-5, atol=0)
        close(gradient, reference.grad, 1e-6)


def test_the_sign_gate_holds_plain_distillation_and_opdvr():
    case = random_case(tokens=60)
    chunk, plain = case.chunk(), case.run("policy_gradient").loss_C
    for mode in ("live_ref", "frozen_ref"):
        assert case.run("sign_gate", agree=1.0, conflict=1.0, mode=mode).loss_C.equal(plain)
    d, z = case.rows.teacher_C - chunk.sampled_C.detach(), case.rows.advantage_C.sign()
    opdvr = -(z * torch.relu(z * d)) * chunk.sampled_C
    found = case.run("sign_gate", agree=1.0, conflict=0.0)
    assert found.loss_C.equal(opdvr)
    assert 0 < found.metrics["gate_conflict"].mean() < 1
    case.rows = replace(case.rows, advantage_C=torch.zeros_like(d))  # the verifier abstained
    neutral = case.run("sign_gate", agree=1.8, conflict=0.0)
    assert neutral.loss_C.equal(plain) and neutral.metrics["gate_neutral"].all()


def test_the_guard_takes_back_a_turned_update_and_counts_it():
    """Columns: agree and turned round, agree and only smaller, agree and to nothing, conflict, d = 0, no verifier."""
    d = torch.tensor([0.2, -0.4, 0.4, -0.3, 0.0, 0.5], dtype=torch.float64)
    delta = torch.tensor([-0.5, 0.2, -0.5, 9.0, 1.0, 9.0], dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    current = torch.full_like(d, -1.0)
    rows = rows_of(current, teacher=current + d, reference=current + d - delta, advantage=sign)
    for guard, expected in (
        (False, [-0.2, -0.24, 0.0, -0.3, 0.0, 0.5]),
        (True, [0.2, -0.24, 0.4, -0.3, 0.0, 0.5]),
    ):
        term = Term(name="sign_gate", options={"mode": "frozen_ref", "guard": guard}, reference=True)
        output = bind_terms((term,))[0](chunk_of(current), rows)
        close(output.loss_C, expected, 1e-12)
        assert output.metrics["gate_guard"].tolist() == ([1.0, 0.0, 1.0, 0.0, 0.0, 0.0] if guard else [0.0] * 6)


def test_the_soft_gate_moves_weight_and_keeps_the_mass():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for beta in (1e-3, 1.0, 20.0):
        for sign in (-0.7, 2.0):
            d = rng.normal(size=rng.integers(2, 30))
            gate = SoftGate(sharpness=beta).gate(d, sign).factors
            raw = 1 / (1 + np.exp(-beta * np.sign(sign) * d / np.median(np.abs(d))))
            np.testing.assert_allclose(gate, raw * np.abs(d).sum() / (raw * np.abs(d)).sum(), rtol=1e-9)
            np.testing.assert_allclose(np.abs(gate * d).sum(), np.abs(d).sum(), rtol=1e-9)
    ones = [(np.array([1.0, -2.0]), 0.0), (np.array([0.0, 0.0, 5.0]), 1.0), (np.zeros(0), 1.0), (-np.ones(4), 1.0)]
    for d, sign in ones:
        assert SoftGate(sharpness=1e3).gate(d, sign).factors.tolist() == [1.0] * len(d)


def test_the_clipped_gradient_at_ratio_one_is_the_advantage_times_the_score():
    case = random_case()
    case.rows = replace(case.rows, old_C=case.chunk().sampled_C.detach())
    output = case.run("clipped_policy_gradient", dual_clip=3.0)
    onehot = torch.nn.functional.one_hot(case.targets, case.student.shape[1])
    score = onehot - case.student.detach().softmax(1)
    close(case.gradient(output.loss_C), -case.rows.advantage_C[:, None] * score, 1e-12)
    assert not output.metrics["clip_fraction"].any()


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize("clip", [True, False])
def test_the_clips_match_the_published_minimum(clip, dual_clip):
    """−min(r A, clip(r) A), and with a dual clip max(…, c A) where A < 0; cut off from the gradient where counted."""
    case = random_case(tokens=200)
    output = case.run("clipped_policy_gradient", clip=clip, dual_clip=dual_clip, clip_high=0.28)
    ratios = (case.chunk().sampled_C.detach() - case.rows.old_C).exp().tolist()
    slopes = case.gradient(output.loss_C).abs().sum(1).tolist()
    for i, (ratio, advantage) in enumerate(zip(ratios, case.rows.advantage_C.tolist(), strict=True)):
        gain = ratio * advantage
        if clip:
            gain = min(gain, min(max(ratio, 0.8), 1.28) * advantage)
        if dual_clip and advantage < 0:
            gain = max(gain, dual_clip * advantage)
        assert math.isclose(output.loss_C[i].item(), -gain, rel_tol=1e-12)
        clipped = gain != ratio * advantage
        assert output.metrics["clip_fraction"][i].item() == clipped == (slopes[i] == 0)


def test_an_absurd_ratio_gives_no_infinity():
    current = torch.tensor([-1.0, -1.0, -900.0], requires_grad=True)
    rows = rows_of(current, old=[-900.0, -900.0, -1.0], advantage=[0.0, -1.0, 1.0])
    (term,) = bind_terms((Term(name="clipped_policy_gradient", options={"clip": False}),))
    loss = term(chunk_of(current), rows).loss_C
    loss.sum().backward()
    assert torch.isfinite(loss).all() and current.grad is not None and torch.isfinite(current.grad).all()


def test_metrics_have_no_gradient_and_one_value_a_token():
    case = random_case()
    for name in TERMS:
        output = case.run(name)
        for metric, values in {"loss": output.loss_C, **output.metrics}.items():
            assert values.shape == (6,), (name, metric)
            assert values.requires_grad == (metric == "loss"), (name, metric)
            assert torch.isfinite(values).all(), (name, metric)
