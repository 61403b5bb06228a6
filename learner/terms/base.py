"""What a loss term is given, and what it returns.

A term is a pure, differentiable function of one chunk of response tokens: `term(student, rows, **options)`. It never
sees rollouts, ranks or the batch: the learner weighs its token losses by the term's own global token count.

Shape suffixes: C tokens of a chunk, V vocabulary, K top-k ids. Every log is natural; floats are float32 or wider.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Signal = Literal["sampled", "topk", "exact"]
SIGNALS: tuple[Signal, ...] = ("sampled", "topk", "exact")  # from the weakest to the strongest


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentChunk:
    """The student's current distribution at temperature 1, attached to the graph."""

    logprobs_CV: Tensor
    sampled_C: Tensor  # log π_θ(y_t) of the token that was sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """The tokens of a chunk and what the other rooms said about them; nothing here has a gradient.

    Where a token lacks a signal its entries are finite filler, and the learner leaves the token out of the term.
    """

    targets_C: Tensor  # int64, y_t
    behaviour_C: Tensor  # log μ(y_t), the sampler's as it sampled
    teacher_C: Tensor  # log π_T(y_t)
    topk_ids_CK: Tensor  # int64, the support that came with the scores
    topk_logprobs_CK: Tensor  # log π_T on that support
    teacher_logprobs_CV: Tensor | None = None  # log π_T, of the exact signal only


@dataclass(frozen=True, slots=True, kw_only=True)
class TermOutput:
    """Token losses with their graph, and detached metrics of the same tokens."""

    loss_C: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name → [C]


TokenLoss = Callable[..., TermOutput]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A term's function and the teacher's signal that a token must have to count in it."""

    function: TokenLoss
    signal: Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTerm:
    """A term with its weight and options, as a run uses it."""

    name: str
    weight: float
    signal: Signal
    function: TokenLoss
    options: dict[str, Any]

    def __call__(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        return self.function(student, rows, **self.options)
