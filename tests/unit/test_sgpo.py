"""SGPO on latent strategies: what following one is worth, what is watched, and what it asks of the services."""

import json
from pathlib import Path

import numpy as np
import pytest
from method_cases import REFERENCE, config
from run_rows import fresh_rng

from tutorloop.cluster.flow.shard import Shard
from tutorloop.cluster.methods import compose, compose_stages
from tutorloop.cluster.methods.parts.composition import Credit, RolloutSummary
from tutorloop.cluster.methods.parts.credit import group_relative
from tutorloop.cluster.methods.parts.strategies import StrategyState, Worth, capped, code_shares, effective
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.receipts import RolloutReceipt, ScoreReceipt, StrategyReceipt
from tutorloop.contracts.records import SampleRequest
from tutorloop.learner.terms import bind_terms

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sgpo_alignment.json").read_text())
GIVEN = {"reference": REFERENCE, "strategies": {"path": "f"}, "rollout": {"samples_per_prompt": 4}}


def answer(group="g0", passed=True, alignment=0.5, diversity=0.0, codes=(0, 1, 2), number=0, **changes):
    said = {} if codes is None else {"alignment": alignment, "diversity": diversity, "codes": codes}
    own = {"source": "student", "context": "plain", "length": 9, "truncated": False, "reward": float(passed)}
    own |= {"rollout_id": f"{group}-{number}", "group_id": group, "passed": passed, "said": {"strategies": said}}
    return RolloutSummary(**own | changes)


def test_the_reward_is_that_of_the_golden_file():
    inputs, expected = GOLDEN["inputs"], GOLDEN["expected"]
    worth = Worth(correct=inputs["alpha_correct"], wrong=inputs["alpha_wrong"], diversity=inputs["div_coef"])
    rows = zip(inputs["rewards_verifier"], inputs["r_align_group"], expected["diversity_bonus"], strict=True)
    rewards = [worth.reward(reward, bool(reward), aligned, diversity) for reward, aligned, diversity in rows]
    assert rewards == pytest.approx(expected["total_reward"], abs=GOLDEN["tol"])
    assert group_relative(rewards) == pytest.approx(expected["group_adv_dr"], abs=GOLDEN["tol"])


def test_a_group_is_credited_by_that_reward():
    inputs, expected = GOLDEN["inputs"], GOLDEN["expected"]
    rows = zip(inputs["rewards_verifier"], inputs["r_align_group"], expected["diversity_bonus"], strict=True)
    group = [
        answer(passed=bool(reward), alignment=aligned, diversity=diversity, codes=(number,), number=number)
        for number, (reward, aligned, diversity) in enumerate(rows)
    ]
    credits = compose(config("sgpo", **GIVEN)).credit(group, 0)
    found = [credit.advantage for credit in credits if isinstance(credit, Credit)]
    assert found == pytest.approx(expected["group_adv_dr"], abs=GOLDEN["tol"])


def test_a_right_answer_outranks_a_wrong_one_whatever_they_followed():
    rng = fresh_rng()
    composition = compose(config("sgpo", **GIVEN))
    for _ in range(50):
        group = [
            answer(
                passed=bool(number % 2),
                alignment=float(rng.random()) if number % 2 else 1.0,
                diversity=float(2 * rng.random()),
                codes=tuple(rng.integers(0, 3, 4).tolist()),
                number=number,
            )
            for number in range(6)
        ]
        values = [credit.advantage for credit in composition.credit(group, 0) if isinstance(credit, Credit)]
        assert min(values[1::2]) > max(values[0::2])


def test_a_neutral_answer_counts_as_the_mean_of_the_others():
    group = [answer(alignment=value, number=number) for number, value in enumerate([0.2, 0.6, None])]
    found = [c.advantage for c in compose(config("sgpo", **GIVEN)).credit(group, 0) if isinstance(c, Credit)]
    assert found[2] == pytest.approx(0, abs=1e-12) and found[0] < 0 < found[1]
    silent = [answer(alignment=None, codes=(), number=number) for number in range(3)]
    assert list(compose(config("sgpo", **GIVEN)).credit(silent, 0)) == [Credit(), Credit(), Credit()]


def test_the_shares_of_codes_and_their_cap():
    rng = fresh_rng()
    rollouts = [answer(codes=tuple(rng.integers(0, 5, rng.integers(0, 9)).tolist())) for _ in range(40)]
    steps = [code for rollout in rollouts for code in rollout.said["strategies"]["codes"]]
    shares = code_shares(rollouts)
    assert shares == pytest.approx({code: steps.count(code) / len(steps) for code in set(steps)})
    entropy = -sum(share * np.log(share) for share in shares.values())
    assert effective(list(shares.values())) == pytest.approx(np.exp(entropy)) and effective([]) == 0
    assert capped((0, 0, 1), {0: 0.8, 1: 0.2}, 0.4) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert capped((), {}, 0.4) == 1


def watched(steps: list[list[RolloutSummary]]) -> StrategyState:
    state = StrategyState()
    for rollouts in steps:
        state.observe(rollouts)
    return state


