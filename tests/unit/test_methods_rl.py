"""Methods that a verifier drives: what each asks, sums and drops, what it asks on top, and what it refuses."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from run_rows import fresh_rng

from tutorloop.cluster.methods.parts.composition import Composition, Credit, RolloutSummary, SampleSpec
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import load_config, parse_config
from tutorloop.learner.terms import bind_terms
from tutorloop.learner.terms.base import StudentChunk, TokenRows

RECIPES = Path(__file__).parents[2] / "recipes"
RL = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "kdrl", "raft_pp", "reinforce_rej")
LIKELIHOOD = ("raft", "rft", "rest", "star")
PLAIN = {
    "output_dir": "x",
    "steps": 40,
    "prompts_per_step": 3,
    "student": {"model": "s"},
    "data": {"path": "d"},
    "rollout": {"samples_per_prompt": 4, "max_new_tokens": 50},
}


def composed(config: Config) -> Composition:
    return importlib.import_module(f"tutorloop.cluster.methods.{config.method}").compose(config)


def method(name: str, *overrides: str, **options: object) -> Composition:
    return composed(parse_config({**PLAIN, "method": name, "method_options": options}, overrides))


def rollout(group: str, reward: float, **changes) -> RolloutSummary:
    """One judged answer of 10 tokens; `abstained` ones say reward 0 as the verifier does."""
    own = {"source": "student", "context": "plain", "length": 10, "truncated": False, "passed": reward >= 0.5}
    return RolloutSummary(rollout_id="r", group_id=group, reward=reward, **{**own, **changes})


def facts_of(rewards: list[list[float]]) -> list[RolloutSummary]:
    return [rollout(f"g{row}", reward) for row, group in enumerate(rewards) for reward in group]


def advantages(credits: list) -> list:
    return [credit.advantage if isinstance(credit, Credit) else credit for credit in credits]


def golden(name: str) -> dict:
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())


def abstained(group: str = "g0") -> RolloutSummary:
    return rollout(group, 0.0, abstained=True, passed=False)


MIXED, RIGHT, WRONG = [1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0] * 4


@pytest.mark.parametrize("name", RL + LIKELIHOOD)
def test_recipes_compose_and_their_terms_bind(name):
    config = load_config(RECIPES / f"{name}.yaml")
    composition = composed(config)
    assert config.method == name and config.output_dir == f"runs/{name}"
    assert config.prompts_per_step * config.rollout.samples_per_prompt == 96
    assert config.rollout.samples_per_prompt >= composition.min_samples
    assert bool(config.teacher) == bool(composition.scoring)
    assert composition.needs_verdicts
    assert bind_terms(composition.terms)


@pytest.mark.parametrize("name", RL + LIKELIHOOD)
def test_the_student_answers_a_group_and_what_was_not_judged_is_dropped(name):
    composition = method(name)
    assert composition.samples(0, 0) == (SampleSpec(samples=4),) and composition.generators == ("student",)
    rollouts = [abstained(), *facts_of([MIXED, RIGHT, WRONG]), abstained("g9")]
    credits = composition.credit(rollouts, 0)
    assert len(credits) == len(rollouts)
    assert credits[0] == credits[-1] == "abstained" and "abstained" not in credits[1:-1]
    assert list(credits[1:-1]) == list(composition.credit(rollouts[1:-1], 0))  # they change no mean
    assert list(composition.credit([abstained(), abstained("g1")], 0)) == ["abstained"] * 2
    assert list(composition.credit([], 0)) == []


@pytest.mark.parametrize("name", sorted(set(RL) - {"reinforce_pp", "raft_pp"}))
def test_group_methods_need_a_group(name):
    assert method(name).min_samples == 2
    credit = method(name).credit([rollout("g0", 1.0), abstained()], 0)[0]
    assert isinstance(credit, str) or credit.advantage == 0  # one judged answer has nothing to be compared with


def test_samples_that_others_need():
    assert method("reinforce_pp").min_samples == method("raft").min_samples == method("raft_pp").min_samples == 1
    assert method("reinforce_pp", baseline=True).min_samples == method("raft", keep="best").min_samples == 2


@pytest.mark.parametrize("name", RL)
def test_stale_rollouts_are_corrected_where_there_can_be_any(name):
    kind = "none" if name == "raft_pp" else "truncated"
    assert method(name).correction.kind == "none"
    assert method(name, "max_staleness=1").correction.kind == kind
    assert method(name, "max_staleness=1", "off_policy.kind=masked").correction.kind == "masked"
    assert method(name).correction.proximal == ("behaviour" if name == "raft_pp" else "recompute")
    assert method(name, "off_policy.proximal=interpolate").correction.proximal == "interpolate"


@pytest.mark.parametrize("name", LIKELIHOOD)
def test_likelihood_methods_train_nll_without_a_correction(name):
    composition = method(name, "max_staleness=1")
    assert [term.name for term in composition.terms] == ["nll"]
    assert composition.correction.kind == "none" and not composition.reference


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("grpo", {}, "adv_verl_sample_std_eps1e_6"),
        ("grpo", {"epsilon": 1e-4}, "adv_sample_std_eps1e_4"),
        ("grpo", {"epsilon": 1e-4, "std": "population"}, "adv_population_std_eps1e_4"),
        ("grpo", {"std": "none"}, "adv_dr_grpo"),
        ("kdrl", {}, "adv_verl_sample_std_eps1e_6"),
        ("dr_grpo", {}, "adv_dr_grpo"),
        ("rloo", {}, "adv_rloo"),
        ("reinforce_pp", {}, "adv_reinforce_pp_global"),
        ("reinforce_pp", {"baseline": True}, "adv_reinforce_pp_baseline"),
    ],
)
def test_advantages_golden_with_answers_in_any_order(name, options, expected):
    read = golden("grpo")
    rollouts = facts_of(read["inputs"]["rewards"])
    wanted = np.array(read["expected"][expected]).ravel()
    order = fresh_rng().permutation(len(rollouts))
    credits = method(name, **options).credit([rollouts[index] for index in order], 0)
    assert advantages(credits) == pytest.approx(wanted[order].tolist(), abs=read["tol"])
    assert all(credit.weight == 1 for credit in credits)


def test_grpo_group_weights_golden_and_dropped_groups():
    read = golden("grpo")
    rollouts = facts_of(read["inputs"]["rewards"])
    for rule, name in (("frontier", "frontier_weight_4p1mp"), ("paced", "paced_weight_p1mp")):
        weights = [credit.weight for credit in method("grpo", group_weight=rule).credit(rollouts, 0)]
        assert weights == pytest.approx(np.repeat(read["expected"][name], 4).tolist(), abs=read["tol"])
    credits = method("grpo", drop_zero_variance=True).credit(rollouts, 0)
    kept = [int(isinstance(credit, Credit)) for credit in credits[::4]]
    assert kept == read["expected"]["keep_group_dynamic_sampling"]
    assert set(credits[4:12]) == {"zero_variance"}


def test_terms_of_the_policy_gradients():
    grpo = method("grpo", clip_low=0.1, clip_high=0.3, dual_clip=3, kl_weight=0.04, reduction="tokens")
    first, second = grpo.terms
    assert (first.name, first.reduction) == ("clipped_policy_gradient", "tokens")
    assert first.options == {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0}
    assert (second.name, second.weight, second.reduction) == ("reference_kl", 0.04, "tokens")
    assert second.reference and grpo.reference and not method("grpo").reference
    reductions = {name: {term.reduction for term in method(name).terms} for name in RL}
    by_answer, by_token = {"grpo", "kdrl", "raft_pp", "reinforce_rej"}, {"dapo", "rloo", "reinforce_pp"}
    assert all(reductions[name] == {"sequences"} for name in by_answer)
    assert all(reductions[name] == {"tokens"} for name in by_token)
    assert reductions["dr_grpo"] == {"length"}
    assert {term.length for term in method("dr_grpo", kl_weight=1).terms} == {50}
    assert method("dapo").terms[0].options == {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0}
    assert method("raft_pp", clip=False).terms[0].options["clip"] is False


@pytest.mark.parametrize("seed", range(3))
def test_kdrl_pulls_to_the_teacher_as_the_k2_estimator_does(seed):
    rng, weight = torch.Generator().manual_seed(seed), 0.3
    logits = torch.randn(6, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (6,), generator=rng)
    teacher = torch.randn(6, generator=rng, dtype=torch.float64) - 2
    composition = method("kdrl", teacher_weight=weight)
    assert composition.scoring.signal == "sampled"
    term = bind_terms(composition.terms)[-1]
    assert (term.key, term.weight) == ("policy_gradient", weight)

    def gradient(teacher_C: torch.Tensor, direct: bool) -> torch.Tensor:
        logprobs = logits.log_softmax(-1)
        sampled = logprobs[torch.arange(6), targets]
        if direct:
            loss = weight * 0.5 * (sampled - teacher_C) ** 2
        else:
            zeros = torch.zeros(6, dtype=torch.float64)
            rows = TokenRows(
                targets_C=targets,
                old_C=sampled.detach(),
                advantage_C=zeros,
                teacher_C=teacher_C,
                reference_C=zeros,
                gate_C=zeros + 1,
                topk_ids_CK=torch.zeros(6, 0, dtype=torch.int64),
                topk_logprobs_CK=torch.zeros(6, 0, dtype=torch.float64),
                teacher_entropy_C=zeros,
            )
            loss = term.weight * term(StudentChunk(logprobs_CV=logprobs, sampled_C=sampled), rows).loss_C
        return torch.autograd.grad(loss.sum(), logits)[0]

    torch.testing.assert_close(gradient(teacher, False), gradient(teacher, True), rtol=0, atol=1e-12)
    assert not torch.allclose(gradient(teacher, False), gradient(teacher + 0.5, False))


def test_kdrl_asks_for_the_sampled_signal_alone():
    assert method("kdrl", "teacher.model=t").scoring is not None
    assert method("kdrl", "teacher.model=t", "teacher.signal=sampled").scoring is not None
    with pytest.raises(ConfigError, match="signal exact of teacher 'teacher'"):
        method("kdrl", "teacher.model=t", "teacher.signal=exact")


# ---- dapo --------------------------------------------------------------------------------------------------------


def test_dapo_drops_equal_groups_and_asks_for_as_many_fresh_prompts():
    composition = method("dapo", max_refills=2)
    judged_alike = [rollout("g4", 1.0), abstained("g4")]
    rollouts = [*facts_of([MIXED, RIGHT, WRONG]), abstained("g3"), *judged_alike]
    credits = composition.credit(rollouts, 0)
    assert [isinstance(credit, Credit) for credit in credits[:4]] == [True] * 4
    assert credits[4:] == ["zero_variance"] * 8 + ["abstained", "zero_variance", "abstained"]
    fresh = [(group, SampleSpec(samples=4, fresh=True)) for group in ("g1", "g2", "g3", "g4")]
    assert composition.follow_up(rollouts, 1) == composition.follow_up(rollouts, 2) == fresh
    assert composition.follow_up(rollouts, 3) == []
    assert composition.follow_up(facts_of([MIXED]), 1) == []
    assert method("dapo", max_refills=0).follow_up(rollouts, 1) == []


@pytest.mark.parametrize("max_refills", [0, 1, 4, 50])
def test_dapo_refills_until_the_step_is_full_or_the_budget_is_spent(max_refills):
    """The driver's loop with random verdicts: never more mixed groups than prompts were asked, and no endless loop."""
    rng = fresh_rng()
    composition = method("dapo", max_refills=max_refills)
    everything, call, attempt, asked = [], 12, 1, 12
    while call:
        rewards = (rng.random((call, 4)) < rng.choice([0.1, 0.5], (call, 1))).astype(float)
        rollouts = [rollout(f"{attempt}-{row}", reward) for row, group in enumerate(rewards) for reward in group]
        everything += rollouts
        follow_up = composition.follow_up(rollouts, attempt)
        call, attempt, asked = len(follow_up), attempt + 1, asked + len(follow_up)
    assert attempt - 2 <= max_refills
    credits = composition.credit(everything, 0)
    trained = {
        rollout.group_id for rollout, credit in zip(everything, credits, strict=True) if isinstance(credit, Credit)
    }
    assert len({rollout.group_id for rollout in everything}) == asked
    assert len(trained) == 12 if attempt - 2 < max_refills else len(trained) <= 12


