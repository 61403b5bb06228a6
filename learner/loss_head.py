"""The output head that ends in a loss: `[tokens, vocab]` exists for one chunk of rows at a time, on either side.

`LossHead` stands where the model's `lm_head` stood, with the same parameter under the same name, so ZeRO-3 gathers the
weight for its forward. `ChunkedLoss` makes a chunk's logits once, lets the terms turn them into a loss, and takes the
gradient with respect to the hidden rows and the weight there and then; what it hands to the outer graph is `[N, D]` and
`[V, D]`. The terms remain plain differentiable PyTorch.

Two sizes: a product with a head wants many rows at once, so a chunk has up to 64 MiB of logits. What the terms make of
them are dozens of passes over arrays of that size, so on a CPU they are given a block at a time: with smaller arrays
there were about a quarter of the page faults, and terms took half the time (49,152 ids; 8 was best of 1 to 16 MiB).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contracts.errors import ModelError
from ..models.loading import check_head
from ..models.logits import logit_chunks
from ..models.packing import packed_hidden_states

BLOCK_BYTES = 8 * 2**20  # of logits

BlockLoss = Callable[[Tensor, slice], Tensor]  # logits [C, V] of rows, → a scalar with its graph
ChunkLoss = Callable[[slice], BlockLoss]  # rows of a chunk → the loss of each block of them
Feel = Callable[[Tensor], None]  # the gradient [C, V] of a block's logits
HeadReader = Callable[[Tensor, Tensor], Tensor]  # hidden [N, D], head [V, D] → anything


class ChunkedLoss(torch.autograd.Function):
    """Σ over blocks of `chunk_loss(chunk)(logits, block)`, scalar; the gradients are ready when forward returns, and
    `feel` has been shown those of each block's logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, feel: Feel | None = None) -> Tensor:
        grad_hidden = torch.zeros_like(hidden)
        trains_head = ctx.needs_input_grad[1]
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if trains_head else weight.new_zeros(0)
        total = hidden.new_zeros((), dtype=wide)
        for rows, logits in logit_chunks(hidden, weight):
            block_loss = chunk_loss(rows)
            for block, logits_CV in _blocks(rows, logits):
                with torch.enable_grad():
                    leaf = logits_CV.detach().requires_grad_()
                    loss = block_loss(leaf, block)
                (grad_CV,) = torch.autograd.grad(loss, leaf)
                if feel:
                    feel(grad_CV)
                logits_CV.copy_(grad_CV)  # in the logits' place, which nobody needs any more
                total += loss.detach()
            grad_logits = logits.to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if trains_head:
                _add_product(grad_weight, grad_logits.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # used once, so scaled where they are
        (scale,) = grad_outputs
        return grad_hidden.mul_(scale), grad_weight.mul_(scale) if ctx.needs_input_grad[1] else None, None, None


def _blocks(rows: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views of a chunk's logits with their rows; on a GPU all of them, for it has no use of smaller ones."""
    fit = max(1, BLOCK_BYTES // (logits.element_size() * logits.shape[1]))
    step = len(logits) if logits.is_cuda else fit
    for start in range(0, len(logits), step):
        own = logits[start : start + step]
        yield slice(rows.start + start, rows.start + start + len(own)), own


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; where they have its dtype, without an array for the product, which is as large as the head."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class LossHead(torch.nn.Module):
    """Holds the head's weight `[V, D]` and lends it to a reader inside its own forward."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, read: HeadReader) -> Tensor:
        return read(hidden, self.weight)


class PackedStudent(torch.nn.Module):
    """A causal language model that takes packed sequences and ends in a LossHead. Always in evaluation mode:
    what is trained is the policy that the sampler runs, without dropout."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        check_head(model, str(model.name_or_path))
        if not hasattr(model, "lm_head"):
            raise ModelError("a student's head is its lm_head", type(model).__name__, "use a model like Qwen3")
        model.lm_head = LossHead(model.lm_head.weight)
        self.model = model.eval()

    def forward(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, read: HeadReader) -> Tensor:
        """`read` rows `rows` int64 `[N]` of the hidden states of `token_ids` `[T]`, packed from `lengths` `[B]`."""
        hidden = packed_hidden_states(self.model, token_ids, lengths)
        return self.model.lm_head(hidden.index_select(0, rows), read)
