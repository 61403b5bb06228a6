"""Verifiers of others' code: reasoning-gym's scores, functions with TRL's signature; and rewards of several parts."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.protocols import Judgement, Response
from tutorloop.contracts.verifier_config import Reward
from tutorloop.contracts.verifier_config import Verifier as Config
from tutorloop.verifier_service.composite import CompositeVerifier, one_box, overlong, part_names
from tutorloop.verifier_service.function_verifier import FunctionVerifier, load_function
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.reasoning_gym_verifier import ReasoningGymVerifier
from tutorloop.verifier_service.verifiers import make_verifier

PATIENT = 60.0  # seconds, for what ends


def fresh_random():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def judge(verifier, response):
    """As the pool does it, in this process."""
    prepared = verifier.prepare(response)
    return prepared if isinstance(prepared, Judgement) else verifier(prepared)


# ---- reasoning-gym ---------------------------------------------------------------------------------------------------

GENERATORS = ("basic_arithmetic", "leg_counting", "bitwise_arithmetic", "complex_arithmetic", "number_sorting")
GENERATORS += ("countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication")
GENERATORS += ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")


@pytest.fixture(scope="module")
def entries():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    seed = int(fresh_random().integers(2**31))
    entries = {name: reasoning_gym.create_dataset(name, seed=seed, size=2)[1] for name in GENERATORS}
    solved = reasoning_gym.create_dataset("intermediate_integration", seed=seed, size=40)
    entries["intermediate_integration"] = next(entry for entry in solved if "Integral" not in entry["answer"])
    return entries


def gym(answers="any", marker="", pass_score=1.0):
    return ReasoningGymVerifier(pass_score, answers, marker)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_dataset_s_own_answer_has_its_own_score(name, entries):
    import reasoning_gym

    entry = entries[name]
    direct = reasoning_gym.get_score_answer_fn(name)
    for answer in (entry["answer"], f"{entry['answer']}1", "0", "[[0]]"):
        judged = judge(gym(), Response(text=f"so <answer>{answer}</answer>", row=json.dumps(entry)))
        assert judged == Judgement(judged.passed, answer, direct(answer=answer, entry=entry))
        assert judged.passed == (judged.score >= 1)
    assert judge(gym(), Response(text=f"<answer>{entry['answer']}</answer>", row=json.dumps(entry))).passed


def test_a_problem_written_down_again_is_no_answer():
    """A generator that cannot solve its integral gives it back, and its scorer is content with that."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    metadata = {"source_dataset": "intermediate_integration", "integrand": "2*x*sin(x)", "variable": "x"}
    entry = {"question": "", "answer": "2*Integral(x*sin(x), x) + C", "metadata": metadata}
    direct = reasoning_gym.get_score_answer_fn("intermediate_integration")
    for answer, own, passed in (
        (entry["answer"], 1.0, False),
        ("2*sin(x) - 2*x*cos(x) + C", 1.0, True),
        ("x", 0.0, False),
    ):
        assert direct(answer=answer, entry=entry) == own
        judged = judge(gym(), Response(text=f"<answer>{answer}</answer>", row=json.dumps(entry)))
        assert judged == Judgement(passed, answer, float(passed))


def test_where_its_answer_stands(entries):
    entry = entries["basic_arithmetic"]
    gold = entry["answer"]
    rows = [json.dumps(entry), json.dumps({**entry, "metadata": json.dumps(entry["metadata"])})]
    for row in rows:
        for text in (f"\\boxed{{{gold}}}", f"<think>1</think>\\boxed{{{gold}}}", f"<answer> {gold} </answer>"):
            assert judge(gym("box"), Response(text=text, row=row)).passed, text
        assert judge(gym("box", "A:"), Response(text=f"A: 0\nA: {gold}\n", row=row)).passed
        assert judge(gym("any"), Response(text=f" {gold}\n", row=row)).passed
        for text in (gold, "", f"\\boxed{{{gold}", f"\\boxed{{{gold}}} \\boxed{{}}", "<answer></answer>"):
            assert judge(gym("box"), Response(text=text, row=row)) == Judgement(False), text


