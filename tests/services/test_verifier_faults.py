"""Who is at fault where a sample cannot be judged: the response is incorrect with its reason, the gold abstains."""

import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import cloudpickle
import numpy as np
import pytest
from misbehaving import PATIENCE, Behaving, Blaming, Disturbing, Raising, half

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import VerifierError
from tutorloop.contracts.protocols import Response
from tutorloop.contracts.records import Rollout, Verdict
from tutorloop.contracts.verifier_config import Reward, Verifier
from tutorloop.verifier_service.any_gold import AnyGoldVerifier
from tutorloop.verifier_service.composite import CompositeVerifier
from tutorloop.verifier_service.function_verifier import FunctionVerifier
from tutorloop.verifier_service.math import MathVerifier
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.verifiers import make_verifier
from tutorloop.verifier_service.worker import VerifierWorker


@pytest.fixture
def pool():
    pool = VerifierPool(Blaming(), timeout_seconds=0.4, memory_gib=0.25)
    yield pool
    pool.close()


def found(outcomes):
    return [(outcome.judgement.error_class, outcome.judgement.fault) for outcome in outcomes]


FAILURES = {
    "hang": "timeout",
    "leave": "crash",
    "fail": "LookupError",
    "allocate 1000": "memory",
    "depart": "SystemExit",
}


def test_what_the_response_does_is_its_fault_and_what_the_gold_does_is_not(pool):
    of_response = pool.judge([Response(what, "fine") for what in FAILURES])
    assert found(of_response) == [(reason, True) for reason in FAILURES.values()]
    of_gold = pool.judge([Response("fine", what) for what in FAILURES])
    assert found(of_gold) == [(f"gold_{reason}", False) for reason in FAILURES.values()]
    early = pool.judge([Response("fine", "raise early")])
    assert found(early) == [("gold_LookupError", False)]
    assert found(pool.judge([Response("fine", "fine")])) == [("", False)]


def test_what_is_known_is_not_run_again(pool):
    rows = [Response("hang", "fine"), Response("fine", "hang 2"), Response("leave 3", "fine")]
    first = found(pool.judge(rows))
    pool.close()
    assert found(pool.judge(rows)) == first == [("timeout", True), ("gold_timeout", False), ("crash", True)]
    assert pool._processes is None


def test_a_gold_is_tried_once_for_a_group(pool, tmp_path):
    """Every run of `count` leaves a mark: two for each response that fails, and one for the gold."""
    path = tmp_path / "runs"
    outcomes = pool.judge([Response(f"fail {i}", "count", row=str(path)) for i in range(6)])
    assert found(outcomes) == [("LookupError", True)] * 6
    assert len(path.read_text()) == 6 * 2 + 1


def test_functions_and_servers_are_never_the_responses_fault():
    pool = VerifierPool(Behaving(), timeout_seconds=0.4, memory_gib=0.25)
    outcomes = pool.judge([Response("text", what) for what in ("fail", "leave", "hang")])
    pool.close()
    assert found(outcomes) == [("LookupError", False), ("crash", False), ("timeout", False)]
    assert make_verifier(Verifier(kind="http", urls=("http://127.0.0.1:1",))).harmless == ""
    rewards = (Reward(kind="format", weight=0.1),)
    for kind in ("math", "numeric", "exact"):
        for verifier in (make_verifier(Verifier(kind=kind)), make_verifier(Verifier(kind=kind, rewards=rewards))):
            assert verifier.harmless == "\\boxed{1}"
        assert make_verifier(Verifier(kind=kind, marker="A:")).harmless == "A: 1"


def test_the_budget_is_of_cpu_time(pool):
    """Three times its budget asleep is no failure; as much of a CPU is."""
    outcomes = pool.judge([Response("nap 1200", "fine"), Response("burn 3000", "fine"), Response("burn 100", "fine")])
    assert found(outcomes) == [("", False), ("timeout", True), ("", False)]


def test_what_sleeps_for_ever_ends_by_the_clock_on_the_wall():
    pool = VerifierPool(Blaming(), timeout_seconds=0.1, memory_gib=0.25)
    start = time.monotonic()
    outcomes = pool.judge([Response(f"nap {PATIENCE * 1000:.0f}", "fine")])
    pool.close()
    assert found(outcomes) == [("timeout", True)]
    assert 2 * 1.0 <= time.monotonic() - start < PATIENCE


