"""One packed forward and backward: sequences end to end, and for each trained token what the terms need.

Row n of the N trained tokens reads hidden row `rows[n]`, the one *before* the token: position t's hidden state predicts
token t + 1. Sequences without a trained token are left out; a micro-batch with none becomes one dummy token that no
term counts, so that its rank still takes part in the collectives.

Shapes: T packed tokens, B sequences, N trained tokens, M of them by one teacher, K ids of top-k, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..contracts.config import REFERENCE
from ..contracts.records import TeacherScores
from .examples import Example, OldPolicy
from .terms.base import BoundTerm, GatedTerm, TokenRows


@dataclass(frozen=True, slots=True)
class Selection:
    """The examples of a micro-batch that train at all, in which terms, and which of their tokens; before any tensor."""

    examples: tuple[Example, ...]
    members: tuple[frozenset[str], ...]  # keys of the terms that each example counts in
    masks: tuple[np.ndarray, ...]  # bool [R] of each example: its trained tokens
    old: tuple[OldPolicy | None, ...]  # what the pass before the gradient found of each; None: there was no pass

    @classmethod
    def of(
        cls, examples: Sequence[Example], terms: Sequence[BoundTerm], old: Mapping[str, OldPolicy] | None = None
    ) -> "Selection":
        """Keep the examples that count in a term with at least one token; tokens that were rejected are out."""
        kept = []
        for example in examples:
            known = (old or {}).get(example.rollout.rollout_id)
            mask = example.rollout.loss_mask & known.keep if known else example.rollout.loss_mask
            members = frozenset(term.key for term in terms if example.asked_by(term) and example.has(term))
            if members and mask.any():
                kept.append((example, members, mask, known))
        return cls(*map(tuple, zip(*kept, strict=True))) if kept else cls((), (), (), ())

    @property
    def passed(self) -> bool:
        """All of it went through the pass before the gradient."""
        return None not in self.old

    @property
    def counts(self) -> list[int]:
        """Trained tokens of each example."""
        return [int(np.count_nonzero(mask)) for mask in self.masks]

    def tokens_and_sequences(self, key: str) -> tuple[int, int]:
        """How many tokens and examples count in a term."""
        counts = [count for count, members in zip(self.counts, self.members, strict=True) if key in members]
        return sum(counts), len(counts)

    def flat(self, arrays: Sequence[np.ndarray | None], filler: float, width: tuple[int, ...] = ()) -> np.ndarray:
        """The trained tokens' entries `[N, *width]` of arrays `[R, *width]`, with `filler` for a missing array."""
        parts = [
            np.full((count, *width), filler) if array is None else array[mask]
            for array, mask, count in zip(arrays, self.masks, self.counts, strict=True)
        ]
        return np.concatenate(parts)

    def repeat(self, values: Sequence[float]) -> np.ndarray:
        """One value an example, repeated over its trained tokens `[N]`."""
        return np.repeat(np.asarray(values), self.counts)

    def split(self, tokens_N: np.ndarray, filler: float) -> list[np.ndarray]:
        """`flat` backwards: an array `[R, …]` for each example, `filler` where a token is not trained."""
        arrays = []
        for mask, part in zip(self.masks, np.split(tokens_N, np.cumsum(self.counts)[:-1]), strict=True):
            array = np.full((len(mask), *tokens_N.shape[1:]), filler, tokens_N.dtype)
            array[mask] = part
            arrays.append(array)
        return arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHidden:
    """One teacher's last hidden states `[M, D]` of the tokens `at` (int64 `[M]`, ascending)."""

    teacher_id: str
    at: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTokens:
    """What one teacher (or each rollout's own) said about the N tokens; finite filler where it said nothing."""

    sampled_N: Tensor
    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor
    entropy_N: Tensor
    views_NW: Tensor
    hidden: tuple[TeacherHidden, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Tensors of one forward and backward."""

    token_ids: Tensor  # int64 [T]
    lengths: Tensor  # int64 [B]
    rows: Tensor  # int64 [N], the hidden row that predicts the token
    targets_N: Tensor  # int64
    behaviour_N: Tensor  # log μ, the sampler's as it sampled
    sampled_N: Tensor  # bool: the student sampled it, so that μ is a policy to correct for
    current_share_N: Tensor  # log π_old = log μ + share · (log π_θ − log μ), where no pass gave it
    old_N: Tensor | None  # log π_old, where a pass gave it
    weights_N: Tensor  # of the row, times the correction that the pass gave
    advantage_N: Tensor
    credits: dict[str, Tensor]  # [N] by service, of those that terms read
    reference_N: Tensor
    teachers: dict[str, TeacherTokens]  # by the name that terms use
    masks: dict[str, Tensor]  # bool [N] by term: the token counts in it
    scales: dict[str, Tensor]  # [N] by term: what its reduction makes of one token
    gates: dict[str, Tensor]  # [N] by term; [N,W] of views


def collate(
    selection: Selection, terms: Sequence[BoundTerm], device: str, current_share: Callable[[Example], float]
) -> MicroBatch:
    """Pack a selection into tensors on `device`."""
    if not selection.examples:
        return _dummy(terms, device)
    examples = selection.examples
    rollouts = [example.rollout for example in examples]
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts])
    first = np.cumsum(lengths) - lengths + [rollout.prompt_length for rollout in rollouts]  # response tokens, packed
    at = np.concatenate([start + np.flatnonzero(mask) for start, mask in zip(first, selection.masks, strict=True)])
    token_ids = np.concatenate([rollout.token_ids for rollout in rollouts])

    def floats(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, torch.float32)

    known = [old for old in selection.old if old]
    corrected = selection.flat([old.weights if old else None for old in selection.old], 1.0)
    reference = [example.scores[REFERENCE].logprobs if REFERENCE in example.scores else None for example in examples]
    services = {term.credit for term in terms if term.credit}
    gated = [term for term in terms if selection.passed and isinstance(term.loss, GatedTerm)]
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids).to(device, torch.int64),
        lengths=torch.from_numpy(lengths).to(device),
        rows=torch.from_numpy(at - 1).to(device),
        targets_N=torch.from_numpy(token_ids[at]).to(device, torch.int64),
        behaviour_N=floats(selection.flat([rollout.logprobs for rollout in rollouts], 0.0)),
        sampled_N=torch.from_numpy(selection.repeat([example.sampled for example in examples])).to(device),
        current_share_N=floats(selection.repeat([current_share(example) for example in examples])),
        old_N=floats(selection.flat([old.logprobs for old in known], 0.0)) if selection.passed else None,
        weights_N=floats(selection.repeat([example.weight for example in examples]) * corrected),
        advantage_N=floats(selection.repeat([example.advantage for example in examples])),
        credits={name: floats(selection.flat([e.credits.get(name) for e in examples], 0.0)) for name in services},
        reference_N=floats(selection.flat(reference, 0.0)),
        teachers={name: _teacher(selection, terms, name, device) for name in {term.teacher for term in terms}},
        masks={
            t.key: torch.from_numpy(selection.repeat([t.key in m for m in selection.members])).to(device) for t in terms
        },
        scales={term.key: floats(_scale(selection, term)) for term in terms},
        gates={term.key: floats(_gate(selection, term)) for term in gated},
    )


def token_rows(batch: MicroBatch, term: BoundTerm, at: slice, old_C: Tensor, **more: Tensor | None) -> TokenRows:
    """What a term is given of the tokens `at`."""
    teacher, gate, views = batch.teachers[term.teacher], batch.gates.get(term.key), term.loss.signal == "views"
    return TokenRows(
        targets_C=batch.targets_N[at],
        old_C=old_C,
        advantage_C=batch.advantage_N[at],
        credit_C=batch.credits[term.credit][at] if term.credit else None,
        teacher_C=teacher.sampled_N[at],
        reference_C=batch.reference_N[at],
        gate_C=torch.ones_like(old_C) if gate is None or views else gate[at],
        topk_ids_CK=teacher.topk_ids_NK[at],
        topk_logprobs_CK=teacher.topk_logprobs_NK[at],
        teacher_entropy_C=teacher.entropy_N[at],
        views_CW=teacher.views_NW[at] if views else None,
        view_gate_CW=gate[at] if views and gate is not None else None,
        **more,
    )


def _scale(selection: Selection, term: BoundTerm) -> np.ndarray:
    """Σ of these over a sequence is 1 where a term averages over sequences; elsewhere a token counts 1."""
    counts = selection.counts
    return selection.repeat([1 / count if term.reduction == "sequences" else 1.0 for count in counts])


def _gate(selection: Selection, term: BoundTerm) -> np.ndarray:
    factors = [old.gates[term.key].factors for old in selection.old if old]
    none = (1,) if term.loss.signal == "views" else ()  # where the term counts nothing
    width = next((array.shape[1:] for array in factors if array.ndim > 1), none)
    wide = [array if array.ndim > len(width) else None for array in factors]  # None: the term does not count it
    return selection.flat(wide, 1.0, width)


def _teacher(selection: Selection, terms: Sequence[BoundTerm], name: str, device: str) -> TeacherTokens:
    """The scores of teacher `name`, as far as the terms that read them need."""
    read = [term for term in terms if term.teacher == name]

    def known(field: str, *signals: str) -> list[np.ndarray | None]:
        """A field of each example's scores; None where none of the terms of those signals counts it."""
        keys = {term.key for term in read if term.loss.signal in signals}
        pairs = zip(selection.examples, selection.members, strict=True)
        return [getattr(e.of(name), field) if keys & members else None for e, members in pairs]

    def floats(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, torch.float32)

    def sent(field: str) -> list[np.ndarray | None]:
        """The same of top-k arrays, which views may come without."""
        return [None if array is None or not array.size else array for array in known(field, "topk", "views")]

    ids, entropy = sent("topk_ids"), known("entropy", "topk")
    k, w = (
        next((array.shape[1] for array in arrays if array is not None), 1) for arrays in (ids, known("views", "views"))
    )
    return TeacherTokens(
        sampled_N=floats(selection.flat(known("logprobs", "sampled"), 0.0)),
        topk_ids_NK=torch.from_numpy(selection.flat(ids, 0, (k,))).to(device, torch.int64),
        topk_logprobs_NK=floats(selection.flat(sent("topk_logprobs"), -np.log(2.0 * k), (k,))),
        entropy_N=floats(selection.flat([_measured(a, ids) for a, ids in zip(entropy, ids, strict=True)], 0.0)),
        views_NW=floats(selection.flat(known("views", "views"), 0.0, (w,))),
        hidden=_hidden(selection, {term.key for term in read if term.loss.signal == "exact"}, name, device),
    )


def _measured(entropy: np.ndarray | None, ids: np.ndarray | None) -> np.ndarray | None:
    """The teacher's entropies; NaN where it sent ids alone, as engines do that never see the whole vocabulary."""
    return entropy if entropy is None or ids is None or entropy.size else np.full(len(ids), np.nan, np.float32)


def _hidden(selection: Selection, keys: set[str], name: str, device: str) -> tuple[TeacherHidden, ...]:
    """The hidden states of the trained tokens, teacher by teacher."""
    counts = selection.counts
    starts = np.cumsum(counts) - counts
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for example, members, mask, start, count in zip(
        selection.examples, selection.members, selection.masks, starts, counts, strict=True
    ):
        scores: TeacherScores | None = example.of(name)
        if keys & members and scores is not None:
            at = np.arange(start, start + count)
            groups.setdefault(scores.teacher_id, []).append((at, scores.hidden[mask]))
    return tuple(
        TeacherHidden(
            teacher_id=teacher_id,
            at=torch.from_numpy(np.concatenate([at for at, _ in parts])).to(device),
            hidden=as_float(np.concatenate([hidden for _, hidden in parts])).to(device),
        )
        for teacher_id, parts in groups.items()
    )


def as_float(hidden: np.ndarray) -> Tensor:
    """float32 as it is; uint16 are bfloat16 bits."""
    if hidden.dtype == np.uint16:
        return torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(hidden)


def _dummy(terms: Sequence[BoundTerm], device: str) -> MicroBatch:
    index = torch.zeros(1, dtype=torch.int64, device=device)
    zero = torch.zeros(1, device=device)
    never = torch.zeros(1, dtype=torch.bool, device=device)
    silent = TeacherTokens(
        sampled_N=zero,
        topk_ids_NK=index[:, None],
        topk_logprobs_NK=zero[:, None] - 1,
        entropy_N=zero,
        views_NW=zero[:, None],
        hidden=(),
    )
    gated = [term for term in terms if isinstance(term.loss, GatedTerm)]
    return MicroBatch(
        token_ids=index,
        lengths=index + 1,
        rows=index,
        targets_N=index,
        behaviour_N=zero,
        sampled_N=never,
        current_share_N=zero + 1,
        old_N=None,
        weights_N=zero,
        advantage_N=zero,
        credits={term.credit: zero for term in terms},
        reference_N=zero,
        teachers={term.teacher: silent for term in terms},
        masks={term.key: never for term in terms},
        scales={term.key: zero for term in terms},
        gates={term.key: zero[:, None] if term.loss.signal == "views" else zero for term in gated},
    )
