"""The worker: a verdict for every rollout and a receipt over them; the verifiers by kind."""

import json
import threading

import cloudpickle
import numpy as np
import pytest
from misbehaving import cheer, describe
from pydantic import ValidationError

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ConfigError, VerifierError
from tutorloop.contracts.records import Prompt, Rollout, Verdict
from tutorloop.contracts.verifier_config import Reward, Verifier
from tutorloop.verifier_service.paths import reasoning_path
from tutorloop.verifier_service.verifiers import make_verifier
from tutorloop.verifier_service.worker import VerifierWorker

SCORE, CHEER = "misbehaving:describe", "misbehaving:cheer"
FUNCTIONS = {SCORE: cloudpickle.dumps(describe), CHEER: cloudpickle.dumps(cheer)}


def rollout(number, text, gold, prompt="p", tokens=1, reason="stop"):
    return Rollout(
        rollout_id=f"r{number}",
        prompt_id=prompt,
        group_id="g",
        sample_index=0,
        token_ids=np.arange(2 + tokens, dtype=np.int32),
        prompt_length=2,
        text=text,
        logprobs=np.zeros(tokens, np.float32),
        loss_mask=np.ones(tokens, bool),
        finish_reason=reason,
        answer=gold,
    )


def prompt(name, row):
    ids = np.arange(2, dtype=np.int32)
    return Prompt(prompt_id=name, text="What is it?", token_ids=ids, answer="", row=json.dumps(row))


def judged(config, rollouts, prompts=None, **arguments):
    worker = VerifierWorker(config=config, **arguments)
    try:
        batch, receipt = worker.judge(encode(Rollout, rollouts), prompts and encode(Prompt, prompts))
    finally:
        worker.close()
    return decode(Verdict, batch), receipt


def test_a_verdict_and_a_receipt_for_every_row():
    texts = ["so \\boxed{\\frac{1}{2}}", "\\boxed{y+x+1}", "\\boxed{3}", "\\boxed{3}", ""]
    golds = ["0.5", "x+1+y", "4", "", "4"]
    rollouts = [rollout(i, *case) for i, case in enumerate(zip(texts, golds, strict=True))]
    verdicts, receipt = judged(Verifier(timeout_seconds=60), rollouts)
    assert [v.rollout_id for v in verdicts] == [f"r{i}" for i in range(5)]
    assert [v.passed for v in verdicts] == list(receipt.passed) == [True, True, False, False, False]
    assert [v.score for v in verdicts] == list(receipt.rewards) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [v.abstained for v in verdicts] == list(receipt.abstained) == [False, False, False, True, False]
    assert [v.answer for v in verdicts] == list(receipt.answers)
    assert (receipt.answers[0], receipt.answers[2:]) == ("1/2", ("3", "", ""))
    assert receipt.paths == tuple(v.path for v in verdicts) == tuple(map(reasoning_path, texts))
    assert receipt.paths[2] == receipt.paths[3] != receipt.paths[0] and receipt.paths[4] == ""
    assert receipt.errors == {"no_gold": 1} and receipt.parts == {}
    assert (receipt.rows, receipt.tokens) == (5, 0) and receipt.seconds > 0


def test_the_verifier_is_given_the_prompt_and_its_row():
    prompts = [prompt("easy", {"level": 2}), prompt("hard", {"level": 8}), prompt("endless", {"level": 9})]
    rollouts = [
        rollout(0, "it is blue", "blue", "hard"),
        rollout(1, "it is blue", "blue", "easy"),
        rollout(2, "it is red", "blue", "easy"),
        rollout(3, "it is blue", "blue", "endless"),
        rollout(4, "it is blue", "blue", "unknown"),
    ]
    config = Verifier(kind=SCORE, pass_score=0.5, timeout_seconds=2)
    verdicts, receipt = judged(config, rollouts, prompts, functions=FUNCTIONS)
    assert [v.score for v in verdicts] == pytest.approx([0.8, 0.2, 0.0, 0.0, 0.0])
    assert [v.passed for v in verdicts] == [True, False, False, False, False]
    assert [v.error_class for v in verdicts] == ["", "", "no_reward", "timeout", "TypeError"]
    assert receipt.errors == {"no_reward": 1, "timeout": 1, "TypeError": 1}


def test_a_reward_of_parts_sums_them_and_says_each():
    config = Verifier(
        timeout_seconds=60,
        weight=2.0,
        rewards=(
            Reward(kind="length", weight=0.5, limit=10, buffer=4),
            Reward(kind=CHEER, weight=0.1),
        ),
    )
    rollouts = [
        rollout(0, "\\boxed{4}", "4", tokens=6),
        rollout(1, "\\boxed{4}!!", "4", tokens=8),
        rollout(2, "\\boxed{5}!", "4", tokens=12),
        rollout(3, "\\boxed{5}!", "", tokens=12),
    ]
    verdicts, receipt = judged(config, rollouts, functions=FUNCTIONS)
    assert [v.score for v in verdicts] == pytest.approx([2.0, 2.0 - 0.25 + 0.2, -0.5 + 0.1, 0.0])
    assert [v.passed for v in verdicts] == [True, True, False, False]
    assert receipt.parts == pytest.approx({"length": -1.5, "cheer": 3.0})


def test_a_shard_with_poison_does_not_hold_up_the_next():
    worker = VerifierWorker(config=Verifier(kind=SCORE, timeout_seconds=60), functions=FUNCTIONS)
    prompts = encode(Prompt, [prompt("easy", {"level": 2}), prompt("endless", {"level": 9})])
    poison = [rollout(i, f"it is blue {i}", "blue", "endless") for i in range(4)]

    def judge_poison():
        with pytest.raises(VerifierError, match="closed"):
            worker.judge(encode(Rollout, poison), prompts)
        refused.append(True)

    refused: list[bool] = []
    thread = threading.Thread(target=judge_poison)
    thread.start()
    fine = [rollout(i, f"it is blue {i}", "blue", "easy") for i in range(4)]
    for _ in range(3):
        _, receipt = worker.judge(encode(Rollout, fine), prompts)
        assert receipt.rewards == (0.2,) * 4
    worker.close()
    thread.join()
    assert refused  # it was still at the poison


def test_an_empty_batch_has_an_empty_receipt():
    verdicts, receipt = judged(Verifier(), [])
    assert verdicts == [] and receipt.rows == 0 and receipt.rewards == ()


def test_verifiers_by_kind():
    for kind, name in [("math", "MathVerifier"), ("exact", "ExactVerifier"), ("numeric", "NumericVerifier")]:
        assert type(make_verifier(Verifier(kind=kind)).one).__name__ == name
    assert type(make_verifier(Verifier(kind="http", urls=("http://localhost:1",)))).__name__ == "HttpVerifier"
    assert type(make_verifier(Verifier(kind=SCORE), FUNCTIONS)).__name__ == "FunctionVerifier"
    assert type(make_verifier(Verifier(weight=0.5))).__name__ == "CompositeVerifier"
    with pytest.raises(ConfigError, match="no_such_module"):
        make_verifier(Verifier(kind="no_such_module:reward"))
    with pytest.raises(ConfigError, match="known: math, exact, numeric"):
        make_verifier(Verifier(kind="none"))
    with pytest.raises(ValidationError, match="math, exact, numeric"):
        Verifier(kind="maths")
