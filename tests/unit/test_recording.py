"""rollouts.jsonl: what stands in a line, which rollouts are chosen, what a resume forgets, what the report shows."""

import json
import math

import numpy as np
import pytest
from hostile_texts import STEERS, TEXTS
from run_rows import fresh_rng, step_row

from tutorloop.cluster.recording.metrics import MetricsLog
from tutorloop.cluster.recording.progress import excerpt, sample_facts
from tutorloop.cluster.recording.report import write_report
from tutorloop.cluster.recording.samples import (
    ROLLOUTS_FILE,
    lines_of,
    newest_sample,
    shown_samples,
    truncate_samples,
    whole_groups,
)
from tutorloop.contracts.arrow import encode
from tutorloop.contracts.records import Prompt, Rollout, Verdict

TURNS = [{"role": "system", "content": "be brief"}]


def batches(rng, texts, **changes):
    """Prompts, rollouts and verdicts in the object store's form, a prompt a rollout; and the rollouts."""
    prompts, rollouts, verdicts = [], [], []
    for i, text in enumerate(texts):
        size, length = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        ids = rng.integers(0, 2**17, size=length + size).astype(np.int32)
        asked = {"turns": json.dumps(TURNS), "answer": "7", "other_answers": ("seven",)} if i % 2 else {"answer": ""}
        prompts.append(Prompt(prompt_id=f"p{i}", text=f"problem {text}", token_ids=ids[:length], **asked))
        values = {
            "rollout_id": f"r{i}",
            "prompt_id": f"p{i}",
            "group_id": f"g{i}",
            "sample_index": i,
            "token_ids": ids,
            "prompt_length": length,
            "text": text,
            "logprobs": -rng.random(size).astype(np.float32),
            "loss_mask": np.ones(size, bool),
            "weight_versions": rng.integers(3, 9, size=size).astype(np.int32),
        }
        rollouts.append(Rollout(**{**values, **changes}))
        verdicts.append(Verdict(rollout_id=f"r{i}", score=0.5 * i, passed=i % 2 == 1, answer=text[:9]))
    return encode(Prompt, prompts), encode(Rollout, rollouts), encode(Verdict, verdicts), rollouts


def test_a_line_holds_the_rollout_and_what_became_of_it():
    rng = fresh_rng()
    prompts, rollouts, verdicts, records = batches(rng, ["a", "b\n", "c", "d"])
    chosen = [1, 3, 0]
    known = {"kind": "train", "step": 5, "trained": False, "dropped": "zero_variance"}
    lines = lines_of([(i, i, known) for i in chosen], prompts, rollouts, verdicts).splitlines()
    for i, line in zip(chosen, map(json.loads, lines), strict=True):
        record = records[i]
        assert {key: line[key] for key in known} == known and list(line)[:2] == ["kind", "step"]
        assert (line["rollout_id"], line["group_id"], line["source"]) == (f"r{i}", f"g{i}", "student")
        assert line["prompt"] == f"problem {record.text}" and line["response"] == record.text
        assert line["golds"] == (["7", "seven"] if i % 2 else []) and line.get("turns", []) == TURNS * (i % 2)
        assert line["token_ids"] == record.token_ids.tolist() and line["prompt_length"] == record.prompt_length
        assert np.array(line["logprobs"], np.float32).tolist() == record.logprobs.tolist()  # bit for bit
        assert line["weight_versions"] == [record.weight_versions.min(), record.weight_versions.max()]
        assert (line["passed"], line["reward"], line["answer"]) == (i % 2 == 1, 0.5 * i, record.text[:9])
        assert "error_class" not in line and line["abstained"] is False


def test_what_was_not_measured_has_no_key():
    rng = fresh_rng()
    given = {"source": "dataset", "weight_versions": np.zeros(0, np.int32)}
    prompts, rollouts, _, _ = batches(rng, ["solution"], **given)
    line = json.loads(lines_of([(0, 0, {"kind": "train", "step": 1})], prompts, rollouts, None))
    assert not line.keys() & {"passed", "reward", "answer", "abstained", "logprobs", "weight_versions", "turns"}