def test_faults_hold_nobody_up_and_are_tried_again_one_by_one(pool):
    futures = [pool.submit(Response(f"hang {i}", "fine")) for i in range(5)]
    assert found(pool.judge([Response(f"fine {i}", "fine") for i in range(50)])) == [("", False)] * 50
    assert found(future.result() for future in futures) == [("timeout", True)] * 5
    assert not pool._in_flight


def test_what_is_tried_again_is_alone_in_a_new_process(pool, tmp_path):
    """Four that hang, and each again: no second run begins while another second one runs, or in a process that judged.
    First runs that begin later may go on beside it."""
    path, rows = tmp_path / "runs", [Response(f"mark {i}", "fine") for i in range(4)]
    assert found(pool.judge([replace(row, row=str(path)) for row in rows])) == [("timeout", True)] * 4
    runs = [line.rsplit(" ", 2) for line in path.read_text().splitlines()]
    first = {text: float(at) for text, _, at in reversed(runs)}
    second = sorted(float(at) for text, _, at in runs if float(at) > first[text])
    assert len(runs) == 8 and len(second) == 4
    assert all(later - earlier >= 0.4 for earlier, later in pairwise(second))  # a budget of CPU time lies between
    assert len({pid for _, pid, _ in runs}) == 8


def test_closing_refuses_what_waits_to_be_tried_again_and_starts_nothing(pool):
    futures = [pool.submit(Response(f"hang {i}", "fine")) for i in range(4)]
    processes, deadline = pool._processes, time.monotonic() + PATIENCE
    while len(processes._alone) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pool._lock:  # as `close` does it, and what a retry finds in between
        pool._processes = None
    while len(processes._alone) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert pool._processes is None
    processes.close()
    assert pool._processes is None
    for future in futures:
        with pytest.raises(VerifierError, match="closed"):
            future.result(timeout=PATIENCE)
    assert not pool._in_flight
    assert found(pool.judge([Response("fine", "fine")])) == [("", False)]


def test_a_process_is_as_new_for_each_sample():
    pytest.importorskip("mpmath")
    pool = VerifierPool(Disturbing(), processes=1)
    answers = {pool.judge([Response(f"disturb {i}", "fine")])[0].judgement.answer for i in range(4)}
    pool.close()
    assert len(answers) == 1 and next(iter(answers)).startswith("(53, 28, ")


def test_order_and_number_of_processes_change_no_verdict():
    rows = [Response(text, gold) for text in ("fine", *FAILURES) for gold in ("fine", "fail", "leave")]
    random, verdicts = np.random.default_rng(), []
    for processes in (1, 3):
        pool = VerifierPool(Blaming(), timeout_seconds=0.3, memory_gib=0.25, processes=processes)
        order = random.permutation(len(rows))
        outcomes = dict(zip(order.tolist(), found(pool.judge([rows[i] for i in order])), strict=True))
        verdicts.append([outcomes[i] for i in range(len(rows))])
        pool.close()
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        ("fine", ("hang", "fine"), (True, "", False)),  # each is judged alone once all of them failed together
        ("fine", ("leave", "hang"), (False, "gold_crash", False)),
        ("fine", ("raise early", "raise early"), (False, "gold_LookupError", False)),
        ("hang", ("hang", "fine"), (False, "timeout", True)),
    ],
)
def test_a_gold_that_hangs_hides_no_other(text, golds, expected):
    pool = VerifierPool(AnyGoldVerifier(Blaming()), timeout_seconds=0.3, memory_gib=0.25)
    (outcome,) = pool.judge([Response(text, golds[0], other_golds=golds[1:])])
    pool.close()
    judgement = outcome.judgement
    assert (judgement.passed, judgement.error_class, judgement.fault) == expected


def test_beside_a_reward_function_a_response_is_at_fault_for_the_verifier_alone():
    """And has the parts of its reward: hanging spares it no penalty."""
    function = FunctionVerifier(cloudpickle.dumps(half), 0.0)
    parts = [(Reward(kind="own:half", weight=1.0), function), (Reward(kind="length", weight=1.0, limit=5), None)]
    pool = VerifierPool(CompositeVerifier(Blaming(), 1.0, parts), timeout_seconds=0.3, memory_gib=0.25)
    texts = ("hang", "fail", "leave", "nap", "burn 1", "fine")
    outcomes = pool.judge([Response(text, "fine", tokens=9) for text in texts])
    of_gold = pool.judge([Response("fine", "hang", tokens=9)])
    pool.close()
    ours = [("half:LookupError", False), ("timeout", False)]
    assert found(outcomes) == [("timeout", True), ("LookupError", True), ("crash", True), *ours, ("", False)]
    assert [outcome.judgement.score for outcome in outcomes] == [-0.5] * 3 + [0.0] * 2 + [0.5]
    assert found(of_gold) == [("gold_timeout", False)]


