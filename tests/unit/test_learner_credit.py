"""Credit of single tokens is added to the advantage, each value to its own token; rows without any are counted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import (
    Bigram,
    OneProcess,
    World,
    check_gradients,
    check_step,
    make_example,
    paths_of,
    slow_losses,
    slow_weights,
)
from term_cases import close, random_case

from tutorloop.contracts.arrow import encode
from tutorloop.contracts.errors import LearnerError, NotFinite, RecordError
from tutorloop.contracts.records import Correction, Rollout, StepPlan, TeacherScores, Term, TokenCredit, TrainRow
from tutorloop.learner.examples import Example, join
from tutorloop.learner.terms import bind_terms

JUDGED = Term(name="clipped_policy_gradient", credit="judge")
TERMS = (
    JUDGED,
    Term(name="clipped_policy_gradient", credit="hints", label="hinted", reduction="sequences", weight=0.4),
    Term(name="clipped_policy_gradient", label="plain", weight=0.3),
    Term(
        name="policy_gradient",
        credit="judge",
        teacher="small",
        reference=True,
        options={"extrapolation": 1.3},
        sources=("student", "dataset"),
    ),
)


def credited_examples(world, count=12):
    """Of two sources, with the credit of both services, of one or of none."""
    services = (("judge", "hints"), ("judge",), ("hints",), ())
    return [
        world.example(f"r{i}", source="dataset" if i % 3 == 2 else "student", services=services[i % 4])
        for i in range(count)
    ]


# ---- against slow loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", ["none", "truncated", "masked"])
def test_credit_is_added_to_the_advantage_token_by_token(kind, parts):
    """Loss and gradient of a step; weights and rejections are those without credit."""
    world = World()
    examples, slow = credited_examples(world), world.student(torch.float64)
    correction = Correction(kind=kind, low=0.6, high=1.5)
    learner = OneProcess(world.student(), TERMS, correction)
    report = learner.learn(examples, [world.cut(len(examples), parts)])
    weights = slow_weights(examples, slow, correction)
    check_step(learner, report, TERMS, slow_losses(world, slow, examples, TERMS, weights=weights), slow)
    lacking = [e for e in examples if "judge" not in e.credits or (e.sampled and "hints" not in e.credits)]
    assert report.metrics["missing_credit"] == len(lacking) and report.metrics["missing_scores"] == 0


def test_the_clip_goes_by_the_sum_of_advantage_and_credit():
    world = World()
    examples, slow = credited_examples(world), world.student(torch.float64)
    learner = OneProcess(world.student(), TERMS[:3], Correction(proximal="behaviour"))
    report = learner.learn(examples, [world.cut(len(examples), 3)])
    old = {e.rollout.rollout_id: e.rollout.logprobs for e in examples}
    check_step(learner, report, TERMS[:3], slow_losses(world, slow, examples, TERMS[:3], old=old), slow)


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_both_terms_against_plain_loops_over_tokens(dual_clip):
    case = random_case(tokens=40)
    credit = torch.from_numpy(np.random.default_rng().normal(size=40))
    case.rows = replace(case.rows, credit_C=credit)
    output = case.run("clipped_policy_gradient", dual_clip=dual_clip)
    own, rows, probabilities = case.chunk().sampled_C.tolist(), case.rows, case.student.detach().softmax(1)
    gradient = case.gradient(case.run("policy_gradient", extrapolation=1.3).loss_C)
    for i in range(40):
        total = rows.advantage_C[i].item() + credit[i].item()
        ratio = math.exp(own[i] - rows.old_C[i].item())
        gain = min(ratio * total, min(max(ratio, 0.8), 1.2) * total)
        gain = max(gain, dual_clip * total) if dual_clip and total < 0 else gain
        assert math.isclose(output.loss_C[i].item(), -gain, rel_tol=1e-12)
        assert output.metrics["advantage"][i].item() == total
        teacher, reference = rows.teacher_C[i].item(), rows.reference_C[i].item()
        advantage = teacher - own[i] + 0.3 * (teacher - reference) + credit[i].item()
        score = -probabilities[i]
        score[case.targets[i]] += 1
        close(gradient[i], -advantage * score, 1e-12)


# ---- whose credit it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
def test_credit_of_one_token_reaches_no_other(parts):
    """No two tokens follow the same token, so each has a row of the student's table, and of its gradient, alone."""
    rng = np.random.default_rng()
    logprobs = [-rng.uniform(0.2, 3.0, rng.integers(2, 6)) for _ in range(6)]
    sequences, table = paths_of(logprobs)
    examples = [
        make_example(f"r{i}", tokens, own, advantage=rng.normal(), credits={"judge": rng.normal(size=len(own))})
        for i, (tokens, own) in enumerate(zip(sequences, logprobs, strict=True))
    ]
    cut = [part.tolist() for part in np.array_split(rng.permutation(len(examples)), parts)]

    def gradient(given):
        learner = OneProcess(Bigram(table), (JUDGED,))
        learner.learn(given, [cut])
        return learner.engine.gradients[0][0]

    before = gradient(examples)
    for i, example in enumerate(examples):
        for t in range(example.rollout.response_length):
            values = example.credits["judge"].copy()
            values[t] += 1.0
            changed = replace(example, credits={"judge": values})
            moved = (gradient([*examples[:i], changed, *examples[i + 1 :]]) != before).any(1)
            assert moved.nonzero().flatten().tolist() == [sequences[i][t]]


