"""One packed forward and backward: sequences end to end, and for each trained token what the terms need.

Row n of the N trained tokens reads hidden row `rows[n]`, the one *before* the token: position t's hidden state predicts
token t + 1. Sequences without a trained token are left out; a micro-batch with none becomes one dummy token with every
mask false, so that its rank still takes part in the collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .examples import Example
from .terms.base import Signal, TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHidden:
    """One teacher's last hidden states `[M, D]` of the tokens `at` (int64 `[M]`, ascending)."""

    teacher_id: str
    at: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """T packed tokens in B sequences, N trained tokens; K ids of top-k (1 where no term asks)."""

    token_ids: Tensor  # int64 [T]
    lengths: Tensor  # int64 [B]
    rows: Tensor  # int64 [N], the hidden row that predicts the token
    tokens: TokenRows  # [N]; without the teacher's distribution, which is made chunk by chunk
    masks: dict[Signal, Tensor]  # bool [N]: the token counts in terms of that signal
    hidden: tuple[TeacherHidden, ...]

    def chunk(self, at: slice, teacher_logprobs_CV: Tensor | None) -> TokenRows:
        """Its tokens `at`, with the teacher's distribution."""
        tokens = self.tokens
        return TokenRows(
            targets_C=tokens.targets_C[at],
            behaviour_C=tokens.behaviour_C[at],
            teacher_C=tokens.teacher_C[at],
            topk_ids_CK=tokens.topk_ids_CK[at],
            topk_logprobs_CK=tokens.topk_logprobs_CK[at],
            teacher_logprobs_CV=teacher_logprobs_CV,
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """The examples of a micro-batch that train at all, and which of their tokens; made before any tensor."""

    examples: tuple[Example, ...]
    present: tuple[frozenset[Signal], ...]  # the signals that each example has
    masks: tuple[np.ndarray, ...]  # bool [R] of each example: its trained tokens

    @classmethod
    def of(cls, examples: Sequence[Example], signals: Sequence[Signal]) -> "Selection":
        """Keep the examples with a trained token and at least one of `signals`."""
        kept = []
        for example in examples:
            present = frozenset(signal for signal in signals if example.has(signal))
            if present and example.rollout.loss_mask.any():
                kept.append((example, present, example.rollout.loss_mask))
        chosen, present_of, masks = zip(*kept, strict=True) if kept else ((), (), ())
        return cls(tuple(chosen), tuple(present_of), tuple(masks))

    @property
    def counts(self) -> list[int]:
        """Trained tokens of each example."""
        return [int(np.count_nonzero(mask)) for mask in self.masks]

    def tokens_with(self, signal: Signal) -> int:
        """Tokens that count in terms of that signal."""
        return sum(n for n, present in zip(self.counts, self.present, strict=True) if signal in present)

    def scores(self, field: str, signal: Signal) -> list[np.ndarray | None]:
        """A field of each example's scores; None where it lacks the signal."""
        pairs = zip(self.examples, self.present, strict=True)
        return [getattr(example.scores, field) if signal in present else None for example, present in pairs]

    def flat(self, arrays: Sequence[np.ndarray | None], filler: float, width: tuple[int, ...] = ()) -> np.ndarray:
        """The trained tokens' entries `[N, *width]` of arrays `[R, *width]`, with `filler` for a missing array."""
        parts = [
            np.full((count, *width), filler) if array is None else array[mask]
            for array, mask, count in zip(arrays, self.masks, self.counts, strict=True)
        ]
        return np.concatenate(parts)


def collate(selection: Selection, signals: Sequence[Signal], device: str) -> MicroBatch:
    """Pack a selection into tensors on `device`."""
    if not selection.examples:
        return _dummy(signals, device)
    rollouts = [example.rollout for example in selection.examples]
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts])
    first = np.cumsum(lengths) - lengths + [rollout.prompt_length for rollout in rollouts]  # response tokens, packed
    at = np.concatenate([start + np.flatnonzero(mask) for start, mask in zip(first, selection.masks, strict=True)])
    token_ids = np.concatenate([rollout.token_ids for rollout in rollouts])
    masks: dict[Signal, Tensor] = {}
    for signal in signals:
        present = np.repeat([signal in present for present in selection.present], selection.counts)
        masks[signal] = torch.from_numpy(present).to(device)
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids).to(device, torch.int64),
        lengths=torch.from_numpy(lengths).to(device),
        rows=torch.from_numpy(at - 1).to(device),
        tokens=_tokens(selection, token_ids[at], device),
        masks=masks,
        hidden=_hidden(selection, device),
    )


def _tokens(selection: Selection, targets: np.ndarray, device: str) -> TokenRows:
    ids = selection.scores("topk_ids", "topk")
    k = next((array.shape[1] for array in ids if array is not None), 1)
    behaviour = selection.flat([example.rollout.logprobs for example in selection.examples], 0.0)
    sampled = selection.flat(selection.scores("logprobs", "sampled"), 0.0)
    topk = selection.flat(selection.scores("topk_logprobs", "topk"), -np.log(2.0 * k), (k,))
    return TokenRows(
        targets_C=torch.from_numpy(targets).to(device, torch.int64),
        behaviour_C=torch.from_numpy(behaviour).to(device, torch.float32),
        teacher_C=torch.from_numpy(sampled).to(device, torch.float32),
        topk_ids_CK=torch.from_numpy(selection.flat(ids, 0, (k,))).to(device, torch.int64),
        topk_logprobs_CK=torch.from_numpy(topk).to(device, torch.float32),
    )


def _hidden(selection: Selection, device: str) -> tuple[TeacherHidden, ...]:
    """The hidden states of the trained tokens, teacher by teacher."""
    counts = selection.counts
    starts = np.cumsum(counts) - counts
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for example, present, mask, start, count in zip(
        selection.examples, selection.present, selection.masks, starts, counts, strict=True
    ):
        if "exact" in present and example.scores is not None:
            at = np.arange(start, start + count)
            groups.setdefault(example.scores.teacher_id, []).append((at, example.scores.hidden[mask]))
    return tuple(
        TeacherHidden(
            teacher_id=teacher_id,
            at=torch.from_numpy(np.concatenate([at for at, _ in parts])).to(device),
            hidden=_as_float(np.concatenate([hidden for _, hidden in parts])).to(device),
        )
        for teacher_id, parts in groups.items()
    )


def _as_float(hidden: np.ndarray) -> Tensor:
    """float32 as it is; uint16 are bfloat16 bits."""
    if hidden.dtype == np.uint16:
        return torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(hidden)


def _dummy(signals: Sequence[Signal], device: str) -> MicroBatch:
    one = torch.zeros(1, dtype=torch.int64, device=device)
    zero = torch.zeros(1, device=device)
    return MicroBatch(
        token_ids=one,
        lengths=one + 1,
        rows=one,
        tokens=TokenRows(
            targets_C=one,
            behaviour_C=zero,
            teacher_C=zero,
            topk_ids_CK=one[:, None],
            topk_logprobs_CK=zero[:, None] - 1,
        ),
        masks={signal: torch.zeros(1, dtype=torch.bool, device=device) for signal in signals},
        hidden=(),
    )
