"""A run's folder: what it holds, whether it can take this run, and checkpoints that are whole or not there.

A checkpoint is written beside its place and renamed into it, with a manifest of sizes and digests that is checked
before a run resumes from it.
"""

import json
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...contracts.config import Config
from ...contracts.errors import CheckpointError, ConfigError, InputError, RunFolderError, StorageError, TutorloopError
from ...contracts.recipe import parse_config
from ...models.digests import Written, digest_of
from ..identity import Identity, local_models
from ..resume_keys import Change, changes
from .claim import FULL, UNWRITABLE, Claim, holder_of, is_claim

Write = Callable[[Path], Awaitable[None]]  # fills a folder
Checkpoint = tuple[Path, dict[str, Any]]  # its folder and its state

CONFIG, IDENTITY = "config.yaml", "identity.json"
STATE, MANIFEST = "state.json", "manifest.json"  # of a checkpoint
NO_RUNS = ("lost+found", "Thumbs.db", "desktop.ini", "@eaDir")  # what systems leave, beside what is hidden
FULL_BYTES = 16 * 2**20  # with less room than this, a failed write is a full disk


@dataclass(slots=True)
class RunFolder:
    """The output folder of one run. `identity`: what the run reads, which its checkpoints name. `allow`: keys that may
    differ from the run's own although they alter its result; `changes`: what does differ (resume_keys.py)."""

    path: Path
    identity: Identity | None = None
    allow: Sequence[str] = ()
    changes: Sequence[Change] = ()
    _claim: Claim | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @contextmanager
    def claimed(self, config: Config, resume: bool, tell: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder for this process alone. `tell` hears of a dead one's claim.

        Raises RunFolderError, StorageError before anything of the folder is touched.
        """
        self.check(config, resume)
        self._claim = Claim.take(self.path, tell)
        try:
            self.check(config, resume)  # another may have come and gone
            yield
        finally:
            self._claim.release()
            self._claim = None

    def check(self, config: Config, resume: bool) -> None:
        """Before anything starts: may this run use the folder? Writes nothing. Raises RunFolderError."""
        try:
            self._check(config, resume)
        except OSError as error:  # it cannot be listed, its name is too long
            found = f"{self.path}: {error.strerror}"
            raise RunFolderError("output_dir can be read and written", found, "choose another output_dir") from error

    def _check(self, config: Config, resume: bool) -> None:
        parent = next(folder for folder in [self.path, *self.path.parents] if folder.exists())
        if not parent.is_dir():
            raise RunFolderError("output_dir is a folder", f"{parent} is a file", "choose another output_dir")
        if resume:
            if not (self.path / CONFIG).is_file():
                raise RunFolderError(
                    "--resume continues the run in output_dir", f"{self.path} holds none", "run without it"
                )
            self._check_same(config, self._saved_config())
        elif parent == self.path and any(map(_is_of_a_run, self.path.iterdir())):
            holder = holder_of(self.path)
            found = f"{self.path} holds another run" + (f", of {holder}" if holder else "")
            remedy = "continue it with --resume, or choose another with output_dir=…"
            raise RunFolderError("a run starts in an empty or new folder", found, remedy)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunFolderError("output_dir can be written", f"{parent} is not writable", "choose another output_dir")

    def _saved_config(self) -> Config:
        file = self.path / CONFIG
        try:
            return parse_config(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, UnicodeDecodeError, ConfigError, TypeError, ValueError) as error:
            remedy = "restore it, or start a new run in another output_dir"
            raise RunFolderError("a run's config.yaml is as it was written", f"{file}: {error}", remedy) from error

    def _check_same(self, config: Config, saved: Config) -> None:
        """By resume_keys.py. The places of data and models may differ where it is known what was read there: that is
        compared once it has been read again. Raises RunFolderError."""
        places = {"data.path", "skills.path", *local_models(config)} if (self.path / IDENTITY).is_file() else set()
        done = sum(1 for left in self.path.glob("stages/*") if left.name.isdecimal())
        self.changes = changes(config, saved, places=places, stages_done=done, allow=self.allow)

    def recorded(self, checkpoint: Checkpoint | None) -> Identity | None:
        """What the run in this folder has read: as its checkpoint says, or the folder itself. None where neither does,
        as in a run of 0.4.0. Raises RunFolderError."""
        file = self.path / IDENTITY
        if checkpoint and checkpoint[1].get("identity"):
            return checkpoint[1]["identity"]
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as error:
            remedy = "restore it, or remove it to continue without comparing"
            raise RunFolderError("a run's identity.json is as it was written", f"{file}: {error}", remedy) from error

    def check_claim(self) -> None:
        """Raises RunFolderError where another process works in the folder by now."""
        if self._claim:
            self._claim.check()

    def create(self, config: Config) -> None:
        """The folder holds a run from here on."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.identity is not None:
            self.write(IDENTITY, json.dumps(self.identity, indent=1))
        self.write(CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def write(self, name: str, text: str) -> None:
        """Replace a file as a whole. Raises StorageError."""
        aside = self.path / f".{name}.tmp"
        try:
            with self.room_for(name):
                aside.write_text(text, encoding="utf-8")
                aside.replace(self.path / name)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise

    @contextmanager
    def room_for(self, what: str) -> Iterator[None]:
        """A block that writes into the folder, here or in an actor: one that fails for want of room, or of leave to
        write, says so. Raises StorageError, and what else the block raises."""
        try:
            yield
        except (InputError, StorageError):
            raise
        except (OSError, TutorloopError) as error:
            free, text = shutil.disk_usage(self.path).free, str(error)
            reason = next((why for why in map(os.strerror, FULL) if why in text), text.split("\n", maxsplit=1)[0])
            if str(self.path) in text and any(os.strerror(number) in text for number in UNWRITABLE):
                remedy = "see that it can be written to, then give the command again with --resume auto"
                raise StorageError(f"{what} is written into {self.path}", text, remedy) from error
            if free < FULL_BYTES or any(os.strerror(number) in text for number in FULL):
                found = f"{reason} ({free / 2**20:.1f} MiB free on the disk of {self.path})"
                remedy = "make room, then give the command again with --resume auto"
                raise StorageError(f"{what} needs room on the disk", found, remedy) from error
            raise

    async def put(self, final: Path, what: str, write: Write) -> None:
        """A folder that is whole or not there: `write` fills it beside its place. Raises StorageError, and then the one
        that stood there stands."""
        aside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with self.room_for(what):
                aside.mkdir(parents=True)
                await write(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _take_the_place(aside, final)

    # ---- checkpoints ----

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder beside the checkpoint's place, for actors to write into. Raises OSError, RunFolderError."""
        self.check_claim()
        for left in self.checkpoints.glob(".step-*"):  # by a process that was killed while it wrote it
            shutil.rmtree(left)
        aside = self.checkpoints / f".step-{step:06d}.tmp"
        aside.mkdir(parents=True)
        return aside

    def end_checkpoint(
        self, aside: Path, state: dict[str, Any], written: Written, keep: int, proven: int | None = None
    ) -> None:
        """State, manifest and the rename; then the newest `keep` stay, and where `proven` is given also the newest of
        at most so many steps and those after it. `written`: files by their paths in `aside`, synced and digested by
        their writers. Raises OSError, and leaves the checkpoints before it."""
        state_file, manifest_file = aside / STATE, aside / MANIFEST
        state_file.write_text(json.dumps({**state, "identity": self.identity}, indent=1), encoding="utf-8")
        files = {str(file.relative_to(aside)): file for file in sorted(aside.rglob("*")) if file.is_file()}
        manifest = {name: written.get(name) or _synced(file) for name, file in files.items()}
        manifest_file.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(manifest_file)
        final = self.checkpoints / f"step-{state['step']:06d}"
        _take_the_place(aside, final)
        found, needed = self.all_checkpoints(), math.inf
        if proven is not None:
            needed = max([step for step in map(_step_of, found) if step <= proven], default=-1)
        for old in found[:-keep]:
            if _step_of(old) < needed:
                shutil.rmtree(old)

    @property
    def standing(self) -> str:
        """What a run that ends now can be continued from, in words."""
        found = self.all_checkpoints()
        return f"continue with --resume from {found[-1]}" if found else "no checkpoint stands"

    def all_checkpoints(self) -> list[Path]:
        """Oldest first; none of them has been verified."""
        found = [path for path in self.checkpoints.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        return sorted(found, key=_step_of)

    def remove_after(self, step: int) -> None:
        """The checkpoints of what a run has gone back from."""
        for path in self.all_checkpoints():
            if _step_of(path) > step:
                shutil.rmtree(path)

    def latest_checkpoint(
        self, tell: Callable[[str], None], wanted: Callable[[int], bool] = lambda step: True
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole, of a step that is `wanted`, and its state; None where there is none.
        Those after it that are not are told, and set aside: they would stand in the way of what is saved from there
        on. Raises CheckpointError where none is whole."""
        broken: dict[Path, CheckpointError] = {}
        for path in [path for path in reversed(self.all_checkpoints()) if wanted(_step_of(path))]:
            try:
                found = self.verified(path)
            except CheckpointError as error:
                broken[path] = error
                continue
            for damaged, error in broken.items():
                tell(f"{damaged.name} is damaged, and {path.name} is used in its place: {error.short}")
                aside = damaged.with_name(f"{damaged.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.replace(aside)
            return found
        for error in broken.values():
            raise error
        return None

    def verified(self, path: Path) -> Checkpoint:
        """A checkpoint and its state. Raises CheckpointError."""
        remedy = "start again in another output_dir, or from the model of an earlier stage or run"
        try:
            written = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            manifest = {name: (size, digest) for name, (size, digest) in written.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError("a checkpoint has its manifest", f"{path}: {error}", remedy) from error
        for name in sorted({STATE, *manifest}):
            file = path / name
            size, digest = manifest.get(name, (0, ""))
            actual = file.stat().st_size if file.is_file() else None
            if actual != size or digest_of(file, like=digest) != digest:
                found = f"{file}: {'missing' if actual is None else f'{actual} bytes of {size}'}"
                if actual == size:
                    found = f"{file}: its bytes changed"
                raise CheckpointError("a checkpoint is as it was written", found, remedy)
        return path, json.loads((path / STATE).read_text(encoding="utf-8"))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _is_of_a_run(path: Path) -> bool:
    """Whether a folder that holds it is another run's: what is hidden, a system's or only claims it is none."""
    return not (path.name.startswith(".") or path.name in NO_RUNS or is_claim(path))


def _take_the_place(aside: Path, final: Path) -> None:
    """One folder in place of another, or of none."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.replace(old)
    aside.replace(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _synced(file: Path) -> tuple[int, str]:
    """The size and digest of a file that is on the disk now."""
    _sync(file)
    return file.stat().st_size, digest_of(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
