"""What is looked at before an optimizer step: are all losses numbers, and does any gradient move the student."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..contracts.errors import NotFinite
from .examples import Example
from .micro_batch import Selection

NAMED = 3  # rollouts in a message


class Watch:
    """One update on this rank. Losses come term by term, in the order of the micro-batches' trained tokens."""

    def __init__(self) -> None:
        self.read: list[tuple[Tensor, Tensor]] = []  # token ids and lengths of each micro-batch
        self._moves: list[Tensor] = []
        self._unsound: dict[str, list[Tensor]] = {}

    def feel(self, gradient: Tensor) -> None:
        """Of a chunk's logits."""
        self._moves.append(gradient.any())

    def see(self, term: str, losses: Tensor) -> None:
        """Of a chunk's tokens."""
        self._unsound.setdefault(term, []).append(~losses.isfinite())

    def flags(self, terms: Iterable[str]) -> list[float]:
        """How many chunks have a gradient other than 0; then the losses of each term that are not finite."""
        own = [self._moves, *(self._unsound.get(term, []) for term in terms)]
        counts = [torch.stack([part.sum() for part in parts]).sum() if parts else torch.zeros(()) for parts in own]
        return [float(count) for count in counts]

    def rollouts(self, selections: Sequence[Selection]) -> list[str]:
        """Those with a loss that is not finite, of the micro-batches that were seen."""
        ids = [id_ for s in selections for id_ in (_ids(s) if s.examples else [""])]  # "": the dummy token
        unsound = torch.stack([torch.cat(parts) for parts in self._unsound.values()]).any(0).cpu()
        return sorted({id_ for id_, bad in zip(ids, unsound.tolist(), strict=True) if bad} - {""})


def _ids(selection: Selection) -> list[str]:
    return np.repeat([example.rollout.rollout_id for example in selection.examples], selection.counts).tolist()


def unsound_rows(examples: Iterable[Example]) -> list[str]:
    """Rollouts that come with a sampler's logprob, an advantage, a credit or a weight that is not finite."""
    return [
        e.rollout.rollout_id
        for e in examples
        if not np.isfinite([e.advantage, e.weight]).all()
        or not all(np.isfinite(v[e.rollout.loss_mask]).all() for v in (e.rollout.logprobs, *e.credits.values()))
    ]


def not_finite(what: str, version: int, rollouts: Iterable[str] = (), where: str = "") -> NotFinite:
    """The error of the step that starts from weights `version`."""
    ids = sorted(set(rollouts))
    others = f" and {len(ids) - NAMED} others" if len(ids) > NAMED else ""
    of = f", of rollouts {', '.join(ids[:NAMED])}{others}" if ids else ""
    return NotFinite(
        "the learner's losses, gradients and weights are finite numbers",
        f"step {version + 1}{where}: {what}{of}",
        "lower learner.learning_rate, with --allow-change learner.learning_rate",
    )
