"""Verdicts that others made, through the killable pool: what agrees, and each disagreement by its name and reason."""

import json
import os
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tutorloop.contracts.protocols import Response
from tutorloop.verifier_service.math import MathVerifier
from tutorloop.verifier_service.numeric import NumericVerifier
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.quantities import read_quantity

DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
POLICY = {"policy_specific", "nondefault_config", "multilingual", "multiple_choice", "answer_tag", "conflicting_labels"}
PATIENT = 60.0  # seconds a sample: a busy machine must not make honest rows time out

# Disagreements, and why they stay.
NOT_REDUCED = {"verdict-0307": "its author wants 2/4 reduced; here equal is equal"}
BOX_FIRST = {"verdict-0166": "its box holds an intermediate result; here the last box decides, not the words after it"}
EMPTY_GOLD = {"verdict-0418": "its gold is an empty box: no verdict, where its author has incorrect"}
MISLABELLED = {"qwen-rmmaj-072-7": "its label says that 10000 is not 10{,}000"}


def shared(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; TUTORLOOP_SHARED_DATA names the folder")
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def judged():
    """Judges rows; equal verifiers share their processes, which start slowly."""
    pools = {}

    def judge(verifier, rows):
        pool = pools.setdefault(pickle.dumps(verifier), VerifierPool(verifier, timeout_seconds=PATIENT))
        responses = [Response(row.get("as_response") or row["prediction"], row["gold"]) for row in rows]
        return [outcome.judgement for outcome in pool.judge(responses)]

    yield judge
    for pool in pools.values():
        pool.close()


def disagreements(rows, judgements):
    pairs = zip(rows, judgements, strict=True)
    return {row["id"] for row, judged in pairs if judged.error_class or judged.passed != row["expected"]}


def test_grader_pairs_of_other_projects(judged):
    rows = [
        row
        for row in shared("verdicts/grader_test_pairs.jsonl")
        if row["expected"] is not None and not POLICY & set(row["tags"])
    ]
    known = NOT_REDUCED | BOX_FIRST | EMPTY_GOLD
    wrong = disagreements(rows, judged(MathVerifier("any"), rows))
    assert len(rows) >= 150 and wrong <= set(known), wrong
    assert len(wrong) <= 0.02 * len(rows)


def test_real_boxed_responses(judged):
    rows = shared("verdicts/qwen_math_cot_responses.jsonl")
    wrong = disagreements(rows, judged(MathVerifier(), rows))
    assert len(rows) == 432 and wrong == set(MISLABELLED), wrong


@pytest.mark.parametrize("kind", [MathVerifier, NumericVerifier])
def test_real_responses_with_a_marker(kind, judged):
    rows = shared("verdicts/gsm8k_model_solutions.jsonl")
    assert not disagreements(rows, judged(kind(marker="A:"), rows))


@pytest.mark.parametrize("answers", ["box", "any"])
def test_adversarial_inputs_always_return_and_never_pass(answers, judged):
    rows = shared("verdicts/adversarial.jsonl")
    judgements = judged(MathVerifier(answers), rows)
    pairs = list(zip(rows, judgements, strict=True))
    passed = [row["id"] for row, judgement in pairs if judgement.passed and row["expected"] is False]
    failed = [row["id"] for row, judgement in pairs if not judgement.passed and row["expected"] and answers == "any"]
    assert not passed and not failed, (passed, failed)
    reasons = Counter((judgement.error_class, judgement.fault) for judgement in judgements if judgement.error_class)
    assert set(reasons) == {("too_large", True)}, reasons


def test_gold_answers_of_gsm8k_verify_themselves_and_not_their_neighbours():
    golds = [row["answer"] for row in shared("problems/gsm8k_train.jsonl")]
    numbers = {gold: read_quantity(gold, gold=True) for gold in golds}
    assert all(numbers.values())
    for verifier in (MathVerifier(), NumericVerifier()):
        own = [verifier.prepare(Response(f"so \\boxed{{{gold}}}", gold)) for gold in golds]
        assert all(judgement.passed for judgement in own)
        for gold, other in pairwise(golds):
            judgement = verifier.prepare(Response(f"so \\boxed{{{other}}}", gold))
            assert judgement.passed == (numbers[gold] == numbers[other])


def test_gold_answers_of_math_verify_themselves_and_not_their_neighbours(judged):
    golds = list(dict.fromkeys(row["answer"] for row in shared("problems/math500_public.jsonl")))
    assert all(MathVerifier().prepare(Response(f"\\boxed{{{gold}}}", gold)).passed for gold in golds)
    rows = [{"prediction": f"\\boxed{{{other}}}", "gold": gold} for gold, other in pairwise(golds)]
    judgements = judged(MathVerifier(), rows)
    assert not [row for row, judgement in zip(rows, judgements, strict=True) if judgement.passed]
    assert not any(judgement.error_class for judgement in judgements)