def test_a_part_of_a_point_passes_from_pass_score_on(entries):
    entry = entries["leg_counting"]
    text = f"<answer>{entry['answer']} or so</answer>"
    score = len(entry["answer"]) / len(f"{entry['answer']} or so")
    judged = judge(gym(), Response(text=text, row=json.dumps(entry)))
    assert not judged.passed and judged.score == pytest.approx(score)
    assert judge(gym(pass_score=score), Response(text=text, row=json.dumps(entry))).passed


@pytest.mark.parametrize(
    ("row", "error_class"),
    [
        ("", "no_row"),
        ("{}", "bad_row"),
        ("[1]", "bad_row"),
        ('{"answer": "1", "metadata": "x"}', "bad_row"),
        ('{"answer": "1", "metadata": {"source_dataset": 1}}', "bad_row"),
        ('{"answer": "1", "metadata": {"source_dataset": "no such"}}', "unknown_dataset"),
    ],
)
def test_rows_of_no_generator_abstain(row, error_class):
    pytest.importorskip("reasoning_gym")
    assert judge(gym(), Response(text="<answer>1</answer>", row=row)).error_class == error_class


def test_an_answer_that_hangs_is_killed(entries):
    pool = VerifierPool(gym(), timeout_seconds=1.5)
    row = json.dumps(entries["countdown"])
    outcomes = pool.judge(
        [Response(text=f"<answer>{a}</answer>", row=row) for a in ("9**9**9**9", entries["countdown"]["answer"])]
    )
    pool.close()
    assert outcomes[0].judgement.error_class in ("timeout", "memory") and outcomes[1].judgement.passed


# ---- functions -------------------------------------------------------------------------------------------------------

FILE = '''
"""Rewards of one's own."""
import asyncio
import threading
from dataclasses import dataclass

LOCK = threading.Lock()
FACTOR = 2.0

@dataclass
class Weighted:
    weight: float
    def __call__(self, completions, **columns):
        return [self.weight for _ in completions]

weighted = Weighted(0.25)
number = 3

def helper(text):
    return FACTOR * len(text)

def length(completions, **columns):
    return [helper(text) for text in completions]

def named(prompts, completions, answer, level=None):
    assert len(prompts) == len(completions) == len(answer) == 1
    return [1.0 if (prompts[0], completions[0], answer[0], level) == ("2+2", "4", "four", [7]) else 0.0]

def messages(prompts, completions, **columns):
    assert prompts == [[{"role": "user", "content": "2+2"}]]
    return [float(completions == [[{"role": "assistant", "content": "4"}]])]

def odd(completions, value, **columns):
    kinds = {"none": [None], "nan": [float("nan")], "inf": [float("inf")], "two": [1.0, 1.0], "empty": [],
             "text": ["1"], "number": 1.0, "nothing": None, "bool": [True], "words": "1", "huge": [10**400],
             "list": [[1.0]]}
    if value == ["raise"]:
        raise LookupError("why")
    if value == ["exit"]:
        import os; os._exit(3)
    if value == ["hang"]:
        while True: pass
    return kinds[value[0]]

async def later(completions, **columns):
    return [1.0]

def for_trainers(completions, trainer_state, **columns):
    return [1.0]

def also_for_trainers(completions, trainer_state=None, completion_ids=None):
    return [1.0 if trainer_state is None and completion_ids is None else 0.0]

def of_nothing(prompts):
    return [1.0]

def locked(completions):
    with LOCK:
        return [1.0]
'''


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "my_rewards.py"
    path.write_text(FILE)
    return str(path)


def own(rewards, name, pass_score=1.0):
    return FunctionVerifier(load_function(f"{rewards}:{name}"), pass_score)


def test_a_file_s_function_crosses_by_value(rewards):
    pool = VerifierPool(own(rewards, "length", 4.0), timeout_seconds=PATIENT)
    outcomes = pool.judge([Response(text=text) for text in ("a", "abc", "\\boxed{7}")])
    pool.close()
    assert [o.judgement for o in outcomes] == [
        Judgement(False, "", 2.0),
        Judgement(True, "", 6.0),
        Judgement(True, "7", 18.0),
    ]
    assert judge(own(rewards, "weighted"), Response(text="x")).score == 0.25


