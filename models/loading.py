"""Find and load models and tokenizers: a local folder, a hub id, or `lab:NAME`. Safetensors only, no remote code."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..contracts.errors import ModelError
from .chat import turn_end

transformers_logging.disable_progress_bar()  # a run has its own

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AFTER_THE_HEAD = (  # fields of configurations whose models do more to the logits than hidden @ head
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
LAYER_TYPES = {"full_attention", "sliding_attention"}
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # from a bad folder


def locate_model(name: str) -> Path:
    """The local folder of a model; a hub id is downloaded (safetensors only). Raises ModelError."""
    if name.startswith("lab:"):
        folder = Path(str(files("tutorloop.lab"))) / "models" / name.removeprefix("lab:")
    else:
        folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(name, folder)
        return folder
    if name.startswith(("lab:", "/", "./", "../", "~")) or name.count("/") != 1:
        raise ModelError("a model is a local folder, a hub id or lab:NAME", f"{name}: no such folder", "check the path")
    from huggingface_hub import snapshot_download  # imported here: only hub ids need it

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # whatever the hub's client raises, the user needs one answer
        reason = f"{name}: no such folder here, and as a hub id: {type(error).__name__}"
        raise ModelError("a model is a local folder, a hub id or lab:NAME", reason, "check the name") from error
    _check_folder(name, folder)
    return folder


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError("a model folder holds config.json", f"{name}: {folder} has none", "give a transformers folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "a model's weights are safetensors", f"{name}: {folder} holds none", "save it with safe_serialization=True"
        )


def check_weights(name: str) -> None:
    """Read the headers of a model's safetensors: a truncated or damaged file is found without loading it."""
    for shard in sorted(locate_model(name).glob("*.safetensors")):
        try:
            with safe_open(shard, "pt"):
                pass
        except UNREADABLE as error:
            raise ModelError("a model's safetensors are whole", f"{shard}: {error}", "copy the file again") from error


def empty_causal_lm(name: str) -> PreTrainedModel:
    """The model on torch's device "meta": its parameters' names and shapes, and no weights. Raises ModelError."""
    try:
        config = load_config(name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except UNREADABLE as error:
        settings = json.loads((locate_model(name) / "config.json").read_text(encoding="utf-8"))
        kind = settings.get("architectures") or settings.get("model_type") or "no architecture named"
        found = f"{name}: {kind}: {error}"
        raise ModelError("transformers has a causal language model of the architecture", found) from error


def check_architecture(name: str) -> None:
    """Refuse a model that transformers lacks, or that would be run otherwise here than it was made. Reads no weights.

    Packed batches keep sequences apart in attention alone, and hidden states times head must be the logits. Raises
    ModelError.
    """
    model = empty_causal_lm(name)
    check_attention(model, name)
    check_head(model, name)


def check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not its last hidden states times one matrix. Raises ModelError naming it."""
    kind, head, config = type(model).__name__, model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ModelError("a model's head is one matrix without bias", f"{name}: {kind} has {head}")
    for field in AFTER_THE_HEAD:
        if getattr(config, field, None) not in (None, 1):
            found = f"{name}: {kind} with {field}={getattr(config, field)}"
            raise ModelError("a model's logits are its last hidden states times its head", found)


def check_attention(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose sequences meet elsewhere than in attention of our own. Raises ModelError naming it."""
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    reasons = {
        "keeps a state": getattr(model, "_is_stateful", False),
        f"has layers of {', '.join(others)}": others,
        "does not let its attention be replaced": not model._supports_attention_backend,
        "has a soft cap in its attention (attn_logit_softcapping)": getattr(config, "attn_logit_softcapping", None),
        "has attention sinks": any(key.endswith("sinks") for key, _ in model.named_parameters()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(
                "a model has plain softmax attention, full or sliding, and nothing else between tokens",
                f"{name}: {type(model).__name__} {reason}",
                "use a model like Qwen3, Llama, Gemma 3, Mistral or Qwen3-MoE",
            )


def load_causal_lm(name: str, dtype: str = "fp32", attention: str = "sdpa", device: str = "cpu") -> PreTrainedModel:
    """A causal language model, in evaluation mode. `attention`: "sdpa", or "packed" for packed batches."""
    folder = locate_model(name)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise ModelError("a model must load with transformers", f"{name}: {error}") from error
    if found["missing_keys"]:  # transformers would draw them at random
        absent = ", ".join(sorted(found["missing_keys"])[:5])
        raise ModelError("a model's folder holds all its weights", f"{name}: {absent} missing", "save the model whole")
    if attention != "sdpa":
        check_attention(model, name)
    return model.to(device=torch.device(device)).eval()  # pyright: ignore[reportCallIssue]


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises ModelError."""
    folder = locate_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "a model folder holds its tokenizer", f"{name}: {error}", "save the tokenizer into it"
        ) from error
    if tokenizer.eos_token is None and (ends := own_eos_ids(name, tokenizer)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])  # what the model's other files say
    return tokenizer


def load_config(name: str) -> Any:
    """The model's transformers configuration."""
    return AutoConfig.from_pretrained(locate_model(name), local_files_only=True)


def own_eos_ids(name: str, tokenizer: Any) -> list[int]:
    """The ids that end a response by the model's files: generation_config.json's first, config.json's, tokenizer's."""
    folder = locate_model(name)
    sources: list[Any] = [load_config(name), tokenizer]
    if (folder / "generation_config.json").is_file():
        sources.insert(0, GenerationConfig.from_pretrained(folder, local_files_only=True))
    found = [getattr(source, "eos_token_id", None) for source in sources]
    listed = [ids if isinstance(ids, list | tuple) else [ids] for ids in found]
    return list(dict.fromkeys(i for ids in listed for i in ids if i is not None))


def eos_ids(name: str, tokenizer: Any) -> list[int]:
    """Every id that ends a response: by the model's files, and the one with which its chat template ends a turn."""
    try:
        end = turn_end(tokenizer)
    except ModelError:  # of several templates none is the default: the run's arguments name one
        end = None
    return sorted({*own_eos_ids(name, tokenizer), *([] if end is None else [end])})


def tokenizer_hash(tokenizer: Any) -> str:
    """Equal for two tokenizers that give every string the same ids: vocabulary, merges, normaliser, added tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    state.pop("padding", None)
    state.pop("truncation", None)
    state = state or {"vocab": tokenizer.get_vocab()}
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def load_lm_head(name: str, dtype: str = "fp32") -> torch.Tensor:
    """A model's output projection `[V, D]` alone, read from its safetensors (the embedding where they are tied)."""
    folder = locate_model(name)
    try:
        for wanted in ("lm_head.weight", "model.embed_tokens.weight"):
            for shard in sorted(folder.glob("*.safetensors")):
                with safe_open(shard, "pt") as tensors:
                    if wanted in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                        return tensors.get_tensor(wanted).to(DTYPES[dtype])
    except SafetensorError as error:
        raise ModelError("a model's weights are safetensors", f"{name}: {error}") from error
    raise ModelError(
        "a teacher of exact divergence has an lm_head or tied embeddings", f"{name}: neither is in {folder}"
    )
