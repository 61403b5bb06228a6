"""The extractor's losses and its codebook, against the golden numbers and plain loops over fresh random input."""

import json
import math
import secrets
from pathlib import Path

import pytest
import torch

from tutorloop.verifier_service.strategies.losses import (
    DEAD,
    DECAY,
    NEW,
    Codebook,
    NextStep,
    adversary_loss,
    commitment,
    info_nce,
    k_means,
    nearest_codes,
    reverse_gradient,
)

CASE = json.loads((Path(__file__).parents[1] / "golden" / "sgpo_alignment.json").read_text())


@pytest.fixture
def generator():
    seed = secrets.randbits(32)
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def drawn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_info_nce_golden():
    """Its three pairs: the first student steps, each with the teacher's vector nearest to it."""
    students, teachers = (
        torch.tensor(CASE["inputs"][name], dtype=torch.float64)
        for name in ("student_step_embeddings", "teacher_strategy_vectors")
    )
    expected = torch.tensor(CASE["expected"]["infonce"], dtype=torch.float64)
    keys = teachers[torch.tensor(CASE["expected"]["cosine"])[: len(expected)].argmax(1)]
    losses = info_nce(
        students[: len(expected)], keys, torch.arange(len(expected)), temperature=CASE["inputs"]["nce_temperature"]
    )
    torch.testing.assert_close(losses, expected, rtol=0, atol=CASE["tol"])
    assert float(losses.mean()) == pytest.approx(CASE["expected"]["infonce_mean"], abs=CASE["tol"])


def test_info_nce_is_the_formula(generator):
    anchors, keys = drawn(generator, 5, 7), drawn(generator, 9, 7)
    positives = torch.randint(9, (5,), generator=generator)
    negatives = torch.rand(5, 9, generator=generator) < 0.5
    found = info_nce(anchors, keys, positives, negatives, temperature=0.3)
    for a in range(5):
        cosines = [float(anchors[a] @ key / anchors[a].norm() / key.norm()) for key in keys]
        own = math.exp(cosines[positives[a]] / 0.3)
        others = sum(math.exp(cosines[n] / 0.3) for n in range(9) if negatives[a, n] and n != positives[a])
        assert float(found[a]) == pytest.approx(-math.log(own / (own + others)), abs=1e-12)


def test_what_is_no_negative_has_no_gradient(generator):
    anchors, keys = drawn(generator, 2, 4), drawn(generator, 3, 4).requires_grad_()
    negatives = torch.tensor([[False, True, False], [False, True, False]])
    info_nce(anchors, keys, torch.tensor([0, 0]), negatives).sum().backward()
    assert keys.grad[2].abs().max() == 0
    assert keys.grad[:2].abs().min() > 0


def test_prediction_of_the_next_step_sees_none_after_it(generator):
    net, vectors = NextStep(6).double(), drawn(generator, 2, 5, 6)
    changed = vectors.clone()
    changed[:, 3:] = drawn(generator, 2, 2, 6)
    before, after = net(vectors), net(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)
    assert (before[:, 3:] - after[:, 3:]).abs().min() > 0


def test_commitment_draws_the_vectors_alone(generator):
    vectors, codes = drawn(generator, 11, 3).requires_grad_(), drawn(generator, 4, 3).requires_grad_()
    loss = commitment(vectors, codes)
    expected = torch.cdist(vectors, codes).detach().min(1).values.square().mean()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-12)
    loss.backward()
    nearest = codes[nearest_codes(vectors, codes)]
    torch.testing.assert_close(vectors.grad, (2 * (vectors - nearest) / 11).detach())
    assert codes.grad is None


def test_codebook_is_a_moving_average(generator):
    codebook = Codebook(drawn(generator, 5, 3))
    counts, sums = [NEW] * 5, [NEW * code for code in codebook.codes_KD]
    for _ in range(20):
        batch = 0.5 * drawn(generator, 30, 3)
        chosen = [min(range(5), key=lambda k: float((v - sums[k] / counts[k]).square().sum())) for v in batch]
        for k in range(5):
            own = [v for v, code in zip(batch, chosen, strict=True) if code == k]
            counts[k] = DECAY * counts[k] + (1 - DECAY) * len(own) * 5 / 30
            sums[k] = DECAY * sums[k] + (1 - DECAY) * sum(own, torch.zeros(3)) * 5 / 30
        assert min(counts) > DEAD, "another seed: a code died"
        codebook.update(batch, generator)
    expected = torch.stack([s / n for s, n in zip(sums, counts, strict=True)])
    torch.testing.assert_close(codebook.codes_KD, expected, rtol=0, atol=1e-5)


def test_a_dead_code_is_put_on_a_vector(generator):
    vectors = drawn(generator, 40, 3)
    codebook = Codebook(torch.cat([vectors[:2], torch.full((1, 3), 1e3, dtype=torch.float64)]))
    updates = math.ceil(math.log(DEAD / NEW) / math.log(DECAY))
    for _ in range(updates - 1):
        codebook.update(vectors, generator)
    torch.testing.assert_close(codebook.codes_KD[2], torch.full((3,), 1e3, dtype=torch.float64), rtol=1e-3, atol=0)
    codebook.update(vectors, generator)
    assert float((vectors - codebook.codes_KD[2]).norm(dim=1).min()) < 1e-6


def test_nearest_codes(generator):
    vectors, codes = drawn(generator, 50, 8), drawn(generator, 7, 8)
    assert torch.equal(nearest_codes(vectors, codes), torch.cdist(vectors, codes).argmin(1))


def test_k_means_finds_what_lies_apart(generator):
    centres = 20 * torch.eye(6, dtype=torch.float64)
    members = torch.arange(6).repeat(30)
    vectors = centres[members] + 0.1 * drawn(generator, 180, 6)
    codes = k_means(vectors, 6, generator)
    chosen = nearest_codes(vectors, codes)
    assert sorted(chosen[:6].tolist()) == list(range(6))
    for member in range(6):
        own = vectors[members == member]
        torch.testing.assert_close(codes[chosen[member]], own.mean(0), rtol=0, atol=1e-9)


def test_k_means_of_fewer_vectors_than_codes(generator):
    vectors = drawn(generator, 3, 4).float().repeat(5, 1)
    codes = k_means(vectors, 8, generator)
    assert len(set(nearest_codes(vectors, codes).tolist())) == 3
    torch.testing.assert_close(codes[nearest_codes(vectors, codes)], vectors)


def test_reversed_gradient(generator):
    vectors = drawn(generator, 6, 4).requires_grad_()
    weight = drawn(generator, 6, 4)
    assert torch.equal(reverse_gradient(vectors), vectors)
    (reverse_gradient(vectors) * weight).sum().backward()
    assert torch.equal(vectors.grad, -weight)


def test_the_adversary_learns_and_the_vectors_resist(generator):
    head, problems = torch.nn.Linear(4, 3).double(), torch.randint(3, (6,), generator=generator)
    vectors = drawn(generator, 6, 4).requires_grad_()
    plain = torch.nn.functional.cross_entropy(head(vectors), problems)
    of_head, of_vectors = torch.autograd.grad(plain, [head.weight, vectors])
    loss = adversary_loss(head, vectors, problems)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(head.weight.grad, of_head)
    torch.testing.assert_close(vectors.grad, -of_vectors)
