"""An engine from outside the package: a class of one's own, whose capabilities decide what a recipe may ask of it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_cases import TEACHER, config
from ray import cloudpickle
from service_rows import CONTEXT, VOCAB, fresh_random, random_prompts, random_rollouts
from tiny import tiny_qwen3

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster.identity import _own_code, digest_of_code, local_models
from tutorloop.cluster.methods import compose_stages, own_modules
from tutorloop.cluster.pools import services
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.config import Config
from tutorloop.contracts.engines import FAKE, ROLLOUT_ENGINES, TEACHER_ENGINES, RolloutCapabilities, TeacherCapabilities
from tutorloop.contracts.errors import ConfigError, ModelError
from tutorloop.contracts.own_code import package_of
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling, ScoreRequest, TeacherScores
from tutorloop.teacher_service.worker import TeacherWorker

PAGE = (Path(__file__).parents[2] / "docs/engines.md").read_text(encoding="utf-8")
[PLAIN_TEACHER] = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "capabilities" in code]

ROLLOUT = """
from tutorloop.actors.transformers_engine import TransformersEngine
from tutorloop.contracts.engines import RolloutCapabilities
from tutorloop.contracts.errors import ModelError

class Mine(TransformersEngine):
    capabilities = RolloutCapabilities(concurrent_calls=3, weights_while_generating=True)

    def __init__(self, model, *, in_flight="keep", max_running=64, **options):
        super().__init__(model, **options)
        self.asked = in_flight, max_running

    @staticmethod
    def check_model(model, parts):
        if model == "no":
            raise ModelError("a model that Mine runs", model)

    def decode(self, token_ids, thinking):
        from words import LAST
        return super().decode(token_ids, thinking) + LAST
"""
BROADCAST = """
from tutorloop.actors.fake_engine import FakeEngine
from tutorloop.contracts.engines import RolloutCapabilities

class Mine(FakeEngine):
    capabilities = RolloutCapabilities(broadcast=True)
    seen = []

    def join_broadcast(self, *place):
        self.seen.append(place)

    def receive_weights(self, layout, manifest):
        self.seen.append((layout, manifest))
"""
SERVED = """
from types import SimpleNamespace
from tutorloop.contracts.engines import TeacherCapabilities

class Served:
    capabilities = TeacherCapabilities(signals=frozenset({"sampled"}), remote=True)

    def score(self, rollouts, request): ...

    @staticmethod
    def probe(model, urls, timeout_seconds, api_key, tokenizer):
        return SimpleNamespace(context=100, largest_k=0)
