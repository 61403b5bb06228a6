"""Model folders as people have them: read as transformers reads them, or refused by name before anything starts."""

import builtins
import json
import os
import pickle
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
import torch
from architectures import Learner, save_small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen3
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from tutorloop.contracts.errors import ModelError
from tutorloop.contracts.recipe import load_config as load_recipe
from tutorloop.models.checkpoint import check_weights, load_lm_head
from tutorloop.models.checkpoint_names import CheckpointNames
from tutorloop.models.folders import INDEX, WHOLE, weight_files
from tutorloop.models.loading import (
    check_architecture,
    eos_ids,
    generation_config,
    load_causal_lm,
    load_config,
    load_tokenizer,
    locate_model,
)
from tutorloop.models.vllm_support import check_vllm_files

ROOT = Path(__file__).parents[2]


def check(folder: Path | str) -> None:
    """What `train` and `eval` ask of a model before anything starts."""
    check_architecture(str(folder))
    check_weights(str(folder))
    eos_ids(str(folder), load_tokenizer(str(folder)))


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return Path(shutil.copytree(locate_model("lab:student"), tmp_path / "student"))


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """Copies: the file may be written again."""
    return {name: own.clone() for name, own in load_file(file).items()}


def settings_of(folder: Path, **changes: object) -> None:
    """Changes config.json; None takes a field out."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))


def weights_of(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes model.safetensors; `__` stands for a dot, None takes a tensor out."""
    tensors = tensors_of(folder / WHOLE) | {key.replace("__", "."): tensor for key, tensor in changes.items()}
    save_file({key: own for key, own in tensors.items() if own is not None}, folder / WHOLE, {"format": "pt"})


def shard(folder: Path, tensors: dict[str, torch.Tensor], parts: int = 3) -> None:
    """The model in shards with their index, beside whatever is there."""
    names, places = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::parts]}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names[i::parts], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def whole_to_shards(folder: Path) -> dict[str, str]:
    shard(folder, tensors_of(folder / WHOLE))
    (folder / WHOLE).unlink()
    return json.loads((folder / INDEX).read_text())["weight_map"]


# ---- which files, which head -----------------------------------------------------------------------------------------


def other_head(folder: Path) -> dict[str, torch.Tensor]:
    tensors = tensors_of(folder / WHOLE)
    return tensors | {"lm_head.weight": tensors["lm_head.weight"].flip(0).contiguous()}


def stale_shards(folder: Path) -> None:
    shard(folder, other_head(folder))


def stale_file(folder: Path) -> None:
    """Comes before the model's own in sorted order, and no index names it."""
    save_file(other_head(folder), folder / "a.safetensors", {"format": "pt"})


def stale_file_beside_an_index(folder: Path) -> None:
    """vLLM leaves it out too."""
    stale_file(folder)
    whole_to_shards(folder)


def named_by_config(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "other.safetensors")
    settings_of(folder, transformers_weights="other.safetensors")
    save_file({"lm_head.weight": torch.zeros(3, 3)}, folder / WHOLE, {"format": "pt"})


@pytest.mark.parametrize("change", [stale_shards, stale_file, stale_file_beside_an_index, named_by_config])
def test_the_head_comes_from_the_files_that_transformers_loads(change, tmp_path):
    folder = Path(shutil.copytree(locate_model("lab:teacher"), tmp_path / "teacher"))
    own = load_lm_head(str(folder))
    change(folder)
    check(folder)
    model = load_causal_lm(str(folder))
    assert torch.equal(load_lm_head(str(folder)), own) and torch.equal(model.get_output_embeddings().weight, own)
    ids = torch.arange(3, 40)[None]
    hidden = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(hidden @ load_lm_head(str(folder)).T, model(ids).logits)
    with nullcontext() if (folder / INDEX).exists() and not (folder / WHOLE).exists() else pytest.raises(ModelError):
        check_vllm_files(str(folder))


def test_shards_alone_are_the_whole_model(student):
    before = {name: p.clone() for name, p in load_causal_lm(str(student)).named_parameters()}
    places = whole_to_shards(student)
    check(student)
    check_vllm_files(str(student))
    assert [file.name for file in weight_files("x", student)] == sorted(set(places.values()))
    after = dict(load_causal_lm(str(student)).named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(p, after[name]) for name, p in before.items())
    names = CheckpointNames(str(student))
    assert [key for name, p in after.items() for key, _ in names.of(name, p.data)] == list(after)


