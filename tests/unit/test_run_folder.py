"""A run's folder: who may use it, and checkpoints that are whole or not there."""

from pathlib import Path

import pytest

from tutorloop.cluster.run_folder import RunFolder
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import CheckpointError, RunFolderError
from tutorloop.contracts.recipe import parse_config


def config(**changes: object) -> Config:
    tree = {
        "method": "opd",
        "output_dir": "x",
        "steps": 3,
        "prompts_per_step": 1,
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "data": {"path": "d"},
    }
    return parse_config({**tree, **changes})


def write_learner(folder: Path) -> None:
    (folder / "learner").mkdir()
    (folder / "learner" / "weights").write_bytes(bytes(range(256)) * 40)


def saved(tmp_path: Path, *steps: int, keep: int = 2) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(config())
    for step in steps:
        folder.save_checkpoint(step, {"step": step}, write_learner, keep)
    return folder


def test_a_folder_takes_one_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check(config(), resume=False)
    with pytest.raises(RunFolderError, match="holds none"):
        folder.check(config(), resume=True)
    folder.create(config())
    folder.check(config(), resume=True)
    with pytest.raises(RunFolderError, match="another run"):
        folder.check(config(), resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "file").check(config(), resume=False)


def test_a_resumed_run_keeps_what_decides_the_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    folder.check(config(eval={"every": 7}), resume=True)
    folder.check(config(steps=9, rollout={"replicas": 4}, teacher={"model": "t", "num_cpus": 2}), resume=True)
    folder.check(config(learner={"learning_rate": 1e-6}), resume=True)
    with pytest.raises(RunFolderError, match="seed: 0 before, 5 now"):
        folder.check(config(seed=5), resume=True)
    with pytest.raises(RunFolderError, match=r"learner\.ranks: 1 before, 2 now"):
        folder.check(config(learner={"ranks": 2}), resume=True)


def test_the_newest_checkpoint_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 10)
    found = folder.latest_checkpoint()
    assert found is not None
    assert found[0].name == "step-000010" and found[1] == {"step": 10}
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000002", "step-000010"]
    assert saved(tmp_path / "other").latest_checkpoint() is None


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)

    def fails(path: Path) -> None:
        write_learner(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.save_checkpoint(2, {}, fails, keep=1)
    found = folder.latest_checkpoint()
    assert found is not None and found[1] == {"step": 1}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path, 1)
    checkpoint = folder.checkpoints / "step-000001"
    weights = checkpoint / "learner" / "weights"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "remove":
        weights.unlink()
    else:
        (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="step-000001"):
        folder.latest_checkpoint()
