"""Methods as compositions: what each asks of the services and the learner, its schedules, and what it refuses."""

import json
import math
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from method_cases import REFERENCE, SELF, TEACHER, config

from tutorloop.cluster.methods import METHODS, compose, compose_stages
from tutorloop.cluster.methods.cold_start import teacher_share, try_again
from tutorloop.cluster.methods.gkd import coin
from tutorloop.cluster.methods.parts.composition import Composition, RolloutSummary, SampleSpec
from tutorloop.cluster.methods.parts.verdict_signs import group_sign, outcome_sign
from tutorloop.cluster.methods.sdpo import group_advantage
from tutorloop.cluster.methods.seqkd import keep_valid, keep_verified
from tutorloop.contracts.recipe import load_config, parse_config
from tutorloop.learner.terms import bind_terms

ROOT = Path(__file__).parents[2]


def only(method: str, teacher: dict | None = None, options: dict | None = None, **keys: Any) -> Composition:
    [composition] = compose_stages(config(method, teacher, options, **keys))
    bind_terms(composition.terms)  # the learner knows every term and option
    return composition


def rollout(**values: Any) -> RolloutSummary:
    base = {
        "rollout_id": "r",
        "group_id": "g",
        "source": "student",
        "context": "plain",
        "length": 3,
        "truncated": False,
    }
    return RolloutSummary(**{**base, **values})


# ---- what each asks for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_composes_and_its_terms_are_known(recipe: Path) -> None:
    for composition in compose_stages(load_config(recipe)):
        bind_terms(composition.terms)
        asked = {
            ask.source for step in range(50) for position in range(8) for ask in composition.samples(step, position)
        }
        assert asked <= set(composition.generators)
        assert {source for term in composition.terms for source in term.sources} <= set(composition.generators)


def test_the_page_names_every_method_and_its_stages_compose() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert set(METHODS) <= {name.strip(" `") for row in rows for name in row.split(",")}
    [stages] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    tree = {"output_dir": "x", "prompts_per_step": 1, "student": SELF, "data": {"path": "d"}}
    run = parse_config({**tree, **yaml.safe_load(stages), "teacher": {**TEACHER, "signal": "topk"}})
    assert [c.terms[0].name for c in compose_stages(run)][:2] == ["nll", "topk_divergence"]


def test_every_method_has_a_recipe() -> None:
    assert {load_config(path).method for path in ROOT.glob("recipes/*.yaml")} == set(METHODS)


@pytest.mark.parametrize(
    ("signal", "options", "asks", "support", "term", "own", "correction"),
    [
        ("sampled", {}, "sampled", 0, "policy_gradient", {}, "truncated"),
        ("topk", {"top_k": 5}, "topk", 0, "topk_divergence", {"direction": "reverse", "rest": "tail"}, "none"),
        (
            "topk",
            {"top_k": 5, "support": "student", "rest": "renormalise"},
            "given",
            5,
            "topk_divergence",
            {"direction": "reverse", "rest": "renormalise"},
            "none",
        ),
        (
            "exact",
            {"direction": "jsd", "temperature": 2.0},
            "hidden",
            0,
            "exact_divergence",
            {"direction": "jsd", "beta": 0.5, "temperature": 2.0},
            "none",
        ),
        (
            "exact",
            {"direction": "skew_reverse"},
            "hidden",
            0,
            "exact_divergence",
            {"direction": "skew_reverse", "beta": 0.1, "temperature": 1.0},
            "none",
        ),
    ],
)
def test_opd_in_three_strengths(
    signal: str, options: dict, asks: str, support: int, term: str, own: dict, correction: str
) -> None:
    composition = only("opd", {**TEACHER, "signal": signal}, options)
    assert composition.scoring is not None
    assert (composition.scoring.signal, composition.scoring.everyone) == (asks, False)
    assert composition.sampling.topk_support == support
    assert [(t.name, t.options) for t in composition.terms] == [(term, own)]
    assert composition.correction.kind == correction
    assert list(composition.samples(0, 0)) == [SampleSpec(samples=4)]


def test_the_recipes_correction_comes_before_the_methods() -> None:
    chosen = {"kind": "masked", "low": 0.1, "high": 5.0}
    correction = only("opd", {**TEACHER, "signal": "exact"}, off_policy=chosen).correction
    assert (correction.kind, correction.low, correction.high) == ("masked", 0.1, 5.0)
    assert only("opd", {**TEACHER, "signal": "sampled"}, off_policy={"high": 3.0}).correction.high == 3.0
    assert only("exopd", TEACHER, reference=REFERENCE).correction.high == 5.0