def test_a_module_s_function_crosses_by_name(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_module.py").write_text("def one(completions, **columns):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    pickled = load_function("rewards_of_a_module:one")
    assert len(pickled) < 100 and judge(FunctionVerifier(pickled, 1.0), Response(text="t")).passed
    with pytest.raises(ConfigError, match="completions"):
        load_function("posixpath:join")


def test_arguments_are_those_of_trl(rewards):
    row = json.dumps({"level": 7, "prompt": "2+2", "completion": "no", "other": 1})
    response = Response(text="4", prompt="2+2", gold="four", row=row)
    assert judge(own(rewards, "named"), response).passed
    assert not judge(own(rewards, "named"), replace(response, gold="4")).passed
    theirs = replace(response, gold="4", row=json.dumps({"level": 7, "answer": "four"}))
    assert judge(own(rewards, "named"), theirs).passed  # the dataset's own column goes before
    turns = json.dumps({"prompt": [{"role": "user", "content": "2+2"}]})
    assert judge(own(rewards, "messages"), replace(response, row=turns)).passed
    assert judge(own(rewards, "also_for_trainers"), response).passed


@pytest.mark.parametrize("value", ["nan", "inf", "two", "empty", "text", "number", "nothing", "words", "huge", "list"])
def test_what_is_no_reward_abstains(rewards, value):
    judged = judge(own(rewards, "odd"), Response(text="\\boxed{1}", row=json.dumps({"value": value})))
    assert (judged.passed, judged.error_class) == (False, "bad_reward")


def test_what_a_function_may_do_is_its_sample_s_alone(rewards):
    values = ["none", "raise", "exit", "hang", "bool", "hang"]
    pool = VerifierPool(own(rewards, "odd"), timeout_seconds=1.0)
    outcomes = pool.judge([Response(text="t", row=json.dumps({"value": value})) for value in values])
    pool.close()
    assert [o.judgement.error_class for o in outcomes] == [
        "no_reward",
        "LookupError",
        "crash",
        "timeout",
        "",
        "timeout",
    ]
    assert [o.judgement.passed for o in outcomes] == [False] * 4 + [True, False]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("number", "a int"),
        ("absent", "not there"),
        ("later", "later"),
        ("for_trainers", "trainer_state"),
        ("of_nothing", "prompts"),
        ("locked", "lock"),
    ],
)
def test_a_function_that_cannot_be_used_is_told(rewards, name, found):
    with pytest.raises(ConfigError, match=found):
        load_function(f"{rewards}:{name}")


@pytest.mark.parametrize(
    "spec", ["absent.py:f", "no_such_module_:f", ":f", "x.py:", ".relative:f", "a/b:f", "json.no:f"]
)
def test_a_place_that_cannot_be_found_is_told(spec):
    with pytest.raises(ConfigError):
        load_function(spec)


# ---- rewards of several parts ----------------------------------------------------------------------------------------


def test_the_soft_overlong_punishment_is_dapo_s():
    """2503.14476, equation 13, with L_max and L_cache; without a cache it begins at L_max."""
    random = fresh_random()
    for _ in range(500):
        longest = int(random.integers(1, 5000))
        cache, length = int(random.integers(0, longest + 1)), int(random.integers(0, 6000))
        if length >= longest:
            expected = -1.0
        elif length <= longest - cache:
            expected = 0.0
        else:
            expected = ((longest - cache) - length) / cache
        assert overlong(length, longest, cache) == pytest.approx(expected), (length, longest, cache)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("so \\boxed{1}", True),
        ("\\fbox {1}", True),
        ("\\boxed{\\frac{1}{2}}", True),
        ("", False),
        ("1", False),
        ("\\boxed{1} \\boxed{2}", False),
        ("\\boxed{1", False),
        ("\\boxed{}", False),
        ("\\boxed{1} \\boxed{", False),
        ("\\boxed{\\boxed{1}}", False),
    ],
)
def test_the_format_is_exactly_one_complete_box(text, is_one):
    assert one_box(text) == is_one


