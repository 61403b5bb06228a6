"""Loss terms are bound by name, and whatever cannot run is refused with the rule it breaks."""

import pytest
import torch
from term_cases import chunk_of, rows_of

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.records import Term
from tutorloop.learner.terms import RANGES, bind_terms
from tutorloop.learner.terms.base import LossTerm, TermOutput


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
            "topk_divergence": {"beta": (-0.1, 1.1), "teacher_entropy_above": (-0.5, None)},
            "policy_gradient": {"extrapolation": (-0.5, None)},
            "sign_gate": {"agree": (-1.0, None), "conflict": (-1.0, None), "blend": (-1.0, None)},
            "soft_gate": {"sharpness": (0.0, None)},
            "skill_gate": {"tau": (0.0, None), "delta_clip": (0.0, None), "confidence": (-0.1, None)},
            "clipped_policy_gradient": {"clip_low": (-0.1, 1.1), "clip_high": (-0.1, None), "dual_clip": (1.0, 0.5)},
        }.items()
        for name, (low, high) in names.items()
    }
    assert owners.keys() == RANGES.keys()
    for option, (name, *values) in owners.items():
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


def test_a_loss_term_of_ones_own():
    def squared(student, rows, *, beta: float = 2.0):
        return TermOutput(loss_C=beta * student.sampled_C**2)

    own = LossTerm(squared, "none")
    (term,) = bind_terms((Term(name="mine", loss=own, options={"beta": 3.0}),))  # its beta has its own range
    current = torch.tensor([-1.0, -2.0])
    assert term.key == "mine" and term(chunk_of(current), rows_of(current)).loss_C.tolist() == [3.0, 12.0]
    assert "gamma" in bad(name="mine", loss=own, options={"gamma": 1})
