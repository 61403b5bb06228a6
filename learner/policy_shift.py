"""How far a step has moved the policy, seen before anybody samples from it."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..contracts.records import Rollout
from ..models.logits import token_logprobs
from .corrections import mismatch

ONE_OF = 32  # rollouts: a forward pass of so few costs a hundredth of a step
TOKENS = 64  # of each response
FEWEST = 32  # tokens of all: the estimate from fewer is noise, and a single step of it may stop a run


def watched(names: Iterable[str], step: int) -> set[str]:
    """Of the rollouts that the student sampled for a step, those that are read again. Where a step has few, one of them
    every so many steps. However ranks hold them: `names` are those of all."""
    ordered = sorted(names)
    return set() if not ordered or step % max(1, ONE_OF // len(ordered)) else set(ordered[::ONE_OF])


@torch.no_grad()
def policy_shift(engine: Any, chosen: Sequence[Rollout], device: str) -> tuple[float, int]:
    """Over the first tokens of some sampled responses, the sum of −log ρ, whose mean estimates KL(μ‖π) in nats, μ the
    sampler and π the policy as it is now; and how many tokens. Every rank must call it, with rollouts or with none.

    It is k1, for k3 takes a seldom token that π has learnt for a large step: one of probability 0.01 that rises to 0.9
    counts as 85 nats.
    """
    ids = [rollout.token_ids[: rollout.prompt_length + TOKENS] for rollout in chosen] or [np.zeros(2, np.int32)]
    lengths = np.array([len(part) for part in ids])
    masks = [rollout.loss_mask[:TOKENS] for rollout in chosen] or [np.ones(1, bool)]
    starts = np.cumsum(lengths) - [len(mask) for mask in masks]  # of the responses, packed
    at = np.concatenate([start + np.flatnonzero(mask) for start, mask in zip(starts, masks, strict=True)])
    packed = torch.from_numpy(np.concatenate(ids)).to(device, torch.int64)
    targets, rows = packed[torch.from_numpy(at).to(device)], torch.from_numpy(at - 1).to(device)
    now = engine(packed, torch.from_numpy(lengths).to(device), rows, lambda h, head: token_logprobs(h, head, targets))
    if not chosen:
        return 0.0, 0
    sampled = np.concatenate([rollout.logprobs[:TOKENS][mask] for rollout, mask in zip(chosen, masks, strict=True)])
    k1, _ = mismatch(now.float(), torch.from_numpy(sampled).to(device, torch.float32))
    return float(k1.double().sum()), len(at)