def test_what_is_not_finite_is_null_and_an_abstention_says_why():
    rng = fresh_rng()
    bad = {"logprobs": np.array([math.nan, -math.inf], np.float32), "loss_mask": np.ones(2, bool)}
    own = {"token_ids": np.arange(3, dtype=np.int32), "prompt_length": 1, "weight_versions": np.zeros(2, np.int32)}
    prompts, rollouts, _, _ = batches(rng, ["x"], **bad, **own)
    verdicts = encode(Verdict, [Verdict(rollout_id="r0", score=0, passed=False, abstained=True, error_class="timeout")])
    line = json.loads(lines_of([(0, 0, {"kind": "train", "step": 1})], prompts, rollouts, verdicts))
    assert line["logprobs"] == [None, None] and (line["abstained"], line["error_class"]) == (True, "timeout")


@pytest.mark.parametrize(
    ("sizes", "most", "chosen"), [([4, 4, 4], 8, 2), ([3, 3, 3], 8, 2), ([16, 16], 8, 1), ([1] * 20, 8, 8), ([], 8, 0)]
)
def test_whole_groups_are_chosen_and_never_by_luck(sizes, most, chosen):
    groups = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    assert whole_groups(groups, most) == {str(i) for i in range(chosen)}


def written(folder, rng, texts, steps, kind="train", **known):
    prompts, rollouts, verdicts, _ = batches(rng, texts)
    with (folder / ROLLOUTS_FILE).open("a", encoding="utf-8") as file:
        for step in steps:
            rows = [(i, i, {"kind": kind, "step": step, **known}) for i in range(len(texts))]
            file.write(lines_of(rows, prompts, rollouts, verdicts))


def test_a_resumed_run_forgets_what_it_writes_again(tmp_path):
    rng = fresh_rng()
    written(tmp_path, rng, ["a", "b"], (1, 2, 3, 4))
    path = tmp_path / ROLLOUTS_FILE
    before = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "cut')
    truncate_samples(tmp_path, 3)
    assert path.read_text() == "".join(before[:6])
    truncate_samples(tmp_path, 0)
    assert path.read_text() == ""
    path.unlink()
    truncate_samples(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_the_newest_that_passed_and_failed_and_one_of_an_evaluation_are_shown(tmp_path):
    rng = fresh_rng()
    assert shown_samples(tmp_path) == []
    written(tmp_path, rng, ["a", "b"], range(1, 30))
    written(tmp_path, rng, ["e"], [29], "eval", model="student")
    passed, failed, evaluated = shown_samples(tmp_path)
    assert (passed["step"], passed["passed"], failed["step"], failed["passed"]) == (29, True, 29, False)
    assert (evaluated["kind"], evaluated["response"]) == ("eval", "e")
    written(tmp_path, rng, ["t"], [29], "eval", model="teacher")
    assert shown_samples(tmp_path)[-1]["source"] == "teacher"
    assert "student · did not pass · answer e" in sample_facts(evaluated)
    text = (tmp_path / ROLLOUTS_FILE).read_text()
    assert newest_sample(text) == shown_samples(tmp_path)[-1] and newest_sample("") is None


def test_long_lines_are_read_from_the_end_whole(tmp_path):
    rng = fresh_rng()
    written(tmp_path, rng, ["x" * 400_000, "y" * 400_000], (1, 2))
    assert {line["response"][0] for line in shown_samples(tmp_path)} == {"x", "y"}
    assert excerpt("x" * 400_000, 100) == f"{'x' * 50} … 399,900 characters … {'x' * 50}"


def test_hostile_text_is_a_line_of_its_own_and_escaped_in_the_report(tmp_path):
    rng = fresh_rng()
    log = MetricsLog(tmp_path, "127.0.0.1", 0)
    log.log_step(step_row(rng, 1))
    log.close()
    for i in range(0, len(TEXTS), 3):
        shown = [
            TEXTS[j % len(TEXTS)] for j in range(i, i + 3)
        ]  # the page shows one that passed, one not, and one of an eval
        (tmp_path / ROLLOUTS_FILE).unlink(missing_ok=True)
        written(tmp_path, rng, shown[:2], [1])
        written(tmp_path, rng, shown[2:], [1], "eval")
        lines = (tmp_path / ROLLOUTS_FILE).read_bytes().splitlines()
        assert len(lines) == 3 and all(line.isascii() for line in lines)
        assert [json.loads(line)["response"] for line in lines] == shown
        page = write_report(tmp_path).read_text(encoding="utf-8")
        assert page.count("<pre class='said'") == 3 and "What the model wrote" in page and not STEERS.search(page)
        assert "<script" not in page and "onerror=alert(1)>" not in page
        assert len(page) < 2**20
