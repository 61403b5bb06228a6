"""Loss terms are bound by name, and whatever cannot run is refused with the rule it breaks."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_origin

import pytest
import torch
from term_cases import chunk_of, rows_of

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.records import Term
from tutorloop.learner.terms import TERMS, bind_terms
from tutorloop.learner.terms.base import LossTerm, Range, TermOutput


def bad(**term):
    with pytest.raises(ConfigError) as error:
        bind_terms((Term(**term),))
    return str(error.value)


def test_terms_are_bound_by_name_and_their_options_checked():
    for terms in ((), (Term(name="nll"), Term(name="nll", weight=2.0))):
        with pytest.raises(ConfigError, match="key of its own"):
            bind_terms(terms)
    two = (Term(name="exact_divergence", teacher="a"), Term(name="exact_divergence", label="b", weight=0.5))
    first, second = bind_terms(two)
    assert (first.key, first.teacher, second.key, second.weight) == ("exact_divergence.a", "a", "b", 0.5)
    assert "known terms: nll, reference_kl" in bad(name="reverse_kl")
    assert "alpha" in bad(name="exact_divergence", options={"alpha": 0.5})
    assert "are: none" in bad(name="nll", options={"beta": 0.5})
    assert "skew_forward" in bad(name="topk_divergence", options={"direction": "backward"})
    assert "below 1" in bad(name="exact_divergence", options={"direction": "skew_forward", "beta": 1.0})
    assert "true or false" in bad(name="clipped_policy_gradient", options={"clip": 1})
    assert "reduction" in bad(name="nll", reduction="mean")
    assert "length" in bad(name="nll", reduction="length")


def test_options_out_of_range_are_refused_and_the_ends_taken():
    owners = {
        name: (term, low, high)
        for term, names in {
            "exact_divergence": {"beta": (-0.1, 1.1), "temperature": (0.0, None), "entry_clip": (-1.0, None)},
            "topk_divergence": {"token_clip": (-0.1, None), "teacher_entropy_above": (-0.5, None)},
            "policy_gradient": {"extrapolation": (-0.5, None)},
            "sign_gate": {"agree": (-1.0, None), "conflict": (-1.0, None), "blend": (-1.0, None)},
            "soft_gate": {"sharpness": (0.0, None)},
            "skill_gate": {"tau": (0.0, None), "delta_clip": (0.0, None), "confidence": (-0.1, None)},
            "clipped_policy_gradient": {"clip_low": (-0.1, 1.1), "clip_high": (-0.1, None), "dual_clip": (1.0, 0.5)},
        }.items()
        for name, (low, high) in names.items()
    }
    ranged = {
        name: {field.name for field in fields(kind) if get_origin(field.type) is Annotated}
        for name, kind in TERMS.items()
    }
    assert set(owners) == {option for options in ranged.values() for option in options}
    for name, options in ranged.items():  # the same option of another term too
        for option in options:
            _, *values = owners[option]
            for value in (*values, float("nan"), float("inf"), "1", True, None):
                if value is not None or values[1] is not None:
                    assert f"{name}'s {option}" in bad(name=name, options={option: value}, reference=True)
    for name, options in (
        ("exact_divergence", {"beta": 0, "temperature": 0.1}),
        ("clipped_policy_gradient", {"clip_low": 1, "clip_high": 0.0, "dual_clip": 0}),
        ("clipped_policy_gradient", {"dual_clip": 1.5}),
    ):
        bind_terms((Term(name=name, options=options),))


def test_a_term_that_reads_the_reference_must_ask_for_it():
    for name, options in (
        ("reference_kl", {}),
        ("policy_gradient", {"extrapolation": 1.25}),
        ("sign_gate", {"mode": "frozen_ref"}),
    ):
        assert "reference=True" in bad(name=name, options=options)
        assert bind_terms((Term(name=name, options=options, reference=True),))[0].reference
    bind_terms((Term(name="policy_gradient", options={"extrapolation": 1.0}), Term(name="sign_gate")))


@dataclass(frozen=True)
class Squared(LossTerm):
    beta: float = 2.0  # no range of its own
    power: Annotated[float, Range("an even number", lambda x: x % 2 == 0)] = 2.0
    side: Literal["left", "right"] = "left"
    more: dict = field(default_factory=dict)

    def loss(self, student, rows):
        return TermOutput(loss_C=self.beta * student.sampled_C**self.power)


def test_a_loss_term_of_ones_own():
    (term,) = bind_terms((Term(name="mine", loss=Squared, options={"beta": 3.0, "more": {"a": 1}}),))
    current = torch.tensor([-1.0, -2.0])
    assert term.key == "mine" and term(chunk_of(current), rows_of(current)).loss_C.tolist() == [3.0, 12.0]
    assert term.loss == Squared(beta=3.0, more={"a": 1}) and term.loss.signal == "none"
    for options, told in (
        ({"gamma": 1}, "are: beta, power, side, more"),
        ({"beta": float("inf")}, "mine's beta is a finite number"),
        ({"power": 3}, "mine's power is an even number"),
        ({"side": "middle"}, "mine's side is one of left, right"),
    ):
        assert told in bad(name="mine", loss=Squared, options=options)
    for what in (Squared(), Squared.loss, int):
        assert "derived from LossTerm" in bad(name="mine", loss=what)


def test_credit_is_for_terms_that_read_it():
    for name, kind in TERMS.items():
        if kind.reads_credit:
            assert bind_terms((Term(name=name, credit="judge"),))[0].credit == "judge"
        else:
            assert "policy_gradient" in bad(name=name, credit="judge", reference=True)
    assert "judge" in bad(name="mine", loss=Squared, credit="judge")