def test_combined_teachers_have_a_term_each_and_score_everything() -> None:
    teachers = {"a": {"model": "x", "weight": 3.0}, "b": {"model": "y"}}
    composition = only("opd", None, {"teachers": "combined"}, teachers=teachers)
    assert composition.scoring and composition.scoring.everyone
    assert {t.teacher: t.weight for t in composition.terms} == {"a": 0.75, "b": 0.25}
    eopd = only("eopd", None, {"teachers": "combined", "forward_weight": 0.5}, teachers=teachers)
    weights = {"reverse.a": 0.75, "forward.a": 0.375, "reverse.b": 0.25, "forward.b": 0.125}
    assert {t.key: t.weight for t in eopd.terms} == weights


def test_given_answers() -> None:
    sft = only("sft")
    assert sft.scoring is None and sft.scored == () and sft.generators == ("dataset",)
    assert list(sft.samples(3, 1)) == [SampleSpec(source="dataset")]
    assert [(t.name, t.sources) for t in sft.terms] == [("nll", ("dataset",))]

    seqkd = only("seqkd", TEACHER, {"filter": "verified"})
    assert list(seqkd.samples(0, 0)) == [SampleSpec(source="teacher", samples=4)]
    assert seqkd.needs_verdicts and seqkd.scoring is None and not only("seqkd", TEACHER).needs_verdicts

    kd = only("kd", {**TEACHER, "signal": "exact"}, {"temperature": 2.0})
    own = {"direction": "forward", "hinton": True, "temperature": 2.0}
    assert [(t.name, t.options, t.sources) for t in kd.terms] == [("exact_divergence", own, ("dataset",))]
    assert kd.scored == kd.generators == ("dataset",)
    kd = only("kd", {**TEACHER, "signal": "topk"}, {"answers": "teacher"})
    assert list(kd.samples(0, 0)) == [SampleSpec(source="teacher", samples=4)] and kd.scored == ("teacher",)
    assert kd.terms[0].options == {"direction": "forward", "rest": "tail"}


def test_filters_of_the_teachers_answers() -> None:
    rollouts = [
        rollout(passed=True, answer="7"),
        rollout(passed=False, answer="8"),
        rollout(passed=False, answer=""),
        rollout(passed=False, answer="7", truncated=True),
        rollout(passed=False, abstained=True),
    ]

    def kept(credits: list) -> list:
        return [credit if isinstance(credit, str) else "" for credit in credits]

    assert kept(keep_valid(rollouts, 0)) == ["", "", "invalid", "invalid", "abstained"]
    assert kept(keep_verified(rollouts, 0)) == ["", "incorrect", "incorrect", "incorrect", "abstained"]


def test_eopd_gates_a_second_forward_term() -> None:
    composition = only("eopd", {**TEACHER, "signal": "topk"})
    reverse, forward = composition.terms
    assert (reverse.name, reverse.key, reverse.options) == ("policy_gradient", "reverse", {})
    assert (forward.name, forward.key) == ("topk_divergence", "forward")
    assert forward.options == {"direction": "forward", "rest": "tail", "teacher_entropy_above": 0.8}
    assert composition.scoring and composition.scoring.top_k == 16 and composition.correction.kind == "truncated"
    composition = only("eopd", {**TEACHER, "signal": "exact"}, {"reverse": "divergence", "entropy_above": 1.5})
    assert [t.name for t in composition.terms] == ["exact_divergence"] * 2
    assert composition.terms[0].options["direction"] == "reverse" and composition.correction.kind == "none"


def test_g_opd_reads_the_reference_unless_it_is_plain_opd() -> None:
    composition = only("exopd", TEACHER, reference=REFERENCE)
    assert composition.reference and composition.terms[0].reference
    assert composition.terms[0].options == {"extrapolation": 1.25}
    assert composition.scoring and composition.scoring.signal == "sampled"
    assert not only("g_opd", TEACHER, {"extrapolation": 1.0}).reference


def test_constant_advantage_is_minus_one_and_asks_no_teacher() -> None:
    composition = only("constant_advantage")
    assert composition.scoring is None and not composition.needs_verdicts
    credits = composition.credit([rollout(), rollout(passed=False), rollout(abstained=True)], 0)
    assert [getattr(credit, "advantage", None) for credit in credits] == [-1.0] * 3


