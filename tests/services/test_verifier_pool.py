"""The pool: a sample that hangs, eats, crashes or lies costs its own process and nobody else's verdict."""

import hashlib
import threading
import time

import numpy as np
import pytest
from misbehaving import PATIENCE, Behaving, Waiting, ask, errors

from tutorloop.contracts.errors import VerifierError
from tutorloop.contracts.protocols import Judgement, Response
from tutorloop.verifier_service.pool import VerifierPool

BUDGET = 0.5  # seconds of a CPU, for what hangs


@pytest.fixture(scope="module")
def pool():
    """For samples that all end."""
    pool = VerifierPool(Behaving(), timeout_seconds=PATIENCE, memory_gib=0.25)
    yield pool
    pool.close()


@pytest.fixture
def strict():
    """For samples that hang."""
    pool = VerifierPool(Behaving(), timeout_seconds=BUDGET, memory_gib=0.25)
    yield pool
    pool.close()


# ---- what becomes of a sample ---------------------------------------------------------------------------------------


def test_every_kind_of_failure_abstains_under_its_name(strict):
    expected = {
        "fine": "",
        "hang": "timeout",
        "leave": "crash",
        "abort": "crash",
        "fail": "LookupError",
        "depart": "SystemExit",
        "recurse": "RecursionError",
        "return_junk": "TypeError",
        "allocate 1000": "memory",
        "raise early": "LookupError",
        "decided": "",
        " ": "no_gold",
        "fine 2": "",
    }
    outcomes = strict.judge(ask(*expected))
    assert errors(outcomes) == list(expected.values())
    assert [o.judgement.passed for o in outcomes] == [not error for error in expected.values()]
    assert BUDGET <= outcomes[1].seconds < PATIENCE / 2


def test_a_death_with_the_memory_full_is_of_memory(pool):
    assert errors(pool.judge(ask("die_full 230", "die_full 20"))) == ["memory", "crash"]


def test_the_memory_budget_is_each_samples_own(pool):
    assert errors(pool.judge(ask(*["allocate 180"] * 4, *[f"allocate {n}" for n in (181, 300, 182)]))) == [
        *[""] * 5,
        "memory",
        "",
    ]


def test_a_process_that_grows_is_replaced(pool):
    pids = [pool.judge(ask(f"leak {140 + i}"))[0].judgement.answer for i in range(3)]
    assert len(set(pids)) == 3


def test_judgements_arrive_as_they_were(pool):
    (odd, much) = pool.judge(ask("return_odd", "return_much"))
    assert odd.judgement == Judgement(True, "7", 0.5, "", (("style", 0.25),))
    assert 1000 < len(much.judgement.answer) < 10**5


def test_text_arrives_as_it_was(pool):
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    texts = ["", "\x00\n\r\u2028\ud800\x1b[31m", "{problem} %s \\", '"' * 9]
    texts += ["".join(map(chr, random.integers(0, 0x11000, size))) for size in (1, 100, 3_000_000)]
    outcomes = pool.judge([Response(text, "digest") for text in texts])
    for text, outcome in zip(texts, outcomes, strict=True):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        assert outcome.judgement == Judgement(True, digest)


def test_what_a_process_says_out_of_turn_is_no_verdict(strict):
    kinds = ("reply_junk", "reply_for_ever", "hang_up", "fine")
    assert errors(strict.judge(ask(*kinds))) == ["crash", "crash", "crash", ""]


def test_nothing_is_printed(pool, capfd):
    assert errors(pool.judge(ask("print", text="\x1b[31m"))) == [""]
    assert capfd.readouterr() == ("", "")


# ---- quarantine -----------------------------------------------------------------------------------------------------


def test_what_was_killed_twice_is_not_run_again(strict):
    golds = ["hang", "leave", "allocate 1000", "fail", "fine"]
    twice = ["timeout", "crash", "memory", "LookupError", ""]
    assert errors(strict.judge(ask(*golds))) == errors(strict.judge(ask(*golds))) == twice
    strict.close()
    assert errors(strict.judge(ask(*golds[:3]))) == twice[:3] and strict._processes is None
    assert errors(strict.judge(ask("leave", text="other"))) == ["crash"]


def test_the_quarantine_is_bounded(strict, monkeypatch):
    monkeypatch.setattr("tutorloop.verifier_service.pool.OFFENDERS", 2)
    for _ in range(2):
        strict.judge(ask("leave 1", "leave 2", "leave 3"))
    assert len(strict._known) == 2


def test_equal_samples_in_flight_run_once(pool, tmp_path):
    path = tmp_path / "runs"
    outcomes = pool.judge([Response("text", "count", row=str(path))] * 8)
    assert errors(outcomes) == [""] * 8 and path.read_text() == "."
    pool.judge([Response("text", "count", row=str(path))])
    assert path.read_text() == ".."


# ---- side by side ---------------------------------------------------------------------------------------------------


def test_the_order_is_kept_and_threads_do_not_mix(pool):
    def judge(thread):
        random = np.random.default_rng(thread)
        responses = [Response(f"{thread}-{i}", f"sleep {random.integers(0, 20)}") for i in range(60)]
        answers[thread] = [outcome.judgement.answer for outcome in pool.judge(responses)]

    answers = {}
    threads = [threading.Thread(target=judge, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {thread: [f"{thread}-{i}" for i in range(60)] for thread in range(4)}


def test_poison_in_every_slot_holds_nobody_up():
    pool = VerifierPool(Behaving(), timeout_seconds=PATIENCE, processes=2)
    try:
        poison = [pool.submit(response) for response in ask(*[f"sleep {PATIENCE * 1000:.0f}0{i}" for i in range(8)])]
        assert errors(pool.judge(ask(*[f"fine {i}" for i in range(100)]))) == [""] * 100
        assert not any(future.done() for future in poison)
    finally:
        pool.close()
    for future in poison:
        with pytest.raises(VerifierError, match="closed"):
            future.result()


def test_more_poison_than_there_is_room_for_ends_too(strict):
    futures = [strict.submit(one) for one in ask(*[f"hang {i}" for i in range(12)], *[f"fine {i}" for i in range(20)])]
    most = 0
    while not all(future.done() for future in futures):
        most = max(most, len(strict._processes._all))
        time.sleep(0.01)
    assert errors(future.result() for future in futures) == ["timeout"] * 12 + [""] * 20
    assert 2 <= most <= 2 + 2 * 4 + 1


def test_verifiers_that_wait_have_many_slots(tmp_path):
    pool = VerifierPool(Waiting(), timeout_seconds=PATIENCE)
    outcomes = pool.judge([Response(str(i), "meet 16", row=str(tmp_path)) for i in range(16)])
    pool.close()
    assert errors(outcomes) == [""] * 16