def test_dapo_penalises_the_last_tokens_of_the_limit():
    """Limit 50, buffer a fifth: 45 tokens cost half the factor. Rewards are ±1, and the penalty makes no variance."""
    composition = method("dapo")
    rollouts = [rollout("g", 1.0), rollout("g", 1.0, length=45), rollout("g", 0.0), rollout("g", 0.0, length=50)]
    shaped = np.array([1, 1 - 0.5, -1, -1 - 1.0])
    expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-6)
    assert advantages(composition.credit(rollouts, 0)) == pytest.approx(expected.tolist(), abs=1e-9)
    equal = [rollout("g", 1.0), rollout("g", 1.0, length=50)]
    assert composition.credit(equal, 0) == ["zero_variance"] * 2
    plain = method("dapo", overlong_buffer=0).credit(rollouts, 0)
    assert advantages(plain) == pytest.approx([3**0.5 / 2, 3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2], abs=1e-5)


# ---- rejection sampling ------------------------------------------------------------------------------------------


def test_raft_and_raft_pp_keep_positives():
    read = golden("rejection_ft")
    rollouts = facts_of(read["inputs"]["rewards"])
    mask = np.array(read["expected"]["raft_positive_mask"]).ravel().astype(bool)
    for name in ("raft", "raft_pp"):
        assert method(name).credit(rollouts, 0) == [Credit(advantage=1.0) if kept else "incorrect" for kept in mask]


