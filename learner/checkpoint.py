"""What training goes on from: float32 weights and Adam's moments, parameter by parameter, in safetensors files.

A rank holds fragments: of each parameter that trains the elements from `start` on, as ZeRO shards them. A checkpoint is
the fragments of all ranks, each with its parameter's name and place, so that other ranks, another ZeRO stage or dtype
read what is theirs (DeepSpeed calls such a checkpoint universal). No rank waits for another to write it.

A snapshot copies the fragments into host memory, and a thread writes the files beside the steps that follow. Where the
host has no room for the copy, the files are written at once.
"""

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..contracts.errors import CheckpointError
from ..models.digests import Written
from .tensor_file import write_tensors

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2**28  # about, of one file
ROOM = 1.25  # times the snapshot: what the host must have free for it


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements of the parameter `name` from `start` on: float32 [n] of its weight and, once it has moved, its moments.
    `updates`: how many Adam has made."""

    name: str
    shape: tuple[int, ...]
    start: int
    updates: float
    values: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    def copy(self) -> "Fragment":
        """In host memory, apart from what trains."""
        own = {kind: value.to("cpu", copy=True) for kind, value in self.values.items()}
        return Fragment(self.name, self.shape, self.start, self.updates, own)


# ---- where DeepSpeed keeps them -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Of a parameter's elements this rank holds `size` from `start` on: in `flat`, which the optimizer updates, they
    stand from `at` on."""

    flat: Tensor
    at: int
    start: int
    size: int
    shape: tuple[int, ...]

    def of(self, array: Tensor) -> Tensor:
        """Its elements of an array with `flat`'s shape."""
        return array.detach().view(-1).narrow(0, self.at, self.size)


def _places(engine: Any) -> Iterator[tuple[str, Any, Place]]:
    """Of every parameter that trains: its name, itself, and this rank's part of it, which may have no element."""
    rank, optimizer = torch.distributed.get_rank(), engine.optimizer
    masters = _masters(optimizer)
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if hasattr(p, "ds_tensor"):  # ZeRO-3 cuts each into as many parts as ranks, the last ones padded
            group, at, part = optimizer.grad_position[optimizer.get_param_id(p)]
            flat, start = optimizer.fp32_partitioned_groups_flat[group], rank * part
            yield name, p, Place(flat, at, start, max(0, min(part, p.ds_numel - start)), tuple(p.ds_shape))
        elif not hasattr(p, "_hp_mapping"):  # stage 0: every rank has it whole
            yield name, p, Place(masters[id(p)] if masters else p, 0, 0, p.numel(), tuple(p.shape))
        elif own := p._hp_mapping:  # stages 1 and 2 cut all of them as if they were one
            flat, held = optimizer.single_partition_of_fp32_groups[own.param_group_index], own.hp_fragment_address
            yield name, p, Place(flat, held.start, own.lp_fragment_address.start, held.numel, tuple(p.shape))
        else:
            yield name, p, Place(p, 0, 0, 0, tuple(p.shape))


def _masters(optimizer: Any) -> dict[int, Tensor]:
    """Of stage 0 in bf16: the float32 weights that DeepSpeed's wrapper updates, by the parameters' ids."""
    pairs = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
    return {id(p): own for low, high in pairs for p, own in zip(low, high, strict=True)}


def fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank is to write, as it stands in memory. What all ranks have whole is rank 0's to write."""
    if engine.zero_optimization_stage() == 0 and torch.distributed.get_rank():
        return
    for name, _, place in _places(engine):
        if not place.size:
            continue
        state = engine.basic_optimizer.state.get(place.flat, {})
        values = {WEIGHT: place.of(place.flat)} | {kind: place.of(state[kind]) for kind in MOMENTS if kind in state}
        yield Fragment(name, place.shape, place.start, float(state.get("step", 0.0)), values)


# ---- writing --------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes one rank's part of a checkpoint, one checkpoint at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._written: Written = {}
        self._error: Exception | None = None

    def begin(self, engine: Any, folder: Path) -> None:
        """Take the snapshot. What has to be as it is now, is once this returns."""
        self.end()
        self._written, self._error = {}, None
        own = list(fragments(engine))
        if psutil.virtual_memory().available < ROOM * sum(fragment.bytes for fragment in own):
            self._write(own, folder)
            return
        snapshot = [fragment.copy() for fragment in own]
        self._thread = threading.Thread(target=self._write, args=(snapshot, folder), daemon=True)
        self._thread.start()

    def written(self) -> Written | None:
        """The files, once all are on the disk; None before. Raises what writing them raised."""
        if self._thread and self._thread.is_alive():
            return None
        if self._error:
            raise self._error
        return self._written

    def end(self) -> None:
        """Once nothing is written any more."""
        if self._thread:
            self._thread.join()

    def _write(self, own: list[Fragment], folder: Path) -> None:
        """Lets go of each file's fragments when it is written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            rank, number = torch.distributed.get_rank(), 0
            while own:
                file = folder / f"rank-{rank:05d}-{number:05d}.safetensors"
                self._written[file.name] = write_fragments(file, _first(own))
                number += 1
        except Exception as error:  # for whoever asks
            self._error = error


def _first(own: list[Fragment]) -> list[Fragment]:
    """The first of them, of together about a file's bytes; they leave the list."""
    taken, size = [], 0
    while own and size < FILE_BYTES:
        taken.append(own.pop(0))
        size += taken[-1].bytes
    return taken


