"""What a loss term is given, and what it returns.

A term is a pure, differentiable function of one chunk of response tokens: `term(student, rows, **options)`. It never
sees rollouts, ranks or the batch: the learner weighs its token losses and divides by the term's own global count.

Shape suffixes: C tokens of a chunk, R response tokens of one rollout, V vocabulary, K top-k ids of all views, W views.
Every log is natural; floats are float32 or wider.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from ...contracts.records import Stances

Signal = Literal["none", "sampled", "views", "topk", "exact"]
SIGNALS: tuple[Signal, ...] = ("none", "sampled", "views", "topk", "exact")  # from the weakest to the strongest


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
    old_C: Tensor  # log π_old(y_t), the proximal policy of clipped ratios
    advantage_C: Tensor  # the rollout's advantage, or the verifier's sign: one value for all its tokens
    teacher_C: Tensor  # log π_T(y_t)
    reference_C: Tensor  # log π_ref(y_t), where the term asks for a reference
    gate_C: Tensor  # what the term's own `gate` said of the token, 1 without one
    topk_ids_CK: Tensor  # int64, the support that came with the scores
    topk_logprobs_CK: Tensor  # log π_T on that support
    teacher_entropy_C: Tensor  # H(π_T) in nats over the whole vocabulary; of the topk signal
    teacher_logprobs_CV: Tensor | None = None  # log π_T, of the exact signal only
    views_CW: Tensor | None = None  # log π_T(y_t) under each view's context, of the views signal only
    view_gate_CW: Tensor | None = None  # and each view's weight times what the term's `gate` said of it


@dataclass(frozen=True, slots=True, kw_only=True)
class TermOutput:
    """Token losses with their graph, and detached metrics of the same tokens."""

    loss_C: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name → [C]


@dataclass(frozen=True, slots=True)
class Gated:
    """What a gate says of one rollout: a factor for each token `[R]`, or for each view `[W]`; its figures, of which the
    metrics are means over rollouts; and, of views, what came of each."""

    factors: np.ndarray
    figures: dict[str, float] = field(default_factory=dict)
    stances: Stances = ()


TokenLoss = Callable[..., TermOutput]
RowGate = Callable[..., Gated]
TokenGap = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A term's function, the teacher's signal that a token must have to count in it, and maybe a gate by rollout.

    `gate(d, advantage, **options)` → `Gated`, from d = log π_T − log π_old of a whole rollout (`[R]`; `[R,W]` of views)
    before the gradient; the learner then makes one pass more over the batch. `gap(student, rows, **options)` → `[C,W]`:
    the d that the gate of views reads. Both are called with the term's options.
    """

    function: TokenLoss
    signal: Signal
    gate: RowGate | None = None
    gap: TokenGap | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTerm:
    """A term with its weight and options, as a run uses it."""

    key: str  # its name in the metrics
    weight: float
    loss: LossTerm
    options: dict[str, Any]
    teacher: str  # whose scores; "" the teacher that the rollout names
    reference: bool  # it also needs the reference's scores
    sources: tuple[str, ...]
    reduction: Literal["tokens", "sequences", "length"]
    length: int
    of_batch: bool

    def __call__(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        return self.loss.function(student, rows, **self.options)
