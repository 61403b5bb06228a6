"""The sum of a step's loss terms over one micro-batch, and the metrics seen on the way.

Each term is divided by its own count over all ranks and micro-batches, so the loss depends neither on how the batch was
cut nor on who holds which part of it. A token that the off-policy correction rejected counts nowhere; what is weighed
(by the correction, or by its row) is weighed in the sum and not in the count.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..contracts.data_config import REPLAY
from ..contracts.records import Correction
from .corrections import mismatch, needs_rollout, token_weights
from .micro_batch import MicroBatch, TeacherTokens, token_rows
from .terms.base import SIGNALS, BoundTerm, StudentChunk
from .watch import Watch


class Objective:
    """The share of the update's loss that one micro-batch has, chunk by chunk: loss_head.ChunkLoss.

    `divisors`: what each term's sum is divided by. `sums` collects the metrics, `watch` what is not finite.
    """

    def __init__(
        self,
        terms: Sequence[BoundTerm],
        micro_batch: MicroBatch,
        divisors: Mapping[str, float],
        heads: Mapping[str, Tensor],
        correction: Correction,
        sums: "Sums",
        watch: Watch | None = None,
    ) -> None:
        self.terms = sorted(terms, key=lambda term: SIGNALS.index(term.loss.signal))
        self.micro_batch, self.divisors, self.heads, self.sums = micro_batch, divisors, heads, sums
        self.watch = watch or Watch()
        weighs = correction.kind != "none" and micro_batch.old_N is None and not needs_rollout(correction)
        self.correction = correction if weighs else None

    def __call__(self, chunk: slice) -> Callable[[Tensor, slice], Tensor]:
        """What gives the loss of a block of this chunk, from the block's logits and its rows."""
        exact = {term.teacher for term in self.terms if term.loss.signal == "exact"}
        teachers = {name: self._teacher_logits(self.micro_batch.teachers[name], chunk) for name in exact}

        def block(logits_CV: Tensor, at: slice) -> Tensor:
            own = slice(at.start - chunk.start, at.stop - chunk.start)
            logits = {name: None if found is None else found[own] for name, found in teachers.items()}
            return self._loss(logits_CV, at, logits)

        return block

    def _loss(self, logits_CV: Tensor, at: slice, teacher_logits: Mapping[str, Tensor | None]) -> Tensor:
        logprobs = logits_CV.log_softmax(1)
        targets = self.micro_batch.targets_N[at]
        student = StudentChunk(logprobs_CV=logprobs, sampled_C=logprobs.gather(1, targets[:, None]).squeeze(1))
        old, weights = self._old_and_weights(student.sampled_C.detach(), at)
        exact: dict[str, Tensor] = {}
        loss = logits_CV.new_zeros(())
        for term in self.terms:
            if term.loss.signal == "exact" and term.teacher not in exact:
                exact[term.teacher] = _logprobs(teacher_logits[term.teacher], logits_CV)
            rows = token_rows(self.micro_batch, term, at, old, teacher_logprobs_CV=exact.get(term.teacher))
            output = term(student, rows)
            mask = self.micro_batch.masks[term.key][at]
            scaled = torch.where(mask, output.loss_C, 0.0) * (weights * self.micro_batch.scales[term.key][at])
            self.watch.see(term.key, scaled)
            if self.divisors[term.key]:
                loss = loss + scaled.sum() * (term.weight / self.divisors[term.key])
                self.sums.add(f"loss_{term.key}", scaled, divisor_of(term.key))
            suffix = f".{term.teacher}" if term.teacher else ""
            for name, values in output.metrics.items():
                self.sums.add(name + suffix, torch.where(mask, values, 0.0), term.key)
        self._measure_student(student, weights, at)
        return loss

    def _old_and_weights(self, current_C: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """log π_old, and the weight of each token's losses: the row's, times the correction."""
        batch = self.micro_batch
        if batch.old_N is not None:
            return batch.old_N[at], batch.weights_N[at]
        behaviour = batch.behaviour_N[at]
        old = torch.lerp(behaviour, current_C, batch.current_share_N[at].to(current_C.dtype))
        old = torch.where(batch.current_share_N[at] == 1, current_C, old)
        weights = batch.weights_N[at]
        if self.correction:
            weights = weights * torch.where(batch.sampled_N[at], token_weights(old, behaviour, self.correction), 1.0)
        return old, weights

    @torch.no_grad()
    def _measure_student(self, student: StudentChunk, weights_C: Tensor, at: slice) -> None:
        """Entropy over all trained tokens but replayed ones; over those that the student sampled, what stands between
        it and the sampler.

        `mismatch` is the k1 estimate of KL(μ‖π_θ) and `mismatch_k3` the k3 one, which is never negative.
        """
        own = [term.key for term in self.terms if term.sources != (REPLAY,)]
        trained = torch.stack([self.micro_batch.masks[key][at] for key in own]).any(0)
        entropy = -(student.logprobs_CV.exp() * student.logprobs_CV).sum(1)
        self.sums.add("entropy", torch.where(trained, entropy, 0.0), "trained")
        sampled = trained & self.micro_batch.sampled_N[at]
        k1, k3 = mismatch(student.sampled_C, self.micro_batch.behaviour_N[at])
        squared = weights_C**2
        figures = {"mismatch": k1, "mismatch_k3": k3, "importance_weight": weights_C, "weight_squared": squared}
        for name, values in figures.items():
            self.sums.add(name, torch.where(sampled, values, 0.0), "sampled")

    @torch.no_grad()
    def _teacher_logits(self, teacher: TeacherTokens, at: slice) -> Tensor | None:
        """`[C, V]`: each token by its own teacher's head, 0 where it has none; None where no token has one."""
        out = None
        for part in teacher.hidden:
            lo, hi = (int(i) for i in torch.searchsorted(part.at, part.at.new_tensor([at.start, at.stop])))
            head = self.heads[part.teacher_id]
            logits = part.hidden[lo:hi].to(head.dtype) @ head.T
            if hi - lo == at.stop - at.start:
                return logits
            if out is None:
                wide = torch.promote_types(head.dtype, torch.float32)
                out = torch.zeros(at.stop - at.start, len(head), dtype=wide, device=head.device)
            out[part.at[lo:hi] - at.start] = logits.to(out.dtype)
        return out


def _logprobs(teacher_logits: Tensor | None, student_logits: Tensor) -> Tensor:
    """log π_T `[C, V]` in the student's dtype; uniform where there is no teacher."""
    logits = torch.zeros_like(student_logits) if teacher_logits is None else teacher_logits.to(student_logits.dtype)
    return logits.log_softmax(1)


def divisor_of(key: str) -> str:
    """The name of what a term's sum is divided by, among the counts."""
    return f"divisor of {key}"


class Sums:
    """Σ of each metric over this rank's tokens, and the name of the count that makes it a mean.

    A stronger signal's figure replaces a weaker one's of the same name. Counts: a term's key (its tokens), its divisor,
    "trained" (tokens of any term but a replay's), or "sampled" (those that the student sampled).
    """

    def __init__(self) -> None:
        self.totals: dict[tuple[str, str], Tensor] = {}

    def add(self, name: str, values: Tensor, count: str) -> None:
        total = values.detach().sum(dtype=torch.float64)
        before = self.totals.get((name, count))
        self.totals[(name, count)] = total if before is None else before + total

    def means(self, totals: Sequence[float], counts: Mapping[str, float]) -> dict[str, float]:
        """Means by name of `totals`, these sums over all ranks in order; left out where nothing counted, and the
        teacher's entropy where not every teacher sent one (NaN)."""
        pairs = zip(self.totals, totals, strict=True)
        means = {name: total / counts[count] for (name, count), total in pairs if counts[count]}
        return {name: mean for name, mean in means.items() if mean == mean or not name.startswith("teacher_entropy")}
