"""A run's folder: who may use it, and checkpoints that are whole or not there."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from run_rows import fresh_rng, step_row

from tutorloop.cluster.checkpoints import Checkpoints, Take
from tutorloop.cluster.recording.metrics import MetricsLog, read_rows
from tutorloop.cluster.recording.run_folder import Checkpoint, RunFolder
from tutorloop.contracts.config import Config
from tutorloop.contracts.errors import CheckpointError, LearnerError, RunFolderError, StorageError
from tutorloop.contracts.recipe import parse_config
from tutorloop.models.digests import Written

GOLDEN = Path(__file__).parents[1] / "golden"


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


async def write_learner(folder: Path) -> None:
    (folder / "learner").mkdir()
    (folder / "learner" / "weights").write_bytes(bytes(range(256)) * 40)


async def nothing_more(folder: Path) -> Written:
    return {}


def save(folder: RunFolder, state: dict, take: Take = write_learner, keep: int = 2) -> None:
    async def whole() -> None:
        checkpoints = Checkpoints(folder, keep)
        await checkpoints.begin(state, take, nothing_more)
        await checkpoints.finish()

    asyncio.run(whole())


def newest(folder: RunFolder) -> Checkpoint | None:
    return folder.latest_checkpoint(lambda said: pytest.fail(said))


def saved(tmp_path: Path, *steps: int, keep: int = 2) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(config())
    for step in steps:
        save(folder, {"step": step}, keep=keep)
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


@pytest.mark.parametrize("left", [".DS_Store", "lost+found", "claim-1", ".config.yaml.tmp"])
def test_what_no_run_has_written_leaves_a_folder_empty(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir() if left == "lost+found" else (tmp_path / left).write_text("{}")
    RunFolder(tmp_path).check(config(), resume=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="another run"):
        RunFolder(tmp_path).check(config(), resume=False)


def test_a_claimed_folder_is_this_processes_alone_until_it_ends(tmp_path: Path) -> None:
    folder, told = RunFolder(tmp_path / "runs" / "one"), list[str]()
    with pytest.raises(KeyError), folder.claimed(config(), False, told.append):
        with pytest.raises(RunFolderError, match=f"process {os.getpid()} on"), folder.claimed(config(), False, print):
            pass
        raise KeyError
    assert not (tmp_path / "runs").exists(), "a start that failed leaves nothing"
    with pytest.raises(SystemExit), folder.claimed(config(), False, told.append):
        folder.create(config())
        for resume in (True, False):
            before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
            other = RunFolder(folder.path)
            with (
                pytest.raises(RunFolderError, match=f"process {os.getpid()} on"),
                other.claimed(config(), resume, print),
            ):
                pass
            assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, "nothing is touched"
        sys.exit(3)
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"] and told == []
    with folder.claimed(config(), True, told.append):
        pass


@pytest.mark.parametrize("place", ["/proc/nope", "FILE/run", "FILE/a/b", "FILE", "LONG", "LINK"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_place_that_takes_no_run(place: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("absent")
    places = {"FILE": str(tmp_path / "file"), "LONG": str(tmp_path / ("x" * 300)), "LINK": str(tmp_path / "link")}
    for mark, name in places.items():
        place = place.replace(mark, name)
    with pytest.raises(RunFolderError), RunFolder(Path(place)).claimed(config(), resume, print):
        pass


@pytest.mark.parametrize("text", ["method: [", "- 1", "", "\xff", "mehtod: opd"])
def test_a_configuration_that_was_damaged_is_named(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path)
    (folder.path / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        folder.check(config(), resume=True)


def test_a_run_of_an_older_version_can_be_continued(tmp_path: Path) -> None:
    """Its config.yaml has none of the keys that came since, and no identity stands beside it."""
    (tmp_path / "config.yaml").write_bytes((GOLDEN / "config_0_4_0.yaml").read_bytes())
    folder = RunFolder(tmp_path)
    folder.check(config(), resume=True)
    folder.check(config(record="all", checkpoint={"minutes": 1}), resume=True)
    with pytest.raises(RunFolderError, match=r"thinking: .* before"):
        folder.check(config(thinking=["<a>", "</a>"]), resume=True)
    with pytest.raises(RunFolderError, match=r"data\.path: 'd' before"):
        folder.check(config(data={"path": "e"}), resume=True)
    assert folder.recorded(None) is None


def test_a_resumed_run_keeps_what_decides_the_weights(tmp_path: Path) -> None:
    """Which key is of which kind: test_resume_keys.py."""
    folder = saved(tmp_path)
    folder.check(config(eval={"every": 7}), resume=True)
    folder.check(config(steps=9, rollout={"replicas": 4}, teacher={"model": "t", "num_cpus": 2}), resume=True)
    folder.check(config(learner={"ranks": 2}), resume=True)
    assert [(change.key, change.kind) for change in folder.changes] == [("learner.ranks", "last bits")]
    with pytest.raises(RunFolderError, match="seed: 0 before, 5 now"):
        folder.check(config(seed=5), resume=True)
    lower = config(learner={"learning_rate": 1e-6})
    with pytest.raises(RunFolderError, match=r"1e-05 before, 1e-06 now\n.*--allow-change learner\.learning_rate"):
        folder.check(lower, resume=True)
    RunFolder(folder.path, allow=["learner.learning_rate"]).check(lower, resume=True)


def test_stages_that_are_done_stay_as_they_were(tmp_path: Path) -> None:
    def staged(*rates: float) -> Config:
        stages = [{"method": "opd", "steps": 2, "learning_rate": rate} for rate in rates]
        return config(method="", steps=0, stages=stages)

    folder = RunFolder(tmp_path, allow=["stages"])
    folder.create(staged(1e-3, 1e-4))
    folder.check(staged(1e-5, 1e-4), resume=True)
    (tmp_path / "stages" / "0").mkdir(parents=True)
    (tmp_path / "stages" / ".1.tmp").mkdir()
    with pytest.raises(RunFolderError, match=r"stages\.0\.learning_rate: .* \(this stage is done"):
        folder.check(staged(1e-5, 1e-4), resume=True)
    folder.check(staged(1e-3, 1e-5, 1e-6), resume=True)
    assert [change.key for change in folder.changes] == ["stages.1.learning_rate", "stages.2"]


def test_the_newest_checkpoint_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2, 10)
    found = newest(folder)
    assert found is not None
    assert found[0].name == "step-000010" and found[1]["step"] == 10
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-000002", "step-000010"]
    assert newest(saved(tmp_path / "other")) is None


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)

    async def fails(path: Path) -> None:
        await write_learner(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space"):
        save(folder, {"step": 2}, fails, keep=1)
    found = newest(folder)
    assert found is not None and found[1]["step"] == 1


def test_a_checkpoint_that_cannot_be_begun_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the run was started: that folder was removed once."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "work").write_text("a year's")
    monkeypatch.chdir(tmp_path / "here")
    folder = saved(tmp_path)
    folder.checkpoints.write_text("a file in its place")
    checkpoints = Checkpoints(folder, 2)

    async def test() -> None:
        for _ in range(2):
            with pytest.raises(OSError, match="checkpoints"):
                await checkpoints.begin({"step": 1}, write_learner, nothing_more)
            await checkpoints.drop()

    asyncio.run(test())
    assert Path("work").read_text() == "a year's" and folder.checkpoints.is_file()


def test_a_folder_that_turns_read_only_says_so_and_keeps_what_stands(full_disk: Path) -> None:
    folder = saved(full_disk, 1, 2)
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    with pytest.raises(StorageError, match="a checkpoint is written into"):
        save(folder, {"step": 3})
    with pytest.raises(StorageError, match="Read-only"):
        folder.write("summary.json", "{}")
    found = newest(folder)
    assert found and found[1]["step"] == 2


def test_a_killed_writers_rest_is_cleared_and_a_saved_step_is_replaced_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path, 999999, 1000000)
    (folder.checkpoints / ".step-000002.tmp" / "learner").mkdir(parents=True)
    (folder.checkpoints / "step-000003.bak").mkdir()
    save(folder, {"step": 1000000, "again": True})
    found = newest(folder)
    assert found is not None and found[1]["again"]
    names = ["step-000003.bak", "step-1000000", "step-999999"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == names


def test_a_full_disk_keeps_what_stands_and_says_so(full_disk: Path) -> None:
    folder = RunFolder(full_disk / "run")

    def files() -> dict[Path, int]:
        found = (path for path in folder.path.rglob("*") if path.is_file() and path.name != "claim-1")
        return {path: path.stat().st_mtime_ns for path in found}

    with folder.claimed(config(), False, print):
        folder.create(config())
        save(folder, {"step": 1})
        asyncio.run(folder.put(folder.path / "final", "the model", write_learner))
        before = files()

        async def too_much(path: Path) -> None:
            (path / "weights").write_bytes(b"x" * 2**21)

        async def in_an_actor(path: Path) -> None:
            raise LearnerError("the learner must finish its call", "PytorchStreamWriter failed writing file")

        for write in (too_much, in_an_actor):
            with pytest.raises(StorageError, match=r"a checkpoint needs room .*\n.* MiB free"):
                save(folder, {"step": 2}, write)
            with pytest.raises(StorageError, match="the model needs room"):
                asyncio.run(folder.put(folder.path / "final", "the model", write))
        with pytest.raises(StorageError, match="the run needs room"), folder.room_for("the run"):
            asyncio.run(too_much(full_disk))
        with pytest.raises(StorageError, match=r"config\.yaml needs room"):
            folder.create(config(seed=7))
        assert before == files()
        found = newest(folder)
        assert found is not None and found[1]["step"] == 1


def test_metrics_that_find_no_room_end_the_run_clearly(full_disk: Path) -> None:
    folder, before = RunFolder(full_disk), threading.enumerate()
    with pytest.raises(StorageError, match="the run needs room"), folder.room_for("the run"), ExitStack() as stack:
        log = MetricsLog(full_disk, "127.0.0.1", 0)
        stack.callback(log.close)
        (full_disk / "fill").write_bytes(bytes(2**20 - 2**15))
        for step in range(1000):
            log.log_step(step_row(fresh_rng(), step))
    rows = read_rows(full_disk / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows))) and rows
    assert threading.enumerate() == before, "none is left to wait for"


def test_a_limit_that_is_no_full_disk_says_so_too(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for number in (errno.EDQUOT, errno.EFBIG):
        with pytest.raises(StorageError, match=os.strerror(number)), folder.room_for("the run"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="read-only"), folder.room_for("the run"):
        raise OSError(errno.EROFS, "read-only")
    with pytest.raises(CheckpointError), folder.room_for("the run"):
        raise CheckpointError("the user's own", "No space left on device")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "empty", "list"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path, 3, 7)
    checkpoint = folder.checkpoints / "step-000007"
    weights = checkpoint / "learner" / "weights"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "flip":
        weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    elif damage == "remove":
        weights.unlink()
    else:
        (checkpoint / "manifest.json").write_text({"manifest": "{", "empty": "{}", "list": "[1]"}[damage])
    said: list[str] = []
    found = folder.latest_checkpoint(said.append)
    assert found is not None and found[1]["step"] == 3
    assert len(said) == 1 and "step-000007 is damaged, and step-000003 is used in its place" in said[0]
    save(folder, {"step": 4})
    found = newest(folder)
    assert found is not None and found[1]["step"] == 4 and not checkpoint.exists()
    for path in folder.all_checkpoints():
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000004.*missing"):
        newest(folder)


@pytest.mark.parametrize("tenth", range(10))
def test_a_file_cut_at_any_tenth_of_its_length_is_found(tmp_path: Path, tenth: int) -> None:
    folder = saved(tmp_path, 1, 2)
    files = [file for file in (folder.checkpoints / "step-000002").rglob("*") if file.is_file()]
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(CheckpointError, match="step-000002"):
            folder.verified(folder.checkpoints / "step-000002")
        file.write_bytes(whole)
    assert folder.verified(folder.checkpoints / "step-000002")[1]["step"] == 2


def test_a_checkpoint_stands_only_once_its_files_are_written_and_one_is_written_at_a_time(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    order: list[str] = []

    async def test() -> None:
        checkpoints, go_on = Checkpoints(folder, 2), asyncio.Event()

        async def slow(path: Path) -> Written:
            await go_on.wait()
            order.append(path.name)
            return {}

        await checkpoints.begin({"step": 2}, write_learner, slow)
        assert [path.name for path in folder.all_checkpoints()] == ["step-000001"]
        second = asyncio.create_task(checkpoints.begin({"step": 3}, write_learner, slow))
        await asyncio.sleep(0.01)
        assert not second.done() and not order
        go_on.set()
        await second
        await checkpoints.finish()
        await checkpoints.begin({"step": 4}, write_learner, fails)
        with pytest.raises(StorageError, match="No space"):
            await checkpoints.finish()
        go_on.clear()
        await checkpoints.begin({"step": 5}, write_learner, slow)
        await checkpoints.drop()

    async def fails(path: Path) -> Written:
        raise OSError(28, "No space left on device")

    asyncio.run(test())
    assert order == [".step-000002.tmp", ".step-000003.tmp"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000002", "step-000003"]
