"""One row in, three records out: JSON lines, TensorBoard events, and what a Prometheus server scrapes over HTTP."""

import json
import math
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import asdict

import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_rows import eval_row, fresh_rng, step_row
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import tutorloop
from tutorloop.cluster.recording.metrics import MetricsLog, read_rows
from tutorloop.contracts.errors import ConfigError, RunFolderError


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path, "127.0.0.1", 0, "opd → grpo")
    yield log
    log.close()


def scrape(log):
    """(name, labels as sorted pairs) → value."""
    with urllib.request.urlopen(log.url, timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert all(family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def events(folder):
    """(tag, step) → value, in the order written."""
    found = {}
    for file in sorted(folder.glob("tensorboard/*tfevents*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag, event.step] = value.tensor.float_val[0]
    return found


def test_a_scrape_shows_the_last_step(log):
    rng = fresh_rng()
    rows = [step_row(rng, step) for step in (1, 2, 3)]
    for row in rows:
        log.log_step(row)
    evaluation = eval_row(rng, 3, "out_of_distribution", "teacher")
    log.log_eval(evaluation)
    seen, last = scrape(log), rows[-1]

    def value(name, **labels):
        return seen[f"tutorloop_{name}", tuple(sorted(labels.items()))]

    expected = {
        "step": last.step,
        "weight_version": last.step,
        "step_last_seconds": last.seconds["total"],
        "step_seconds_count": 3,
        "sampler_entropy_nats": last.sampler_entropy,
        "run_seconds": last.wall_seconds,
        "loss": last.loss,
        "reward": last.reward,
        "pass_ratio": last.pass_rate,
        "response_length_tokens": last.response_length,
        "truncated_ratio": last.truncated_share,
        "staleness_mean_versions": last.staleness_mean,
        "staleness_max_versions": last.staleness_max,
        "reverse_kl_nats": last.learner["reverse_kl"],
        "entropy_nats": last.learner["entropy"],
        "grad_norm": last.learner["grad_norm"],
        "learning_rate": last.learner["learning_rate"],
        "abstained_total": sum(row.abstained for row in rows),
        "score_cache_hits_total": sum(row.score_cache["hits"] for row in rows),
        "score_cache_misses_total": sum(row.score_cache["misses"] for row in rows),
        "score_cache_read_bytes_total": sum(row.score_cache["bytes_read"] for row in rows),
        "score_cache_written_bytes_total": sum(row.score_cache["bytes_written"] for row in rows),
        "nonfinite_values_total": 0,
    }
    assert {name: value(name) for name in expected} == pytest.approx(expected)
    assert value("response_faults_total", reason="too_large") == sum(row.response_faults["too_large"] for row in rows)
    assert value("learner_metric", metric="importance_weight") == last.learner["importance_weight"]
    for name, pool in last.pools.items():
        assert value("pool_tokens_per_second", pool=name) == pool.tokens_per_second
        assert value("pool_busy_ratio", pool=name) == pool.busy_fraction
        assert value("pool_queue_depth", pool=name) == pool.queue_depth
        busy = sum(row.pools[name].busy_seconds for row in rows)
        assert value("pool_busy_seconds_total", pool=name) == pytest.approx(busy)
        assert value("pool_replicas", pool=name) == pool.replicas
    for kind, pool in {"generated": "rollout", "scored": "teacher", "trained": "learner"}.items():
        assert value("tokens_total", pool=pool) == sum(row.tokens[kind] for row in rows)
    for stage in last.seconds.keys() - {"total"}:  # which is the sum of the others
        assert value("stage_last_seconds", stage=stage) == last.seconds[stage]
        assert value("stage_seconds_sum", stage=stage) == pytest.approx(sum(row.seconds[stage] for row in rows))
        assert value("stage_seconds_count", stage=stage) == 3
    accuracy = value("accuracy_ratio", split="out_of_distribution", model="teacher")
    assert accuracy == evaluation.stats["avg_at_k"]["value"]
    assert seen["tutorloop_run_info", (("method", "opd → grpo"), ("version", tutorloop.__version__))] == 1
    assert not [labels for _, labels in seen if ("stage", "total") in labels]


def test_before_its_first_event_a_reason_is_0_and_what_was_not_measured_is_not_there(log, tmp_path):
    seen = scrape(log)
    for reason in ("stale", "teacher_refused", "empty_response", "off_policy", "no_gradient"):
        assert seen["tutorloop_dropped_total", (("reason", reason),)] == 0
    unmeasured = ("reward", "pass_rate", "abstained", "sampler_entropy", "staleness_mean", "staleness_max")
    log.log_step(step_row(fresh_rng(), 1, groups={}, reward_parts={}, **dict.fromkeys(unmeasured)))
    names = {name for name, _ in scrape(log)}
    assert "tutorloop_loss" in names
    assert not {n for n in names if n.startswith(("tutorloop_reward", "tutorloop_pass", "tutorloop_stal"))}
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert not row.keys() & set(unmeasured) and "nonfinite" not in row


def test_cumulative_counts_are_not_added_up_again(log):
    rng = fresh_rng()
    for step, (stale, timeouts) in enumerate([(2, 1), (2, 4), (7, 4)], 1):
        log.log_step(step_row(rng, step, dropped={"stale": stale}, failed={"verifier:timeout": timeouts}))
    seen = scrape(log)
    assert seen["tutorloop_dropped_total", (("reason", "stale"),)] == 7
    assert seen["tutorloop_failed_total", (("error", "timeout"), ("pool", "verifier"))] == 4


def test_json_lines_hold_every_row(log, tmp_path):
    rng = fresh_rng()
    step, evaluation = step_row(rng, 1), eval_row(rng, 1)
    log.log_step(step)
    log.log_eval(evaluation)  # read before close: lines are flushed as they come
    expected = [{"kind": "step", **asdict(step)}, {"kind": "eval", **asdict(evaluation)}]
    assert read_rows(tmp_path / "metrics.jsonl") == json.loads(json.dumps(expected))


def test_what_is_not_finite_is_null_named_and_counted(log, tmp_path):
    row = step_row(fresh_rng(), 1, loss=math.nan, learner={"grad_norm": math.inf, "entropy": 0.5})
    log.log_step(row)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line and "Infinity" not in line
    saved = json.loads(line)
    assert saved["loss"] is None and saved["learner"] == {"grad_norm": None, "entropy": 0.5}
    assert saved["nonfinite"] == ["learner/grad_norm", "loss"]
    assert scrape(log)["tutorloop_nonfinite_values_total", ()] == 2
    log.close()
    assert ("loss", 1) not in events(tmp_path) and ("reward", 1) in events(tmp_path)


def test_tensorboard_holds_the_figures(log, tmp_path):
    rng = fresh_rng()
    rows, evaluation = [step_row(rng, step) for step in (1, 2)], eval_row(rng, 2)
    for row in rows:
        log.log_step(row)
    log.log_eval(evaluation)
    log.close()
    seen = events(tmp_path)
    for row in rows:
        assert seen["loss", row.step] == pytest.approx(row.loss, rel=1e-6)
        assert seen["learner/reverse_kl", row.step] == pytest.approx(row.learner["reverse_kl"], rel=1e-6)
        expected = row.pools["rollout"].busy_fraction
        assert seen["pools/rollout/busy_fraction", row.step] == pytest.approx(expected, rel=1e-6)
    expected = evaluation.stats["maj_at_k"]["low"]
    assert seen["eval/in_distribution/student/maj_at_k/low", 2] == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    rng = fresh_rng()
    log = MetricsLog(tmp_path, "127.0.0.1", 0)
    log.log_eval(eval_row(rng, 0))
    for step in range(1, 5):
        log.log_step(step_row(rng, step))
        log.log_eval(eval_row(rng, step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # the crash cut a line

    log = MetricsLog(tmp_path, "127.0.0.1", 0)
    log.truncate_after(2)  # two steps are done: they stand, and what was evaluated after the second
    kept = [(row["kind"], row["step"]) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert kept == [("eval", 0), ("step", 1), ("eval", 1), ("step", 2), ("eval", 2)]
    again = step_row(rng, 3)
    log.log_step(again)
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["loss"] == again.loss
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # TensorBoard's own reader
    tag = "eval/in_distribution/student/avg_at_k/value"
    assert [event.step for event in shown.Scalars(tag)] == [0, 1, 2]
    losses = {event.step: event.value for event in shown.Scalars("loss")}
    assert list(losses) == [1, 2, 3] and losses[3] == pytest.approx(again.loss, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 0}\nnot json\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2"):
        read_rows(path)
    path.write_text('{"kind": "step"}\n')
    with pytest.raises(RunFolderError, match="kind and a step"):
        read_rows(path)
    assert read_rows(tmp_path / "none.jsonl") == []


def test_close_frees_the_port_and_may_be_repeated(tmp_path):
    log = MetricsLog(tmp_path, "127.0.0.1", 0)
    port = int(log.url.rsplit(":", 1)[1].split("/")[0])
    scrape(log)
    log.close()
    log.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(log.url, timeout=2)
    again = MetricsLog(tmp_path, "127.0.0.1", port)  # the same port, at once
    again.close()


def test_a_port_that_is_taken_is_the_users_to_mend(tmp_path):
    folder = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"metrics\.port"):
        MetricsLog(folder, "127.0.0.1", taken.getsockname()[1])
    assert not folder.exists()


def test_two_runs_in_one_process_do_not_mix(tmp_path):
    rng = fresh_rng()
    logs = [MetricsLog(tmp_path / name, "127.0.0.1", 0) for name in "ab"]
    for log, loss in zip(logs, (1.0, 2.0), strict=True):
        log.log_step(step_row(rng, 1, loss=loss))
    assert [scrape(log)["tutorloop_loss", ()] for log in logs] == [1.0, 2.0]
    for log in logs:
        log.close()


def test_reading_rows_loads_neither_torch_nor_ray(tmp_path):
    watched = ("torch", "ray", "tensorboardX")
    code = f"import sys, tutorloop.cluster.recording.report; print([m for m in {watched} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_rows_of_0_4_0_count_their_steps_as_ours_do(tmp_path):
    rows = [{"kind": "step", "step": step, "version": step + 1} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with closing(MetricsLog(tmp_path, "127.0.0.1", 0)) as log:
        log.truncate_after(2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
