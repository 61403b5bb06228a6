"""Find and load models and tokenizers: a local folder, a hub id, or `lab:NAME`. Safetensors only, no remote code."""

import hashlib
import json
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from ..contracts.errors import ModelError
from .chat import turn_end
from .folders import check_folder, check_settings, read_json, reading, stored_tensors

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
THREADED_PARAMETERS = 2**24  # of fewer, a second thread costs more than it saves
LAYER_TYPES = {"full_attention", "sliding_attention"}
OWN_FILES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # and nobody is asked
TOKENIZER = "save the tokenizer into it with these versions of transformers and tokenizers"


def locate_model(name: str) -> Path:
    """The local folder of a model; a hub id is downloaded (safetensors only). Raises ModelError."""
    if name.startswith("lab:"):
        folder = Path(str(files("tutorloop.lab"))) / "models" / name.removeprefix("lab:")
    else:
        folder = Path(name).expanduser()
    with reading("a model folder can be read", name, "check its permissions, and those of the folders above it"):
        if folder.is_dir():
            check_folder(name, folder)
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
    check_folder(name, folder)
    return folder


def load_config(name: str) -> Any:
    """The model's transformers configuration. Raises ModelError, also for a model that we cannot train or run whole."""
    folder = locate_model(name)
    check_settings(name, folder)
    settings = read_json(name, folder / "config.json")
    kind = _kind(settings)
    if settings.get("auto_map") and settings["model_type"] not in CONFIG_MAPPING:
        raise ModelError(
            "transformers has the model's architecture itself: code of a model's folder is never run",
            f"{name}: {kind} of {settings['model_type']}, whose auto_map names code",
            "use a model of an architecture that transformers has, or save this one's weights as such a one",
        )
    rule, remedy = "transformers can read a model's config.json", "mend it, or use a model that this release knows"
    with reading(rule, f"{name}: {kind}", remedy):
        config = AutoConfig.from_pretrained(folder, **OWN_FILES)
        inner = config.get_text_config()
    if inner is not config:
        found = f"{name}: {kind} wraps {type(inner).__name__}"
        remedy = "save its language model as a folder of its own (docs/engines.md shows how), with the tokenizer"
        raise ModelError("a model is a language model alone, without vision or sound", found, remedy)
    return config


def _kind(settings: dict[str, Any]) -> str:
    named = settings.get("architectures") or settings.get("model_type") or "no architecture named"
    return ", ".join(map(str, named)) if isinstance(named, list) else str(named)


def empty_causal_lm(name: str) -> PreTrainedModel:
    """The model on torch's device "meta": its parameters' names and shapes, and no weights. Raises ModelError."""
    config = load_config(name)
    kind = _kind(read_json(name, locate_model(name) / "config.json"))
    rule = "transformers has a causal language model of the architecture"
    with reading(rule, f"{name}: {kind}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_architecture(name: str) -> None:
    """Refuse a model that transformers lacks, or that would be run otherwise here than it was made. Reads no weights.

    Packed batches keep sequences apart in attention alone, and hidden states times head must be the logits. Raises
    ModelError.
    """
    model = empty_causal_lm(name)
    check_attention(model, name)
    check_head(model, name)
    generation_config(name)


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
        "reads both ways (use_bidirectional_attention, is_causal)": getattr(config, "use_bidirectional_attention", None)
        or getattr(config, "is_causal", None) is False,
        "has attention sinks": any(key.endswith("sinks") for key, _ in model.named_parameters()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(
                "a model has plain softmax attention, full or sliding, and nothing else between tokens",
                f"{name}: {type(model).__name__} {reason}",
                "use a model like Qwen3, Llama, Gemma 3, Mistral or Qwen3-MoE",
            )


def context_length(config: Any) -> int:
    """Most positions of a sequence; very many where the configuration does not say.

    Where a model's frequencies depend on the longest sequence beside which one is read (LongRoPE), it is the length up
    to which they do not: beyond it, a token's logprob would be another in each batch.
    """
    positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    varying = varying_frequencies(config)
    return min(positions, varying[1]) if varying else positions


def varying_frequencies(config: Any) -> tuple[str, int] | None:
    """The `rope_type` of a model whose frequencies depend on its batch, and the most positions at which they do not."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else [own for own in found.values() if isinstance(own, dict)]
    limits = []
    for own in kinds:
        if own.get("rope_type") == "longrope":
            limits.append(("longrope", int(own["original_max_position_embeddings"])))
        elif "dynamic" in str(own.get("rope_type")):
            limits.append((own["rope_type"], int(config.max_position_embeddings)))
    return min(limits, key=lambda limit: limit[1], default=None)


def load_causal_lm(name: str, dtype: str = "fp32", attention: str = "sdpa", device: str = "cpu") -> PreTrainedModel:
    """A causal language model, in evaluation mode. `attention`: "sdpa", or "packed" for packed batches."""
    config, folder = load_config(name), locate_model(name)
    with reading("a model must load with transformers", name):
        model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **OWN_FILES,
        )
    if found["missing_keys"]:  # transformers would draw them at random
        absent = ", ".join(sorted(found["missing_keys"])[:5])
        raise ModelError("a model's folder holds all its weights", f"{name}: {absent} missing", "save the model whole")
    if attention != "sdpa":
        check_attention(model, name)
    return model.to(device=torch.device(device)).eval()  # pyright: ignore[reportCallIssue]


def use_threads(model: PreTrainedModel, threads: int) -> None:
    """Torch threads of this process, which runs `model` and may have `threads`."""
    torch.set_num_threads(threads_for(sum(p.numel() for p in model.parameters()), threads))


def threads_for(parameters: int, threads: int) -> int:
    """How many of `threads` a model makes use of: one if it is small, and no more than there are cores."""
    return 1 if parameters < THREADED_PARAMETERS else min(threads, len(os.sched_getaffinity(0)))


def stored_parameters(name: str) -> int:
    """Parameters of a model's files, by their headers. Raises ModelError."""
    return sum(math.prod(own.shape) for own in stored_tensors(name, locate_model(name)).values())


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises ModelError."""
    folder = locate_model(name)
    with reading("a model folder holds a tokenizer that can be read", f"{name}: {_tokenizer_files(folder)}", TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_FILES)
        words = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    if not words:  # of files that are not there transformers makes an empty one
        found = f"{name}: {_tokenizer_files(folder)}: no tokens but special ones"
        raise ModelError("a model folder holds its tokenizer", found, TOKENIZER)
    if tokenizer.eos_token is None and (ends := own_eos_ids(name, tokenizer)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])  # what the model's other files say
    return tokenizer


def _tokenizer_files(folder: Path) -> str:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    return ", ".join(str(folder / own) for own in names if (folder / own).is_file()) or f"no tokenizer in {folder}"


def generation_config(name: str) -> GenerationConfig | None:
    """The model's generation configuration, where its folder has one. Raises ModelError."""
    folder = locate_model(name)
    if not (folder / "generation_config.json").is_file():
        return None
    rule, remedy = "generation_config.json can be read", "mend it, or remove it"
    read_json(name, folder / "generation_config.json")
    with reading(rule, name, remedy):
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
    ends = found.eos_token_id
    if not all(own is None or isinstance(own, int) for own in (ends if isinstance(ends, list) else [ends])):
        raise ModelError(rule, f"{name}: eos_token_id of {ends!r}", remedy)
    return found


def own_eos_ids(name: str, tokenizer: Any) -> list[int]:
    """The ids that end a response by the model's files: generation_config.json's first, config.json's, tokenizer's."""
    sources: list[Any] = [generation_config(name), load_config(name), tokenizer]
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
