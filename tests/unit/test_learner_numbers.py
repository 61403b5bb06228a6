"""Numbers that must not go wrong in silence: what is not finite is named and steps nothing, what has no signal moves
nothing, and odd inputs train or are refused by name. tests/ray has the same on DeepSpeed's ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from learner_cases import Bigram, OneProcess, World, make_example

from tutorloop.contracts.errors import LearnerError, NotFinite
from tutorloop.contracts.records import Correction, TeacherScores, Term
from tutorloop.learner.engine import SittingAdamW
from tutorloop.learner.terms import TERMS

PG = (Term(name="policy_gradient"),)
CLIPPED = (Term(name="clipped_policy_gradient"),)
MASKED = Correction(kind="masked", low=0.1, high=9.0)
UNSOUND = "the sampler's logprobs, or an advantage, credit or weight, are not finite, of rollouts {}"


def taught(world, name):
    """A random example that the teacher "big" has scored."""
    example = world.example(name, teachers=["big"])
    return replace(example, rollout=replace(example.rollout, teacher="big"))


def weights_of(learner):
    return [p.detach().clone() for p in learner.engine.module.parameters()]


def same(found, wanted):
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# ---- not finite ------------------------------------------------------------------------------------------------------


def spoilt(example, field, value=np.nan):
    """With `value` at a trained token of the scores, or of the sampler's logprobs."""
    at = int(np.flatnonzero(example.rollout.loss_mask)[0])
    if field == "sampler":
        array = example.rollout.logprobs.copy()
        array[at] = value
        return replace(example, rollout=replace(example.rollout, logprobs=array))
    if field in ("advantage", "weight"):
        return replace(example, **{field: value})
    scores = {}
    for name, own in example.scores.items():
        array = getattr(own, field).copy()
        array[at] = value
        scores[name] = replace(own, **{field: array})
    return replace(example, scores=scores)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    "terms, field, says",
    [
        (PG, "logprobs", "loss_policy_gradient is not finite, of rollouts {}"),
        (
            (*CLIPPED, Term(name="topk_divergence")),
            "topk_logprobs",
            "loss_topk_divergence is not finite, of rollouts {}",
        ),
        ((Term(name="exact_divergence"), *CLIPPED), "hidden", "loss_exact_divergence is not finite, of rollouts {}"),
        (CLIPPED, "sampler", UNSOUND),
        (CLIPPED, "advantage", UNSOUND),
        (CLIPPED, "weight", UNSOUND),
    ],
)
def test_what_is_not_finite_is_named_and_steps_nothing(terms, field, says, updates):
    world = World()
    examples = [taught(world, f"r{i}") for i in range(8)]
    bad = {1, 6}
    rows = [spoilt(e, field) if i in bad else e for i, e in enumerate(examples)]
    learner = OneProcess(world.student(), terms, heads=world.heads, updates=updates)
    before = weights_of(learner)
    cuts = [[[0, 1, 2], [], [3, 4, 5, 6, 7]]] if updates == 1 else [[[6, 1]], [[0], [2, 3, 4, 5, 7]]]
    with pytest.raises(NotFinite) as stopped:
        learner.learn(rows, cuts, version=11)
    assert says.format("r1, r6\n") in f"{stopped.value}\n" and "step 12" in str(stopped.value)
    assert same(weights_of(learner), before) and learner.whole


def test_only_a_few_of_many_rollouts_are_named():
    world = World()
    examples = [spoilt(taught(world, f"r{i}"), "sampler") for i in range(9)]
    with pytest.raises(NotFinite, match="of rollouts r0, r1, r2 and 6 others\n"):
        OneProcess(world.student(), PG).learn(examples)


def test_what_no_term_trains_may_be_anything():
    """A masked token, a rollout of a source that no term asks for."""
    world = World()
    example = taught(world, "r")
    off = np.concatenate([example.rollout.logprobs, [np.nan]])
    masked = make_example(
        "m",
        [*example.rollout.token_ids, 3],
        off,
        prompt=example.rollout.prompt_length,
        mask=[*example.rollout.loss_mask, False],
    )
    (scores,) = example.scores.values()
    masked = replace(masked, scores={"big": replace(scores, rollout_id="m", **longer(scores))})
    learner = OneProcess(world.student(), PG)
    report = learner.learn([masked])
    assert np.isfinite(list(report.metrics.values())).all() and report.tokens == masked.rollout.loss_mask.sum()


def longer(scores):
    """Each array with a last token that is no number."""
    names = ("logprobs", "topk_logprobs", "entropy", "hidden", "views")
    grown = {name: np.concatenate([getattr(scores, name), 0 * getattr(scores, name)[:1] + np.nan]) for name in names}
    return grown | {"topk_ids": np.concatenate([scores.topk_ids, scores.topk_ids[:1]])}