"""
URLS = {"urls": ["http://a:8000/v1"]}
PLACE = {"device": "cpu", "threads": 1, "tokens_per_batch": 8192}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> str:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "engines.py").write_text(ROLLOUT)
    (tmp_path / "words.py").write_text("LAST = '!'\n")
    return f"{tmp_path}/engines.py:Mine"


@pytest.fixture
def plain(tmp_path: Path) -> str:
    (tmp_path / "plain_teacher.py").write_text(PLAIN_TEACHER, encoding="utf-8")
    return f"{tmp_path}/plain_teacher.py:PlainTeacher"


def asked(teacher: dict[str, Any], **rollout: Any) -> Config:
    return config("opd", {**TEACHER, "signal": "sampled", **teacher}, rollout=rollout)


# ---- what a recipe may ask of it -------------------------------------------------------------------------------------


def test_a_recipe_names_it_and_uses_what_it_can(mine: str, plain: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = asked({"engine": "plain_teacher.py:PlainTeacher"}, engine="engines.py:Mine", in_flight="wait")
    assert ours.rollout.engine == mine and ours.teacher and ours.teacher.engine == plain
    assert ours.rollout.capabilities.concurrent_calls == 3 and ours.teacher.capabilities.signals == {"sampled"}
    [composition] = compose_stages(ours)
    assert composition.scoring and composition.scoring.signal == "sampled"
    assert {Path(module.__file__ or "").name for module in own_modules(ours)} == {"engines.py", "plain_teacher.py"}
    served = tmp_path / "served.py"
    served.write_text(SERVED)
    remote = asked({"engine": f"{served}:Served", **URLS})
    compose_stages(remote)
    assert remote.teacher and remote.teacher.model == "t" and "teacher.model" not in local_models(remote)


def test_a_recipe_is_read_without_its_code(tmp_path: Path) -> None:
    ours = asked({}, engine=f"{tmp_path}/gone.py:Mine", in_flight="wait")
    with pytest.raises(ConfigError, match=r"gone\.py: no such file"):
        compose_stages(ours)


@pytest.mark.parametrize(
    ("teacher", "rollout", "expected"),
    [
        ({}, {"engine": "MINE", "tensor_parallel": 2}, "rollout.tensor_parallel is for rollout.engine=vllm"),
        ({}, {"engine": "MINE", "transfer": "broadcast"}, "rollout.transfer=broadcast is for rollout.engine=vllm"),
        ({"engine": "PLAIN", "signal": "topk"}, {}, "sends the sampled signal"),
        ({"engine": "PLAIN", "signal": "exact"}, {}, "sends the sampled signal"),
        ({"engine": "PLAIN", "tensor_parallel": 2}, {}, "teacher.tensor_parallel is for teacher.engine=vllm"),
        ({"engine": "PLAIN", "model": "s", "follows": "live"}, {}, "teacher.follows needs weights of our own"),
        ({"engine": "PLAIN", **URLS}, {}, "teacher.urls are given where teacher.engine is http"),
        ({"engine": "PLAIN", "api_key_env": "KEY"}, {}, "teacher.api_key_env is for teacher.engine=http"),
        ({"engine": "MINE"}, {}, "capabilities = TeacherCapabilities(…)"),
    ],
)
def test_what_it_cannot_do_is_refused(teacher: dict, rollout: dict, expected: str, mine: str, plain: str) -> None:
    names = {"MINE": mine, "PLAIN": plain}
    given = [
        {key: names.get(value, value) if key == "engine" else value for key, value in section.items()}
        for section in (teacher, rollout)
    ]
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        compose_stages(asked(given[0], **given[1]))
    assert caught.value.rule and caught.value.found and caught.value.remedy


CAPABLE = "from tutorloop.contracts.engines import *\nclass Mine:\n    capabilities = "
METHODS = "\n    def generate(self): ...\n    def decode(self): ...\n    def load_weights(self): ...\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "engines.py:Mine is not there"),
        ("def Mine(model): ...\n", "engines.py:Mine is a function"),
        ("class Mine: ...\n", "engines.py:Mine states none"),
        (f"{CAPABLE}TeacherCapabilities(signals=frozenset(SIGNALS)){METHODS}", "states a TeacherCapabilities"),
        (f"{CAPABLE}RolloutCapabilities(){METHODS.replace('decode', 'decoded')}", "lacks decode"),
        (f"{CAPABLE}RolloutCapabilities(broadcast=True){METHODS}", "lacks join_broadcast, receive_weights"),
        (f"{CAPABLE}RolloutCapabilities(concurrent_calls=2){METHODS}", "takes new weights while it generates"),
        (f"{CAPABLE}RolloutCapabilities(concurrent_calls=0){METHODS}", "concurrent_calls=0"),
        (f"{CAPABLE}TeacherCapabilities(signals=frozenset({{'top'}}))", "are some of sampled, topk, given, hidden"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError"),
    ],
)
def test_what_is_no_engine_is_told(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "engines.py").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        compose_stages(asked({}, engine=f"{tmp_path}/engines.py:Mine"))


def test_a_name_that_is_none_is_told_as_the_recipe_is_read() -> None:
    for section, told in (("rollout", "transformers, vllm, MODULE"), ("teacher", "transformers, vllm, http, MODULE")):
        for name in ("vlm", FAKE, "engines.py"):
            with pytest.raises(ConfigError, match=rf"{section}\.engine is {told}.* \(found '{name}'\)"):
                asked({"engine": name}) if section == "teacher" else asked({}, engine=name)


def test_it_can_be_a_module_and_is_what_a_resumed_run_must_find(mine: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "engines.py").rename(tmp_path / "engines_for_test.py")
    monkeypatch.syspath_prepend(tmp_path)
    ours = asked({}, engine="engines_for_test:Mine")
    compose_stages(ours)
    assert _own_code(ours) == ["engines_for_test"] and digest_of_code("engines_for_test")


# ---- what it is given, and what it does ------------------------------------------------------------------------------


def test_its_capabilities_decide_what_it_is_given(mine: str, plain: str, monkeypatch) -> None:
    monkeypatch.setattr(services, "Pool", lambda *_, **arguments: arguments)
    monkeypatch.setattr(services, "threads_of", lambda *_: 1)
    ours = asked({"engine": plain}, engine=mine, in_flight="wait", batch_size=5)
    [composition] = compose_stages(ours)
    backend: Any = None
    given: Any = services.stage_generators(ours, composition, backend)["student"]
    assert given["concurrent_calls"] == 3 and (given["in_flight"], given["max_running"]) == ("wait", 5)
    assert given["engine"] is ROLLOUT_ENGINES.class_of(mine) and "tensor_parallel" not in given
    taught: Any = services.stage_teachers(ours, composition, given, {}, backend)["teacher"]
    assert taught["engine"] is TEACHER_ENGINES.class_of(plain) and "hidden" not in taught
    vllm = asked({"engine": "vllm"}, engine="vllm", tensor_parallel=2)
    given = services.stage_generators(vllm, composition, backend)["student"]
    assert (given["engine"], given["concurrent_calls"], given["tensor_parallel"]) == ("vllm", 4, 2)
    assert not services.stage_teachers(vllm, composition, given, {}, backend)["teacher"]["hidden"]


def test_it_refuses_models_before_anything_starts(mine: str) -> None:
    ROLLOUT_ENGINES.check_model(mine, "yes", 1)
    with pytest.raises(ModelError, match="a model that Mine runs"):
        ROLLOUT_ENGINES.check_model(mine, "no", 1)


def test_a_rollout_worker_runs_it(mine: str, qwen3: str) -> None:
    random = fresh_random()
    prompts = [
        Prompt(prompt_id=str(i), text="", token_ids=ids, answer="")
        for i, ids in enumerate(random_prompts(random, [3, 9]))
    ]
    requests = tuple(
        SampleRequest(rollout_id=f"{row}", group_id=f"{row}", sample_index=0, row=row, seed=row) for row in range(2)
    )
    found = []
    for engine in (mine, ROLLOUT_ENGINES.class_of(mine), "transformers"):
        worker = RolloutWorker(engine=engine, model=qwen3, dtype="fp32")
        batch, receipt = worker.generate(encode(Prompt, prompts), requests, Sampling(max_new_tokens=9))
        assert receipt.rows == 2 and receipt.errors == {}
        found.append(decode(Rollout, batch))
    for own, sent, ours in zip(*found, strict=True):
        assert own.token_ids.tolist() == sent.token_ids.tolist() == ours.token_ids.tolist()
        assert own.text == sent.text == f"{ours.text}!"


def test_a_rollout_worker_passes_broadcasts_on(tmp_path: Path) -> None:
    (tmp_path / "engines.py").write_text(BROADCAST)
    ours = asked({}, engine=f"{tmp_path}/engines.py:Mine", transfer="broadcast")
    compose_stages(ours)
    worker = RolloutWorker(engine=ours.rollout.engine, model="none", dtype="fp32")
    worker.join_broadcast("host", 1, 2, 3)
    assert worker.receive_weights("manifest", ["layout"]) >= 0
    assert worker.engine.seen == [("host", 1, 2, 3), (["layout"], "manifest")]


def test_a_teacher_worker_runs_the_documented_one(plain: str, qwen3: str) -> None:
    batch = encode(Rollout, random_rollouts(fresh_random()))
    own, ours = (
        decode(TeacherScores, worker.score(batch, ScoreRequest(signal="sampled"))[0])
        for worker in (
            TeacherWorker(teacher_id="t", engine=engine, model=qwen3, dtype="fp32", **PLACE)
            for engine in (plain, "transformers")
        )
    )
    for one, other in zip(own, ours, strict=True):
        assert (one.rollout_id, one.error_class) == (other.rollout_id, other.error_class)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_its_class_goes_where_its_file_is_not(mine: str, tmp_path: Path) -> None:
    [module] = own_modules(asked({}, engine=mine))
    cloudpickle.register_pickle_by_value(package_of(module))
    (tmp_path / "sent").write_bytes(cloudpickle.dumps(ROLLOUT_ENGINES.to_send(mine)))
    cloudpickle.unregister_pickle_by_value(package_of(module))
    for name in ("engines.py", "words.py"):
        (tmp_path / name).unlink()
    code = (
        "import pickle; import tutorloop.actors.transformers_engine as ours\n"
        "Mine = pickle.load(open('sent', 'rb')); own = object.__new__(Mine); own.tokenizer = None\n"
        "ours.decode_response = lambda *_: 'text'\n"
        "print(Mine.capabilities.concurrent_calls, own.decode([], ()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout == "3 text!\n", ended.stderr


# ---- those of the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [ROLLOUT_ENGINES, TEACHER_ENGINES], ids=lambda engines: engines.key)
def test_each_of_ours_has_what_its_capabilities_say(engines) -> None:
    for name in engines.known:
        kind, stated = engines.class_of(name), engines.capabilities(name)
        assert all(callable(getattr(kind, method)) for method in stated.methods), name
        assert engines.to_send(name) == name and engines.own_module(name) is None
        if isinstance(stated, TeacherCapabilities):
            assert hasattr(kind, "load_weights") == stated.takes_weights, name
            assert hasattr(kind, "probe") == stated.remote, name
        else:
            assert hasattr(kind, "join_broadcast") == stated.broadcast, name


def test_what_ours_can_do_is_known_without_loading_them() -> None:
    code = (
        "import sys; from tutorloop.contracts.recipe import parse_config\n"
        "from tutorloop.cluster.methods import compose_stages\n"
        "rollout = {'engine': 'vllm', 'in_flight': 'wait'}\n"
        "parts = {'student': {'model': 's'}, 'data': {'path': 'd'}, 'rollout': rollout}\n"
        "tree = {'method': 'opd', 'steps': 1, 'prompts_per_step': 1, 'output_dir': 'x', **parts}\n"
        "compose_stages(parse_config({**tree, 'teacher': {'model': 't', 'engine': 'vllm'}}))\n"
        "print({'torch', 'ray', 'vllm'} & sys.modules.keys())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


def test_one_line_adds_one(mine: str, qwen3: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "engines.py").rename(tmp_path / "added_for_test.py")
    monkeypatch.syspath_prepend(tmp_path)
    line = ("added_for_test:Mine", RolloutCapabilities(split=True, concurrent_calls=2, weights_while_generating=True))
    monkeypatch.setitem(ROLLOUT_ENGINES.known, "added", line)
    ours = asked({}, engine="added", tensor_parallel=2, in_flight="abort")
    compose_stages(ours)
    assert own_modules(ours) == [] and ours.rollout.capabilities.concurrent_calls == 2
    assert RolloutWorker(engine="added", model=qwen3, dtype="fp32").engine.asked == ("keep", 64)
    with pytest.raises(ConfigError, match=re.escape("rollout.transfer=broadcast is for rollout.engine=vllm")):
        asked({}, engine="added", transfer="broadcast")
    with pytest.raises(ConfigError, match=re.escape("rollout.tensor_parallel is for rollout.engine=vllm or added")):
        asked({}, tensor_parallel=2)
