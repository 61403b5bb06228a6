"""The sum of a step's loss terms over one micro-batch, and the metrics seen on the way.

Each term is divided by its own count of tokens over all ranks and micro-batches, so the loss depends neither on how the
batch was cut nor on who holds which part of it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .micro_batch import MicroBatch
from .terms.base import SIGNALS, BoundTerm, Signal, StudentChunk


class Objective:
    """Called with the logits of each chunk of one micro-batch; returns that chunk's share of the step's loss.

    `counts`: tokens of each signal over all ranks and micro-batches. `sums` collects, by metric, Σ over this rank's
    tokens and the signal whose count makes it a mean.
    """

    def __init__(
        self,
        terms: Sequence[BoundTerm],
        micro_batch: MicroBatch,
        counts: Mapping[Signal, int],
        heads: Mapping[str, Tensor],
        sums: "Sums",
    ) -> None:
        self.terms = sorted(terms, key=lambda term: SIGNALS.index(term.signal))
        self.micro_batch, self.counts, self.heads, self.sums = micro_batch, counts, heads, sums

    def __call__(self, logits_CV: Tensor, at: slice) -> Tensor:
        exact = any(term.signal == "exact" for term in self.terms)
        teacher = self._teacher_logprobs(logits_CV, at) if exact else None
        rows = self.micro_batch.chunk(at, teacher)
        logprobs = logits_CV.log_softmax(1)
        student = StudentChunk(logprobs_CV=logprobs, sampled_C=logprobs.gather(1, rows.targets_C[:, None]).squeeze(1))
        loss = logits_CV.new_zeros(())
        for term in self.terms:
            mask = self.micro_batch.masks[term.signal][at]
            output = term(student, rows)
            total = torch.where(mask, output.loss_C, 0.0).sum()
            if self.counts[term.signal]:
                loss = loss + total * (term.weight / self.counts[term.signal])
            for name, values in {**output.metrics, f"loss_{term.name}": output.loss_C.detach()}.items():
                self.sums.add(name, torch.where(mask, values, 0.0), term.signal)
        self._measure_student(student, rows.behaviour_C, at)
        return loss

    @torch.no_grad()
    def _measure_student(self, student: StudentChunk, behaviour_C: Tensor, at: slice) -> None:
        trained = torch.stack([mask[at] for mask in self.micro_batch.masks.values()]).any(0)
        entropy = -(student.logprobs_CV.exp() * student.logprobs_CV).sum(1)
        self.sums.add("entropy", torch.where(trained, entropy, 0.0), None)
        self.sums.add("mismatch", torch.where(trained, student.sampled_C - behaviour_C, 0.0), None)

    @torch.no_grad()
    def _teacher_logprobs(self, logits_CV: Tensor, at: slice) -> Tensor:
        """log π_T `[C, V]` of the chunk's tokens, each by its own teacher's head; uniform where a token has none."""
        out = None
        for teacher in self.micro_batch.hidden:
            lo, hi = (int(i) for i in torch.searchsorted(teacher.at, teacher.at.new_tensor([at.start, at.stop])))
            head = self.heads[teacher.teacher_id]
            logits = (teacher.hidden[lo:hi].to(head.dtype) @ head.T).to(logits_CV.dtype)
            if hi - lo == at.stop - at.start:
                return logits.log_softmax(1)
            if out is None:
                out = torch.zeros_like(logits_CV)
            out[teacher.at[lo:hi] - at.start] = logits
        return (torch.zeros_like(logits_CV) if out is None else out).log_softmax(1)


class Sums:
    """Σ of each metric over this rank's tokens. A stronger signal's figure replaces a weaker one's of the same name."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, Signal | None], Tensor] = {}

    def add(self, name: str, values_C: Tensor, signal: Signal | None) -> None:
        total = values_C.detach().sum(dtype=torch.float64)
        before = self.totals.get((name, signal))
        self.totals[(name, signal)] = total if before is None else before + total

    def means(self, totals: Sequence[float], counts: Mapping[Signal | None, int]) -> dict[str, float]:
        """Means by name of `totals`, these sums over all ranks in order; left out where no token counted."""
        pairs = zip(self.totals, totals, strict=True)
        return {name: total / counts[signal] for (name, signal), total in pairs if counts[signal]}
