"""What is typed reaches the run as it was typed: overrides by what their key holds, and recipes without a lost key."""

import re
from pathlib import Path
from typing import Any

import pytest

from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import load_config, parse_config

SMALL = {
    "method": "opd",
    "output_dir": "x",
    "steps": 1,
    "prompts_per_step": 1,
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"path": "d"},
}
RECIPE = """method: opd
output_dir: x
steps: 1
prompts_per_step: 1
student: {model: s}
teacher: {model: t}
data: {path: d}
"""
BOMB = "  k0: &k0 [1]\n" + "".join(f"  k{n + 1}: &k{n + 1} [*k{n}, *k{n}]\n" for n in range(30))
STAGED = {**SMALL, "method": None, "steps": None, "stages": [{"method": "opd", "steps": n} for n in (1, 2)]}


def at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else value[int(part)] if part.isdecimal() else vars(value)[part]
    return value


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("verifier.marker=####", "####"),
        ("verifier.marker=A: #", "A: #"),
        ("data.prompt_suffix= # x", " # x"),
        ("data.prompt_suffix= think first ", " think first "),
        ("data.prompt_suffix=\\boxed{}: [a, b", "\\boxed{}: [a, b"),
        ("data.prompt_suffix=\n\nAnswer: #1", "\n\nAnswer: #1"),
        ("data.prompt_suffix=a=b", "a=b"),
        ("student.model=123", "123"),
        ("data.split=010", "010"),
        ("data.name=no", "no"),
        ("data.name=null", "null"),
        ("data.name=~", "~"),
        ("data.name=2024-01-01", "2024-01-01"),
        ("data.name=", ""),
        ("data.name=*a", "*a"),
        ("templates.mine@1={problem} # {answer}: x", "{problem} # {answer}: x"),
        ("student.model={a: b}", "{a: b}"),
        ('data.prompt_suffix="\\nAnswer:"', "\nAnswer:"),
        ("data.prompt_suffix='it''s #1'", "it's #1"),
        ('data.prompt_suffix="a" or "b"', '"a" or "b"'),
        ('data.prompt_suffix="', '"'),
        ('data.prompt_suffix=""', ""),
        ("method_options.template= a #b", " a #b"),
        ("method_options.filter=verified", "verified"),
        ("student.lora.targets=all-linear", "all-linear"),
        ("student.lora.targets=[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("learner.learning_rate=1e-6", 1e-6),
        ("learner.learning_rate=+.5E-3", 5e-4),
        ("seed=1_000", 1000),
        ("seed=0x10", 16),
        ("seed= 7 ", 7),
        ("learner.zero_stage=2", 2),
        ("off_policy.normalise=on", True),
        ("rollout.temperature=", 1.0),
        ("eval.max_new_tokens=", None),
        ("teacher.urls=", ()),
        ("data.chat_template_kwargs.enable_thinking=off", False),
        ("data.chat_template_kwargs={top: 1e-6, on: x}", {"top": 1e-6, "on": "x"}),
        ("data.chat_template_kwargs={a: null}", {"a": None}),
        ("learner.betas=[0.9, 0.99]", (0.9, 0.99)),
        ("thinking=[<a>, </a>]", ("<a>", "</a>")),
    ],
)
def test_an_override_is_read_by_what_its_key_holds(override: str, value: object) -> None:
    assert at(parse_config(SMALL, [override]), override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps=# 5", "steps= takes the default"),
        ("steps=~", "steps= takes the default"),
        ("eval.max_new_tokens=null", "eval.max_new_tokens= takes the default"),
        ("steps=5 # five", "leave out the comment"),
        ("thinking=[<a>, </a>] # x", "leave out the comment"),
        ("steps=010", "steps (line 1): 010 is octal or decimal by the version of YAML; is it 10?"),
        ("method_options.x=010", "octal or decimal"),
        ("steps=yes", "steps: Input should be a valid integer"),
        ("learner.learning_rate=on", "learner.learning_rate: Input should be a valid number"),
        ("steps=1:30", "(found '1:30')"),
        ("steps=&a 3", "neither anchors nor tags"),
        ("steps=*a", "neither anchors nor tags"),
        ("steps=!!int 3", "neither anchors nor tags"),
        ("method_options.x=!!python/name:os.system", "neither anchors nor tags"),
        ("method_options={a: 1, a: 2}", "method_options.a: given twice"),
        ("method_options={[1]: 2}", "a key is a word"),
        ("steps=[", "must be YAML"),
        ("seed=1" + "0" * 5000, "too many digits"),
        ("learner.learning_rate=.inf", "learner.learning_rate: a number must be finite"),
        ("learner.learning_rate=1e400", "learner.learning_rate: a number must be finite"),
        ("learner.learning_rate=nan", "learner.learning_rate: Input should be a finite number"),
        ("seed=.nan", "seed: a number must be finite"),
        ("method_options.x=[1, {a: -.inf}]", "method_options.x.1.a: a number must be finite"),
        ("data.chat_template_kwargs.a=.nan", "data.chat_template_kwargs.a: a number must be finite"),
        ("output_dir=", "output_dir: holds no text"),
        ("output_dir= ", "output_dir: holds no text"),
        ("student.model=", "student.model: holds no text"),
        ("metrics.host=", "metrics.host: holds no text"),
        ("verifier.kind=", "verifier.kind: holds no text"),
        ("thinking=<a>", "write [a, b]"),
        ("student=s", "write {key: value}"),
        ("student.model=a\0b", "student.model: text has no NUL"),
        ("output_dir=a\udcff", "output_dir: text has no NUL and no half"),
        ("+steps=3", "write steps=3"),
        ("--steps=3", "write steps=3"),
        ("steps:3", "write steps=3"),
        ("student.model: a b", "write student.model=a b"),
        ("steps = 3", "write steps=3"),
        ("steps", "without spaces"),
        ("=3", "key.path=value"),
        ("student..model=x", "key.path=value"),
        (".steps=1", "key.path=value"),
        ("steps.deeper=1", "leads through sections"),
        ("learner.betas.0=1", "learner.betas=[…]"),
        ("lerner.ranks=2", "did you mean learner"),
    ],
)
def test_an_override_that_would_lose_something_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_config(SMALL, [override])