def test_self_teachers_are_shown_more() -> None:
    opsd = only("opsd", {**SELF, "signal": "exact"}, {"template": "solution@1", "entry_clip": 0.05})
    assert opsd.scoring and (opsd.scoring.context, opsd.scoring.signal) == ("solution@1", "hidden")
    assert opsd.terms[0].options == {"direction": "jsd", "beta": 0.5, "temperature": 1.0, "entry_clip": 0.05}
    assert not opsd.after_verdicts
    sdft = only("sdft", {**SELF, "signal": "sampled", "follows": "live"})
    assert sdft.scoring and sdft.scoring.context == "demonstration@1" and sdft.terms[0].name == "policy_gradient"
    own = {"clue@1": "{problem} It is {answer}."}
    mine = only("opsd", {**SELF, "signal": "sampled"}, {"template": "clue@1"}, templates=own)
    assert mine.scoring and mine.scoring.context == "clue@1"


def test_sdpo_scores_judged_groups_on_the_students_ids() -> None:
    sdpo = only("sdpo", {**SELF, "signal": "topk", "follows": "ema"})
    assert sdpo.after_verdicts and sdpo.needs_verdicts and sdpo.min_samples == 2
    assert sdpo.scoring and (sdpo.scoring.signal, sdpo.scoring.top_k, sdpo.scoring.context) == ("given", 100, "peer@1")
    assert sdpo.sampling.topk_support == 100
    assert sdpo.terms[0].options == {"direction": "jsd", "beta": 0.5, "rest": "tail"}
    assert (sdpo.correction.kind, sdpo.correction.high) == ("truncated", 2.0)
    blend = only("sdpo", {**SELF, "signal": "sampled"}, {"grpo_weight": 0.3})
    weights = {"policy_gradient": 0.7, "clipped_policy_gradient": 0.3}
    assert {t.name: t.weight for t in blend.terms} == weights and all(t.of_batch for t in blend.terms)
    first, second = group_advantage([rollout(reward=1.0), rollout(reward=0.0)])
    assert getattr(first, "advantage", 0) == pytest.approx(0.5 / math.sqrt(0.5), abs=1e-5)
    assert getattr(second, "advantage", 0) == pytest.approx(-0.5 / math.sqrt(0.5), abs=1e-5)


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_gkds_coin_falls_by_step_and_its_ends_are_exact() -> None:
    teacher = {**TEACHER, "signal": "exact"}
    for share in (0.2, 0.5, 0.9):
        composition = only("gkd", teacher, {"on_policy": share}, seed=3)
        steps = [composition.samples(step, 0)[0].source for step in range(2000)]
        assert set(steps) == set(composition.generators) == set(composition.scored) == {"student", "dataset"}
        deviation = math.sqrt(share * (1 - share) / len(steps))
        assert abs(steps.count("student") / len(steps) - share) < 4 * deviation
        assert all(composition.samples(7, position) == composition.samples(7, 0) for position in range(5))
    assert coin(3, 5) == coin(3, 5) != coin(4, 5)
    for share, source in ((0, "teacher"), (1, "student")):
        options = {"on_policy": share, **({"other": "teacher"} if share == 0 else {})}
        composition = only("gkd", teacher, options)
        assert {composition.samples(step, 0)[0].source for step in range(500)} == {source}
        assert composition.generators == composition.scored == composition.terms[0].sources == (source,)
    for beta in (0.0, 1.0):
        assert only("gkd", teacher, {"beta": beta}).terms[0].options["beta"] == beta


def test_the_teachers_share_of_answers_falls_in_a_line() -> None:
    golden = json.loads((ROOT / "tests/golden/sg_opd_gate.json").read_text())
    expected = golden["expected"]["teacher_fraction_linear_steps_0_5_10_20_30"]
    start, length = golden["inputs"]["rho0"], golden["inputs"]["K_cold"]
    found = [teacher_share(step, start, length) for step in (0, 5, 10, 20, 30)]
    assert found == pytest.approx(expected, abs=golden["tol"])


