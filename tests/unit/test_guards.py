"""Guards: limits against a slow reference, troubles of every kind that trip, healthy noise that does not, the state."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import typer
from learner_cases import OneProcess, World
from run_rows import fresh_rng, step_row

from tutorloop.cli.outcome import ends_clearly
from tutorloop.cluster.recording.counters import RunCounters
from tutorloop.cluster.recording.guards import EXPLODED, RULES, SPREADS, WINDOW, Guards
from tutorloop.cluster.recording.run_folder import RunFolder
from tutorloop.contracts.errors import ConfigError, GuardTripped, LearnerError, NotFinite
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import Term

RULE = {rule.kind: rule for rule in RULES}
START = {  # what a healthy run may look like, by kind
    "pass_rate": 0.6,
    "eos": 0.9,
    "length_up": 300.0,
    "length_down": 300.0,
    "entropy_up": 0.6,
    "entropy_down": 0.6,
    "overlap": 0.8,
    "reverse_kl": 0.4,
    "coverage": 0.95,
    "staleness": 0.0,
    "shift": 0.002,
    "update": 0.004,
    "gradient": 0.7,
}


def configured(**guards):
    tree = {
        "method": "opd",
        "output_dir": "x",
        "steps": 9,
        "prompts_per_step": 1,
        "student": {"model": "a"},
        "data": {"path": "b"},
        "guards": guards,
    }
    return parse_config(tree)


def seen(rng, step, **figures):
    """A row with these figures by kind, and the step's drops; what is not given is as at the start, give or take."""
    known = {kind: value * rng.uniform(0.95, 1.05) if kind != "staleness" else value for kind, value in START.items()}
    known |= figures
    stale = round(known["staleness"] * 100)
    learner = {
        "top1_agreement.a": known["overlap"],
        "top1_agreement.b": 1.0,
        "reverse_kl.a": -9.0,
        "topk_reverse_kl": known["reverse_kl"],
        "teacher_coverage": known["coverage"],
        "grad_norm": known["gradient"],
        "mismatch_k3": known["shift"] * 4,
        "policy_shift": known["update"] * 5,
    }
    length = "length_up" if "length_up" in figures else "length_down"
    entropy = "entropy_up" if "entropy_up" in figures else "entropy_down"
    own = {
        "learner": learner,
        "response_length": known[length],
        "truncated_share": 1 - known["eos"],
        "pass_rate": known["pass_rate"],
        "sampler_entropy": known[entropy],
        "staleness_mean": 4.0,
        "rollouts": {"taken": 100 - stale, "trained": 100 - stale},
    }
    return step_row(rng, step, **own), {"stale": stale} if stale else {}


def watched(config, guards, rng, figures, first=1):
    """What tripped in each of some steps. `figures`: of each step, by kind."""
    return [guards.observe(config, *seen(rng, first + i, **own)) for i, own in enumerate(figures)]


@pytest.mark.parametrize("kind", [rule.kind for rule in RULES if rule.kind != "gradient" and rule.usual is None])
def test_limits_are_those_of_a_slow_reference(kind):
    rng, rule = fresh_rng(), RULE[kind]
    for scale in (0.001, 0.1, 1.0):
        start = [float(value) for value in rng.normal(rng.normal(), scale, size=int(rng.integers(1, 12)))]
        middle = np.median(start)
        spread = np.median(np.abs(np.array(start) - middle))
        share = abs(middle) * (rule.times - 1) if rule.above else abs(middle) * (1 - 1 / rule.times)
        far = max(share, SPREADS * spread, rule.room)
        start_is, limit, how = rule.limit(start)
        assert start_is == middle
        np.testing.assert_allclose(limit, middle + far if rule.above else middle - far)
        assert f"{middle:.4g}, the median of the first {len(start)} steps" in how


def beyond(kind, rng):
    """A figure that no run should have."""
    rule, start = RULE[kind], START[kind]
    if kind == "gradient":
        return 1.01 * EXPLODED * 1.05 * start * rng.uniform(1, 5)
    if kind == "staleness":
        return int(rng.integers(25, 90)) / 100
    if rule.above:
        return start + max(1.06 * start * rule.times - start, 1.3 * rule.room) * rng.uniform(1.3, 3)
    return max(0.0, min(0.94 * start / rule.times, start - 1.3 * rule.room)) * rng.uniform(0, 0.8)