def test_overrides_reach_into_lists_and_the_last_one_holds() -> None:
    config = parse_config(
        STAGED, ["stages.1.steps=7", "stages.1.until={trigger: entropy_collapse, every: 1}", "seed=1"]
    )
    assert [stage.steps for stage in config.plan] == [1, 7] and config.plan[1].until
    assert parse_config(STAGED, ["seed=1", "data.path=e", "seed=2"]).seed == 2
    with pytest.raises(ConfigError, match=re.escape("stages.2.steps: stages has 2")):
        parse_config(STAGED, ["stages.2.steps=3"])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("seed: 1\nlearner: {ranks: 1}\nlearner: {ranks: 2}\n", "learner: given twice, in line 9 and in line 10"),
        ("learner:\n  ranks: 1\n  dtype: fp32\n  ranks: 2\n", "learner.ranks: given twice, in line 9 and in line 11"),
        ('seed: 1\n"seed": 1\n', "seed: given twice, in line 8 and in line 9"),
        ("method_options: {a: [{b: 1, b: 2}]}\n", "method_options.a.0.b: given twice, in line 8 and in line 8"),
        ("verifier:\n  marker: ####\n", "verifier.marker (line 9): holds nothing but a comment"),
        ("seed: 010\n", "seed (line 8): 010 is octal"),
        ("method_options: !!python/object/apply:os.system [ls]\n", "python/object/apply:os.system is not read here"),
        ("method_options: {a: !!binary aGk=}\n", "method_options.a (line 8): the tag"),
        ("method_options: &a {x: *a}\n", "nested too deeply"),
        ("method_options: {a: " + "[" * 5000 + "]" * 5000 + "}\n", "nested too deeply"),
        (
            "method_options:\n  k0: &k0 [1]\n" + "".join(f"  k{n + 1}: &k{n + 1} [*k{n}, *k{n}]\n" for n in range(30)),
            "aliases",
        ),
        ("verifier:\n\tmarker: x\n", "indent with spaces"),
        ("learner: {learning_rate: .inf}\n", "learner.learning_rate: a number must be finite"),
        ("eval: {temperature: warm}\n", "eval.temperature: Input should be a valid number"),
        ('skills: {path: "a\\0b"}\n', "skills.path: text has no NUL"),
        ("? [a]\n: b\n", "a key is a word"),
        ("1: x\n", "1: unknown key"),
        ("---\nmethod: opd\n", "one document"),
        ("<<: 3\n", "<< takes in mappings"),
    ],
)
def test_a_recipe_that_loses_something_is_refused(more: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(written(tmp_path, RECIPE + more))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"# nothing\n",
        b"- a\n",
        b"text\n",
        b"a: [\n",
        RECIPE.encode() + b"# \xe9\n",
        RECIPE.encode("utf-16"),
        b"a: \x07",
    ],
)
def test_a_file_that_is_no_recipe(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a recipe"):
        load_config(written(tmp_path, data))


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + RECIPE.encode(),
        RECIPE.replace("\n", "\r\n").encode(),
        f"---\n{RECIPE}...\n".encode(),
        RECIPE.encode() + b"teachers:  # none\nskills: ~\nverifier:\n",
    ],
)
def test_a_recipe_as_other_editors_save_it(data: bytes, tmp_path: Path) -> None:
    assert load_config(written(tmp_path, data)) == parse_config(SMALL)


