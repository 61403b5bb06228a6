"""The protocols of the exchangeable parts. An actor knows a protocol, never another actor."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from .records import BucketEntries, Rollout, Sampling, ScoreRequest, TeacherScores, WeightBucket, WeightManifest


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
    """Generates from token ids. Its capabilities (contracts/engines.py) say whether `generate` is called from several
    threads and weights change meanwhile; else they change only between two calls."""

    weight_version: int
    context: int  # most tokens of prompt and response

    def generate(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], sampling: Sampling) -> Sequence[Generation]:
        """One response per prompt. The draw depends on the prompt's seed alone, not on the rest of the batch."""
        ...

    def decode(self, token_ids: np.ndarray, thinking: tuple[str, str]) -> str:
        """Response text, special tokens left out but for the marks of its `thinking`."""
        ...

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest) -> None:
        """Copy a version in, then prove it: fingerprint and canary. Raises WeightsMismatch."""
        ...


@runtime_checkable
class BroadcastEngine(Protocol):
    """A rollout engine that takes weights from a process group too."""

    def join_broadcast(self, host: str, port: int, first_rank: int, size: int) -> None:
        """Meet the learner at `host`:`port`; this engine's processes are those from `first_rank` on, of `size`.
        In place of a group that they were in before. Raises BroadcastBroken."""
        ...

    def receive_weights(self, layout: Sequence[BucketEntries], manifest: WeightManifest) -> None:
        """As `load_weights`, of buckets that the learner broadcasts meanwhile. Raises WeightsMismatch; or
        BroadcastBroken, where the group breaks: calls in flight then wait for the next version that is taken in."""
        ...


class TeacherEngine(Protocol):
    """Scores exact token ids, never re-tokenised text, at temperature 1."""

    context: int  # most tokens of a rollout
    largest_k: int  # most top-k ids of a token

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        """Scores in the order of `rollouts`; one that cannot be scored comes back with an error class."""
        ...


@dataclass(frozen=True, slots=True)
class Response:
    """What a verifier is given of one rollout."""

    text: str
    gold: str = ""
    prompt: str = ""  # the user's turn
    row: str = ""  # the dataset's row as JSON, for verifiers that read more of it than the gold answer
    tokens: int = 0  # of the response
    truncated: bool = False  # the token limit ended it
    other_golds: tuple[str, ...] = ()  # as right as `gold`


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verifier's decision: correct, incorrect, or abstained, and then `error_class` says why.

    `fault`: it was killed or raised, or that reason lies in the response alone (not readable, too large, over its
    budget), which is incorrect unless the recipe says otherwise (verifier.response_fault), so that no neutral
    verdict is to be had.
    """

    passed: bool
    answer: str = ""  # canonical, "" where none was found
    score: float = math.nan  # the reward; by default 1 where passed, else 0
    error_class: str = ""
    parts: tuple[tuple[str, float], ...] = ()  # of a composite reward: each part's own score
    fault: bool = False
    rule: str = field(default="", compare=False)  # by which it was decided, for people

    def __post_init__(self) -> None:
        if math.isnan(self.score):
            object.__setattr__(self, "score", float(self.passed))


def error_class_of(error: BaseException) -> str:
    """An exception's name as an error class, unless it is a name that no honest code has."""
    name = type(error).__name__
    return name[:64] if name.isascii() and name.isidentifier() else "error"


class Verifier(Protocol):
    """Judges one response at a time, in two parts.

    `prepare` runs in the caller and cannot hang: everything in it is linear in the text. It decides what it can, or
    returns what the rest must see: the less the better, since a poison sample is known by it. Calling the verifier with
    that may hang or crash, and runs in a process that can be killed.
    """

    needs_gold: bool  # a response without a gold answer abstains
    harmless: (
        str  # a response that no failure can be the fault of, to try golds with; "": failures are never responses'
    )
    waits: bool  # it spends its time waiting for others, so that many run side by side

    def prepare(self, response: Response) -> Judgement | Response: ...

    def __call__(self, response: Response) -> Judgement: ...


def judgement_of(verifier: Verifier, response: Response) -> Judgement:
    """A verifier's judgement, both halves; what it raises is its error class."""
    try:
        prepared = verifier.prepare(response)
        return prepared if isinstance(prepared, Judgement) else verifier(prepared)
    except MemoryError:
        return Judgement(False, error_class="memory", fault=True)
    except Exception as error:
        return Judgement(False, error_class=error_class_of(error), fault=True)