def test_raft_keeps_the_best_golden():
    read = golden("rejection_ft")
    credits = method("raft", keep="best").credit(facts_of(read["inputs"]["rewards"]), 0)
    for row, best in enumerate(read["expected"]["raft_dedup_best_of_n_index"]):
        group = credits[4 * row : 4 * row + 4]
        assert [index for index, credit in enumerate(group) if isinstance(credit, Credit)] == [best] * (best >= 0)
    assert credits[4:8] == [Credit(advantage=1.0), *["not_best"] * 3] and credits[8:12] == ["incorrect"] * 4
    graded = [rollout("g", 0.6), rollout("g", 0.9), rollout("g", 2.0, passed=False)]
    assert method("raft", keep="best").credit(graded, 0) == ["not_best", Credit(advantage=1.0), "incorrect"]


def test_reinforce_rej_golden_and_its_reasons():
    read = golden("rejection_ft")
    credits = advantages(method("reinforce_rej").credit(facts_of(read["inputs"]["rewards"]), 0))
    for row, wanted in enumerate(read["expected"]["reinforce_rej_adv_pm1"]):
        if read["expected"]["reinforce_rej_keep_groups"][row]:
            assert credits[4 * row : 4 * row + 4] == wanted
    assert credits[4:12] == ["all_right"] * 4 + ["all_wrong"] * 4