def test_a_reward_is_the_weighted_sum_of_its_parts(rewards):
    random = fresh_random()
    kinds = ("format", "length", f"{rewards}:length", f"{rewards}:weighted")
    own_scores = {
        "format": lambda r, c: float(r.text.count("\\boxed{") == 1 if not c.pattern else c.pattern in r.text),
        "length": lambda r, c: overlong(r.tokens, c.limit, c.buffer),
        "my_rewards.py:length": lambda r, c: 2.0 * len(r.text),
        "my_rewards.py:weighted": lambda r, c: 0.25,
    }
    for _ in range(30):
        parts = []
        for kind in random.permutation(kinds)[: random.integers(1, 5)]:
            own_keys = {"limit": int(random.integers(50, 99)), "buffer": 40} if kind == "length" else {}
            if kind == "format" and random.random() < 0.5:
                own_keys = {"pattern": ".*so.*"}
            parts.append(Reward(kind=str(kind), weight=float(random.normal()), **own_keys))
        config = Config(kind="exact", weight=float(random.normal()), rewards=tuple(parts))
        verifier = pickle.loads(pickle.dumps(make_verifier(config)))
        box = str(random.choice(["\\boxed{7}", "\\boxed{8}", "7", "\\boxed{7} \\boxed{7}"]))
        response = Response(text=f"so\n{box}", gold="7", tokens=int(random.integers(0, 120)))
        judged = judge(verifier, response)
        main = judge(make_verifier(Config(kind="exact")), response)
        scores = []
        for part in parts:
            plain = part.model_copy(update={"pattern": part.pattern.replace(".*", "")})
            scores.append(own_scores[part.kind.rpartition("/")[2]](response, plain))
        total = config.weight * main.score + sum(p.weight * s for p, s in zip(parts, scores, strict=True))
        assert (judged.passed, judged.answer, judged.error_class) == (main.passed, main.answer, "")
        assert judged.score == pytest.approx(total)
        assert judged.parts == tuple(zip(part_names(parts), map(pytest.approx, scores), strict=True))


def test_parts_that_cannot_hang_need_no_process():
    quick = Config(kind="exact", rewards=(Reward(kind="format", weight=1), Reward(kind="length", weight=1, limit=9)))
    assert isinstance(make_verifier(quick).prepare(Response(text="\\boxed{7}", gold="7")), Judgement)
    slow = Config(kind="exact", rewards=(Reward(kind="format", weight=1, pattern="(a+)+b"),))
    assert isinstance(make_verifier(slow).prepare(Response(text="\\boxed{7}", gold="7")), Response)


def test_names_of_parts_differ(rewards):
    kinds = ["format", "format", "a.py:f", "b.py:f", "m:g"]
    assert part_names([Reward(kind=kind, weight=1) for kind in kinds]) == ["format", "format_2", "f", "f_2", "g"]


def test_a_verifier_or_a_part_that_abstains_abstains_the_whole(rewards):
    main = own(rewards, "length")
    for value, error_class in (("none", "odd:no_reward"), ("nan", "odd:bad_reward"), ("raise", "odd:LookupError")):
        part = (Reward(kind=f"{rewards}:odd", weight=1), own(rewards, "odd"))
        judged = judge(CompositeVerifier(main, 1.0, [part]), Response(text="abc", row=json.dumps({"value": value})))
        assert (judged.passed, judged.score, judged.error_class) == (False, 0.0, error_class)
    part = (Reward(kind="format", weight=1), None)
    judged = judge(CompositeVerifier(own(rewards, "odd"), 1.0, [part]), Response(text="t", row='{"value": "none"}'))
    assert (judged.error_class, judged.parts) == ("no_reward", ())
    assert not CompositeVerifier(main, 1.0, [part]).needs_gold


def test_a_pattern_that_backtracks_is_killed_and_one_that_is_none_is_told():
    config = Config(kind="exact", rewards=(Reward(kind="format", weight=1, pattern="(a+)+b"),))
    pool = VerifierPool(make_verifier(config), timeout_seconds=1.0)
    texts = ["a" * 40, "aab", "\\boxed{7}"]
    judged = [o.judgement for o in pool.judge([Response(text=text, gold="aab") for text in texts])]
    pool.close()
    assert [j.error_class for j in judged] == ["timeout", "", ""]
    assert [dict(j.parts) for j in judged] == [{}, {"format": 1.0}, {"format": 0.0}]
    for pattern in ("(", "a" * 10 + "{99999999999}"):
        with pytest.raises(ConfigError, match="regular expression"):
            make_verifier(Config(kind="exact", rewards=(Reward(kind="format", weight=1, pattern=pattern),)))