@pytest.mark.parametrize(
    ("text", "golds", "expected"),
    [
        ("a", ("bad", "a"), (True, "", False)),
        ("a", ("bad", "b"), (False, "", False)),
        ("bad", ("a", "b"), (False, "LookupError", True)),
        ("bad", ("bad", "b"), (False, "LookupError", True)),
        ("a", ("bad", "bad"), (False, "gold_LookupError", False)),
    ],
)
def test_of_several_golds_one_that_can_be_compared_is_enough(text, golds, expected):
    pool = VerifierPool(AnyGoldVerifier(Raising()), timeout_seconds=PATIENCE)
    (outcome,) = pool.judge([Response(text, golds[0], other_golds=golds[1:])])
    pool.close()
    judgement = outcome.judgement
    assert (judgement.passed, judgement.error_class, judgement.fault) == expected


def rollout(number, text, gold):
    return Rollout(
        rollout_id=f"r{number}",
        prompt_id="p",
        group_id="g",
        sample_index=0,
        token_ids=np.arange(3, dtype=np.int32),
        prompt_length=2,
        text=text,
        logprobs=np.zeros(1, np.float32),
        loss_mask=np.ones(1, bool),
        finish_reason="stop",
        answer=gold,
    )


@pytest.mark.parametrize("response_fault", ["incorrect", "abstain"])
def test_the_recipe_says_what_a_fault_is(response_fault):
    worker = VerifierWorker(config=Verifier(response_fault=response_fault, timeout_seconds=PATIENCE))
    tower = "9^{9^{9^9}}"
    rows = [("\\boxed{4}", "4"), (f"\\boxed{{{tower}}}", "4"), ("\\boxed{x+1}", tower), ("\\boxed{4}", "")]
    batch, receipt = worker.judge(encode(Rollout, [rollout(i, *row) for i, row in enumerate(rows)]))
    worker.close()
    lenient = response_fault == "abstain"
    assert [one.abstained for one in decode(Verdict, batch)] == [False, lenient, True, True] == list(receipt.abstained)
    assert [one.error_class for one in decode(Verdict, batch)] == ["", "too_large", "gold_too_large", "no_gold"]
    assert receipt.faults == ({} if lenient else {"too_large": 1})
    assert Counter(receipt.errors) == Counter(["gold_too_large", "no_gold", *["too_large"] * lenient])
    assert receipt.rewards == (1.0, 0.0, 0.0, 0.0)


def test_a_fault_has_the_parts_of_its_reward():
    verifier = make_verifier(Verifier(rewards=(Reward(kind="format", weight=0.5),)))
    judged = verifier.prepare(Response("\\boxed{9^{9^{9^9}}}", "4"))
    assert judged == replace(
        judged, score=0.5, parts=(("format", 1.0),), fault=True, error_class="too_large", passed=False
    )


def test_no_neutral_verdict_can_be_had():
    """Of answers that once abstained none does."""
    pool = VerifierPool(MathVerifier(), timeout_seconds=PATIENCE)
    answers = [
        "²",
        "x²",
        "①",
        "\\frac{1}{0}",
        "0=0",
        "0x=0",
        "\\log_{1.0000001}(10^{300})",
        "\\lfloor 10^{1000}\\pi\\rfloor",
    ]
    answers += ["{" * 50, "\\sqrt", "\\frac{}{}", "9" * 3000, "\ud800", "\x00", "\\text{²}", "x_²"]
    outcomes = pool.judge([Response(f"\\boxed{{{answer}}}", "x=5") for answer in answers])
    pool.close()
    abstained = [
        answer for answer, o in zip(answers, outcomes, strict=True) if o.judgement.error_class and not o.judgement.fault
    ]
    assert not abstained and not any(outcome.judgement.passed for outcome in outcomes)
