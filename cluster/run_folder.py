"""A run's folder: what it holds, whether it can take this run, and checkpoints that are whole or not there.

A checkpoint is written beside its place and renamed into it, with a manifest of sizes and digests that is checked
before a run resumes from it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..contracts.config import Config
from ..contracts.errors import CheckpointError, RunFolderError, StorageError, TutorloopError
from ..contracts.recipe import parse_config

FULL_BYTES = 16 * 2**20  # with less room than this, a failed write is a full disk
# First or last parts of the keys that may differ between a run and its continuation: where it runs, how long, and what
# is written about it; and the rate, as a person chooses. Everything else decides the weights.
MAY_DIFFER = (
    *("steps", "output_dir", "eval", "checkpoint", "metrics", "replicas", "num_cpus", "num_gpus"),
    *("learning_rate", "min_learning_rate"),  # lowered to go on before what was not finite
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The output folder of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check(self, config: Config, resume: bool) -> None:
        """Before anything starts: may this run use the folder? Writes nothing. Raises RunFolderError."""
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError("output_dir is a folder", f"{self.path} is a file", "choose another output_dir")
        saved = self.path / "config.yaml"
        if resume:
            if not saved.is_file():
                raise RunFolderError(
                    "--resume continues the run in output_dir", f"{self.path} holds none", "run without it"
                )
            self._check_same(config, parse_config(yaml.safe_load(saved.read_text(encoding="utf-8"))))
        elif self.path.exists() and any(self.path.iterdir()):
            remedy = "continue it with --resume, or choose another with output_dir=…"
            raise RunFolderError("a run starts in an empty or new folder", f"{self.path} holds another run", remedy)
        parent = next(folder for folder in [self.path, *self.path.parents] if folder.exists())
        if not os.access(parent, os.W_OK):
            raise RunFolderError("output_dir can be written", f"{parent} is not writable", "choose another output_dir")

    def _check_same(self, config: Config, saved: Config) -> None:
        new, old = _leaves(config.model_dump()), _leaves(saved.model_dump())
        differing = [
            f"{key}: {old.get(key)!r} before, {new.get(key)!r} now"
            for key in sorted(new.keys() | old.keys())
            if new.get(key) != old.get(key) and not {key.split(".")[0], key.split(".")[-1]} & set(MAY_DIFFER)
        ]
        if differing:
            rule = f"a resumed run keeps its configuration, but for {', '.join(MAY_DIFFER)}"
            remedy = "restore it, or start a new run in another output_dir"
            raise RunFolderError(rule, "\n         ".join(differing), remedy)

    def create(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole."""
        aside = self.path / f".{name}.tmp"
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.path / name)

    # ---- checkpoints ----

    def save_checkpoint(self, step: int, state: dict[str, Any], write: Callable[[Path], None], keep: int) -> Path:
        """`write(folder)` puts the actors' files in; then the state, the manifest, and the rename."""
        final = self.checkpoints / f"step-{step:06d}"
        aside = self.checkpoints / f".{final.name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self._write_checkpoint(aside, state, write)
        except (OSError, TutorloopError) as error:
            free = shutil.disk_usage(self.path).free
            shutil.rmtree(aside, ignore_errors=True)
            if free < FULL_BYTES:
                found = f"{free / 2**20:.1f} MiB are free on the disk of {self.path}"
                remedy = "make room, then continue with --resume from the checkpoint before it"
                raise StorageError("a checkpoint needs room on the disk", found, remedy) from error
            raise
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)
        _sync(self.checkpoints)
        for old in self._all_checkpoints()[:-keep]:
            shutil.rmtree(old)
        return final

    def _write_checkpoint(self, aside: Path, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        aside.mkdir(parents=True)
        write(aside)
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = sorted(file for file in aside.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(aside)): [file.stat().st_size, _digest(file)] for file in files}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in [*files, aside / "manifest.json"]:
            _sync(file)

    def _all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step-*"))

    def latest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint, verified, and its state; None where there is none. Raises CheckpointError."""
        found = self._all_checkpoints()
        if not found:
            return None
        newest = found[-1]
        remedy = f"remove {newest} to resume from the one before it, or start again in another output_dir"
        try:
            manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError("a checkpoint has its manifest", f"{newest}: {error}", remedy) from error
        for name, (size, digest) in manifest.items():
            file = newest / name
            actual = file.stat().st_size if file.is_file() else None
            if actual != size or _digest(file) != digest:
                found_text = f"{file}: {'missing' if actual is None else f'{actual} bytes of {size}'}"
                if actual == size:
                    found_text = f"{file}: its bytes changed"
                raise CheckpointError("a checkpoint is as it was written", found_text, remedy)
        return newest, json.loads((newest / "state.json").read_text(encoding="utf-8"))


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
