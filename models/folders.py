"""A model's folder as it lies on the disk: which files hold the model, and what of it can be told before it is loaded.

`transformers` reads `model.safetensors` where there is one, else the shards that its index names, whatever else lies
beside them. Everyone here who reads weights asks `weight_files`, so that all read the same.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..contracts.errors import ModelError, TutorloopError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEQUANTISE = "take the original, or load it with transformers and save `model.dequantize()`: we train whole weights"
FLOATS = {"F64", "F32", "F16", "BF16"}
INTEGERS = {"I64", "I32", "I16", "BOOL"}  # of buffers such as position ids; a quantised weight is none of these
SHOWN = 400  # characters of a library's own message


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file, by its header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "BF16", …


@contextmanager
def reading(rule: str, name: str, remedy: str = "") -> Iterator[None]:
    """What a library raises inside, whatever it is, becomes a ModelError that names the model `name`.

    The parsers of tokenizers raise bare Exceptions, and where they panic not even these. A machine without memory is
    no fault of a folder.
    """
    try:
        yield
    except (TutorloopError, KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        text = f"{type(error).__name__}: {error}" if type(error) not in (OSError, ValueError) else str(error)
        text = " ".join(text.split()).partition("Please pass the argument `trust_remote_code")[0]  # no key of ours
        raise ModelError(rule, f"{name}: {text if len(text) <= SHOWN else text[:SHOWN] + '…'}", remedy) from error


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder without a configuration, or without weights in a form that we load. Reads neither."""
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors") and file.is_symlink() and not file.exists():
            found = f"{name}: {file} points to {file.readlink()}, which is not there"
            raise ModelError("a model folder's links lead to files", found, "download or copy the model again")
    if not (folder / "config.json").is_file():
        remedy = "give a transformers folder"
        if (folder / "adapter_config.json").is_file():
            remedy = "merge the adapter into its base (peft's merge_and_unload) and save the model whole"
        raise ModelError("a model folder holds config.json", f"{name}: {folder} has none", remedy)
    if not any(folder.glob("*.safetensors")):
        others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(kind))
        found = f"{name}: {folder} holds {', '.join(others[:3]) or 'none'}"
        raise ModelError("a model's weights are safetensors", found, "save it with safe_serialization=True")


def read_json(name: str, file: Path) -> dict[str, Any]:
    """A JSON object of the model's folder. Raises ModelError naming the file."""
    rule, remedy = f"{file.name} of a model is a JSON object", "download or save it again"
    with reading(rule, f"{name}: {file}", remedy):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ModelError(rule, f"{name}: {file} holds a {type(found).__name__}", remedy)
    return found


def check_settings(name: str, folder: Path) -> None:
    """Refuse by its config.json a model that is quantised, has an adapter beside it, or is no model of transformers."""
    settings = read_json(name, folder / "config.json")
    if not isinstance(settings.get("model_type"), str):
        found = f"{name}: {folder / 'config.json'} has no model_type"
        raise ModelError("config.json names the model's architecture", found, "give a transformers folder")
    inner = [value for value in settings.values() if isinstance(value, dict)]
    for field in ("quantization_config", "compression_config", "quantization"):
        own = next((part[field] for part in (settings, *inner) if part.get(field)), None)
        if own is not None:
            method = own.get("quant_method") or own.get("quant_type") or own if isinstance(own, dict) else own
            raise ModelError("a model's weights are not quantised", f"{name}: {field} of {method}", DEQUANTISE)
    if (folder / "adapter_config.json").is_file():
        found = f"{name}: {folder / 'adapter_config.json'} lies beside the model"
        remedy = "merge the adapter (peft's merge_and_unload) and save the model whole, or move the adapter away"
        raise ModelError("a model folder is one model, without an adapter", found, remedy)


def weight_files(name: str, folder: Path) -> list[Path]:
    """The files that transformers loads, sorted. Raises ModelError where they are not all there."""
    entry = _entry(name, folder)
    if not _is_index(entry):
        return [entry]
    shards = sorted({folder / shard for shard in _weight_map(name, entry).values()})
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        found = f"{name}: {entry} names {', '.join(absent[:5])}, not there"
        raise ModelError("every shard that a model's index names is in its folder", found, "download or copy it again")
    return shards


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def _entry(name: str, folder: Path) -> Path:
    """Where transformers begins: the file of the whole model, or else the index of its shards."""
    named = read_json(name, folder / "config.json").get("transformers_weights")  # it goes before the usual names
    usual = [named] if isinstance(named, str) else [WHOLE, INDEX]
    for file in (folder / own for own in usual):
        if file.is_file():
            return file
    has = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
    found = f"{name}: {folder} has {has} instead"
    raise ModelError(f"a model's weights are in {' or '.join(usual)}", found, "save the model whole")


def _weight_map(name: str, index: Path) -> dict[str, str]:
    found = read_json(name, index)
    names = found.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        rule = "a model's index maps its tensors' names to files (weight_map)"
        raise ModelError(rule, f"{name}: {index} has no such map", "download or save it again")
    if not isinstance(found.get("metadata"), dict):
        rule = "a model's index has metadata, which transformers reads"
        raise ModelError(rule, f"{name}: {index} has none", 'add `"metadata": {}` to it, or save the model again')
    return names


def stored_tensors(name: str, folder: Path) -> dict[str, Stored]:
    """Every tensor of the model's files by name, of headers alone. Raises ModelError where a file is damaged, where
    files and index disagree, or where weights are quantised."""
    tensors: dict[str, Stored] = {}
    for file in weight_files(name, folder):
        for key, own in _header(name, file).items():
            if key in tensors:
                found = f"{name}: {key} is in {tensors[key].file.name} and in {file.name}"
                raise ModelError("a tensor is in one of a model's shards", found, "remove the stale shards")
            if own.dtype not in FLOATS | INTEGERS:
                found = f"{name}: {key} in {file} is {own.dtype}"
                raise ModelError("a model's weights are not quantised", found, DEQUANTISE)
            tensors[key] = own
    index = _entry(name, folder)
    for key, shard in _weight_map(name, index).items() if _is_index(index) else ():
        if key not in tensors or tensors[key].file != folder / shard:
            where = f"it is in {tensors[key].file.name}" if key in tensors else "no shard has it"
            found = f"{name}: {index} says that {key} is in {shard}; {where}"
            raise ModelError("a model's shards hold what its index says", found, "download or copy it again")
    return tensors


def _header(name: str, file: Path) -> dict[str, Stored]:
    rule = "a model's safetensors are whole"
    with reading(rule, f"{name}: {file}", "download or copy the file again"):
        with file.open("rb") as content:
            start = content.read(8)
        if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
            found = f"{name}: {file} is a torch pickle"
            raise ModelError("a model's weights are safetensors", found, "save it with safe_serialization=True")
        if start == b"version ":
            raise ModelError(rule, f"{name}: {file} is a Git LFS pointer", "run `git lfs pull` in its folder")
        with safe_open(file, "pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {key: Stored(file, tuple(own.get_shape()), own.get_dtype()) for key, own in slices.items()}
