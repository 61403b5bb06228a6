"""Read a model's distribution token by token, a chunk at a time, so that `[tokens, vocab]` is never in memory."""

from collections.abc import Iterator

import torch

CHUNK_BYTES = 64 * 2**20


def chunk_rows(vocab: int) -> int:
    """Rows of float32 logits that fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * vocab))


def logit_chunks(hidden: torch.Tensor, head: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Float32 (or wider) logits `[C, V]` of `hidden` [R, D] under `head` [V, D], chunk by chunk, with their rows."""
    step = chunk_rows(head.shape[0])
    for start in range(0, len(hidden), step):
        rows = slice(start, min(start + step, len(hidden)))
        logits = hidden[rows] @ head.T
        yield rows, logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def token_logprobs(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(targets) `[R]`, natural, at temperature 1; hidden `[R, D]`, targets int64 `[R]`."""
    out = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for rows, logits in logit_chunks(hidden, head):
        picked = logits.gather(1, targets[rows, None]).squeeze(1)
        out[rows] = picked - logits.logsumexp(1)
    return out
