"""Several golds of one row: a response passes where it equals any; where it abstains, and what the processes see."""

import numpy as np
import pytest

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.protocols import Judgement, Response
from tutorloop.contracts.records import Prompt, Rollout, Verdict
from tutorloop.contracts.verifier_config import Reward, Verifier
from tutorloop.verifier_service.any_gold import AnyGoldVerifier
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.verifiers import make_verifier
from tutorloop.verifier_service.worker import VerifierWorker

CASES = [  # kind, the response's answer, golds, passed, the answer that is told, error class
    ("exact", "b", ("a", "b"), True, "b", ""),
    ("exact", "c", ("a", "b"), False, "c", ""),
    ("numeric", "0.50", ("7", "1/2"), True, "1/2", ""),
    ("numeric", "8", ("7", "none"), False, "8", ""),
    ("numeric", "7", ("none", "7"), True, "7", ""),
    ("numeric", "7", ("none", "nor this"), False, "", "gold_not_numeric"),
    ("math", "7", ("8", "7"), True, "7", ""),
    ("math", "9", ("8", "7"), False, "9", ""),
    ("math", "\\frac{\\sqrt{4}}{4}", ("8", "\\sin(x)", "0.5"), True, "1/2", ""),  # needs sympy
    ("math", "x + y", ("z", "y + x"), True, "y+x", ""),
    ("math", "9^{9^{9^{9}}}", ("7", "8"), False, "9^{9^{9^{9}}}", "too_large"),
    ("math", "7", ("9^{9^{9^{9}}}", "x+1"), False, "7", ""),
    ("math", "1, 2", ("7", "\\{1, 2\\}"), True, "\\{1,2\\}", ""),
]


@pytest.fixture(scope="module")
def pools():
    made = {
        kind: VerifierPool(make_verifier(Verifier(kind=kind)), timeout_seconds=60.0)
        for kind in ("exact", "numeric", "math")
    }
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize(("kind", "answer", "golds", "passed", "told", "error"), CASES)
def test_any_gold_passes(pools, kind, answer, golds, passed, told, error):
    """In either order of the golds, and judged in this process the same as in one that can be killed."""
    for ordered in (golds, golds[::-1]):
        response = Response(f"so \\boxed{{{answer}}}", ordered[0], other_golds=ordered[1:])
        (outcome,) = pools[kind].judge([response])
        judgement = outcome.judgement
        assert (judgement.passed, judgement.error_class) == (passed, error)
        assert judgement.answer == told or not passed
        assert make_verifier(Verifier(kind=kind))(response) == judgement


def test_one_gold_is_judged_as_ever(pools):
    one = make_verifier(Verifier())
    for answer, gold in (("7", "7"), ("x+1", "1+x"), ("8", "7"), ("7", " ")):
        response = Response(f"\\boxed{{{answer}}}", gold)
        assert one.prepare(response) == one.one.prepare(response)
    (outcome,) = pools["math"].judge([Response("\\boxed{7}", " ")])
    assert outcome.judgement.error_class == "no_gold"
    (outcome,) = pools["math"].judge([Response("\\boxed{7}", "8", other_golds=(" ", "7"))])
    assert outcome.judgement.passed


class Odd:
    """Compares as its gold says."""

    needs_gold, waits, harmless = True, False, ""

    def prepare(self, response):
        if response.gold == "raises here":
            raise KeyError(response.gold)
        return response if response.gold.endswith("there") else Judgement(response.gold == "right", response.gold)

    def __call__(self, response):
        if response.gold == "raises there":
            raise ValueError
        return Judgement(response.gold == "right there", response.gold)


@pytest.mark.parametrize(
    ("golds", "decided_here", "passed", "answer", "error"),
    [
        (("wrong", "right"), True, True, "right", ""),
        (("raises here", "right"), True, True, "right", ""),
        (("raises here", "wrong"), True, False, "wrong", ""),
        (("raises here", "raises here"), True, False, "", "KeyError"),
        (("wrong there", "right"), True, True, "right", ""),
        (("raises there", "right there"), False, True, "right there", ""),
        (("raises there", "wrong"), False, False, "wrong", ""),
        (("raises there", "raises here"), False, False, "", "ValueError"),
        (("wrong", "wrong there"), False, False, "wrong", ""),
    ],
)
def test_what_one_gold_cannot_decide_the_others_may(golds, decided_here, passed, answer, error):
    verifier, response = AnyGoldVerifier(Odd()), Response("", golds[0], other_golds=golds[1:])
    prepared = verifier.prepare(response)
    assert isinstance(prepared, Judgement) == decided_here and (decided_here or prepared == response)
    for judgement in [verifier(response), *([prepared] if decided_here else [])]:
        assert (judgement.passed, judgement.answer, judgement.error_class) == (passed, answer, error)


def test_with_rewards_and_through_the_worker():
    """The worker reads the other golds from the prompts."""

    def rollout(number, text, prompt):
        return Rollout(
            rollout_id=f"r{number}",
            prompt_id=prompt,
            group_id="g",
            sample_index=0,
            token_ids=np.arange(3, dtype=np.int32),
            prompt_length=2,
            text=text,
            logprobs=np.zeros(1, np.float32),
            loss_mask=np.ones(1, bool),
            answer="1/2",
        )

    ids = np.arange(2, dtype=np.int32)
    prompts = [Prompt(prompt_id="one", text="?", token_ids=ids, answer="1/2")]
    prompts += [Prompt(prompt_id="many", text="?", token_ids=ids, answer="1/2", other_answers=("x+1", "3"))]
    texts = ["\\boxed{1 + x}", "\\boxed{3}", "\\boxed{0.5}", "\\boxed{4}"]
    rollouts = [rollout(i, text, "many") for i, text in enumerate(texts)] + [rollout(4, "\\boxed{3}", "one")]
    format_part = (Reward(kind="format", weight=1, pattern=".*"),)
    for rewards, bonus in ((), 0.0), (format_part, 1.0):
        worker = VerifierWorker(config=Verifier(rewards=rewards, timeout_seconds=60.0))
        verdicts = decode(Verdict, worker.judge(encode(Rollout, rollouts), encode(Prompt, prompts))[0])
        worker.close()
        assert [v.passed for v in verdicts] == [True, True, True, False, False]
        assert [v.score for v in verdicts] == [1 + bonus] * 3 + [bonus] * 2


def test_a_function_gets_the_first_gold_or_its_own_column(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def f(completions, answer, **columns):\n    return [float(answer == [['1', '2']])]\n")
    function = make_verifier(Verifier(kind=f"{own}:f"))
    golds = {"gold": "1", "other_golds": ("2",)}
    assert function(Response("x", row='{"answer": ["1", "2"]}', **golds)).score == 1.0
    assert function(Response("x", row='{"other": 1}', **golds)).score == 0.0


def test_the_box_of_a_solution_is_a_gold():
    judged = make_verifier(Verifier()).prepare(Response("\\boxed{7}", "It is $\\boxed{7}$."))
    assert isinstance(judged, Judgement) and judged.passed and judged.answer == "7"
