"""What reaches the student on average, of every term of every method: a four-word toy, summed over y ~ π_θ.

A gradient −A(y) ∇log π_θ(y) whose A is the same for all y is zero on average, whatever A holds: the divergence of a
whole distribution, handed to the loss as an advantage, trains nothing. And one in which A is not detached has no
teacher in it.
"""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
import torch
from term_cases import Case

from tutorloop.cluster.methods import METHODS
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import Term
from tutorloop.learner.terms import bind_terms
from tutorloop.learner.terms.base import LossTerm, TermOutput
from tutorloop.learner.terms.clipped_policy_gradient import ClippedPolicyGradient
from tutorloop.learner.terms.likelihood import NegativeLogLikelihood, ReferenceKl
from tutorloop.learner.terms.policy_gradient import PolicyGradient

WORDS = 4
CHOICES = {  # every option that selects a term or what it reads; numbers are one value of each kind
    "direction": ["reverse", "forward", "jsd", "skew_reverse", "skew_forward"],
    "support": ["teacher", "student", "sampled", "local"],
    "rest": ["tail", "renormalise"],
    "teachers": ["routed", "combined"],
    "reverse": ["policy_gradient", "divergence"],
    "extrapolation": [0.5, 1.0, 1.25],
    "gate": ["sign", "soft", True, False],
    "mode": ["live_ref", "frozen_ref", "blend"],
    "cold_start": [0.0, 0.5],
    "teacher_loss": ["nll", "forward_kl"],
    "on_policy": [0.0, 0.5, 1.0],
    "other": ["dataset", "teacher"],
    "answers": ["dataset", "teacher"],
    "grpo_weight": [0.0, 0.5],
    "kl_weight": [0.0, 0.1],
    "baseline": [True, False],
    "clip": [True, False],
    "keep": ["positives", "best"],
    "entropy_above": [0.5],
}


def recipe(method, signal, options):
    own = {"signal": signal} if signal else {}
    own |= {"follows": "live"} if method == "sgpo_guided" else {}
    teachers = {name: {"model": "s", **own} for name in ("a", "b")}
    tree = {"method": method, "output_dir": "x", "steps": 100, "prompts_per_step": 2, "reference": {"model": "s"}}
    tree |= {"student": {"model": "s"}, "data": {"path": "d"}, "rollout": {"samples_per_prompt": 4}}
    return parse_config({**tree, "teachers": teachers, "method_options": options})


def compositions(method):
    """Every combination of signals and options that the method takes."""
    with pytest.raises(ConfigError) as refused:
        METHODS[method](recipe(method, "", {"no such option": 1}))
    known = re.findall(r"\w+", refused.value.remedy.partition(":")[2])
    own = [[(name, value) for value in [None, *CHOICES[name]]] for name in known if name in CHOICES]
    found = {}
    for signal in ("", "sampled", "topk", "exact"):
        for chosen in itertools.product(*own):
            options = {name: value for name, value in chosen if value is not None}
            try:
                composition = METHODS[method](recipe(method, signal, options))
            except ConfigError:
                continue
            asked = composition.scoring is not None
            found[str((composition.terms, asked))] = (composition.terms, asked)
    assert found, "no combination at all is a mistake of this test"
    return list(found.values())


def distribution(*logits):
    return torch.tensor([logits], dtype=torch.float64)


STUDENT, TEACHER = distribution(0.3, -0.8, 1.1, 0.1), distribution(0.9, 0.2, -0.4, 0.6)
REFERENCE = distribution(-0.5, 0.4, 0.2, 0.8)
PI = STUDENT.softmax(1)[0]
ADVANTAGES = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)


def by_word(term, teacher=TEACHER, advantages=ADVANTAGES, **changes):
    """∂loss/∂logits `[sampled word, V]`: row y is what training on y does."""
    ids = torch.tensor([[0, 2]]).expand(WORDS, -1)
    grown = [x.expand(WORDS, -1) for x in (STUDENT, teacher, REFERENCE)]
    case = Case(grown[0], grown[1], torch.arange(WORDS), grown[2], ids, advantage=advantages)
    case.rows = replace(case.rows, old_C=case.chunk().sampled_C.detach())
    for name, change in changes.items():
        case.rows = replace(case.rows, **{name: change(getattr(case.rows, name))})
    return case.gradient(term(case.chunk(), case.rows).loss_C)


