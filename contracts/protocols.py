"""The protocols of the exchangeable parts. An actor knows a protocol, never another actor."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from .records import Rollout, Sampling, ScoreRequest, TeacherScores, WeightBucket, WeightManifest


class Generation(Protocol):
    """One sampled response: ids, logprobs and the weight version of each token `[R]`, the sampler's own top-k ids
    `[R,K]` if asked, and why it ended."""

    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def weight_versions(self) -> np.ndarray: ...
    @property
    def topk_ids(self) -> np.ndarray: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def restarts(self) -> int: ...


class RolloutEngine(Protocol):
    """Generates from token ids. One that batches continuously is called from several threads at once, and its weights
    may change while it generates; the others' change only between calls of `generate`."""

    weight_version: int
    context: int  # most tokens of prompt and response

    def generate(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling) -> Sequence[Generation]:
        """One response per prompt. The draw depends on the prompt's seed alone, not on the rest of the batch."""
        ...

    def decode(self, token_ids: np.ndarray) -> str:
        """Response text, special tokens left out."""
        ...

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Copy a version in, then prove it: fingerprint and canary. Raises WeightsMismatch."""
        ...


class TeacherEngine(Protocol):
    """Scores exact token ids, never re-tokenised text, at temperature 1."""

    context: int  # most tokens of a rollout
    largest_k: int  # most top-k ids of a token

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        """Scores in the order of `rollouts`; one that cannot be scored comes back with an error class."""
        ...


class Judgement(Protocol):
    """A verifier's decision on one text: passed, and the canonical answer it read ("" for none)."""

    @property
    def passed(self) -> bool: ...
    @property
    def answer(self) -> str: ...


class Verifier(Protocol):
    """Judges one response text against one gold answer. May hang or crash: it runs in a process that can be killed."""

    def __call__(self, text: str, gold: str) -> Judgement: ...
