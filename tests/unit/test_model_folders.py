"""Model folders as people have them: read as transformers reads them, or refused by name before anything starts."""

import builtins
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from architectures import Learner
from model_folders import check, copy_of, settings_of, shard, tensors_of, weights_of, whole_to_shards
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_qwen3
from transformers import AutoModelForCausalLM

from tutorloop.contracts.errors import ModelError
from tutorloop.models.checkpoint import check_weights, load_lm_head
from tutorloop.models.checkpoint_names import CheckpointNames
from tutorloop.models.folders import INDEX, WHOLE, weight_files
from tutorloop.models.loading import (
    check_architecture,
    generation_config,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from tutorloop.models.vllm_support import check_vllm_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return copy_of("lab:student", tmp_path / "student")


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
    folder = copy_of("lab:teacher", tmp_path / "teacher")
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


def test_buffers_that_transformers_itself_leaves_out_are_let_through(student):
    """Older checkpoints of Llama and others hold their angles."""
    weights_of(student, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16))
    check(student)
