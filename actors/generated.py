"""What an engine returns for one prompt."""

from dataclasses import dataclass, field

import numpy as np

from ..contracts.records import EMPTY_F, EMPTY_I, EMPTY_II


@dataclass(frozen=True, slots=True)
class Generated:
    """A `contracts.protocols.Generation`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    topk_ids: np.ndarray
    finish_reason: str
    weight_versions: np.ndarray = field(default_factory=lambda: EMPTY_I)
    restarts: int = 0  # times that a weight update made the engine begin it again


REFUSED = Generated(EMPTY_I, EMPTY_F, EMPTY_II, "error")