def test_a_gradient_that_overflows_is_not_stepped():
    world = World()
    examples = [taught(world, f"r{i}") for i in range(3)]
    rows = [replace(e, advantage=3e37) for e in examples]
    learner = OneProcess(world.student(), CLIPPED, Correction(proximal="behaviour"))
    before = weights_of(learner)
    with pytest.raises(NotFinite, match="step 1, update 1 of 1: the gradients' norm is not finite"):
        learner.learn(rows)
    assert same(weights_of(learner), before) and learner.whole


@pytest.mark.parametrize("late", ["loss", "weights"])
def test_weights_inside_a_step_that_failed_are_never_saved(late, tmp_path):
    """The first update has been taken, and the second is no number; or the step's own weights are none."""
    world = World()
    examples = [taught(world, f"r{i}") for i in range(4)]
    learner = OneProcess(world.student(), PG, updates=2)
    if late == "loss":
        with pytest.raises(NotFinite, match="step 1, update 2 of 2"):
            learner.learn([*examples[:3], spoilt(examples[3], "logprobs")], [[[0, 1, 2]], [[3]]])
    else:
        learner.engine.optimizer.step = lambda: learner.engine.module.head.data[0].fill_(torch.inf)
        with pytest.raises(NotFinite, match="step 1: weights, after the step"):
            learner.learn(examples, [[[0, 1, 2, 3]]])
    with pytest.raises(LearnerError, match="a step's end"):
        learner.save(str(tmp_path))


@pytest.mark.parametrize("seen", ["before the save", "by the next loss"])
def test_weights_too_large_to_multiply_take_no_good_checkpoints_place(seen, tmp_path):
    """Each is finite, and the forward of what the step trained on is not; or that of one rollout of the next step."""
    world = World()
    learner = OneProcess(world.student(), PG)
    rows = [taught(world, "r")]
    words = rows[0].rollout.token_ids.astype(np.int64)
    embedding = learner.engine.module.embedding
    learner.engine.optimizer.step = lambda: embedding.data.index_fill_(0, torch.from_numpy(words), torch.finfo().max)
    assert np.isfinite(learner.learn(rows, version=6).loss)
    if seen == "by the next loss":
        with pytest.raises(NotFinite, match="step 8, update 1 of 1: loss_policy_gradient is not finite"):
            learner.learn(rows, [[[], [0]]], version=7)
    with pytest.raises(NotFinite, match="step 7: logits of the weights, before they are saved"):
        learner.save(str(tmp_path))


@pytest.mark.parametrize("correction", [MASKED, Correction(veto=0.5), Correction(probability_gap=0.1)])
def test_a_student_that_overflows_rejects_no_token_in_silence(correction):
    """Comparisons with NaN are false: such tokens would be off-policy, and the step empty."""
    world = World()
    examples = [taught(world, f"r{i}") for i in range(3)]
    broken = world.student()
    broken.embedding.data.fill_(torch.inf)
    learner = OneProcess(world.student(), PG, correction, before=broken)
    with pytest.raises(NotFinite, match="the student's logprobs are not finite, of rollouts r0, r1, r2\n"):
        learner.learn(examples)


# ---- no signal -------------------------------------------------------------------------------------------------------


def with_momentum(student, terms, **options):
    """A learner with AdamW that has taken a step, so that it has momentum, and weight decay."""
    learner = OneProcess(student, terms, **options)
    adam = SittingAdamW(student.parameters(), lr=0.1, weight_decay=0.3)
    learner.engine.optimizer = learner.engine.basic_optimizer = adam
    return learner


def everything(learner):
    state = learner.engine.optimizer.state.values()
    return [*weights_of(learner), *(value.clone() for own in state for value in own.values())]


@pytest.mark.parametrize("case", ["equal rewards", "the teacher agrees", "rows without weight", "no rows"])
def test_an_update_without_a_signal_moves_nothing(case):
    """Neither by weight decay nor by old momentum, to the byte; and the next one that has a signal is as if it had not
    been."""
    world = World()
    student = Bigram(world.embedding @ world.head.T)
    terms = PG if case == "the teacher agrees" else CLIPPED
    rows = [taught(world, f"r{i}") for i in range(6)]
    learner = with_momentum(student, terms)
    first = learner.learn(rows)
    assert first.metrics["skipped_updates"] == 0 < first.metrics["grad_norm"]
    if case == "the teacher agrees":
        own = student.logprobs().detach()

        def agreeing(example):
            ids, start = torch.from_numpy(example.rollout.token_ids).long(), example.rollout.prompt_length
            said = own[ids[start - 1 : -1], ids[start:]].numpy()
            return replace(example, scores={"big": replace(example.scores["big"], logprobs=said)})

        silent = [agreeing(row) for row in rows]
    else:
        silent = [replace(row, **({"weight": 0.0} if "weight" in case else {"advantage": 0.0})) for row in rows]
    before = everything(learner)
    report = learner.learn([] if case == "no rows" else silent)
    assert report.metrics["skipped_updates"] == 1
    assert same(everything(learner), before)
    assert learner.learn(rows).metrics["skipped_updates"] == 0 and not same(everything(learner), before)