@pytest.mark.parametrize("kind", list(RULE))
def test_trouble_trips_after_patience_steps_in_a_row_and_is_said_once(kind):
    rng = fresh_rng()
    warmup, patience = int(rng.integers(4, 8)), int(rng.integers(2, 5))
    config, guards = configured(warmup=warmup, patience=patience), Guards()
    patience = 1 if RULE[kind].at_once else patience
    bad = [{kind: beyond(kind, rng)} for _ in range(patience)]
    assert not any(watched(config, guards, rng, [{}] * warmup + bad[1:] + [{}] + bad[1:] + [{}]))
    assert not guards.take_news()
    value = bad[0][kind]
    tripped = watched(config, guards, rng, [*bad[1:], bad[0], *bad], first=70)
    assert [bool(one) for one in tripped] == [False] * (patience - 1) + [True] * (patience + 1)
    (said,) = guards.take_news()
    assert said.startswith(f"{RULE[kind].guard} guard: ") and RULE[kind].remedy in said
    row = f"{patience} steps in a row" if patience > 1 else "a step"
    assert f"is {value:.4g} in step {69 + patience}, {row}" in said
    side = "above" if RULE[kind].above else "below"
    assert f"{side} its limit" in said and ("the median of the" in said) == (RULE[kind].usual is None)
    assert tripped[-1].action == "warn" and guards.said == {f"0 {kind}": said}


def test_a_healthy_run_trips_nothing():
    rng = fresh_rng()
    for _ in range(20):
        config, guards = configured(warmup=5, patience=1), Guards()
        drift = np.linspace(1, 0.4, 60)  # a run learns
        figures = [{"reverse_kl": 0.4 * d, "gradient": 0.7 * d, "entropy_down": 0.6 * d} for d in drift]
        assert not any(watched(config, guards, rng, figures))