def advantage_of(gradients):
    """A(y) where row y is −A(y) (onehot(y) − π), else None."""
    scores = torch.eye(WORDS, dtype=torch.float64) - PI
    advantages = -(gradients * scores).sum(1) / scores.square().sum(1)
    return advantages if torch.allclose(gradients, -advantages[:, None] * scores, atol=1e-12) else None


def raised(word, by=0.2):
    """Adds to the row of one word, of `[C]` or `[C, W]`."""

    def change(values):
        values = values.clone()
        values[word] += by
        return values

    return change


def check_sampled(term):
    """The advantage of a word is made of the teacher's logprob of that word, and of nothing else of the teacher's."""
    read = "views_CW" if term.loss.signal == "views" else "teacher_C"
    advantages = advantage_of(by_word(term))
    assert advantages is not None
    assert (advantages - (PI * advantages).sum()).abs().max() > 1e-2, "the same for all words trains nothing"
    for word in range(WORDS):
        changed = (advantage_of(by_word(term, **{read: raised(word)})) - advantages).abs() > 1e-6
        assert changed.nonzero().flatten().tolist() == [word]
    others = {"topk_logprobs_CK": lambda x: x - 1, "teacher_entropy_C": lambda x: x + 1}
    assert torch.equal(by_word(term, **others), by_word(term))
    expected = PI @ by_word(term)
    assert expected.abs().max() > 1e-3
    if type(term.loss) is PolicyGradient and term.options.get("extrapolation", 1.0) == 1.0:
        gap = PI.log() - TEACHER.log_softmax(1)[0]
        torch.testing.assert_close(expected, PI * (gap - (PI * gap).sum()), rtol=0, atol=1e-12)


def check_distribution(term):
    """A divergence of whole distributions is differentiated itself: which word was sampled plays no part."""
    gradients = by_word(term)
    assert torch.allclose(gradients, gradients[:1].expand(WORDS, -1), atol=1e-12)
    assert gradients.abs().max() > 1e-3 and advantage_of(gradients) is None
    assert (by_word(term, teacher=TEACHER.roll(1, 1)) - gradients).abs().max() > 1e-3


def check_without_teacher(term):
    """The verdict's advantage trains by its differences alone; imitation by who was chosen to be imitated."""
    gradients = by_word(term)
    assert torch.equal(by_word(term, teacher=TEACHER.roll(1, 1)), gradients)
    if type(term.loss) is ReferenceKl:
        assert (PI @ gradients).abs().max() > 1e-3
        return
    assert type(term.loss) in (NegativeLogLikelihood, ClippedPolicyGradient) and advantage_of(gradients) is not None
    torch.testing.assert_close(PI @ by_word(term, advantages=-torch.ones_like(PI)), torch.zeros_like(PI))
    assert ((PI @ gradients).abs().max() > 1e-3) == (type(term.loss) is ClippedPolicyGradient)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_term_of_every_composition_trains_what_it_says(method):
    seen = set()
    for terms, asked in compositions(method):
        bound = bind_terms(terms)
        signals = {term.loss.signal for term in bound}
        assert (signals != {"none"}) == asked, "a teacher that is asked is in a gradient, and no other is"
        for term in bound:
            key = (term.loss, term.reference)
            if key in seen:
                continue
            seen.add(key)
            local = term.options.get("support") == "local"
            if term.loss.signal == "none":
                check_without_teacher(term)
            elif local:
                assert (by_word(term, views_CW=raised(1)) - by_word(term)).abs().max() > 1e-3
            elif term.loss.signal in ("sampled", "views"):
                check_sampled(term)
            else:
                check_distribution(term)


def test_a_divergence_that_is_handed_over_as_an_advantage_would_be_found():
    """The trap itself, and the other one: a log-ratio that is differentiated."""

    @dataclass(frozen=True)
    class Trap(LossTerm):
        signal = "topk"

        def loss(self, student, rows):
            kl = (student.logprobs_CV.exp() * (student.logprobs_CV - rows.teacher_logprobs_CV)).sum(1)
            return TermOutput(loss_C=kl.detach() * student.sampled_C)

    @dataclass(frozen=True)
    class Direct(LossTerm):
        signal = "sampled"

        def loss(self, student, rows):
            return TermOutput(loss_C=student.sampled_C - rows.teacher_C)

    for own, check in ((Trap, check_distribution), (Direct, check_sampled)):
        (term,) = bind_terms((Term(name="own", loss=own),))
        with pytest.raises(AssertionError):
            check(term)
