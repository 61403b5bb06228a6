"""What is no whole model of ours is refused by name, with its folder and what to do, before anything starts."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import ray
import torch
from architectures import save_small
from model_folders import check, copy_of, settings_of, tensors_of, weights_of, whole_to_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from tutorloop.contracts.errors import ModelError
from tutorloop.contracts.recipe import load_config as load_recipe
from tutorloop.models.folders import INDEX, WHOLE
from tutorloop.models.loading import (
    load_causal_lm,
    load_config,
    load_tokenizer,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return copy_of("lab:student", tmp_path / "student")


# ---- what is refused -------------------------------------------------------------------------------------------------


def edit_map(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def lost_shard(folder: Path) -> None:
    whole_to_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def shard_without_its_tensor(folder: Path) -> None:
    places = whole_to_shards(folder)
    wrong = next(place for place in places.values() if place != places["model.norm.weight"])
    edit_map(folder, lambda index: index["weight_map"].update({"model.norm.weight": wrong}))


def tensor_that_no_shard_has(folder: Path) -> None:
    places = whole_to_shards(folder)
    edit_map(folder, lambda index: index["weight_map"].update({"more": places["model.norm.weight"]}))


def tensor_in_two_shards(folder: Path) -> None:
    places = whole_to_shards(folder)
    file = folder / next(place for place in places.values() if place != places["lm_head.weight"])
    save_file(tensors_of(file) | {"lm_head.weight": torch.zeros(512, 96)}, file, {"format": "pt"})


def shard_cut(folder: Path) -> None:
    whole_to_shards(folder)
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def pickled(folder: Path) -> None:
    torch.save(tensors_of(folder / WHOLE), folder / WHOLE)


def link_to_nowhere(folder: Path) -> None:
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to("../../blobs/0a1b")


def stray_only(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "model.fp16.safetensors")


def eight_bits(folder: Path) -> None:
    weights_of(folder, model__layers__0__mlp__up_proj__weight=torch.zeros(288, 96).to(torch.float8_e4m3fn))


def index_of(text: str):
    def write(folder: Path) -> None:
        whole_to_shards(folder)
        (folder / INDEX).write_text(text)

    return write


def config_of(content: bytes):
    return lambda folder: (folder / "config.json").write_bytes(content)


def settings(**changes: object):
    return lambda folder: settings_of(folder, **changes)


def weights(**changes: torch.Tensor | None):
    return lambda folder: weights_of(folder, **changes)


REFUSED = {
    "a lost shard": (lost_shard, "model-00002-of-00003.safetensors, not there"),
    "a shard without its tensor": (shard_without_its_tensor, "model.norm.weight is in .*; it is in"),
    "a tensor that no shard has": (tensor_that_no_shard_has, "more is in .*; no shard has it"),
    "a tensor in two shards": (tensor_in_two_shards, "lm_head.weight is in .* and in "),
    "a shard cut off": (shard_cut, "model-00003-of-00003.safetensors"),
    "an index that is no JSON": (index_of("{"), "index.json of a model is a JSON object"),
    "an index without a map": (index_of('{"metadata": {}}'), "weight_map"),
    "an index without metadata": (index_of('{"weight_map": {"a": "model-00001-of-00003.safetensors"}}'), "metadata"),
    "an empty file": (lambda folder: (folder / WHOLE).write_bytes(b""), "model.safetensors: .*download or copy"),
    "a header of nonsense": (lambda folder: (folder / WHOLE).write_bytes(b"\xff" * 99), "safetensors are whole"),
    "a pointer": (
        lambda folder: (folder / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "lfs pull",
    ),
    "a pickle": (pickled, "is a torch pickle.*safe_serialization"),
    "a link to nowhere": (link_to_nowhere, "points to ../../blobs/0a1b, which is not there"),
    "a variant alone": (stray_only, f"{WHOLE} or {INDEX}.*model.fp16.safetensors"),
    "a missing tensor": (weights(model__norm__weight=None), "holds all its weights.*model.norm.weight missing"),
    "a tensor too many": (weights(model__layers__9__mlp__up_proj__weight=torch.zeros(288, 96)), "layers.9.mlp"),
    "another shape": (weights(model__norm__weight=torch.zeros(5)), r"model.norm.weight is \[5\] .*, \[96\] by config"),
    "fewer layers by config": (
        settings(num_hidden_layers=3, layer_types=None),
        r"Qwen3ForCausalLM has no model.layers.3",
    ),
    "a leftover adapter": (weights(model__norm__lora_A__weight=torch.zeros(2, 96)), "lora_A"),
    "eight bits": (eight_bits, "up_proj.weight in .* is F8_E4M3.*dequantize"),
    "gptq": (
        settings(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config of gptq.*dequantize",
    ),
    "mlx": (settings(quantization={"bits": 4, "group_size": 64}), "quantization of .*dequantize"),
    "config.json cut off": (config_of(b'{"model_type": "qwen3"'), r"config.json of a model is a JSON object"),
    "config.json in UTF-16": (config_of("{}".encode("utf-16")), "config.json of a model is a JSON object"),
    "config.json of a list": (config_of(b"[]"), "config.json holds a list"),
    "config.json too deep": (config_of(b"[" * 99999), "config.json of a model is a JSON object"),
    "no model_type": (settings(model_type=None), "has no model_type"),
    "an unknown model_type": (settings(model_type="nope", architectures=["Nope"]), "Nope: .*nope"),
    "a field of another type": (settings(hidden_size="big"), "hidden_size"),
    "both directions": (
        lambda folder: save_small(folder, "gemma3_text", use_bidirectional_attention=True),
        "use_bidirectional_attention",
    ),
    "generation_config.json": (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config"),
    "a wrong generation_config.json": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "eos_token_id of '</s>'",
    ),
    "an adapter beside it": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge_and_unload"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_one_whole_model_is_refused_by_name(case, student):
    change, reason = REFUSED[case]
    change(student)
    with pytest.raises(ModelError, match=f"(?s){reason}") as caught:
        check(student)
    assert str(student) in str(caught.value) and caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


TOKENIZERS = {
    "an unknown kind of merges": lambda text: text.replace('"merges":', '"merges": 7, "was":'),
    "an unknown pre-tokenizer": lambda text: json.dumps(json.loads(text) | {"pre_tokenizer": {"type": "Nope"}}),
    "empty": lambda text: "",
    "no JSON": lambda text: text[: len(text) // 2],
    "an object of nothing": lambda text: "{}",
    "a list": lambda text: "[]",
    "too deep": lambda text: "[" * 99999,
    "a pointer": lambda text: "version https://git-lfs.github.com/spec/v1\n",
    "lone bytes": lambda text: b"\xff\xfe{",
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_its_file(case, student):
    file = student / "tokenizer.json"
    changed = TOKENIZERS[case](file.read_text())
    file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(ModelError, match=re.escape(str(file))):
        load_tokenizer(str(student))


def test_a_folder_without_a_tokenizer_gets_no_empty_one(student):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / name).unlink()
        with pytest.raises(ModelError, match=r"(?s)tokenizer.*save the tokenizer"):
            load_tokenizer(str(student))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed", [".", "config.json", WHOLE, "tokenizer.json"])
def test_what_may_not_be_read_is_refused_by_name(closed, student):
    for folder in [student, *student.parents[:3]]:
        folder.chmod(0o755)
    (student / closed).chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(ModelError, match=re.escape(str(student))) as caught:
            check(student)
    finally:
        os.seteuid(0)
    assert "Permission" in str(caught.value)


def test_a_wrapper_is_refused_and_its_language_model_can_be_taken_out(tmp_path, monkeypatch):
    """By the lines of docs/engines.md, as they stand there."""
    text = load_config(save_small(tmp_path / "plain", "gemma3_text")).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = {"text_config": text, "vision_config": vision | {"image_size": 28, "patch_size": 14}}
    config = AutoConfig.for_model("gemma3", **own, mm_tokens_per_image=4, image_token_index=510)
    whole = AutoModelForMultimodalLM.from_config(config).eval()
    monkeypatch.chdir(tmp_path)
    shutil.copytree("plain", "WRAPPER")
    whole.save_pretrained("WRAPPER")
    with pytest.raises(
        ModelError, match=r"(?s)Gemma3ForConditionalGeneration wraps Gemma3TextConfig.*docs/engines\.md"
    ):
        check(tmp_path / "WRAPPER")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engines.md").read_text(), re.DOTALL)
    (lines,) = (block for block in blocks if "WRAPPER" in block)
    exec(lines, {})
    check(tmp_path / "TEXT")
    ids = torch.arange(5, 60)[None]
    torch.testing.assert_close(load_causal_lm("./TEXT")(ids).logits, whole(input_ids=ids).logits)


def test_eval_refuses_as_train_does_and_starts_nothing(student):
    from tutorloop.cluster.standalone_eval import evaluate_model

    settings_of(student, quantization_config={"quant_method": "fp8"})
    config = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"student.model={student}"])
    with pytest.raises(ModelError, match="quantization_config of fp8"):
        evaluate_model(config, None)
    settings_of(student, quantization_config=None)
    weights_of(student, model__norm__weight=None)
    with pytest.raises(ModelError, match=r"model\.norm\.weight missing"):
        evaluate_model(config, None)
    assert not ray.is_initialized()