def test_a_real_model_that_learns_trips_nothing():
    """SmolLM2 of benchmarks/results/smollm2_opd.md: noisy steps of 16 rollouts, none of which ended at first."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "smollm2_opd.json"
    run = json.loads(file.read_text(encoding="utf-8"))
    config, guards = configured(), Guards()
    for row in (dict(zip(run["columns"], values, strict=True)) for values in run["rows"]):
        length, entropy = row["response_length"], row["entropy"]
        figures = {"length_up": length, "length_down": length, "entropy_up": entropy, "entropy_down": entropy}
        figures |= {"eos": 1 - row["truncated_share"], "reverse_kl": row["reverse_kl"], "gradient": row["grad_norm"]}
        assert guards.judge(config, row["step"], figures) is None
    assert len(guards.starts["eos"]) == config.guards.warmup < len(run["rows"]) and not guards.said


def test_what_was_not_measured_says_nothing():
    rng, config, guards = fresh_rng(), configured(warmup=2, patience=2), Guards()
    watched(config, guards, rng, [{}] * 2)
    for step in range(5):
        row, _ = seen(rng, step)
        nothing = {"sampler_entropy": None, "response_length": 1e9, "truncated_share": 1.0, "learner": {}}
        bare = step_row(rng, step, **{**nothing, "rollouts": {"taken": 0, "trained": 0}})
        assert guards.observe(config, bare, {}) is None
        learner = {**row.learner, "reverse_kl.a": float("nan"), "grad_norm": 0.0}
        assert guards.observe(config, step_row(rng, step, **{**nothing, "learner": learner}), {}) is None
    assert not any(guards.beyond.values())


def test_the_usual_gradient_follows_the_run_and_no_explosion():
    rng, config, guards = fresh_rng(), configured(warmup=5, patience=2), Guards()
    norms = [50 * 0.9**i for i in range(60)]  # 100 times below the start by then
    assert not any(watched(config, guards, rng, [{"gradient": norm} for norm in norms]))
    assert guards.norms == norms[-WINDOW:]
    usual = float(np.median(norms[-WINDOW:]))
    assert EXPLODED * usual < norms[0]
    clip = config.learner.max_grad_norm
    exploded = max(clip, EXPLODED * usual) * 1.01
    tripped = watched(config, guards, rng, [{"gradient": exploded}] * 6)
    assert tripped[0] is None and all(tripped[1:]) and guards.norms == norms[-WINDOW:]


def test_the_state_goes_through_a_checkpoint():
    rng = fresh_rng()
    config = configured(warmup=4, patience=2, action="rollback", rate=0.25)
    bad = {kind: beyond(kind, rng) for kind in ("eos", "overlap", "length_up", "gradient")}
    figures = [{kind: bad[kind] for kind in bad if rng.random() < 0.4} for _ in range(20)]
    rows = [seen(rng, i + 1, **own) for i, own in enumerate([{}] * 5 + figures + [bad] * 2)]
    whole, cut, at = Guards(), Guards(), int(rng.integers(1, 27))
    found = [whole.observe(config, *row) for row in rows]
    again = [cut.observe(config, *row) for row in rows[:at]]
    counters = RunCounters(guards=cut)
    resumed = RunCounters()
    resumed.resume(json.loads(json.dumps(counters.state())))
    again += [resumed.guards.observe(config, *row) for row in rows[at:]]
    assert again == found and any(found) and resumed.guards == whole
    assert resumed.summary()["warnings"] == list(whole.said.values())
    resumed.resume({name: value for name, value in counters.state().items() if name != "guards"})  # of an older release
    assert resumed.guards == Guards()


def test_each_guard_has_its_action_and_the_gravest_counts():
    rng = fresh_rng()
    config = configured(warmup=2, patience=1, action="rollback", actions={"entropy": "stop", "eos": "off"})
    assert [config.guards.action_of(name) for name in ("eos", "length", "entropy")] == ["off", "rollback", "stop"]
    guards = Guards()
    bad = {kind: beyond(kind, rng) for kind in ("eos", "length_up", "entropy_up")}
    watched(config, guards, rng, [{}] * 2)
    assert watched(config, guards, rng, [{"eos": bad["eos"]}]) == [None]
    (tripped,) = watched(config, guards, rng, [{**bad, "entropy_up": START["entropy_up"]}])
    assert tripped.action == "rollback" and tripped.error().rolls_back
    (tripped,) = watched(config, guards, rng, [bad])
    error = tripped.error()
    assert tripped.action == "stop" and not error.rolls_back and isinstance(error, GuardTripped)
    assert "entropy guard" in str(error) and "learner.learning_rate" in error.remedy
    two = [Guards().judge(config, 1, own) for own in ({"shift": 9.0}, {"staleness": 1.0})]
    assert [one.action for one in two] == ["rollback", "stop"]  # no rate mends what comes late
    assert watched(config, guards, rng, [{"coverage": 0.1}])[0].action == "rollback"
    assert len(guards.take_news()) == 3 and guards.take_news() == []


def test_weights_are_proven_once_what_they_write_was_seen_within_the_limits():
    rng = fresh_rng()
    behind = int(rng.integers(0, 4))
    config = configured(warmup=3, patience=9, action="stop", actions={"entropy": "warn", "length": "rollback"})
    guards, bad = Guards(), {kind: beyond(kind, rng) for kind in ("length_up", "entropy_up", "eos")}
    watched(config, guards, rng, [{}] * 3)
    trouble = [("", None), ("entropy_up", None), ("length_up", 6), ("length_up eos", 6), ("eos", 7), ("", None)]
    for step, (kinds, since) in enumerate(trouble, start=4):
        watched(config, guards, rng, [{kind: bad[kind] for kind in kinds.split()}], first=step)
        assert guards.proven(config, step, behind) == (since or step + 1) - 2 - behind


def test_another_stage_has_its_own_start():
    rng, config, guards = fresh_rng(), configured(warmup=3, patience=1), Guards()
    assert any(watched(config, guards, rng, [{}] * 3 + [{"length_up": 3000.0}]))
    guards.begin(0)
    assert len(guards.starts["length_up"]) == 3
    guards.begin(1)
    long = [{"length_up": 3000.0}]
    assert not any(watched(config, guards, rng, long * 6)) and len(guards.said) == 1
    assert any(watched(config, guards, rng, [{"length_up": 30000.0}])) and len(guards.said) == 2


def test_rollbacks_lower_the_rate_leave_a_batch_out_and_end():
    config = configured(action="rollback", rollbacks=3, rate=0.5)
    tripped = GuardTripped("rule", "the length ran away")
    tripped.rolls_back = True
    guards, unsound = Guards(), NotFinite("rule", "nan")
    assert not guards.go_back(config, GuardTripped("rule", "stop"), 9, 8)
    assert not guards.go_back(config, LearnerError("rule"), 9, 8)
    assert guards.go_back(config, tripped, 9, 8) and (guards.rate, guards.skipped) == (0.5, [])
    assert guards.go_back(config, unsound, 12, 12) and (guards.rate, guards.skipped) == (0.5, [12])
    assert guards.go_back(config, unsound, 13, 13) and (guards.rate, guards.skipped) == (0.25, [12, 13])
    assert not guards.go_back(config, tripped, 20, 19) and "guards.rollbacks=3 are used up" in tripped.found
    assert guards.rollbacks == guards.news
    assert "after step 12: from here step 13 trains nothing. nan" in guards.news[1]
    older = Guards(starts={"eos": [0.5]})
    older.keep(guards)
    assert (older.rate, older.skipped, len(older.rollbacks), older.starts) == (0.25, [12, 13], 3, {"eos": [0.5]})
    counters = RunCounters(guards=guards)
    assert counters.summary()["rollbacks"] == 3 and counters.summary()["warnings"] == guards.rollbacks
    warned = configured(action="rollback", actions={"gradient": "warn"})
    assert not Guards().go_back(warned, NotFinite("rule", "nan"), 3, 3)
    assert not Guards().go_back(config, NotFinite("rule", "nan"), 0, None)  # no batch was read
    assert asdict(Guards())["rate"] == 1


def test_a_stopped_run_has_an_exit_code_of_its_own(capsys):
    """Trying it again without a change would end as it did."""

    @ends_clearly
    def command():
        raise GuardTripped("rule", "the length ran away", "what helps")

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 3 and "the length ran away" in capsys.readouterr().err


def test_an_unknown_guard_is_one_clear_error():
    with pytest.raises(ConfigError) as wrong:
        configured(actions={"eoss": "stop"})
    assert "guards.actions.eoss: " in wrong.value.found and "'eos', 'length'" in wrong.value.found
    assert wrong.value.found.count("\n") == 0
    with pytest.raises(ConfigError, match=r"guards\.actions\.eos: .*'off', 'warn', 'stop' or 'rollback'"):
        configured(actions={"eos": "explode"})


def test_coverage_is_the_share_of_tokens_that_a_teacher_answered():
    world = World()
    examples = [world.example(f"r{i}") for i in range(6)]
    refused = {i for i in range(6) if world.rng.random() < 0.5} | {0}
    for i in refused:
        examples[i].scores.clear()
    terms = (Term(name="policy_gradient"),)
    report = OneProcess(world.student(), terms).learn(examples)
    tokens = [int(example.rollout.loss_mask.sum()) for example in examples]
    answered = sum(count for i, count in enumerate(tokens) if i not in refused)
    assert report.metrics["teacher_coverage"] == pytest.approx(answered / sum(tokens))
    unasked = OneProcess(world.student(), (Term(name="clipped_policy_gradient"),)).learn(examples)
    assert "teacher_coverage" not in unasked.metrics


def test_a_folder_keeps_what_a_rollback_needs_and_forgets_what_it_left(tmp_path):
    folder = RunFolder(tmp_path / "run")

    def standing():
        return [int(path.name.removeprefix("step-")) for path in folder.all_checkpoints()]

    def save(step, proven=None):
        folder.end_checkpoint(folder.begin_checkpoint(step), {"step": step}, {}, 1, proven)

    folder.create(configured())
    for step, stay in ((2, [2]), (4, [2, 4]), (6, [2, 4, 6]), (8, [4, 6, 8]), (9, [6, 8, 9])):
        save(step, proven=step - 3)
        assert standing() == stay
    save(10, proven=6)  # in trouble since then
    assert standing() == [6, 8, 9, 10]
    folder.remove_after(6)
    assert standing() == [6]
    save(11)
    assert standing() == [11]
