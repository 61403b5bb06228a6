"""What crosses a process: random records come back as they went in, in place, and misaligned ones cannot be made."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import RecordError
from tutorloop.contracts.records import Prompt, Rollout, TeacherScores, TokenCredit, Verdict, seed_of

KINDS = (Prompt, Rollout, TeacherScores, TokenCredit, Verdict)


def random_text(random):
    letters = list("aé7\u2028\n\\{}𝔸 ")
    return "".join(random.choice(letters, random.integers(0, 12)))


def random_ids(random, *shape):
    return random.integers(0, 2**31 - 1, shape, dtype=np.int32)


def random_rollout(random, number, responses=6, support=3):
    prompt, rows = int(random.integers(1, 5)), int(random.integers(0, responses))
    return Rollout(
        rollout_id=f"r{number}",
        prompt_id=random_text(random),
        group_id=random_text(random),
        sample_index=number,
        token_ids=random_ids(random, prompt + rows),
        prompt_length=prompt,
        text=random_text(random),
        logprobs=-random.random(rows, np.float32),
        loss_mask=random.random(rows) < 0.5,
        topk_ids=random_ids(random, rows, support) if rows and random.random() < 0.5 else np.zeros((0, 0), np.int32),
        weight_versions=random_ids(random, rows) if random.random() < 0.5 else np.zeros(0, np.int32),
        finish_reason="stop" if rows else "error",
        answer=random_text(random),
        teacher=random_text(random),
        source=str(random.choice(["student", "teacher", "dataset"])),
        context=random_text(random),
    )


def random_scores(random, number, dtype=np.float32):
    if random.random() < 0.3:
        return TeacherScores(rollout_id=f"r{number}", teacher_id="t", error_class="too_long")
    rows, support = int(random.integers(1, 6)), int(random.integers(1, 4))
    hidden = random.integers(0, 2**16, (rows, 4)).astype(dtype)
    return TeacherScores(
        rollout_id=f"r{number}",
        teacher_id=random_text(random),
        teacher_version=int(random.integers(0, 2**60)),
        context=random_text(random),
        entropy=random.random(rows, np.float32) if random.random() < 0.5 else np.zeros(0, np.float32),
        logprobs=-random.random(rows, np.float32),
        topk_ids=random_ids(random, rows, support),
        topk_logprobs=-random.random((rows, support), np.float32),
        hidden=hidden if random.random() < 0.7 else np.zeros((0, 0), dtype),
    )


def random_prompt(random, number):
    ids = random_ids(random, random.integers(0, 5))
    return Prompt(
        prompt_id=f"p{number}",
        text=random_text(random),
        token_ids=ids,
        answer=random_text(random),
        solution=random_text(random),
        solution_ids=random_ids(random, random.integers(0, 5)),
        tags=random_text(random),
        teacher=random_text(random),
    )


def random_verdict(random, number):
    passed, path = bool(random.random() < 0.5), random_text(random)
    return Verdict(rollout_id=f"r{number}", score=random.random(), passed=passed, answer="½", path=path)


def random_credit(random, number):
    if random.random() < 0.3:
        return TokenCredit(rollout_id=f"r{number}", service="s", error_class="timeout")
    values = random.normal(size=random.integers(0, 6)).astype(np.float32)
    return TokenCredit(rollout_id=f"r{number}", service=random_text(random), values=values)


MAKERS = dict(zip(KINDS, (random_prompt, random_rollout, random_scores, random_credit, random_verdict), strict=True))


def assert_same(left, right):
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray) and a.size:
            assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b), field.name
        elif isinstance(a, np.ndarray):
            assert b.size == 0, field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("kind", KINDS)
def test_random_records_come_back_as_they_were(kind):
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for count in (0, 1, 17):
        records = [MAKERS[kind](random, i) for i in range(count)]
        batch = encode(kind, records)
        assert batch.schema.equals(kind.SCHEMA) and batch.num_rows == count
        for record, back in zip(records, decode(kind, batch), strict=True):
            assert_same(record, back)


def test_chosen_rows_and_slices_and_ipc_read_alike():
    random = np.random.default_rng(1)
    records = [random_rollout(random, i) for i in range(12)]
    batch = encode(Rollout, records)
    for back, i in zip(decode(Rollout, batch, [7, 0, 7]), (7, 0, 7), strict=True):
        assert_same(records[i], back)
    for back, record in zip(decode(Rollout, batch.slice(3, 5)), records[3:8], strict=True):
        assert_same(record, back)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    read = pa.ipc.open_stream(sink.getvalue()).read_next_batch()
    for back, record in zip(decode(Rollout, read), records, strict=True):
        assert_same(record, back)


def test_decoded_arrays_lie_in_the_batch_and_are_read_only():
    random = np.random.default_rng(2)
    batch = encode(Rollout, [replace(random_rollout(random, 0), finish_reason="stop") for _ in range(4)])
    buffers = [batch.column(name).values.buffers()[1] for name in ("token_ids", "logprobs", "topk_ids")]
    for record in decode(Rollout, batch):
        for name, buffer in zip(("token_ids", "logprobs", "topk_ids"), buffers, strict=True):
            array = getattr(record, name)
            at = array.__array_interface__["data"][0]
            if array.size:
                assert buffer.address <= at < buffer.address + buffer.size, name
                assert not array.flags.writeable, name


def test_hidden_states_keep_their_bits_and_one_dtype_a_batch():
    random = np.random.default_rng(3)
    bits = random.integers(0, 2**16, (5, 3)).astype(np.uint16)
    score = TeacherScores(rollout_id="r", teacher_id="t", logprobs=np.zeros(5, np.float32), hidden=bits)
    refused = TeacherScores(rollout_id="q", teacher_id="t", error_class="empty")
    back = decode(TeacherScores, encode(TeacherScores, [refused, score]))
    assert back[0].error_class == "empty" and not back[0].hidden.size
    assert back[1].hidden.dtype == np.uint16 and np.array_equal(back[1].hidden, bits)
    with pytest.raises(RecordError, match="share a dtype"):
        encode(TeacherScores, [score, replace(score, hidden=bits.astype(np.float32))])


@pytest.mark.parametrize("name", ["logprobs", "loss_mask", "topk_ids"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_rollout_off_by_one_token_cannot_be_made(name, change):
    rows = 4
    good = Rollout(
        rollout_id="r",
        prompt_id="p",
        group_id="g",
        sample_index=0,
        token_ids=np.arange(7, dtype=np.int32),
        prompt_length=3,
        text="",
        logprobs=np.zeros(rows, np.float32),
        loss_mask=np.ones(rows, bool),
        topk_ids=np.zeros((rows, 2), np.int32),
    )
    array = getattr(good, name)
    with pytest.raises(RecordError, match=name):
        replace(good, **{name: np.resize(array, (rows + change, *array.shape[1:]))})
    for length in (0, 8):
        with pytest.raises(RecordError, match="prompt"):
            replace(good, prompt_length=length)


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprobs", "entropy", "hidden"])
def test_scores_off_by_one_token_cannot_be_made(name):
    good = TeacherScores(
        rollout_id="r",
        teacher_id="t",
        logprobs=np.zeros(4, np.float32),
        topk_ids=np.zeros((4, 2), np.int32),
        topk_logprobs=np.zeros((4, 2), np.float32),
        entropy=np.zeros(4, np.float32),
        hidden=np.zeros((4, 3), np.float32),
    )
    with pytest.raises(RecordError, match=name):
        replace(good, **{name: getattr(good, name)[:-1]})
    with pytest.raises(RecordError, match="one shape"):
        replace(good, topk_ids=np.zeros((4, 3), np.int32))


def test_a_batch_of_another_kind_is_refused():
    with pytest.raises(RecordError, match="schema"):
        decode(Rollout, encode(Verdict, []))


def test_seeds_differ_by_every_part_and_fit_63_bits():
    seeds = {seed_of(run, prompt, sample) for run in range(4) for prompt in ("a", "b", "1") for sample in range(4)}
    assert len(seeds) == 48 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("a", "b") != seed_of("ab") and seed_of(1, 2) == seed_of(1, 2)
