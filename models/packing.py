"""Packing without padding: sequences end to end in one row, attention inside each alone.

Linear layers see `[1, T]` tokens with no padding. Attention alone is unfolded to `[B, Lmax]`, where causality needs
no mask at all (padding lies to the right of every real token), and folded back. It is registered with transformers as
the attention implementation "packed", so any architecture that uses its attention interface can run it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each of T packed tokens stands in the unfolded `[B, Lmax]` grid."""

    slots: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], the position inside its sequence
    batch: int  # B
    width: int  # Lmax

    @classmethod
    def of(cls, lengths: torch.Tensor) -> "Packing":
        """From the sequences' lengths, int64 [B], in order."""
        width = int(lengths.max())
        starts = torch.cumsum(lengths, 0) - lengths
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        positions = torch.arange(int(lengths.sum()), device=lengths.device) - starts[rows]
        return cls(rows * width + positions, positions, len(lengths), width)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each packed sequence; query `[1, H, T, d]`, key and value `[1, Hkv, T, d]`."""
    assert packing is not None, "the packed attention runs under packed_hidden_states only"
    q, k, v = (_unfold(x, packing) for x in (query, key, value))
    mask = None
    if sliding_window is not None and packing.width > sliding_window:
        at = torch.arange(packing.width, device=q.device)
        gap = at[:, None] - at[None, :]
        mask = (gap >= 0) & (gap < sliding_window)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out = out.transpose(1, 2).reshape(packing.batch * packing.width, *out.shape[1::2])  # [B*Lmax, H, d]
    return out.index_select(0, packing.slots)[None], None


def _unfold(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """`[1, H, T, d]` to `[B, H, Lmax, d]`, zeros to the right of each sequence."""
    heads, dim = x.shape[1], x.shape[3]
    grid = x.new_zeros(packing.batch * packing.width, heads, dim)
    grid = grid.index_copy(0, packing.slots, x[0].transpose(0, 1))
    return grid.view(packing.batch, packing.width, heads, dim).transpose(1, 2)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *_args, **_kwargs: None)


@contextmanager
def attention_packed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` runs the packed attention, whatever it was loaded with."""
    own = model.config._attn_implementation or "sdpa"
    if own == "packed":
        yield
        return
    model.set_attn_implementation("packed")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def packed_hidden_states(model: PreTrainedModel, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[T, D]`, the head's input, of `token_ids` int64 `[T]` in sequences of `lengths` int64 `[B]`.

    Attention is packed, whatever the model was loaded with.
    """
    packing = Packing.of(lengths)
    with attention_packed(model):
        out = model.base_model(
            input_ids=token_ids[None], position_ids=packing.positions[None], use_cache=False, packing=packing
        )
    return out.last_hidden_state[0]


def next_token_rows(lengths: torch.Tensor) -> torch.Tensor:
    """Row of the packed batch that predicts each token but every sequence's first: int64 `[T - B]`."""
    total = int(lengths.sum())
    rows = torch.arange(total, device=lengths.device)
    last = torch.cumsum(lengths, 0) - 1
    keep = torch.ones(total, dtype=torch.bool, device=lengths.device)
    keep[last] = False
    return rows[keep]
