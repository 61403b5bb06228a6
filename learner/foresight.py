"""What must be known about whole rollouts before the first gradient: one pass over the batch without one.

The pass gives log π_old of every token as the student stands before the step's updates. From it come the clipped ratios
of several updates, corrections that reject tokens (so that their denominators are known), and gates by rollout. Where
a run needs none of these, there is no pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..contracts.records import Correction
from ..models.logits import token_logprobs
from .corrections import current_share, needs_rollout, weigh
from .examples import Example, Foreseen, Updates
from .micro_batch import Selection, collate
from .terms.base import BoundTerm

OverRanks = Callable[[list[float]], list[float]]  # sums over ranks


class Foresight:
    """The pass, and what is made of it. `look` is collective."""

    def __init__(
        self, engine: Any, terms: Sequence[BoundTerm], correction: Correction, updates: int, device: str
    ) -> None:
        self.engine, self.terms, self.correction, self.device = engine, terms, correction, device
        self.gated = [term for term in terms if term.loss.gate]
        recomputed = updates > 1 and correction.proximal == "recompute"
        self.needed = bool(self.gated) or recomputed or needs_rollout(correction)

    def look(
        self, updates: Updates, version: int, over_ranks: OverRanks
    ) -> tuple[dict[str, Foreseen] | None, dict[str, float]]:
        """What was foreseen, by rollout id (None: no need), and metrics of what the correction rejected."""
        if not self.needed:
            return None, {}
        foreseen: dict[str, Foreseen] = {}
        for examples in (batch for update in updates for batch in update):
            foreseen.update(self._of(examples, version))
        sampled = [e for update in updates for batch in update for e in batch if e.sampled]
        known = [(e, foreseen[e.rollout.rollout_id]) for e in sampled if e.rollout.rollout_id in foreseen]
        masks = [(k.keep, k.weights, e.rollout.loss_mask) for e, k in known]
        tokens, kept, weight = over_ranks(
            [
                float(sum(mask.sum() for _, _, mask in masks)),
                float(sum((keep & mask).sum() for keep, _, mask in masks)),
                float(sum(weights[keep & mask].sum(dtype=np.float64) for keep, weights, mask in masks)),
            ]
        )
        if self.correction.normalise and weight:
            for example, own in known:
                scaled = (own.weights * (kept / weight)).astype(np.float32)
                foreseen[example.rollout.rollout_id] = replace(own, weights=scaled)
        vetoed, rows = over_ranks([float(sum(not (k & m).any() for k, _, m in masks)), float(len(masks))])
        metrics = {"rejected_tokens": 1 - kept / tokens, "rejected_sequences": vetoed / rows} if tokens else {}
        return foreseen, metrics

    @torch.no_grad()
    def _of(self, examples: Sequence[Example], version: int) -> dict[str, Foreseen]:
        selection = Selection.of(examples, self.terms)
        batch = collate(selection, self.terms, self.device, lambda _: 1.0)
        current = self.engine(
            batch.token_ids, batch.lengths, batch.rows, lambda h, head: token_logprobs(h, head, batch.targets_N)
        )
        if not selection.examples:
            return {}
        arrays = selection.split(current.float().cpu().numpy(), 0.0)
        return {
            example.rollout.rollout_id: self._foresee(example, mask, array, version)
            for example, mask, array in zip(selection.examples, selection.masks, arrays, strict=True)
        }

    def _foresee(self, example: Example, mask: np.ndarray, current: np.ndarray, version: int) -> Foreseen:
        rollout = example.rollout
        gates = {term.key: self._gate(term, example, current, mask) for term in self.gated}
        weights, keep = np.ones(len(mask), np.float32), np.ones(len(mask), bool)
        if not example.sampled:
            return Foreseen(old=current, weights=weights, keep=keep, gates=gates)
        share = current_share(self.correction.proximal, rollout.oldest_version, version, version)
        mu = rollout.logprobs
        old = current if share == 1 else mu + np.float32(share) * (current - mu)
        old_M, mu_M = (torch.from_numpy(array[mask]) for array in (old, mu))
        weights_M, keep_M = weigh(old_M, mu_M, self.correction)
        weights[mask], keep[mask] = weights_M.numpy(), keep_M.numpy()
        return Foreseen(old=old, weights=weights, keep=keep, gates=gates)

    def _gate(self, term: BoundTerm, example: Example, current: np.ndarray, mask: np.ndarray) -> np.ndarray:
        gate = np.ones(len(mask), np.float32)
        scores = example.of(term.teacher)
        if scores is not None and term.loss.gate and example.asked_by(term):
            d = (scores.logprobs[mask] - current[mask]).astype(np.float64)
            gate[mask] = term.loss.gate(d, example.advantage, **term.options)
        return gate
