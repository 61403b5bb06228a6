"""The output head that ends in a loss: `[tokens, vocab]` exists for one chunk of rows at a time, on either side.

`LossHead` stands where the model's `lm_head` stood, with the same parameter under the same name, so ZeRO-3 gathers the
weight for its forward. `ChunkedLoss` makes a chunk's logits once, lets the terms turn them into a loss, and takes the
gradient with respect to the hidden rows and the weight there and then; what it hands to the outer graph is `[N, D]` and
`[V, D]`. The terms remain plain differentiable PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..contracts.errors import ModelError
from ..models.loading import check_head
from ..models.logits import logit_chunks
from ..models.packing import packed_hidden_states

ChunkLoss = Callable[[Tensor, slice], Tensor]  # logits [C, V] of rows, → a scalar with its graph
Feel = Callable[[Tensor], None]  # the gradient [C, V] of those logits
HeadReader = Callable[[Tensor, Tensor], Tensor]  # hidden [N, D], head [V, D] → anything


class ChunkedLoss(torch.autograd.Function):
    """Σ over chunks of `chunk_loss(logits, rows)`, scalar; the gradients are ready when forward returns, and `feel` has
    been shown each chunk's."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, feel: Feel | None = None) -> Tensor:
        grad_hidden = torch.zeros_like(hidden)
        trains_head = ctx.needs_input_grad[1]
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if trains_head else weight.new_zeros(0)
        total = hidden.new_zeros((), dtype=wide)
        for rows, logits in logit_chunks(hidden, weight):
            with torch.enable_grad():
                leaf = logits.requires_grad_()
                loss = chunk_loss(leaf, rows)
            (grad_logits,) = torch.autograd.grad(loss, leaf)
            grad_logits = grad_logits.to(weight.dtype)
            if feel:
                feel(grad_logits)
            grad_hidden[rows] = grad_logits @ weight
            if trains_head:
                _add_product(grad_weight, grad_logits.T, hidden[rows])
            total += loss.detach()
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors  # used once, so scaled where they are
        (scale,) = grad_outputs
        return grad_hidden.mul_(scale), grad_weight.mul_(scale) if ctx.needs_input_grad[1] else None, None, None


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