def test_a_recipe_s_values_are_what_their_keys_hold(tmp_path: Path) -> None:
    more = """verifier: &v
  marker: "####"
  pass_score: 1e-6
eval: {name: no, split: 010, path: 2024-01-01}
learner: &l {learning_rate: 1E-3, warmup_steps: 1_0}
off_policy:
  <<: [{low: 0.1, high: 3}, {high: 4, veto: 1e-4}]
  low: 0.2
method_options: {a: 1:30, b: 0o10, c: !!str 5, d: yes, e: 2024-01-01, f: 1e-6}
metrics: {port: !!int "9400"}
"""
    config = load_config(written(tmp_path, RECIPE + more))
    assert (config.verifier.marker, config.verifier.pass_score) == ("####", 1e-6)
    assert (config.eval.name, config.eval.split, config.eval.path) == ("no", "010", "2024-01-01")
    assert (config.learner.learning_rate, config.learner.warmup_steps) == (1e-3, 10)
    assert (config.off_policy.low, config.off_policy.high, config.off_policy.veto) == (0.2, 3, 1e-4)
    assert config.method_options == {"a": "1:30", "b": "0o10", "c": "5", "d": True, "e": "2024-01-01", "f": 1e-6}
    assert config.metrics.port == 9400


def test_paths_are_written_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/mine")
    for name in ("s", "d", "own.py"):
        (tmp_path / name).write_text("")
    rewards = [{"kind": "own.py:f", "weight": 1}, {"kind": "length", "weight": 1, "limit": 3}]
    tree = {
        **SMALL,
        "eval": {"path": "~/e", "ood_path": "lab:ood"},
        "verifier": {"kind": "~/r.py:f", "rewards": rewards},
    }
    config = parse_config(tree, ["output_dir=~/runs/one", "method=own.py"])
    assert config.output_dir == "/home/of/mine/runs/one"
    assert (config.student.model, config.data.path) == (f"{tmp_path}/s", f"{tmp_path}/d")
    assert config.teacher and config.teacher.model == "t", "it may be a hub id"
    assert (config.eval.path, config.eval.ood_path) == ("/home/of/mine/e", "lab:ood")
    assert config.method == f"{tmp_path}/own.py" and config.verifier.kind == "/home/of/mine/r.py:f"
    assert [reward.kind for reward in config.verifier.rewards] == [f"{tmp_path}/own.py:f", "length"]
    http = {"model": "s", "engine": "http", "urls": ["http://a:8000/v1"]}
    served = parse_config({**SMALL, "teacher": http}).teacher
    assert served and served.model == "s", "a server's own name for it"
    with pytest.raises(ConfigError, match="home folder"):
        parse_config(SMALL, ["output_dir=~nobody_is_called_so/x"])


def test_a_recipe_of_the_package_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("quickstart")).method == "opd"
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load_config(Path("quickstrat"))
    (tmp_path / "quickstart").write_text(RECIPE.replace("opd", "sft"))
    assert load_config(Path("quickstart")).method == "sft"