def test_rft_trains_each_path_of_a_prompt_once():
    paths = [("a", 1), ("b", 0), ("b", 1), ("a", 1), ("b", 1), ("c", 0)]
    rollouts = [rollout("g0", float(right), path=path) for path, right in paths] + [rollout("g1", 1.0, path="a")]
    kept = Credit(advantage=1.0)
    expected = [kept, "incorrect", kept, "duplicate_path", "duplicate_path", "incorrect", kept]
    assert method("rft").credit(rollouts, 0) == expected
    assert method("rft").round_steps == 40 and method("rft", round_steps=8).round_steps == 8
    assert not method("rft").restart


def test_rest_raises_its_threshold_within_a_round():
    composition = method("rest", round_steps=4, thresholds=[0.5, 0.8], length_cost=0.5)
    assert composition.round_steps == 4 and not composition.restart
    rollouts = [rollout("g", 1.0), rollout("g", 1.0, length=30), rollout("g", 0.0), abstained("g")]
    short, long = Credit(advantage=1.0), Credit(advantage=1.0)  # scores 0.9 and 0.7
    for step in range(8):
        second = long if step % 4 < 2 else "below_threshold"
        assert composition.credit(rollouts, step) == [short, second, "below_threshold", "abstained"]


def test_star_rationalises_failed_prompts_once_golden():
    read = golden("rejection_ft")
    rollouts = facts_of(read["inputs"]["rewards"])
    composition = method("star", template="solution@1", round_steps=7)
    asked = composition.follow_up(rollouts, 1)
    wanted = [f"g{row}" for row, failed in enumerate(read["expected"]["star_rationalise_prompts"]) if failed]
    assert asked == [(group, SampleSpec(context="solution@1")) for group in wanted]
    hinted = [rollout("g2", 0.0, context="solution@1")]
    assert composition.follow_up(hinted, 2) == [] == composition.follow_up([abstained()], 1)
    assert composition.restart and composition.round_steps == 7
    assert method("star").follow_up(rollouts, 1)[0][1].context == "answer@1"


