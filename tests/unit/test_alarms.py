"""What a run says of itself: figures only of what was measured, and each alarm once, from real shards of work."""

import asyncio
from dataclasses import asdict, replace
from typing import get_args

import pytest
from flow_cases import World, plain, run
from run_rows import eval_row, fresh_rng, step_row

from tutorloop.cluster.methods.parts.composition import SampleSpec
from tutorloop.cluster.pools.busy import BusyTime, Watch
from tutorloop.cluster.recording.alarms import OTHER, Alarms
from tutorloop.cluster.recording.counters import RunCounters
from tutorloop.cluster.recording.prometheus import KNOWN_ALARMS
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import StepReport
from tutorloop.contracts.reliability import GuardName


def report(flow, shards, **changes):
    """A learner's report on all rows of the shards."""
    rows = sum(len(shard.requests) for shard in shards)
    metrics = {"grad_norm": 1.0, "missing_scores": 0.0, **changes.pop("metrics", {})}
    return StepReport(**{"loss": 0.5, "tokens": 7, "rollouts": rows, "seconds": 0.0, "metrics": metrics, **changes})


def tallied(composition=plain, steps=1, receipts=None, verifier=True, passes=lambda request: True, **changes):
    """The rows of some steps. `receipts`: what the verifier's and the generators' receipts say instead."""
    world = World(fresh_rng(), passes)
    flow, taken = asyncio.run(run(world, composition, steps, verifier=verifier, max_staleness=steps))
    counters, rows = RunCounters(), []
    counters.watch.begin(flow.pools)
    for step, shards in enumerate(taken):
        for shard in shards:
            for name, own in (receipts or {}).items():
                if name in shard.receipts:
                    shard.receipts[name] = replace(shard.receipts[name], **own(shard.receipts[name]))
        flow.trainable(step, shards)
        rows.append(counters.step_row(step + 1, shards, report(flow, shards, **changes), {"total": 1.0}, flow))
    return counters, rows


def silent(receipt):
    """No answer in any response."""
    nothing = {"answers": ("",) * receipt.rows, "passed": (False,) * receipt.rows, "rewards": (0.0,) * receipt.rows}
    return {**nothing, "errors": {}}


def test_steps_count_from_1_and_warn_of_nothing_where_nothing_is_wrong():
    counters, rows = tallied(steps=3)
    assert [row.step for row in rows] == [1, 2, 3] and not any(row.warnings for row in rows)
    assert rows[0].pass_rate == rows[0].reward == rows[0].groups["all_right"] == 1
    assert rows[0].rollouts == {"taken": 12, "trained": 12} and not rows[0].dropped
    assert counters.summary()["warnings"] == []


@pytest.mark.parametrize("source", ["student", "dataset"])
def test_what_nobody_judged_has_no_figure(source):
    def composition(config):
        ask = SampleSpec(source=source, samples=3)
        return replace(plain(config), samples=lambda step, position: (ask,), generators=(source,))

    counters, (row,) = tallied(composition, verifier=source == "dataset")
    assert (row.reward, row.pass_rate, row.abstained, row.reward_parts) == (None, None, None, {})
    assert row.groups == {"given_share": float(source == "dataset")} and row.response_length is not None
    assert (row.staleness_mean is None) == (source == "dataset") == (row.sampler_entropy is None)
    assert counters.summary()["accuracy"] == {} and ("staleness" in counters.summary()) == (source == "student")


def test_responses_without_an_answer_are_told_of_once():
    counters, rows = tallied(steps=4, receipts={"verdicts": silent})
    (warning,) = [text for row in rows for text in row.warnings]
    assert not rows[0].warnings and rows[1].warnings  # 12 rollouts are too few, 24 are not
    assert "\\boxed" in warning and "data.prompt_suffix" in warning and "verifier.answers=any" in warning
    again = RunCounters()
    again.resume(counters.state())
    assert again.summary()["warnings"] == [warning]
    old = {name: value for name, value in counters.state().items() if name not in ("alarms", "available", "present")}
    again = RunCounters()
    again.resume(old)  # of 0.4.0
    assert again.tokens == counters.tokens and not again.busy


def test_one_answer_is_enough():
    def one(receipt):
        return {**silent(receipt), "answers": ("3",) + ("",) * (receipt.rows - 1)}

    assert not any(row.warnings for row in tallied(steps=4, receipts={"verdicts": one})[1])


def test_a_step_of_nothing_but_cut_off_responses_is_an_alarm():
    _, rows = tallied(steps=2, receipts={"rollouts": lambda r: {"truncated": r.rows}})
    (warning,) = [text for row in rows for text in row.warnings]
    assert "rollout.max_new_tokens=256" in warning and "eos_token_id" in warning


@pytest.mark.parametrize("passes", [True, False])
def test_groups_that_are_all_alike_train_nothing(passes):
    still = {"metrics": {"grad_norm": 0.0}}
    counters, rows = tallied(steps=4, passes=lambda request: passes, **still)
    assert all(row.rollouts == {"taken": 12, "trained": 0} for row in rows)
    assert rows[-1].dropped == {"no_gradient": 48} == counters.summary()["dropped"]
    (warning,) = [text for row in rows for text in row.warnings]
    assert rows[2].warnings and "the last 3 steps moved no weight" in warning
    assert f"are right ({100 * passes} %)" in warning and "samples_per_prompt" in warning


