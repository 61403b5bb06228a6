"""What the tests of the loss terms share: golden files, chunks of tokens, and fresh random cases."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tutorloop.contracts.records import Term
from tutorloop.learner.terms import bind_terms
from tutorloop.learner.terms.base import StudentChunk, TokenRows

GOLDEN = Path(__file__).parent / "golden"
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]  # every golden file's `tol` is 1e-9


def golden(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    assert case["tol"] == 1e-9
    return case["inputs"], case["expected"]


def close(found, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), expected.expand_as(found), rtol=0, atol=tolerance)


def apply(name, student, rows, options=None):
    """The output of a term by its name."""
    term = Term(name=name, options=options or {}, reference=True)
    return bind_terms((term,))[0](student, rows)


def chunk_of(sampled):
    """A student of whom only log π_θ(y_t) is known."""
    return StudentChunk(logprobs_CV=sampled[:, None], sampled_C=sampled)


def rows_of(like, **known):
    """Rows of as many tokens as `like` [C]: what is known (without the suffix, numbers are repeated), and filler."""
    zeros = torch.zeros_like(like.detach())
    filler = TokenRows(
        targets_C=zeros.long(),
        old_C=zeros,
        advantage_C=zeros,
        teacher_C=zeros,
        reference_C=zeros,
        gate_C=zeros + 1,
        topk_ids_CK=zeros[:, None].long(),
        topk_logprobs_CK=zeros[:, None],
        teacher_entropy_C=zeros,
    )
    given = {name: torch.as_tensor(value, dtype=zeros.dtype).expand_as(zeros) for name, value in known.items()}
    return replace(filler, **{f"{name}_C": value for name, value in given.items()})


class Case:
    """A student (logits that take a gradient) and a perfect teacher, both given by their logits [C, V]."""

    def __init__(self, student, teacher, targets, reference=None, support=None, dtype=torch.float64, **known):
        self.student = torch.as_tensor(student, dtype=dtype).clone().requires_grad_()
        self.teacher = torch.as_tensor(teacher, dtype=dtype)
        self.targets = torch.as_tensor(targets)
        q = self.teacher.log_softmax(1)
        reference = q if reference is None else torch.as_tensor(reference, dtype=dtype).log_softmax(1)
        ids = q.topk(2, 1).indices if support is None else torch.as_tensor(support)
        known = {"teacher": self.picked(q), "reference": self.picked(reference), **known}
        self.rows = replace(
            rows_of(self.picked(q), teacher_entropy=-(q.exp() * q).sum(1), **known),
            targets_C=self.targets,
            topk_ids_CK=ids,
            topk_logprobs_CK=q.gather(1, ids),
            teacher_logprobs_CV=q,
            views_CW=self.picked(q)[:, None],
            view_gate_CW=torch.ones_like(q[:, :1]),
        )

    def picked(self, logprobs):
        return logprobs.gather(1, self.targets[:, None]).squeeze(1)

    def chunk(self, logits=None):
        logprobs = (self.student if logits is None else logits).log_softmax(1)
        return StudentChunk(logprobs_CV=logprobs, sampled_C=self.picked(logprobs))

    def run(self, name, **options):
        return apply(name, self.chunk(), self.rows, options)

    def gradient(self, loss):
        """∂ Σ loss / ∂ student logits [C, V]."""
        return torch.autograd.grad(loss.sum(), self.student)[0]


def toy(inputs, dtype, **more):
    """The shared toy of the golden files: three tokens of four words."""
    targets = inputs.get("sampled_tokens", inputs.get("targets", [0] * len(inputs["student_logits"])))
    teacher = inputs.get("teacher_logits", inputs["student_logits"])
    return Case(inputs["student_logits"], teacher, targets, inputs.get("ref_logits"), dtype=dtype, **more)


def random_case(tokens=6, vocab=11, k=4, dtype=torch.float64):
    """Fresh random models, targets, support, and everything else that a row carries. Prints its seed."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    rng = np.random.default_rng(seed)
    student, teacher, reference = rng.normal(size=(3, tokens, vocab)) * 2
    return Case(
        student,
        teacher,
        rng.integers(0, vocab, tokens),
        reference,
        np.stack([rng.permutation(vocab)[:k] for _ in range(tokens)]),
        dtype,
        old=-rng.exponential(2.0, tokens),
        advantage=rng.normal(size=tokens),
        gate=rng.uniform(0.2, 2.0, tokens),
    )