def without_prefix(folder: Path) -> None:
    """As the base model alone is saved."""
    tensors = tensors_of(folder / WHOLE)
    save_file({name.removeprefix("model."): own for name, own in tensors.items()}, folder / WHOLE, {"format": "pt"})


def head_for_both(folder: Path) -> None:
    """A tied model of which the head was saved, and not the embedding."""
    tensors = tensors_of(folder / WHOLE)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / WHOLE, {"format": "pt"})


def both_alike(folder: Path) -> None:
    weights_of(folder, lm_head__weight=tensors_of(folder / WHOLE)["model.embed_tokens.weight"].clone())


@pytest.mark.parametrize("change", [lambda folder: None, without_prefix, head_for_both, both_alike])
def test_a_tied_head_is_the_embedding_under_whatever_name(change, tmp_path):
    folder = Path(tiny_qwen3(tmp_path / "tied", tied=True))
    own = tensors_of(folder / WHOLE)["model.embed_tokens.weight"]
    change(folder)
    check(folder)
    assert torch.equal(load_lm_head(str(folder)), own)
    assert torch.equal(load_causal_lm(str(folder)).get_output_embeddings().weight, own)


def test_an_untied_model_has_no_other_head_than_its_own(student):
    weights_of(student, lm_head__weight=None)
    for reads in (load_lm_head, check_weights):
        with pytest.raises(ModelError, match="lm_head"):
            reads(str(student))


def test_a_tied_head_with_values_of_its_own_is_refused(tmp_path):
    folder = Path(tiny_qwen3(tmp_path / "tied", tied=True))
    weights_of(folder, lm_head__weight=torch.randn(300, 32))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        check_weights(str(folder))


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Questions on the terminal, all of which get a yes."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    return questions


def with_code(folder: Path, model_type: str) -> Path:
    ran = folder / "RAN"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    settings_of(folder, model_type=model_type, architectures=["MyLM"], auto_map=auto_map)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": auto_map}))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "own.py", folder / "custom_generate" / "generate.py")
    return ran


def test_a_folders_code_never_runs_and_nobody_is_asked(student, asked):
    ran = with_code(student, "mymodel")
    for reads in (check_architecture, check_weights, load_config, load_causal_lm, load_lm_head):
        with pytest.raises(ModelError, match=r"(?s)code of a model's folder is never run.*MyLM of mymodel") as caught:
            reads(str(student))
        assert "trust_remote_code" not in str(caught.value)
    load_tokenizer(str(student))
    assert not ran.exists() and asked == []


def test_what_transformers_knows_runs_by_its_own_class_whatever_auto_map_says(student, asked):
    own = load_causal_lm("lab:student")
    ran = with_code(student, "qwen3")
    check(student)
    model = load_causal_lm(str(student))
    assert type(model) is type(own) and not ran.exists() and asked == []
    ids = torch.arange(3, 30)[None]
    assert torch.equal(model(ids).logits, own(ids).logits)


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
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "engines.md").read_text(), re.DOTALL)
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


# ---- export ----------------------------------------------------------------------------------------------------------


def test_an_export_names_neither_the_students_files_nor_its_code(tmp_path):
    folder = Path(tiny_qwen3(tmp_path / "student"))
    (folder / WHOLE).rename(folder / "own.safetensors")
    with_code(folder, "qwen3")
    settings_of(folder, transformers_weights="own.safetensors", torch_dtype="bfloat16", dtype=None)
    Learner(str(folder), str(folder)).export(str(tmp_path / "final"))
    check(tmp_path / "final")
    check_vllm_files(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["dtype"] == "float32" and not {"auto_map", "torch_dtype", "transformers_weights"} & config.keys()
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(found.values()) and model.dtype == torch.float32
    with safe_open(folder / "own.safetensors", "pt") as before:
        assert torch.equal(model.get_output_embeddings().weight, before.get_tensor("lm_head.weight"))
    first, last = generation_config(str(folder)), generation_config(str(tmp_path / "final"))
    assert first and last and first.eos_token_id == last.eos_token_id