def test_one_rollout_with_a_signal_is_a_step():
    world = World()
    rows = [replace(world.example(f"r{i}"), advantage=float(i == 3)) for i in range(6)]
    learner = with_momentum(world.student(), CLIPPED)
    before = everything(learner)
    assert learner.learn(rows, [[[0, 1], [2], [3], [4, 5]]]).metrics["skipped_updates"] == 0
    assert not same(weights_of(learner), before[:2])


# ---- odd inputs ------------------------------------------------------------------------------------------------------


def two_words(name, tokens, certain, **fields):
    """A rollout over a vocabulary of two, whose teacher gives word 0 the probability 1 (and word 1 none), or not."""
    rows = len(tokens) - 1
    table = np.array([0.0, -np.inf], np.float32) if certain else np.log(np.array([0.7, 0.3], np.float32))
    said = np.maximum(table[np.asarray(tokens[1:])], -20000.0).astype(np.float32)
    scores = TeacherScores(
        rollout_id=name,
        teacher_id="t",
        logprobs=said,
        topk_ids=np.tile(np.int32([0, 1]), (rows, 1)),
        topk_logprobs=np.tile(table, (rows, 1)),
        entropy=np.full(rows, -np.nansum(np.exp(table) * np.where(np.isinf(table), 0, table)), np.float32),
        hidden=np.tile(np.float32([1e4, -1e4] if certain else [0.4, -0.4]), (rows, 1)),
        views=np.stack([said, said - 1], 1),
        view_weights=np.full(2, 0.5, np.float32),
    )
    return make_example(name, tokens, np.full(rows, -0.7), scores=[scores], **fields)


ODD = {
    "one token": ([0, 1], {}),
    "of word 0": ([0, 0, 0], {}),
    "of word 1": ([1, 1, 1, 1], {}),
    "all masked": ([0, 1, 0], {"mask": [False, False]}),
    "one unmasked": ([0, 1, 0, 1], {"mask": [False, True, False]}),
    "no weight": ([0, 1, 1], {"weight": 0.0}),
    "no advantage": ([1, 0, 1], {"advantage": 0.0}),
}
DIVERGENCES = [
    {"direction": direction, "beta": beta, **more}
    for direction in ("reverse", "forward", "jsd", "skew_forward", "skew_reverse")
    for beta, more in ((0.0, {}), (0.5, {"entry_clip": 0.05}), (0.5, {}))
]
OPTIONS = {name: [{}] for name in TERMS} | {
    "topk_divergence": [*DIVERGENCES, *({**options, "rest": "renormalise"} for options in DIVERGENCES)],
    "exact_divergence": [*DIVERGENCES, {"temperature": 0.01}, {"temperature": 100.0, "hinton": True}],
    "policy_gradient": [{"extrapolation": 0.0}, {}, {"extrapolation": 3.0}],
    "sign_gate": [{"mode": mode} for mode in ("live_ref", "frozen_ref", "blend")],
    "skill_gate": [{"validated": validated} for validated in (True, False)],
    "clipped_policy_gradient": [{}, {"clip": False}, {"dual_clip": 3.0}],
}


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("name", list(TERMS))
def test_odd_rollouts_train_every_term_to_finite_weights(name, certain):
    """Alone, where a group is one rollout, and all together; the student may be as certain as the teacher, of the
    other word."""
    student = {"plain": torch.zeros(2, 2), "certain": torch.tensor([[90.0, -90.0], [-90.0, 90.0]])}
    rows = [two_words(kind, tokens, certain, **{"advantage": 1.0, **more}) for kind, (tokens, more) in ODD.items()]
    rows = [
        replace(row, scores=row.scores | {"reference": replace(row.scores["t"], teacher_id="reference")})
        for row in rows
    ]
    reads = TERMS[name].signal in ("none", "sampled") and name != "nll"
    for number, options in enumerate(OPTIONS[name]):
        term = (Term(name=name, options=options, reference=reads),)
        for table in student.values():
            for chosen in [rows] if number else [*([row] for row in rows), rows]:
                learner = OneProcess(Bigram(table), term, heads={"t": torch.eye(2)})
                report = learner.learn(chosen)
                trained = sum(int(row.rollout.loss_mask.sum()) for row in chosen)
                assert report.tokens == trained and np.isfinite([report.loss, *report.metrics.values()]).all()
                assert all(weight.isfinite().all() for weight in weights_of(learner))
                assert (report.metrics["skipped_updates"] == 1) >= (trained == 0)
