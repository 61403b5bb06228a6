"""Wrong input, as a new user gives it: one clear error, exit code 2, no traceback, nothing written, no Ray."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import ray
from tiny import tiny_qwen3
from typer.testing import CliRunner

from tutorloop.cli.main import app

ROOT = Path(__file__).parents[2]


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
CONFIGS = {
    "code": {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    "quantised": {"quantization_config": {"quant_method": "awq"}},
    "long": {"rope_parameters": ROPE | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
    "shallow": {"num_hidden_layers": 1, "layer_types": None},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_qwen3(folder / "student")
    tiny_qwen3(folder / "teacher", seed=1)
    shutil.copytree(folder / "teacher", folder / "other")
    tokenizer = json.loads((folder / "other/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token in vocab if vocab[token] in (40, 41)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    tiny_qwen3(folder / "wide", vocab=310)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "teacher", folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, changes in CONFIGS.items():
        shutil.copytree(folder / "teacher", folder / name)
        settings = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(settings | changes))
    return folder


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = {"prompt": "2+2", "answer": "4"}
HTTP = ["teacher.engine=http", "teacher.signal=topk", "teacher.timeout_seconds=1"]
CASES = {
    "unknown key": (["lerner.ranks=2"], "did you mean learner"),
    "wrong type": (["steps=soon"], "steps: "),
    "unknown method": (["method=oppd"], "did you mean opd"),
    "missing student": (["student.model=/absent/model"], "/absent/model: no such folder"),
    "a folder that is no model": (["student.model=MODELS/empty"], "config.json"),
    "truncated weights": (["teacher.model=MODELS/cut"], "model.safetensors"),
    "a model of its own code": (["student.model=MODELS/code"], "never run"),
    "a quantised teacher": (["teacher.model=MODELS/quantised"], "quantization_config of awq"),
    "weights of another depth": (["teacher.model=MODELS/shallow"], "Qwen3ForCausalLM has no model.layers.1"),
    "LongRoPE beyond its length": (
        ["teacher.model=MODELS/long", "rollout.max_new_tokens=20"],
        "(rope_type=longrope:",
    ),
    "missing dataset": (["data.path=/absent.jsonl"], "/absent.jsonl: no such file"),
    "missing evaluation set": (["eval.path=/absent.jsonl"], "/absent.jsonl: no such file"),
    "empty dataset": (["data.path=TMP/empty.jsonl"], "empty"),
    "a row without prompt": (["data.path=TMP/noprompt.jsonl"], "data.prompt_field"),
    "a row without answer": (["data.path=TMP/noanswer.jsonl"], "data.answer_field"),
    "other tokenizer": (["teacher.model=MODELS/other"], "share one tokenizer"),
    "other vocabulary size": (["teacher.model=MODELS/wide"], "one vocabulary size"),
    "top_k beyond the vocabulary": (["teacher.signal=topk", "method_options.top_k=301"], "top_k is at most"),
    "prompt beyond the context": (["data.path=TMP/long.jsonl"], "context"),
    "response beyond the context": (["rollout.max_new_tokens=100000"], "rollout.max_new_tokens"),
    "an unknown teacher's row": (["data.path=TMP/teacher.jsonl"], "'nobody'"),
    "a folder that holds another run": (["output_dir=TMP/taken"], "holds another run"),
    "nothing to resume": (["--resume"], "holds none"),
    "no vLLM here": (["rollout.engine=vllm"], "the vllm engine needs vLLM"),
    "a server that is not there": ([*HTTP, "teacher.urls=[http://127.0.0.1:9/v1]"], "127.0.0.1:9"),
    "a key that is not there": ([*HTTP, "teacher.urls=[http://a:9/v1]", "teacher.api_key_env=ABSENT"], "ABSENT"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_clear_error(
    case: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as on a machine that has none
    write(tmp_path / "good.jsonl", GOOD)
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "noprompt.jsonl", GOOD, {"answer": "4"})
    write(tmp_path / "noanswer.jsonl", GOOD, {"prompt": "2+2"})
    write(tmp_path / "long.jsonl", GOOD, {"prompt": "2" * 5000, "answer": "4"})
    write(tmp_path / "teacher.jsonl", {**GOOD, "teacher": "nobody"})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("method: opd")
    before = sorted(tmp_path.rglob("*"))
    changes, expected = CASES[case]
    base = {
        "student.model": f"{models}/student",
        "teacher.model": f"{models}/teacher",
        "data.path": f"{tmp_path}/good.jsonl",
        "output_dir": f"{tmp_path}/run",
        "rollout.max_new_tokens": "8",
        "eval.path": "",
        "eval.ood_path": "",
    }
    arguments = ["train", str(ROOT / "recipes/quickstart.yaml"), *(f"{key}={value}" for key, value in base.items())]
    arguments += [change.replace("MODELS", str(models)).replace("TMP", str(tmp_path)) for change in changes]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and expected in result.stderr
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before
    assert not ray.is_initialized()


def test_a_usage_error_also_ends_with_2() -> None:
    for arguments in (["train"], ["tarin", "x"], ["train", "recipe.yaml", "--adress", "x"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
