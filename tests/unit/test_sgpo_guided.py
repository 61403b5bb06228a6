"""The published SGPO: golden numbers, which guided answer is the target, who is asked, what trains in which term."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from flow_cases import ROWS, World, in_loop
from learner_cases import Bigram, OneProcess, check_step, make_example, own_logprobs, slow_losses, slow_weights
from learner_cases import World as Learning
from method_cases import SELF, config
from run_rows import fresh_rng
from term_cases import PRECISIONS, close, golden, random_case, toy

from tutorloop.cluster.methods import METHODS, compose_stages
from tutorloop.cluster.methods.parts.composition import Composition, Credit, RolloutSummary, SampleSpec
from tutorloop.cluster.methods.sgpo_guided import SgpoGuidedOptions
from tutorloop.contracts.receipts import ScoreReceipt
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import Correction, ScoreRequest, TeacherScores, Term
from tutorloop.learner.terms import bind_terms

LIVE = {**SELF, "signal": "topk", "follows": "live"}
SHOWN = "strategy@1"


def method(**options) -> Composition:
    (composition,) = compose_stages(config("sgpo_guided", LIVE, options))
    return composition


def answer(group: str, sample: int, passed: bool, guided: bool = False, likely: float | None = None, **changes):
    """One judged answer; `likely`: what the teacher said of it without guidance."""
    own = {
        "source": "student",
        "context": SHOWN if guided else "plain",
        "length": 10,
        "truncated": False,
        "reward": float(passed),
        "said": {} if likely is None else {"unguided": {"mean_logprob": likely}},
    }
    return RolloutSummary(rollout_id=f"{group}-{sample}", group_id=group, passed=passed, **{**own, **changes})


def group_of(plain, guided, group="0"):
    """From passes of plain answers, and pairs (pass, likelihood) of guided ones."""
    first = [answer(group, i, bool(passed)) for i, passed in enumerate(plain)]
    return first + [answer(group, len(plain) + i, bool(p), True, likely) for i, (p, likely) in enumerate(guided)]


# ---- golden ----------------------------------------------------------------------------------------------------------

precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)


@precisions
@pytest.mark.parametrize("name", ["exact_divergence", "topk_divergence"])
def test_a_tokens_divergence_counts_at_most_delta_and_has_no_gradient_beyond_it(name, dtype, tolerance):
    """The golden δ clips none of its tokens; a smaller one does. Three ids of four and a tail are the vocabulary."""
    inputs, expected = golden("sgpo_published")
    ids = torch.tensor(inputs["teacher_logits"]).topk(3, 1).indices
    case = toy(inputs, dtype, support=ids)
    forward = case.run(name, direction="forward")
    close(forward.loss_C, expected["fkl_guided_to_unguided"], tolerance)
    assert "divergence_clipped" not in forward.metrics
    clipped = case.run(name, direction="forward", token_clip=inputs["kl_clip_delta_used_here"])
    close(clipped.loss_C, expected["fkl_clipped"], tolerance)
    assert not clipped.metrics["divergence_clipped"].any()
    tight = case.run(name, direction="forward", token_clip=0.1)
    close(tight.loss_C, [min(value, 0.1) for value in expected["fkl_guided_to_unguided"]], tolerance)
    assert tight.metrics["divergence_clipped"].tolist() == [1, 0, 1]
    whole, cut = case.gradient(forward.loss_C), case.gradient(tight.loss_C)
    assert not cut[[0, 2]].any() and whole.any(1).all() and torch.equal(cut[1], whole[1])


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("name", ["exact_divergence", "topk_divergence"])
def test_the_clip_of_tokens_on_random_models(name, direction):
    case = random_case(tokens=40)
    whole = case.run(name, direction=direction).loss_C.detach()
    delta = float(whole.median())
    output = case.run(name, direction=direction, token_clip=delta)
    close(output.loss_C, whole.clamp(max=delta), 0)
    assert output.metrics["divergence_clipped"].mean() == 0.5
    assert ((case.gradient(output.loss_C) != 0).any(1) == (whole <= delta)).all()


def test_the_golden_weight_target_advantages_and_loss():
    inputs, expected = golden("sgpo_published")
    options = SgpoGuidedOptions()
    for case, wanted in expected["alpha_q_cases"].items():
        p_guided, p_plain = (float(part[2:]) for part in case.split("_"))
        assert options.weight(p_guided, p_plain) == pytest.approx(wanted, abs=1e-9)
    likely = [float(np.mean(logprobs)) for logprobs in inputs["unguided_logp_of_guided"]]
    assert likely == pytest.approx(expected["mean_unguided_logp"], abs=1e-9)
    guided = list(zip(inputs["rewards_guided"], likely, strict=True))
    assert options.weight(expected["p_guided"], expected["p_auto"]) == expected["alpha_q"]
    composition = method(delta=inputs["kl_clip_delta_used_here"], top_k=3)
    credits = composition.credit(group_of(inputs["rewards_auto"], guided), 0)
    assert [c.advantage for c in credits[:8]] == pytest.approx(expected["adv_autonomous"], abs=1e-9)
    assert [c.weight for c in credits[:8]] == [1] * 8
    chosen = Credit(weight=expected["alpha_q"])
    assert credits[8:] == ["not_chosen", chosen, "incorrect", "not_chosen"]
    assert credits[8:].index(chosen) == expected["selected_guided_index"]

    # One target of three tokens 1, 3, 2 after the prompt 0: the bigrams 0→1, 1→3 and 3→2 have the golden logits.
    table, teacher = torch.zeros(4, 4), torch.tensor(inputs["teacher_logits"], dtype=torch.float64).log_softmax(1)
    table[[0, 1, 3]] = torch.tensor(inputs["student_logits"])
    top = teacher.topk(3, 1)
    said = TeacherScores(
        rollout_id="",
        teacher_id="t",
        logprobs=np.zeros(3, np.float32),
        topk_ids=top.indices.int().numpy(),
        topk_logprobs=top.values.float().numpy(),
        entropy=np.zeros(3, np.float32),
    )
    tokens = [0, *inputs["sampled_tokens"]]
    target = make_example("8", tokens, [0.0] * 3, weight=chosen.weight, scores=[said], context=SHOWN)
    plain = [make_example(str(i), [0, 2, 1], [-1.0] * 2, advantage=1.0) for i in range(3)]
    report = OneProcess(Bigram(table), composition.terms).learn([*plain, target])
    assert report.metrics["loss_topk_divergence"] == pytest.approx(expected["distill_loss"], abs=1e-6)
    assert report.metrics["loss_clipped_policy_gradient"] == pytest.approx(-1, abs=1e-6)
    assert report.rollouts == 4 and report.tokens == 9


# ---- the choice ------------------------------------------------------------------------------------------------------


def slow_credit(options, plain, guided):
    """What the guided answers of a group get, decided by sorting; all judged."""
    rates = [sum(r.passed for r in own) / len(own) for own in (guided, plain)]
    gain = (rates[0] - rates[1]) / (options.gamma + rates[1])
    alpha = min(max(gain, 0.0) * options.alpha0, options.alpha_max)
    known = [r for r in guided if r.passed and r.said]
    best = sorted(known, key=lambda r: (-r.said["unguided"]["mean_logprob"], int(r.rollout_id.split("-")[1])))[:1]
    reasons = {}
    for rollout in guided:
        silent = "not_chosen" if rollout.said else "teacher_refused"
        reason = "incorrect" if not rollout.passed else silent if alpha else "no_guidance_needed"
        reasons[rollout.rollout_id] = Credit(weight=alpha) if alpha and rollout in best else reason
    return reasons


@pytest.mark.parametrize("seed", range(20))
def test_targets_of_random_groups_in_any_order(seed):
    rng = fresh_rng()
    alpha0, gamma, alpha_max = rng.uniform(0.01, 1, 3)
    options = {"alpha0": alpha0, "gamma": gamma, "alpha_max": alpha_max, "guided": 6}
    rollouts, wanted = [], {}
    for group in map(str, range(12)):
        share = rng.random(2)
        pairs = [(rng.random() < share[0], rng.choice([-0.5, -1.0, None])) for _ in range(6)]  # with equal ones
        own = group_of(rng.random(8) < share[1], pairs, group)
        rollouts += own
        wanted |= slow_credit(SgpoGuidedOptions(**options), own[:8], own[8:])
    composition, order = method(**options), rng.permutation(len(rollouts))
    credits = composition.credit([rollouts[i] for i in order], 3)
    found = {rollouts[i].rollout_id: credit for i, credit in zip(order, credits, strict=True)}
    for name, credit in wanted.items():
        assert type(found[name]) is type(credit)
        if isinstance(credit, Credit):
            assert found[name] == replace(credit, weight=pytest.approx(credit.weight, rel=1e-12))
        else:
            assert found[name] == credit
    for group in map(str, range(12)):
        plain = [r for r in rollouts if r.group_id == group and r.context == "plain"]
        alone = METHODS["grpo"](config("grpo")).credit(plain, 3)
        assert [found[r.rollout_id] for r in plain] == alone, "as if nothing had been guided"


def test_what_was_not_judged_is_left_out_of_both_pass_rates():
    lost = {"abstained": True, "passed": False, "reward": 0.0}
    rollouts = group_of([1, 0, 0], [(1, -1.0), (0, None)])
    rollouts += [replace(answer("0", 5, False), **lost), replace(answer("0", 6, False, True), **lost)]
    credits = method().credit(rollouts, 0)
    assert credits[3:] == [Credit(weight=0.5 * (1 / 2 - 1 / 3) / (0.1 + 1 / 3)), "incorrect", "abstained", "abstained"]
    unknown = [replace(rollout, **lost) for rollout in rollouts[:3]] + rollouts[3:5]
    assert method().credit(unknown, 0) == ["abstained"] * 5
    assert [c.advantage for c in method().credit(rollouts[:3], 0)] == [c.advantage for c in credits[:3]]


# ---- what it asks and sums -------------------------------------------------------------------------------------------


def test_two_kinds_of_answers_two_terms_and_two_questions():
    composition = method(top_k=9, guided=3, delta=0.5, clip_low=0.1)
    bind_terms(composition.terms)
    assert list(composition.samples(0, 0)) == [SampleSpec(samples=4), SampleSpec(samples=3, context=SHOWN)]
    reward, distilled = composition.terms
    assert (reward.key, reward.contexts, reward.reduction) == ("clipped_policy_gradient", ("plain",), "sequences")
    assert reward.options == {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 0.0}
    assert (distilled.key, distilled.contexts, distilled.reduction) == ("topk_divergence", (SHOWN,), "sequences")
    assert distilled.options == {"direction": "forward", "rest": "tail", "token_clip": 0.5} and distilled.weight == 1
    assert composition.scoring == ScoreRequest(signal="topk", top_k=9, context=SHOWN)
    asked = {one.name: (one.service, one.contexts, one.to_learner) for one in composition.annotations}
    assert asked["teacher"] == ("teacher", (SHOWN,), "scores") and asked["unguided"] == ("teacher", (SHOWN,), "")
    assert asked["verdicts"][1] == () and composition.needs_verdicts and composition.min_samples == 2
    assert composition.correction.kind == "none" and method_of("max_staleness=1").correction.kind == "truncated"
    leash = method_of("method_options.kl_weight=0.1", "reference.model=s")
    assert [term.contexts for term in leash.terms] == [("plain",), ("plain",), (SHOWN,)] and leash.reference


def method_of(*overrides: str) -> Composition:
    tree = config("sgpo_guided", LIVE).model_dump(exclude_unset=True)
    (composition,) = compose_stages(parse_config(tree, overrides))
    return composition


class Judging(World):
    """The teacher says how likely each answer is without guidance."""

    def result(self, name, call):
        payload, receipt = super().result(name, call)
        request = call.arguments.get("request")
        if isinstance(receipt, ScoreReceipt) and request == ScoreRequest(signal="sampled"):
            likely = {r.rollout_id: -float(r.seed % 1009) for r in call.arguments["rollouts"][1]}
            receipt = replace(receipt, mean_logprobs=likely)
        return payload, receipt


def passes(request):
    return request.seed % 3 == 0 if request.context == "plain" else request.seed % 3 > 0


@in_loop
async def test_the_teacher_is_asked_about_guided_answers_and_chooses_among_them():
    world = Judging(fresh_rng(), passes=passes)
    teachers = {"teachers.a.model": "s", "teachers.b.model": "s"}
    live = {f"teachers.{name}.follows": "live" for name in "ab"}
    flow = world.flow(METHODS["sgpo_guided"], method="sgpo_guided", prompts_per_step=12, **teachers, **live)
    flow.admit(0)
    shards = await world.take(flow, 0)
    groups = Counter((shard.context, request.group_id) for shard in shards for request in shard.requests)
    assert groups == {(c, str(g)): n for g in range(12) for c, n in (("plain", 3), (SHOWN, 4))}
    assert all(len({request.context for request in shard.requests}) == 1 for shard in shards)
    names = {request.rollout_id: request.sample_index for request in world.requests()}
    assert names == {f"{group}-{sample}": sample for group in range(12) for sample in range(7)}
    for name, call in world.calls("score"):
        (_, requests), request = call.arguments["rollouts"], call.arguments["request"]
        assert {r.context for r in requests} == {SHOWN}
        assert name in {world.teacher_of_row[r.row] for r in requests}
        assert ("prompts" in call.arguments) == (request.context == SHOWN) == (request.signal == "topk")
    judged = sum(len(call.arguments["rollouts"][1]) for name, call in world.submitted if name == "verifier")
    assert judged == 12 * 7

    rows = flow.trainable(0, shards)
    seeds = {r.rollout_id: r.seed for r in world.requests()}
    guided = [s for s in shards if s.context == SHOWN]
    assert all(len(s.for_learner("scores")) == (0 if s not in guided else len(teachers_of(world, s))) for s in shards)
    for group in map(str, range(12)):
        right = [r for r in world.requests() if r.group_id == group and r.context == SHOWN and passes(r)]
        rate = sum(passes(r) for r in world.requests() if r.group_id == group and r.context == "plain") / 3
        outcomes = {r.rollout_id: o for s in guided for r, o in zip(s.requests, s.outcomes, strict=True)}
        chosen = [n for n, o in outcomes.items() if isinstance(o, Credit) and n.startswith(f"{group}-")]
        helps = len(right) / 4 > rate
        wanted = (
            [max(right, key=lambda r: (-(seeds[r.rollout_id] % 1009), -r.sample_index)).rollout_id] if helps else []
        )
        assert chosen == wanted
    assert len(rows) + sum(flow.dropped.values()) == 12 * 7
    assert set(flow.dropped) <= {"incorrect", "not_chosen", "no_guidance_needed"}


def teachers_of(world, shard):
    return {world.teacher_of_row[request.row % ROWS] for request in shard.requests}


@in_loop
async def test_a_step_is_the_same_whoever_answers_first_and_plain_shards_wait_for_no_teacher():
    async def given(order):
        world = Judging(np.random.default_rng(order), passes=passes)
        own = {"teacher.model": "s", "teacher.follows": "live"}
        flow = world.flow(METHODS["sgpo_guided"], method="sgpo_guided", prompts_per_step=8, **own)
        world.teacher_of_row[:] = ["a"] * ROWS
        await world.admit(flow, 0)
        for item in [one for one in world.pending if one[1].method == "generate"]:
            world.answer(*item)
        await world.settle()
        (status,) = flow.in_flight()
        guided = sum(shard.context == SHOWN for shard in flow.shards[0])
        assert status.waits_for == {"verifier": len(flow.shards[0]), "teacher": 2 * guided}
        shards = await world.take(flow, 0)
        return [shard.requests for shard in shards], flow.trainable(0, shards), flow.dropped

    first = await given(0)
    assert first[1] and [await given(order) for order in range(1, 10)] == [first] * 9


# ---- what the learner makes of it ------------------------------------------------------------------------------------

TERMS = (
    Term(name="clipped_policy_gradient", contexts=("plain",), reduction="sequences"),
    Term(name="topk_divergence", teacher="small", contexts=(SHOWN,), reduction="sequences", weight=0.7),
)


def under_the_template(example):
    """As it was sampled under a template: its log-probabilities are of another prompt, and far from the student's."""
    far = example.rollout.logprobs - np.float32(3)
    return replace(example, rollout=replace(example.rollout, context=SHOWN, logprobs=far))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "correction",
    [Correction(kind="truncated", high=1.2), Correction(kind="masked", low=0.7, high=1.5, veto=0.2, normalise=True)],
    ids=["truncated", "masked"],
)
def test_each_term_trains_its_context_and_nothing_corrects_what_was_sampled_under_a_template(correction, parts):
    world = Learning()
    plain = [world.example(f"p{i}") for i in range(8)]
    guided = [under_the_template(world.example(f"g{i}")) for i in range(6)]
    slow, learner = world.student(torch.float64), OneProcess(world.student(), TERMS, correction)
    report = learner.learn([*plain, *guided], [world.cut(14, parts)])
    weights = slow_weights(plain, slow, correction)
    losses = slow_losses(world, slow, plain, TERMS[:1], weights=weights)
    losses |= slow_losses(world, slow, guided, TERMS[1:])
    check_step(learner, report, TERMS, losses, slow)
    kept = [np.isfinite(weights[e.rollout.rollout_id]) for e in plain]
    gaps = [own_logprobs(slow, e.rollout) - e.rollout.logprobs for e in plain]
    total = sum(float(-gap[on].sum()) for gap, on in zip(gaps, kept, strict=True))
    assert report.metrics["mismatch"] == pytest.approx(total / sum(on.sum() for on in kept), rel=1e-4)
    assert report.rollouts == sum(on.any() for on in kept) + 6


def test_the_policys_shift_is_measured_on_plain_answers_alone():
    world = Learning()
    own = world.student().logprobs().detach().double()
    tokens = {name: world.rng.integers(0, world.vocab, 41) for name in "ab"}
    examples = [
        make_example(name, ids, own[ids[:-1], ids[1:]].numpy(), advantage=1.0, scores=[world.scores("small", ids, 1)])
        for name, ids in tokens.items()
    ]
    learner = OneProcess(world.student(), TERMS)
    report = learner.learn([under_the_template(examples[0]), examples[1]])
    after = own_logprobs(learner.engine.module, examples[1].rollout)
    wanted = float((examples[1].rollout.logprobs - after).mean())
    assert report.metrics["policy_shift"] == pytest.approx(wanted, abs=1e-6) and abs(wanted) > 1e-3
    alone = OneProcess(world.student(), TERMS).learn([under_the_template(example) for example in examples])
    assert "policy_shift" not in alone.metrics and "mismatch" not in alone.metrics