def test_star_trains_what_passed_with_or_without_the_hint():
    rollouts = [rollout("a", 1.0), rollout("b", 0.0), rollout("c", 0.0)]
    rollouts += [rollout("b", 1.0, context="answer@1"), rollout("c", 0.0, context="answer@1")]
    kept = Credit(advantage=1.0)
    assert method("star").credit(rollouts, 0) == [kept, "incorrect", "incorrect", kept, "incorrect"]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("grpo", {"std": "sampel"}, "method_options.std"),
        ("grpo", {"epsilon": 0}, "method_options.epsilon"),
        ("grpo", {"clip_low": 1.0}, "method_options.clip_low"),
        ("grpo", {"clip_high": 0}, "method_options.clip_high"),
        ("grpo", {"dual_clip": 1.0}, "method_options.dual_clip.*above 1"),
        ("grpo", {"dual_clip": -3}, "method_options.dual_clip"),
        ("grpo", {"kl_weight": -0.1}, "method_options.kl_weight"),
        ("grpo", {"group_weight": "all"}, "method_options.group_weight"),
        ("grpo", {"reduction": "length"}, "method_options.reduction"),
        ("dr_grpo", {"std": "none"}, "dr_grpo knows: clip_low, clip_high, dual_clip, kl_weight"),
        ("dapo", {"kl_weight": 0.1}, "method_options.kl_weight"),
        ("dapo", {"max_refills": -1}, "method_options.max_refills"),
        ("dapo", {"penalty_factor": -1}, "method_options.penalty_factor"),
        ("dapo", {"overlong_buffer": 51}, "overlong_buffer 51, and rollout.max_new_tokens 50"),
        ("rloo", {"baseline": True}, "method_options.baseline"),
        ("reinforce_pp", {"baseline": "maybe"}, "method_options.baseline"),
        ("kdrl", {"teacher_weight": 0}, "method_options.teacher_weight"),
        ("raft", {"keep": "worst"}, "method_options.keep"),
        ("raft_pp", {"clip_low": 0.1}, "raft_pp knows: clip, clip_high"),
        ("reinforce_rej", {"kl_weight": 0.1}, "method_options.kl_weight"),
        ("rft", {"round_steps": 41}, "a round of rft ends within its stage"),
        ("rest", {"round_steps": 0}, "method_options.round_steps"),
        ("rest", {"round_steps": 41}, "round_steps 41, and 40 steps"),
        ("rest", {"thresholds": [0.5, 0.5]}, "thresholds rise"),
        ("rest", {"thresholds": []}, "method_options.thresholds"),
        ("rest", {"thresholds": [0.1, 0.2], "round_steps": 1}, "2 method_options.thresholds for 1 steps"),
        ("rest", {"length_cost": -1}, "method_options.length_cost"),
        ("star", {"round_steps": 41}, "a round of star ends within its stage"),
        ("star", {"template": ""}, "method_options.template"),
        ("star", {"template": "anwser@1"}, "answer@1"),
        ("star", {"template": "peer@1"}, "peer@1 shows .*peer"),
        ("star", {"template": "plain"}, "shows the gold answer"),
    ],
)
def test_options_that_are_refused(name, options, says):
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        method(name, **options)


@pytest.mark.parametrize("name", RL)
def test_a_policy_gradient_is_not_greedy(name):
    with pytest.raises(ConfigError, match=r"rollout\.temperature 0"):
        method(name, "rollout.temperature=0")


@pytest.mark.parametrize("setting", ["kind=truncated", "veto=0.1", "proximal=behaviour"])
def test_star_takes_no_off_policy_settings(setting):
    with pytest.raises(ConfigError, match="another prompt"):
        method("star", f"off_policy.{setting}")
    assert method("star", "off_policy.kind=none").correction.kind == "none"
