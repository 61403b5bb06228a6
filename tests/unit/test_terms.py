"""The loss terms, through the functions that training runs, against the golden numbers and against themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.records import Term
from tutorloop.learner.terms import TERMS, bind_terms
from tutorloop.learner.terms.base import StudentChunk, TokenRows

GOLDEN = Path(__file__).parents[1] / "golden"
PRECISIONS = [(torch.float64, None), (torch.float32, 1e-5)]


def golden(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    return case["inputs"], case["expected"], case["tol"]


def run(name, student_logits, rows, **options):
    """Token losses of a term by its name, from logits that may need a gradient."""
    (term,) = bind_terms((Term(name=name, options=options),))
    logprobs = student_logits.log_softmax(1)
    sampled = logprobs.gather(1, rows.targets_C[:, None]).squeeze(1)
    return term(StudentChunk(logprobs_CV=logprobs, sampled_C=sampled), rows)


def rows_of(teacher_logits, targets, behaviour=None, support=None):
    """What a perfect teacher would send about `targets`; `support` int64 [C,K], by default its best two."""
    teacher = teacher_logits.log_softmax(1)
    ids = teacher.topk(2, 1).indices if support is None else support
    sampled = teacher.gather(1, targets[:, None]).squeeze(1)
    return TokenRows(
        targets_C=targets,
        behaviour_C=sampled if behaviour is None else behaviour,
        teacher_C=sampled,
        topk_ids_CK=ids,
        topk_logprobs_CK=teacher.gather(1, ids),
        teacher_logprobs_CV=teacher,
    )


def random_case(seed, tokens=6, vocab=11, k=4):
    print("seed", seed)
    rng = np.random.default_rng(seed)
    student, teacher = (torch.from_numpy(rng.normal(size=(tokens, vocab)) * 2) for _ in range(2))
    targets = torch.from_numpy(rng.integers(0, vocab, tokens))
    behaviour = torch.from_numpy(-rng.random(tokens) * 4)
    support = torch.from_numpy(np.stack([rng.permutation(vocab)[:k] for _ in range(tokens)]))
    return student, teacher, targets, behaviour, support


def close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_policy_gradient_matches_golden(dtype, tolerance):
    inputs, expected, tol = golden("opd_thinking_machines")
    student = torch.tensor(inputs["student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(inputs["teacher_logits"], dtype=dtype)
    targets = torch.tensor(inputs["sampled_tokens"])
    rows = rows_of(teacher, targets, torch.tensor(inputs["sampling_logprobs"], dtype=dtype))
    output = run("policy_gradient", student, rows)
    tolerance = tolerance or tol
    close(output.loss_C.mean(), expected["recomputed_tis2_loss_token_mean"], tolerance)
    close(output.metrics["importance_weight"], expected["tis2_weight"], tolerance)
    close(-output.metrics["reverse_kl"], expected["advantages_recomputed_current_policy"], tolerance)
    output.loss_C.sum().backward()
    weighted = torch.tensor(expected["tis2_weight"]) * torch.tensor(expected["advantages_recomputed_current_policy"])
    onehot = torch.nn.functional.one_hot(targets, student.shape[1])
    gradient = -weighted[:, None] * (onehot - student.detach().softmax(1))  # −w A ∇log π
    close(student.grad, gradient.double(), max(tolerance, 1e-7))


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_estimators_match_golden(dtype, tolerance):
    inputs, expected, tol = golden("reverse_kl")
    student = torch.tensor(inputs["student_logits"], dtype=dtype)
    rows = rows_of(torch.tensor(inputs["teacher_logits"], dtype=dtype), torch.tensor(inputs["sampled_tokens"]))
    metrics = run("policy_gradient", student, rows).metrics
    close(metrics["reverse_kl"], expected["k1"], tolerance or tol)
    close(metrics["reverse_kl_k3"], expected["k3"], tolerance or tol)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize(
    "direction, name, key", [("reverse", "reverse_kl", "per_token_rkl"), ("forward", "forward_kl", "per_token_fkl")]
)
def test_exact_divergence_matches_golden_with_its_gradient(dtype, tolerance, direction, name, key):
    inputs, expected, tol = golden(name)
    student = torch.tensor(inputs["student_logits"], dtype=dtype, requires_grad=True)
    rows = rows_of(torch.tensor(inputs["teacher_logits"], dtype=dtype), torch.tensor(inputs["sampled_tokens"]))
    output = run("exact_divergence", student, rows, direction=direction)
    close(output.loss_C, expected[key], tolerance or tol)
    close(output.metrics["reverse_kl"], golden("reverse_kl")[1]["per_token_rkl"], tolerance or tol)
    output.loss_C.sum().backward()
    close(student.grad, expected["grad_sum_wrt_student_logits"], tolerance or tol)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("owner", ["teacher", "student"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_topk_divergence_matches_golden(dtype, tolerance, owner, k):
    inputs, expected, tol = golden("topk_reverse_kl")
    student, teacher = (torch.tensor(inputs[f"{who}_logits"], dtype=dtype) for who in ("student", "teacher"))
    support = torch.tensor(expected[f"{owner}_top{k}_idx"])
    rows = rows_of(teacher, torch.zeros(len(student), dtype=torch.int64), support=support)
    for direction, short in (("reverse", "rkl"), ("forward", "fkl")):
        output = run("topk_divergence", student, rows, direction=direction)
        close(output.loss_C, expected[f"{owner}_top{k}_tail_{short}"], tolerance or tol)
        if k == student.shape[1] - 1:
            close(output.loss_C, expected[f"full_{short}"], tolerance or tol)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name, options",
    [
        ("exact_divergence", {"direction": "reverse"}),
        ("exact_divergence", {"direction": "forward"}),
        ("topk_divergence", {"direction": "reverse"}),
        ("topk_divergence", {"direction": "forward"}),
    ],
)
def test_gradients_match_finite_differences(name, options, seed):
    student, teacher, targets, behaviour, support = random_case(seed)
    rows = rows_of(teacher, targets, behaviour, support)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: run(name, logits, rows, **options).loss_C.sum(), student)


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_descends_the_reverse_kl_on_policy(seed):
    """Summed over y ~ π_θ, −w A ∇log π is ∇KL(π_θ‖π_T), taken here by finite differences."""
    student, teacher, *_ = random_case(seed, tokens=1)
    vocab = student.shape[1]
    logits = student.repeat(vocab, 1).requires_grad_()
    targets = torch.arange(vocab)
    logprobs = student.log_softmax(1)[0]
    loss = run("policy_gradient", logits, rows_of(teacher.repeat(vocab, 1), targets, logprobs)).loss_C
    (loss * logprobs.exp()).sum().backward()

    def kl(x):
        return (x.softmax(1) * (x.log_softmax(1) - teacher.log_softmax(1))).sum()

    step = 1e-5
    bumps = torch.eye(vocab, dtype=torch.float64) * step
    expected = torch.stack([(kl(student + bump) - kl(student - bump)) / (2 * step) for bump in bumps])
    close(logits.grad.sum(0), expected, 1e-8)


def test_the_weight_is_truncated_and_carries_no_gradient():
    student = torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rows = rows_of(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), torch.tensor([-5.0]).double())
    output = run("policy_gradient", student, rows, importance_clip=3.0)
    assert output.metrics["importance_weight"].item() == 3.0
    assert output.metrics["clipped_share"].item() == 1.0
    output.loss_C.sum().backward()
    p = student.detach().softmax(1)
    advantage = np.log(0.5) - p[0, 0].log()
    close(student.grad[0, 0], -3.0 * advantage * (1 - p[0, 0]), 1e-12)


@pytest.mark.parametrize("name", list(TERMS))
def test_the_gradient_depends_on_the_teacher(name):
    student, teacher, targets, behaviour, support = random_case(5)
    gradients = []
    for logits in (teacher, teacher.roll(1, 0)):
        leaf = student.clone().requires_grad_()
        run(name, leaf, rows_of(logits, targets, behaviour, support)).loss_C.sum().backward()
        gradients.append(leaf.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_the_tail_bucket_counts_mass_outside_the_support(seed):
    """Never negative, never above the full divergence; it sees a student that agrees on the support alone."""
    student, teacher, targets, behaviour, support = random_case(seed, tokens=20)
    rows = rows_of(teacher, targets, behaviour, support)
    for direction in ("reverse", "forward"):
        coarse = run("topk_divergence", student, rows, direction=direction).loss_C
        full = run("exact_divergence", student, rows, direction=direction).loss_C
        assert (coarse >= -1e-12).all() and (coarse <= full + 1e-12).all()
    agreeing = teacher.clone()
    agreeing += 3.0
    agreeing.scatter_(1, support, teacher.gather(1, support))  # the same ratios inside, more mass outside
    assert (run("topk_divergence", agreeing, rows).loss_C > 1e-3).all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_vanishing_tail_keeps_its_gradient(direction):
    """K = V − 1 in float32 with the tail far below machine epsilon, on the student's side, the teacher's, and both:
    the gradient is the exact one in float64 for a teacher whose tail is machine epsilon."""
    ids = torch.arange(7)[None]
    epsilon = np.log(torch.finfo(torch.float32).eps)
    flat, peaked = torch.zeros(1, 8), torch.tensor([[0.0] * 7 + [-40.0]])
    for student_logits, teacher_logits in ((flat, peaked), (peaked, flat), (peaked, peaked)):
        student = student_logits.clone().requires_grad_()
        rows = rows_of(teacher_logits, torch.zeros(1, dtype=torch.int64), support=ids)
        run("topk_divergence", student, rows, direction=direction).loss_C.sum().backward()

        reference = student_logits.double().requires_grad_()
        p, q = reference.log_softmax(1), teacher_logits.double().log_softmax(1).clamp(min=epsilon)
        p, q = (p, q) if direction == "reverse" else (q, p)
        (p.exp() * (p - q)).sum().backward()
        assert reference.grad[0, 7] != 0
        torch.testing.assert_close(student.grad[0, 7].double(), reference.grad[0, 7], rtol=1e-5, atol=0)
        close(student.grad, reference.grad, 1e-6)


def test_terms_are_bound_by_name_and_their_options_checked():
    for bad in (
        (Term(name="reverse_kl"),),
        (),
        (Term(name="exact_divergence"), Term(name="exact_divergence", weight=2.0)),
        (Term(name="exact_divergence", options={"beta": 0.5}),),
        (Term(name="topk_divergence", options={"direction": "backward"}),),
    ):
        with pytest.raises(ConfigError):
            bind_terms(bad)
    with pytest.raises(ConfigError, match="policy_gradient, topk_divergence, exact_divergence"):
        bind_terms((Term(name="nope"),))