def various(count=12):
    return [answer(codes=(k % 6, (k + 1) % 6, (k + 2) % 6)) for k in range(count)]


def test_a_policy_with_a_single_strategy_trips_the_alarm_and_halves_what_strategies_are_worth():
    single = [answer(codes=(3, 3, 3)) for _ in range(12)]
    state = watched([various()] * 4 + [single])
    assert state.scale == 1 and not state.alarm, "one step alone is noise"
    state.observe(single)
    assert state.scale == 0.5 and "1.0 strategies are in use, of 6.0 at first" in state.alarm
    for _ in range(9):
        state.observe(single)
    assert state.scale == 0.5, "it rests"
    state.observe(single)
    assert state.scale == 0.25


def test_a_dominant_code_trips_it_unless_it_was_so_from_the_start():
    mostly = [answer(codes=(0, 0, 0, 0, k % 6, (k + 1) % 6)) for k in range(12)]
    assert "one code is 72 % of all steps (17 % at first)" in watched([various()] * 3 + [mostly] * 2).alarm
    assert not watched([mostly] * 20).alarm


def test_alignment_that_rises_without_accuracy_trips_it():
    def trained(alignments, accuracies):
        state = StrategyState()
        for alignment, accuracy in zip(alignments, accuracies, strict=True):
            state.observe([answer(alignment=alignment, codes=(k % 6,)) for k in range(6)])
            state.evaluated(accuracy)
        return state

    hacked = trained([0.3, 0.4, 0.5, 0.6], [0.5, 0.52, 0.49, 0.5])
    assert hacked.scale == 0.5 and "rose from 0.30 to 0.60 over 3 evaluations" in hacked.alarm
    assert not trained([0.3, 0.4, 0.5, 0.6], [0.5, 0.52, 0.54, 0.55]).alarm
    assert not trained([0.5, 0.5, 0.5, 0.51], [0.5, 0.5, 0.5, 0.5]).alarm


def test_after_an_alarm_wrong_answers_earn_nothing_by_alignment():
    composition = compose(config("sgpo", **GIVEN))
    assert composition.state
    group = [answer(passed=False, alignment=value, number=number) for number, value in enumerate((0.1, 0.9))]
    before = composition.credit(group, 0)
    composition.state.load({**StrategyState().save(), "scale": 0.5})
    assert before[0] != before[1] and composition.credit(group, 0) == [Credit(), Credit()]


def test_the_state_survives_a_checkpoint():
    state = watched([various()] * 3 + [[answer(codes=(1, 1, 1))] * 12] * 2)
    state.evaluated(0.5)
    again = StrategyState()
    again.load(json.loads(json.dumps(state.save())))
    assert again == state
    again.load({})
    assert again == StrategyState()


def test_what_it_asks_and_sums():
    composition = compose(config("sgpo", options={"order": "ordered", "shaping": False}, **GIVEN))
    surrogate, leash = bind_terms(composition.terms)
    assert surrogate.credit == "strategies" and (leash.name, leash.weight) == ("reference_kl", 0.01)
    asked = next(own for own in composition.annotations if own.service == "strategies")
    assert asked.given == {"order": "ordered", "credit_weight": 0.2, "shaping": False}
    assert asked.to_learner == "credits" and asked.contexts == ("plain",) and "verdicts" not in asked.reads


def test_what_is_refused():
    given = {key: value for key, value in GIVEN.items() if key != "strategies"}
    with pytest.raises(ConfigError, match="asks how the teacher solves"):
        compose(config("sgpo", **given))
    with pytest.raises(ConfigError, match="asks for no strategies"):
        compose_stages(config("grpo", rollout={"samples_per_prompt": 4}, strategies={"path": "f"}))
    with pytest.raises(ConfigError, match="needs a reference model"):
        compose(config("sgpo", strategies={"path": "f"}, rollout={"samples_per_prompt": 4}))


def test_a_shard_hands_on_what_its_services_say_of_each_rollout():
    requests = tuple(SampleRequest(rollout_id=f"7-{n}", group_id="7", sample_index=n, row=0, seed=n) for n in range(2))
    shard = Shard(0, requests)
    lengths = {"lengths": (5, 6), "response_lengths": (2, 3), "finish_reasons": ("stop", "stop")}
    shard.add("rollouts", None, RolloutReceipt(rows=2, seconds=0, **lengths))
    own = {"alignments": (0.5, None), "diversities": (0.1, 0.2), "codes": ((1, 2, 3), ())}
    shard.add("strategies", None, StrategyReceipt(rows=2, seconds=0, **own))
    shard.add("unguided.teacher", None, ScoreReceipt(rows=1, seconds=0, mean_logprobs={"7-1": -0.25}))
    first, second = shard.summaries()
    assert first.said["strategies"] == {"alignment": 0.5, "diversity": 0.1, "codes": (1, 2, 3)}
    assert first.said["unguided"] == {} and second.said["unguided"] == {"mean_logprob": -0.25}