def test_credit_that_no_term_names_changes_nothing():
    world = World()
    terms = (Term(name="clipped_policy_gradient"), Term(name="policy_gradient", teacher="big"))
    examples = credited_examples(world)
    bare = [replace(example, credits={}) for example in examples]
    learners = [OneProcess(world.student(), terms) for _ in range(2)]
    one, other = (learner.learn(given) for learner, given in zip(learners, (examples, bare), strict=True))
    assert one.metrics == other.metrics and "missing_credit" not in one.metrics
    for a, b in zip(*(learner.engine.gradients[0] for learner in learners), strict=True):
        assert a.equal(b)


# ---- without credit --------------------------------------------------------------------------------------------------


def test_rows_without_credit_are_left_out_and_counted():
    """As if they had not been there, but for the count. A term that needs no credit still trains on them."""
    world = World()
    credited = [world.example(f"r{i}", services=("judge",)) for i in range(3)]
    bare = [world.example("bare"), world.example("other", services=("hints",))]
    mixed = [credited[0], bare[0], *credited[1:], bare[1]]
    learners = [OneProcess(world.student(), (JUDGED,)) for _ in range(2)]
    report, alone = (learner.learn(given) for learner, given in zip(learners, (mixed, credited), strict=True))
    assert (report.tokens, report.rollouts) == (alone.tokens, 3)
    assert report.loss == pytest.approx(alone.loss, rel=1e-6)
    check_gradients(learners[0].engine.gradients[0], [g.double() for g in learners[1].engine.gradients[0]])
    assert report.dropped == {"credit_missing": 2}
    assert report.untrained == {"bare": "credit_missing", "other": "credit_missing"}
    assert (report.metrics["missing_credit"], report.metrics["missing_scores"]) == (2, 0)
    assert alone.dropped == {} and alone.metrics["missing_credit"] == 0

    both = OneProcess(world.student(), (JUDGED, Term(name="nll", weight=0.1))).learn(mixed)
    assert both.rollouts == 5 and both.dropped == {} and both.metrics["missing_credit"] == 2


def test_scores_that_are_missing_too_are_named_first():
    world = World()
    term = Term(name="policy_gradient", teacher="big", credit="judge")
    examples = [
        world.example("whole", services=("judge",)),
        world.example("no scores", teachers=(), services=("judge",)),
        world.example("neither", teachers=()),
        world.example("no credit"),
    ]
    report = OneProcess(world.student(), (term,)).learn(examples)
    assert report.dropped == {"teacher_refused": 2, "credit_missing": 1}
    assert (report.metrics["missing_scores"], report.metrics["missing_credit"]) == (2, 1)


