"""Draw tokens from logits, each row by its own random numbers.

A row's uniforms come from its own seed, and a token is drawn from its own uniform by the inverse of the cumulative
distribution. So a draw depends on its seed and its logits, never on which rows share the batch.

Shapes: B rows, V vocabulary, T new tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch


def uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """float64 `[B, T]` in [0, 1): row i is the Philox stream of `seeds[i]`, so a longer row extends a shorter one."""
    return np.stack([np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds])


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 `[B]` and their natural logprobs float32 `[B]`; logits `[B, V]`, uniform float64 `[B]`.

    Logprobs are of the distribution that was sampled, after the temperature. Temperature 0 takes the likeliest token,
    whose logprob is then that of temperature 1 (the distribution of a greedy sampler says nothing).
    """
    logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
    logprobs = torch.log_softmax(logits, -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        target = uniform * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # rounding can put the target on the total itself
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