def test_missing_scores_stale_rollouts_and_abstentions():
    refused = {"rollouts": 0, "tokens": 0, "dropped": {"teacher_refused": 12}}
    _, rows = tallied(steps=2, **refused)
    assert [len(row.warnings) for row in rows] == [1, 0] and "no rollout got a score" in rows[0].warnings[0]

    def abstains(receipt):
        return {**silent(receipt), "abstained": (True,) * receipt.rows, "errors": {"timeout": receipt.rows}}

    _, rows = tallied(steps=2, receipts={"verdicts": abstains})
    assert [len(row.warnings) for row in rows] == [1, 0] and "abstained on 12 of 12" in rows[0].warnings[0]
    assert "timeout 12" in rows[0].warnings[0] and rows[0].abstained == 12 and rows[0].pass_rate is None

    def at_fault(receipt):
        faults = {"timeout": 1, "too_large": receipt.rows - 1}
        return {**silent(receipt), "answers": ("7",) * receipt.rows, "faults": faults}

    counters, rows = tallied(steps=2, receipts={"verdicts": at_fault})
    shards = rows[0].response_faults["timeout"]
    (warning,) = [text for row in rows for text in row.warnings]
    assert "12 of 12 responses" in warning and f"too_large {12 - shards}, timeout {shards}" in warning
    assert rows[0].response_faults == rows[1].response_faults == {"timeout": shards, "too_large": 12 - shards}
    assert (rows[0].abstained, rows[0].pass_rate) == (0, 0.0)
    again = RunCounters()
    again.resume(counters.state())
    expected = {"timeout": 2 * shards, "too_large": 24 - 2 * shards}
    assert counters.summary()["response_faults"] == again.summary()["response_faults"] == expected
    again.resume({name: value for name, value in counters.state().items() if name != "response_faults"})  # of 0.5.0
    assert again.summary()["response_faults"] == {}

    flow, taken = asyncio.run(run(World(fresh_rng()), plain, 1))
    row = step_row(fresh_rng(), 1, learner={"grad_norm": 1.0}, response_faults={})
    alarms = Alarms()
    said = [alarms.step(flow.config, row, taken[0], {"stale": 5}) for _ in range(2)]
    assert "dropped 5 rollouts" in said[0][0] and "max_staleness=0" in said[0][0] and said[1] == []
    assert Alarms(**asdict(alarms)) == alarms


def test_an_evaluation_raises_them_too():
    flow, _ = asyncio.run(run(World(fresh_rng()), plain, 1))
    counters = RunCounters()
    row = replace(eval_row(fresh_rng(), 0), answered_share=0.0, truncated_share=1.0)
    said = counters.eval_row(flow.config, row).warnings
    assert len(said) == 2 and "no response holds an answer" in said[0] and "eval.max_new_tokens=256" in said[1]
    assert counters.eval_row(flow.config, row).warnings == [] and counters.summary()["warnings"] == said


def test_the_busy_share_is_of_the_time_watched_and_never_above_1():
    class Clock:
        at = 0.0

        def __call__(self):
            return self.at

    class Pool:
        name, replicas = "rollout", [1, 2]

    clock = Clock()
    pool, watch = Pool(), Watch(clock)
    pool.busy = BusyTime(range(2), clock)
    watch.begin([pool])
    pool.busy.sent(0, "a")
    clock.at = 10
    seen = watch.take()  # a call under way counts in the step in which it runs
    assert (seen.seconds, seen.busy, seen.available) == (10, {"rollout": 10}, {"rollout": 20})
    clock.at = 14
    watch.pause()  # an evaluation
    clock.at = 114
    watch.begin([pool])
    clock.at = 120
    pool.busy.done(0, "a", seconds=120, ended=120)
    clock.at = 122
    seen = watch.take()
    assert (seen.seconds, seen.busy, seen.available) == (12, {"rollout": 10}, {"rollout": 24})


def test_an_alarm_has_a_kind():
    counters, rows = tallied(steps=4, receipts={"verdicts": silent})
    (warning,) = [text for row in rows for text in row.warnings]
    others = {
        "another text": OTHER,
        "entropy guard: it fell": "entropy",
        "no guard: x": OTHER,
        "rollback 1 of": "rollback",
    }
    assert {text: counters.kind_of(text) for text in others} == others and counters.kind_of(warning) == "no_answer"


def test_every_kind_is_counted_from_its_first():
    """Prometheus sees no increase of a counter that was not there before."""

    class Seen(Alarms):
        def _new(self, found):
            kinds.update(found)
            return []

    kinds: set[str] = set()
    tree = {"method": "opd", "output_dir": "x", "steps": 1, "prompts_per_step": 1, "data": {"path": "d"}}
    config = parse_config({**tree, "student": {"model": "s"}, "teacher": {"model": "t"}})
    Seen().step(config, step_row(fresh_rng(), 1), [], {})
    Seen().eval(config, eval_row(fresh_rng(), 1))
    assert kinds and kinds | set(get_args(GuardName)) | {"rollback"} == set(KNOWN_ALARMS)