def write_fragments(file: Path, own: Iterable[Fragment]) -> tuple[int, str]:
    """One file, on the disk; its size and digest. Raises OSError."""
    own = list(own)
    tensors = {f"{kind}.{one.name}": value.cpu().contiguous() for one in own for kind, value in one.values.items()}
    known = {one.name: [list(one.shape), one.start, one.updates] for one in own}
    return write_tensors(file, tensors, {"fragments": json.dumps(known)})


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Piece:
    """A fragment in a file."""

    tensors: Any  # the open file
    start: int
    size: int
    updates: float
    moved: bool


@dataclass(slots=True)
class Saved:
    """A checkpoint's fragments: parameter → where its elements are."""

    folder: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Saved":
        """Raises CheckpointError."""
        saved = cls(folder)
        try:
            for file in sorted(folder.glob("rank-*.safetensors")):
                tensors: Any = safe_open(file, "pt")
                names = set(tensors.keys())
                for name, (shape, start, updates) in json.loads(tensors.metadata()["fragments"]).items():
                    size = tensors.get_slice(f"{WEIGHT}.{name}").get_shape()[0]
                    moved = f"{MOMENTS[0]}.{name}" in names
                    saved.shapes[name] = tuple(shape)
                    saved.pieces.setdefault(name, []).append(Piece(tensors, start, size, updates, moved))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            found = f"{folder}: {type(error).__name__}: {error}"
            raise CheckpointError("a learner's checkpoint is readable", found, "resume from an older one") from error
        return saved

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError where these are not all elements of the parameters with `shapes`."""
        if self.shapes != shapes:
            differing = sorted(
                name for name in self.shapes.keys() | shapes if self.shapes.get(name) != shapes.get(name)
            )
            found = f"{self.folder}: {', '.join(differing[:3])} and {len(differing)} in all differ, or none is there"
            raise CheckpointError("a checkpoint is of the student's parameters", found, "resume with the same student")
        for name, shape in shapes.items():
            held = sum(piece.size for piece in self.pieces[name])
            if held != torch.Size(shape).numel():
                found = f"{self.folder}: {held} elements of {name}, which is {list(shape)}"
                raise CheckpointError("a checkpoint has the files of all ranks", found, "resume from an older one")

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Elements `start` to `start + size`: float32 [size]; of moments that there are none of yet, zeros."""
        found = torch.zeros(size)
        for piece in self.pieces[name]:
            first, last = max(start, piece.start), min(start + size, piece.start + piece.size)
            if first < last and (piece.moved or kind == WEIGHT):
                part = piece.tensors.get_slice(f"{kind}.{name}")[first - piece.start : last - piece.start]
                found[first - start : last - start] = part
        return found

    def updates(self, name: str) -> float:
        return max(piece.updates for piece in self.pieces[name])

    def moved(self, name: str) -> bool:
        return any(piece.moved for piece in self.pieces[name])


@torch.no_grad()
def restore(engine: Any, folder: Path) -> None:
    """Go on from a checkpoint, of whatever ranks, ZeRO stage and dtype; every rank reads. Raises CheckpointError."""
    saved, own = Saved.of(folder), list(_places(engine))
    saved.check({name: place.shape for name, _, place in own})
    sharded = engine.zero_optimization_stage() == 3
    if sharded:
        engine.optimizer.checkpoint_event_prologue()  # what is whole on every rank is put together again below
    state = engine.basic_optimizer.state
    state.clear()
    for name, p, place in own:
        part = saved.read(WEIGHT, name, place.start, place.size)
        if place.size:
            place.of(place.flat).copy_(part)
        if place.size and saved.moved(name):
            moments = _fresh_state(state, place.flat)
            moments["step"].fill_(saved.updates(name))
            for kind in MOMENTS:
                place.of(moments[kind]).copy_(saved.read(kind, name, place.start, place.size))
        if sharded:
            p.ds_tensor.view(-1).narrow(0, 0, place.size).copy_(part)
        elif place.flat is not p or not place.size:  # the forward pass reads another array, whole, of the model's dtype
            p.copy_(saved.read(WEIGHT, name, 0, p.numel()).view(p.shape))
    if sharded:
        engine.optimizer.checkpoint_event_epilogue()
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed keeps views of the moments, and so these


def _fresh_state(state: Any, flat: Tensor) -> dict[str, Tensor]:
    """Adam's of an array, as its first step makes it."""
    if flat not in state:
        zeros = {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS}
        state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **zeros}
    return state[flat]
