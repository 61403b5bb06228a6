"""The teacher's head as the learner read it, proved on what the teacher itself said.

A teacher of the exact signal sends its last hidden states and, made with its own head, the logprobs of the response's
tokens. Hidden states times the learner's copy of the head must give the same logprobs: else the two were read from
different files, and the divergence would be one from another distribution.
"""

import numpy as np
import torch

from ..contracts.errors import ModelError
from ..models.logits import token_logprobs
from .examples import Updates
from .micro_batch import as_float

ROWS = 256  # tokens compared, of one rollout
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, of the mean gap; another head was whole nats off


def prove_heads(unproven: frozenset[str], heads: dict[str, torch.Tensor], updates: Updates) -> frozenset[str]:
    """Those of `unproven` teachers of whom `updates` hold no hidden states. Raises ModelError for a wrong head."""
    examples = [example for update in updates for batch in update for example in batch] if unproven else []
    for example in examples:
        for name in unproven & example.scores.keys():
            if example.scores[name].hidden.size:
                ids = example.rollout.token_ids[example.rollout.prompt_length :]
                scores = example.scores[name]
                _prove(name, heads[name], as_float(scores.hidden[:ROWS]), ids[:ROWS], scores.logprobs[:ROWS])
                unproven -= {name}
    return unproven


def _prove(name: str, head: torch.Tensor, hidden: torch.Tensor, ids: np.ndarray, logprobs: np.ndarray) -> None:
    own = token_logprobs(hidden.to(head), head, torch.from_numpy(ids.astype(np.int64)).to(head.device))
    gap = float((own.cpu() - torch.from_numpy(logprobs.copy())).abs().mean())
    if not gap <= TOLERANCE[head.dtype]:  # so that a NaN is refused too
        raise ModelError(
            "a teacher's hidden states times the head that the learner read give the teacher's own logprobs",
            f"teacher {name!r}: {gap:.3g} nats apart on average",
            "its folder differs from one machine to another, or holds two models: copy it anew",
        )