def test_a_credit_that_is_not_finite_stops_the_step():
    world = World()
    examples = [world.example(f"r{i}", services=("judge",)) for i in range(3)]
    values = examples[1].credits["judge"].copy()
    values[np.flatnonzero(examples[1].rollout.loss_mask)[0]] = np.nan
    broken = replace(examples[1], credits={"judge": values})
    with pytest.raises(NotFinite, match="an advantage, credit or weight, are not finite, of rollouts r1"):
        OneProcess(world.student(), (JUDGED,)).learn([examples[0], broken, examples[2]])


# ---- from Arrow ------------------------------------------------------------------------------------------------------


def batches_of(examples, *credits):
    scores = [scores for example in examples for scores in example.scores.values()]
    rollouts = encode(Rollout, [example.rollout for example in examples])
    return rollouts, encode(TeacherScores, scores), *(encode(TokenCredit, part) for part in credits)


def plan_of(count, **batches):
    rows = tuple(TrainRow(batch=0, row=i) for i in range(count))
    return StepPlan(step=0, version=0, rollout_batches=1, score_batches=1, updates=((rows,),), **batches)


def test_credits_come_after_the_scores_and_are_joined_by_rollout_and_service():
    world = World()
    examples = [world.example(f"r{i}") for i in range(4)]
    lengths = [example.rollout.response_length for example in examples]

    def credit(i, service, value):
        values = np.full(lengths[i], value, np.float32)
        return TokenCredit(rollout_id=f"r{i}", service=service, values=values)

    refused = TokenCredit(rollout_id="r2", service="judge", error_class="timeout")
    elsewhere = replace(credit(0, "judge", 9.0), rollout_id="of another rank")
    first = [credit(1, "judge", 1.0), refused, credit(0, "judge", 2.0), elsewhere, credit(0, "hints", 3.0)]
    batches = batches_of(examples, first, [credit(1, "judge", 4.0)])
    [[joined]] = join(plan_of(4, credit_batches=2), batches)
    found = [{name: values.tolist() for name, values in example.credits.items()} for example in joined]
    wanted = [{"judge": 2.0, "hints": 3.0}, {"judge": 4.0}, {}, {}]
    assert found == [{name: [v] * n for name, v in own.items()} for own, n in zip(wanted, lengths, strict=True)]
    assert all(set(one.scores) == set(other.scores) for one, other in zip(joined, examples, strict=True))
    with pytest.raises(LearnerError, match="4 batches, where the plan counts 1 of rollouts, 1 of scores, 1 of credits"):
        join(plan_of(4, credit_batches=1), batches)


@pytest.mark.parametrize("off", [-1, 1])
def test_credit_of_another_length_is_refused(off):
    world = World()
    example = world.example("r0")
    values = np.zeros(example.rollout.response_length + off, np.float32)
    with pytest.raises(RecordError, match="a service's credit aligns with the response"):
        Example(rollout=example.rollout, credits={"judge": values})
    batches = batches_of([example], [TokenCredit(rollout_id="r0", service="judge", values=values)])
    with pytest.raises(RecordError, match="r0"):
        join(plan_of(1, credit_batches=1), batches)


def test_a_term_sees_no_credit_unless_it_names_one():
    """`credit_C` is None then, and not zeros, so that a term can tell."""
    case = random_case()
    assert case.rows.credit_C is None
    (term,) = bind_terms((Term(name="clipped_policy_gradient"),))
    zeros = replace(case.rows, credit_C=torch.zeros_like(case.rows.advantage_C))
    assert term(case.chunk(), case.rows).loss_C.equal(term(case.chunk(), zeros).loss_C)
