"""The configuration: overrides, one clear error for each wrong thing, and the interface's keys."""

import importlib.util
from pathlib import Path

import pytest

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import load_config, parse_config

ROOT = Path(__file__).parents[2]
SMALL = {
    "method": "opd",
    "output_dir": "x",
    "steps": 1,
    "prompts_per_step": 1,
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"path": "d"},
}


HTTP = {"model": "t", "engine": "http", "urls": ["http://a:8000/v1"]}
STAGED = {"method": None, "steps": None}
COLLAPSE = {"trigger": "entropy_collapse"}
NEVER = {**COLLAPSE, "share": 0, "floor": 0}


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid(recipe: Path) -> None:
    assert load_config(recipe).steps > 0


def test_overrides_are_yaml_values_at_dotted_paths() -> None:
    changes = ["learner.learning_rate=1e-3", "rollout.replicas=2", "data.name=", "eval.path=lab:test"]
    config = load_config(ROOT / "recipes/quickstart.yaml", changes)
    assert config.learner.learning_rate == 1e-3
    assert config.rollout.replicas == 2
    assert config.eval.path == "lab:test"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lerner": {}}, "did you mean learner"),
        ({"learner": {"rank": 2}}, "learner.rank: unknown key; did you mean learner.ranks"),
        ({"teacher": {"model": "t", "replcas": 2}}, "did you mean teacher.replicas"),
        ({"teacher": None, "teachers": {"a": {"model": "t", "enginee": "x"}}}, "did you mean teachers.a.engine"),
        ({"steps": "many"}, "steps: "),
        ({"steps": 0}, "steps: "),
        ({"student": {}}, "student.model: required"),
        ({"learner": {"zero_stage": 4}}, "learner.zero_stage"),
        ({"teachers": {"a": {"model": "t"}}}, "either teacher.model or teachers.NAME.model"),
        ({"teacher": None, "teachers": {"reference": {"model": "t"}}}, "cannot be called 'reference'"),
        ({"method": None}, "method: required"),
        ({"steps": None}, "steps: required"),
        ({"stages": [{"method": "opd", "steps": 1}]}, "either stages, or method"),
        (
            {**STAGED, "stages": [{"method": "opd", "step": 1}]},
            "stages.0.step: unknown key; did you mean stages.0.steps",
        ),
        ({**STAGED, "stages": [{"method": "raft", "steps": 19, "until": COLLAPSE}]}, "able to fire: raft has 19 steps"),
        ({**STAGED, "stages": [{"method": "raft", "steps": 20, "until": NEVER}]}, "share and until.floor are both 0"),
        ({"off_policy": {"kind": "masked", "low": 3}}, "off_policy.low is below off_policy.high"),
        ({"off_policy": {"kind": "truncated", "level": "geometric"}}, "level=geometric is for off_policy.kind=masked"),
        ({"student": {"model": "s", "lora": {"rnak": 8}}}, "did you mean student.lora.rank"),
        ({"learner": {"learning_rate": 1e-5, "min_learning_rate": 1e-3}}, "min_learning_rate"),
        ({"student": "a/b"}, "student: "),
        ({"teacher": {"model": "t", "engine": "http"}}, "teacher.urls are given where"),
        ({"teacher": {"model": "t", "urls": ["http://a:1/v1"]}}, "teacher.urls are given where"),
        ({"teacher": {**HTTP, "urls": ["a:8000/v1"]}}, "teacher.urls read http://HOST:PORT/v1"),
        ({"teacher": {**HTTP, "urls": ["http://me:secret@a:1/v1"]}}, "without a key (teacher.api_key_env)"),
        ({"teacher": {**HTTP, "follows": "live"}}, "needs weights of our own"),
        ({"teacher": {"model": "t", "api_key_env": "KEY"}}, "api_key_env is for"),
        ({"teacher": {"model": "t", "tensor_parallel": 2}}, "teacher.tensor_parallel is for"),
        ({"teacher": {"model": "t", "engine": "vllm", "follows": "ema"}}, "follows=ema averages"),
        ({"teacher": {"model": "t", "shared": True}}, "shared is for teacher.follows=live"),
        ({"rollout": {"tensor_parallel": 2}}, "rollout.tensor_parallel is for"),
        ({"rollout": {"in_flight": "abort"}}, "rollout.in_flight is for"),
        ({"rollout": {"engine": "vlm"}}, "rollout.engine"),
    ],
)
def test_each_fault_names_its_key(change: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**SMALL, **change})
    assert expected in str(caught.value)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**SMALL, "steps": -1, "sed": 3})
    assert "steps" in str(caught.value) and "sed" in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    for text in ("a: [", "- 1", ""):
        bad.write_text(text)
        with pytest.raises(ConfigError):
            load_config(bad)
    with pytest.raises(ConfigError, match="readable"):
        load_config(tmp_path / "absent.yaml")
    good = ROOT / "recipes/quickstart.yaml"
    for override in ("novalue", "=3", "seed.deeper=1", "seed=["):
        with pytest.raises(ConfigError):
            load_config(good, [override])


def test_several_teachers_by_name() -> None:
    config = parse_config({**SMALL, "teacher": None, "teachers": {"a": {"model": "x"}, "b": {"model": "y"}}})
    assert sorted(config.named_teachers) == ["a", "b"]
    assert list(parse_config(SMALL).named_teachers) == ["teacher"]


def test_the_documented_configuration_is_the_real_one() -> None:
    spec = importlib.util.spec_from_file_location("write_configuration", ROOT / "docs/write_configuration.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run docs/write_configuration.py"
