"""What must be known about whole rollouts before the first gradient: one pass over the batch without one.

The pass gives log π_old of every token as the student stands before the step's updates. From it come the clipped ratios
of several updates, corrections that reject tokens (so that their denominators are known), and gates by rollout. Where
a run needs none of these, there is no pass.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contracts.records import Correction, Polarities
from ..models.logits import logit_chunks, token_logprobs
from .corrections import current_share, needs_rollout, weigh
from .examples import Example, OldPolicy, Updates
from .micro_batch import MicroBatch, Selection, collate, token_rows
from .terms.base import BoundTerm, Gated, GatedTerm, StudentChunk
from .watch import not_finite

OverRanks = Callable[[list[float]], list[float]]  # sums over ranks
FromRanks = Callable[[Any], list[Any]]  # every rank's


@dataclass(frozen=True, slots=True)
class PassResult:
    """What the pass found out. Empty where there was no need of one."""

    rollouts: dict[str, OldPolicy] | None = None  # of this rank, by rollout id
    metrics: dict[str, float] = field(default_factory=dict)
    polarities: dict[str, Polarities] = field(default_factory=dict)  # of the views of all ranks' rollouts


class OldPolicyPass:
    """The pass, and what is made of it. `run` is collective."""

    def __init__(
        self, engine: Any, terms: Sequence[BoundTerm], correction: Correction, updates: int, device: str
    ) -> None:
        self.engine, self.terms, self.correction, self.device = engine, terms, correction, device
        self.gated = [(term, term.loss) for term in terms if isinstance(term.loss, GatedTerm)]
        self.of_views = [(term, loss) for term, loss in self.gated if loss.signal == "views"]
        recomputed = updates > 1 and correction.proximal == "recompute"
        self.needed = bool(self.gated) or recomputed or needs_rollout(correction)

    def run(self, updates: Updates, version: int, over_ranks: OverRanks, from_ranks: FromRanks) -> PassResult:
        """What the pass found; its metrics say what the correction rejected, and what the gates said. Raises NotFinite:
        a comparison with what is no number would reject its token in silence."""
        if not self.needed:
            return PassResult()
        found: dict[str, OldPolicy] = {}
        for examples in (batch for update in updates for batch in update):
            found.update(self._of(examples, version))
        sampled = [e for update in updates for batch in update for e in batch if e.sampled]
        known = [(e, found[e.rollout.rollout_id]) for e in sampled if e.rollout.rollout_id in found]
        masks = [(k.keep, k.weights, e.rollout.loss_mask) for e, k in known]
        unsound = [name for name, own in found.items() if not np.isfinite(own.logprobs).all()]
        tokens, kept, weight, refused = over_ranks(
            [
                float(sum(mask.sum() for _, _, mask in masks)),
                float(sum((keep & mask).sum() for keep, _, mask in masks)),
                float(sum(weights[keep & mask].sum(dtype=np.float64) for keep, weights, mask in masks)),
                float(len(unsound)),
            ]
        )
        if refused:
            names = [name for theirs in from_ranks(unsound) for name in theirs]
            raise not_finite("the student's logprobs are not finite", version, names)
        if self.correction.normalise and weight:
            for example, own in known:
                scaled = (own.weights * (kept / weight)).astype(np.float32)
                found[example.rollout.rollout_id] = replace(own, weights=scaled)
        vetoed, rows = over_ranks([float(sum(not (k & m).any() for k, _, m in masks)), float(len(masks))])
        metrics = {"rejected_tokens": 1 - kept / tokens, "rejected_sequences": vetoed / rows} if tokens else {}
        said, polarities = self._said(found, from_ranks) if self.gated else ({}, {})
        return PassResult(found, metrics | said, polarities)

    def _said(
        self, found: dict[str, OldPolicy], from_ranks: FromRanks
    ) -> tuple[dict[str, float], dict[str, Polarities]]:
        """Means of the gates' figures over the rollouts that have them, and the views' polarities by rollout."""
        sums, counts = Counter[str](), Counter[str]()
        polarities: dict[str, Polarities] = {}
        for rollout_id, known in found.items():
            for gated in known.gates.values():
                sums.update(gated.figures)
                counts.update(gated.figures.keys())
                if gated.polarities:
                    polarities[rollout_id] = gated.polarities
        total, number, all_polarities = Counter[str](), Counter[str](), {}
        for their_sums, their_counts, theirs in from_ranks((sums, counts, polarities)):
            total.update(their_sums)
            number.update(their_counts)
            all_polarities |= theirs
        return {name: total[name] / number[name] for name in sorted(number)}, all_polarities

    @torch.no_grad()
    def _of(self, examples: Sequence[Example], version: int) -> dict[str, OldPolicy]:
        selection = Selection.of(examples, self.terms)
        batch = collate(selection, self.terms, self.device, lambda _: 1.0)
        seen = self.engine(batch.token_ids, batch.lengths, batch.rows, lambda h, head: self._read(batch, h, head))
        if not selection.examples:
            return {}
        arrays = selection.split(seen.float().cpu().numpy(), 0.0)
        widths = {term.key: batch.teachers[term.teacher].views_NW.shape[1] for term, _ in self.of_views}
        return {
            example.rollout.rollout_id: self._old_policy(example, mask, array, widths, version)
            for example, mask, array in zip(selection.examples, selection.masks, arrays, strict=True)
        }

    def _read(self, batch: MicroBatch, hidden: Tensor, head: Tensor) -> Tensor:
        """log π_θ(y_t) in the first column; after it, in order, what the gates of views read of each token."""
        if not self.of_views:
            return token_logprobs(hidden, head, batch.targets_N)[:, None]
        parts = []
        for at, logits in logit_chunks(hidden, head):
            logprobs = logits.log_softmax(1)
            sampled = logprobs.gather(1, batch.targets_N[at, None]).squeeze(1)
            student = StudentChunk(logprobs_CV=logprobs, sampled_C=sampled)
            gaps = [loss.gap(student, token_rows(batch, term, at, sampled)) for term, loss in self.of_views]
            parts.append(torch.cat([sampled[:, None], *gaps], 1))
        return torch.cat(parts)

    def _old_policy(
        self, example: Example, mask: np.ndarray, seen: np.ndarray, widths: Mapping[str, int], version: int
    ) -> OldPolicy:
        """`seen` is what `_read` gives; `widths`: its columns of each term that reads gaps."""
        rollout, current, at = example.rollout, seen[:, 0], 1
        gates = {}
        for term, loss in self.gated:
            width = widths.get(term.key, 0)
            own = seen[:, at : at + width] if width else current
            gates[term.key] = self._gate(term, loss, example, own, mask)
            at += width
        weights, keep = np.ones(len(mask), np.float32), np.ones(len(mask), bool)
        if not example.sampled:
            return OldPolicy(logprobs=current, weights=weights, keep=keep, gates=gates)
        share = current_share(self.correction.proximal, rollout.oldest_version, version, version)
        mu = rollout.logprobs
        old = current if share == 1 else mu + np.float32(share) * (current - mu)
        old_M, mu_M = (torch.from_numpy(array[mask]) for array in (old, mu))
        weights_M, keep_M = weigh(old_M, mu_M, self.correction)
        weights[mask], keep[mask] = weights_M.numpy(), keep_M.numpy()
        return OldPolicy(logprobs=old, weights=weights, keep=keep, gates=gates)

    def _gate(self, term: BoundTerm, loss: GatedTerm, example: Example, seen: np.ndarray, mask: np.ndarray) -> Gated:
        """The gate's factors by token `[R]`, or by token and view `[R,W]` and then times the views' weights.

        `seen`: log π_θ of the tokens `[R]`, or the views' gaps `[R,W]`.
        """
        scores, views = example.of(term.teacher), loss.signal == "views"
        if scores is None or not example.asked_by(term) or (views and not example.has(term)):
            return Gated(np.ones(len(mask), np.float32))
        d = (seen if views else scores.logprobs - seen)[mask].astype(np.float64)
        factors = np.ones((len(mask), *d.shape[1:]), np.float32)
        if not views:
            said = loss.gate(d, example.advantage)
            factors[mask] = said.factors
            return replace(said, factors=factors)
        shown = scores.view_weights > 0
        said = loss.gate(d[:, shown], example.advantage)
        polarity = np.zeros(len(shown))
        polarity[shown] = said.factors
        factors[mask] = polarity * scores.view_weights
        own = iter(said.polarities)
        return replace(said, factors=factors, polarities=tuple(next(own) if was_shown else None for was_shown in shown))
