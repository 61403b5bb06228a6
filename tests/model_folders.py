"""A model's folder as people have it: a copy of the lab's student, and ways to change it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tutorloop.models.checkpoint import check_weights
from tutorloop.models.folders import INDEX, WHOLE
from tutorloop.models.loading import check_architecture, eos_ids, load_tokenizer, locate_model


def check(folder: Path | str) -> None:
    """What `train` and `eval` ask of a model before anything starts."""
    check_architecture(str(folder))
    check_weights(str(folder))
    eos_ids(str(folder), load_tokenizer(str(folder)))


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(locate_model(name), folder))


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
