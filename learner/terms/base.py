"""What a loss term is, what it is given, and what it returns.

A term is a frozen dataclass: its fields are its options, and `loss` is a pure, differentiable function of one chunk of
response tokens. It never sees rollouts, ranks or the batch: the learner weighs its token losses and divides by the
term's own global count.

Shape suffixes: C tokens of a chunk, R response tokens of one rollout, V vocabulary, K top-k ids of all views, W views.
Every log is natural; floats are float32 or wider.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from torch import Tensor

from ...contracts.records import Polarities, Term

Signal = Literal["none", "sampled", "views", "topk", "exact"]
SIGNALS: tuple[Signal, ...] = ("none", "sampled", "views", "topk", "exact")  # from the weakest to the strongest


class Range(NamedTuple):
    """What the number of an option may be: in words, and as a test."""

    rule: str
    holds: Callable[[float], bool]


# Types of options. A field with one of them is a float, and its range is checked when the term is bound.
Share = Annotated[float, Range("in [0, 1]", lambda x: 0 <= x <= 1)]
Positive = Annotated[float, Range("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Range("0 or above", lambda x: x >= 0)]
OffOrPositive = Annotated[float, Range("0 (off) or above", lambda x: x >= 0)]


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
    credit_C: Tensor | None = None  # what the term's credit service gave each token; None where the term names none
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
    metrics are means over rollouts; and, of views, whether each was helpful (1), harmful (-1) or neutral (0)."""

    factors: np.ndarray
    figures: dict[str, float] = field(default_factory=dict)
    polarities: Polarities = ()


@dataclass(frozen=True)
class LossTerm:
    """The base of all terms. The fields of a term are its options; `terms/__init__.py` checks their types and ranges:
    bool, float, a range from above, or a `Literal` of the choices."""

    signal: ClassVar[Signal] = "none"  # the weakest signal that a token must have from the teacher to count
    reads_credit: ClassVar[bool] = False  # whether `Term.credit` may name a service: the term reads `rows.credit_C`

    @property
    def reads_reference(self) -> bool:
        """Whether it reads `rows.reference_C` with these options."""
        return False

    def loss(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        """The token losses `[C]` of one chunk."""
        raise NotImplementedError


@dataclass(frozen=True)
class GatedTerm(LossTerm):
    """A term that first judges each whole rollout. The learner makes one more pass over the batch for it, without a
    gradient, and gives `loss` the result as `rows.gate_C` or `rows.view_gate_CW`."""

    def gate(self, d: np.ndarray, advantage: float) -> Gated:
        """From d = log π_T − log π_old of one rollout's trained tokens, `[R]`; of views, from their gaps `[R,W]`."""
        raise NotImplementedError

    def gap(self, student: StudentChunk, rows: TokenRows) -> Tensor:
        """The d `[C,W]` that the gate of views reads; called where the signal is views."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTerm(Term):
    """A term whose options are checked: `loss` is no longer a class, but an instance that holds them."""

    loss: LossTerm  # pyright: ignore[reportGeneralTypeIssues]  # no default, unlike Term's: this one is always there

    def __call__(self, student: StudentChunk, rows: TokenRows) -> TermOutput:
        return self.loss.loss(student, rows)