def test_the_cold_start_asks_the_teacher_in_a_share_of_the_prompts() -> None:
    options = {"cold_start": 0.5, "cold_steps": 0.2}
    composition = only("sg_opd", TEACHER, options, rollout={"samples_per_prompt": 8})
    assert composition.generators == ("student", "teacher") and composition.scored == ("student",)
    for step in (0, 5, 12, 19, 20, 60):
        share = 0.5 * max(0.0, 1 - step / 20)
        asks = [composition.samples(step, position) for position in range(1500)]
        assert all(ask[0] == SampleSpec(samples=8) for ask in asks)
        taught = [ask[1] for ask in asks if len(ask) > 1]
        assert abs(len(taught) / len(asks) - share) <= 4 * math.sqrt(share * (1 - share) / len(asks))
        assert set(taught) <= {SampleSpec(source="teacher", samples=math.ceil(Fraction(20 - step, 40) * 8))}
    assert composition.samples(3, 4) == composition.samples(3, 4)
    gated, given = composition.terms
    assert (gated.name, gated.sources, given.name, given.sources) == ("sign_gate", ("student",), "nll", ("teacher",))
    assert gated.of_batch and given.of_batch

    none = only("sg_opd", TEACHER, {"cold_start": 0.0})
    assert none.generators == ("student",) and none.follow_up is None and not none.terms[0].of_batch
    assert {len(none.samples(0, position)) for position in range(50)} == {1}


def test_the_teacher_tries_again_and_then_the_student_answers() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    for tries in (1, 2, 4):
        right_at = draw.choice([1, 2, 3, 4, 99])
        follow_up = try_again(tries)
        answers, attempt, source = [], 1, "teacher"
        while True:
            answers.append(source)
            passed = source == "teacher" and len(answers) >= right_at
            judged = [rollout(source=source, passed=passed), rollout(source="student", passed=False)]
            extra = follow_up(judged, attempt)
            if not extra:
                break
            [(group, ask)] = extra
            assert group == "g" and ask.samples == 1
            source, attempt = ask.source, attempt + 1
        taught = min(tries, right_at)
        assert answers == ["teacher"] * taught + ["student"] * (right_at > tries)


def test_signs_against_a_slow_rule() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    rollouts = []
    for index in range(200):
        reward = draw.choice([0.0, 0.25, 0.5, 1.0]) if index >= 20 else 0.1
        rollouts.append(
            rollout(
                group_id=f"g{index // 10}",
                source="teacher" if draw.random() < 0.2 else "student",
                truncated=draw.random() < 0.2,
                abstained=draw.random() < 0.2,
                reward=reward,
                passed=reward > 0.5,
            )
        )
    outcome, group = outcome_sign(rollouts, 0), group_sign(rollouts, 0)
    for index, one in enumerate(rollouts):
        if one.source == "teacher":
            expected = "" if one.passed else "abstained" if one.abstained else "teacher_incorrect"
            assert [c if isinstance(c, str) else "" for c in (outcome[index], group[index])] == [expected] * 2
            continue
        neutral = one.truncated or one.abstained
        peers = [
            Fraction(p.reward)
            for p in rollouts
            if p.group_id == one.group_id and p.source == "student" and not p.truncated and not p.abstained
        ]
        gap = 0 if neutral else Fraction(one.reward) - sum(peers) / len(peers)
        assert getattr(outcome[index], "advantage", None) == (0 if neutral else 1 if one.passed else -1)
        assert getattr(group[index], "advantage", None) == (gap > 0) - (gap < 0)  # all exact in float64


def test_sg_opds_forms() -> None:
    forward = only("sg_opd", {**TEACHER, "signal": "topk"}, {"teacher_loss": "forward_kl", "top_k": 5})
    assert forward.scoring and (forward.scoring.signal, forward.scoring.top_k) == ("topk", 5)
    assert forward.scored == ("student", "teacher")
    assert (forward.terms[1].name, forward.terms[1].options) == ("topk_divergence", {"direction": "forward"})
    exact = only("sg_opd", {**TEACHER, "signal": "exact"}, {"teacher_loss": "forward_kl"})
    assert exact.scoring and (exact.scoring.signal, exact.terms[1].name) == ("hidden", "exact_divergence")
    frozen = only("sg_opd", TEACHER, {"mode": "frozen_ref"}, reference=REFERENCE)
    assert frozen.reference and frozen.terms[0].reference
    soft = only("sg_opd", TEACHER, {"gate": "soft", "sharpness": 0.1})
    assert (soft.terms[0].name, soft.terms[0].options) == ("soft_gate", {"sharpness": 0.1})
    group = only("sg_opd", TEACHER, {"sign": "group"})
    assert group.credit is group_sign and group.min_samples == 2
    opdvr = compose(load_config(ROOT / "recipes/opdvr.yaml"))
    assert opdvr.terms[0].options == {"agree": 1.0, "conflict": 0.0, "mode": "live_ref", "blend": 1.0}
