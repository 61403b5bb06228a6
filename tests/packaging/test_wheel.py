"""The wheel holds what the folders hold: every module, the lab's data and models, the files to deploy; nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = ("tests", "benchmarks", "recipes", "docs")
DATA = ("lab/data/", "lab/models/", "deploy/", "recipes/")


def tree_files() -> list[str]:
    """What a clone would hold, and new files that are not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in set(names) if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that nothing built before and nothing ignored can get in."""
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in tree_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = out.iterdir()
    return built


def packed(wheel: Path) -> list[str]:
    """The wheel's files below `tutorloop/`, relative to it. Nothing but them and the metadata is inside."""
    names = zipfile.ZipFile(wheel).namelist()
    stray = [name for name in names if name.split("/")[0] != "tutorloop" and ".dist-info/" not in name]
    assert not stray
    return [name.removeprefix("tutorloop/") for name in names if name.startswith("tutorloop/")]


def test_modules_are_the_folders_modules(wheel):
    modules = [name for name in tree_files() if name.endswith(".py") and name.split("/")[0] not in NOT_SHIPPED]
    assert sorted(name for name in packed(wheel) if name.endswith(".py")) == modules


def test_package_data_is_inside_and_nothing_else(wheel):
    data = [name for name in tree_files() if name.startswith(DATA) and not name.endswith(".py")]
    assert sorted(name for name in packed(wheel) if not name.endswith(".py")) == data
    assert any(name.startswith("lab/data/") for name in data)
    assert any(name.endswith(".safetensors") for name in data)


def test_what_is_packed_is_what_is_in_the_folders(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        for name in packed(wheel):
            assert archive.read(f"tutorloop/{name}") == (ROOT / name).read_bytes(), name


def test_an_unpacked_wheel_imports_and_finds_its_data(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, pathlib, tutorloop.contracts.config, tutorloop.cli.main\n"
        "from importlib.resources import files\n"
        "print(pathlib.Path(tutorloop.__file__).parents[1], files('tutorloop.lab').joinpath('data').is_dir())\n"
        "from tutorloop.contracts.recipe import load_config\n"
        "print(load_config(pathlib.Path('quickstart')).method)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == [str(tmp_path), "True", "opd"], run.stderr
