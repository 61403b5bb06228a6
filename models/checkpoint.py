"""A model's stored tensors against the model that its configuration describes, told from headers; and its head alone.

transformers itself says what it would load: it is given tensors of the stored names and shapes without their contents.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging as transformers_logging

from ..contracts.errors import ModelError
from .folders import Stored, reading, stored_tensors
from .loading import DTYPES, empty_causal_lm, locate_model


def check_weights(name: str) -> None:
    """Refuse a folder whose files do not hold the whole model of its configuration, and nothing else.

    Headers are read, and contents only of a head beside an embedding that the configuration ties it to. Raises
    ModelError.
    """
    stored = stored_tensors(name, locate_model(name))
    model = empty_causal_lm(name)
    empty = {key: torch.empty(own.shape, device="meta") for key, own in stored.items()}
    with reading("a model must load with transformers", name, "save it again with transformers"), _quiet():
        _, found = type(model).from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            None,
            config=model.config,
            state_dict=empty,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    kind = f"{name}: {type(model).__name__}"
    if found["mismatched_keys"]:
        key, theirs, ours = min(found["mismatched_keys"], key=str)
        text = f"{kind}: {key} is {list(theirs)} in the folder, {list(ours)} by config.json"
        remedy = "its config.json and its weights are of two models: copy both from one"
        raise ModelError("a model's weights have the shapes of its configuration", text, remedy)
    if found["missing_keys"]:  # transformers would draw them at random
        text = f"{kind}: {_some(found['missing_keys'])} missing"
        raise ModelError("a model's folder holds all its weights", text, "save the model whole")
    if found["unexpected_keys"]:
        text = f"{kind} has no {_some(found['unexpected_keys'])}"
        remedy = "config.json and weights are of two models, or parts were added: save the one model with transformers"
        raise ModelError("a model's folder holds nothing that its model would leave out", text, remedy)
    _check_tie(name, model, stored)


def _some(keys: set[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join(shown) + (f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own report of what it finds would repeat ours."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_tie(name: str, model: PreTrainedModel, stored: dict[str, Stored]) -> None:
    """Where a tied head is stored beside its embedding, engines differ in which they take unless both are equal."""
    head, embedding = _head_key(model, stored), _embedding_key(model, stored)
    if not model.config.tie_word_embeddings or head is None or embedding is None:
        return
    if not torch.equal(_tensor(name, head, stored), _tensor(name, embedding, stored)):
        found = f"{name}: {head} and {embedding} differ, and config.json has tie_word_embeddings=true"
        raise ModelError("a tied head is the embedding", found, "set tie_word_embeddings to false in its config.json")


def load_lm_head(name: str, dtype: str = "fp32") -> torch.Tensor:
    """A model's output projection `[V, D]` alone, out of the files that transformers loads: its own, or the embedding
    where the configuration ties the two. Raises ModelError."""
    folder = locate_model(name)
    stored, model = stored_tensors(name, folder), empty_causal_lm(name)
    key = _head_key(model, stored)
    if key is None and model.config.tie_word_embeddings:
        key = _embedding_key(model, stored)
    if key is None:
        found = f"{name}: {type(model).__name__} in {folder} has neither"
        raise ModelError("a teacher of exact divergence has an lm_head or tied embeddings", found)
    return _tensor(name, key, stored).to(DTYPES[dtype])


def _tensor(name: str, key: str, stored: dict[str, Stored]) -> torch.Tensor:
    file = stored[key].file
    with (
        reading("a model's safetensors are whole", f"{name}: {file}", "copy the file again"),
        safe_open(file, "pt") as f,
    ):
        return f.get_tensor(key)


def _head_key(model: PreTrainedModel, stored: dict[str, Stored]) -> str | None:
    return _stored_key(model, model.get_output_embeddings(), stored)


def _embedding_key(model: PreTrainedModel, stored: dict[str, Stored]) -> str | None:
    return _stored_key(model, model.get_input_embeddings(), stored)


def _stored_key(model: Any, module: Any, stored: dict[str, Stored]) -> str | None:
    """The stored name of a module's weight, by the renamings with which transformers loads the model."""
    wanted = next((f"{name}.weight" for name, own in model.named_modules() if own is module), None)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    known = model.state_dict()
    for key in stored:
        own = rename_source_key(key, renamings, converters, model.base_model_prefix, known)[0]
        if own == wanted or key == wanted:
            return key
    return None
