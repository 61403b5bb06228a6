"""What records beside the run: lines are written once and in order, whoever collects them, and whoever gives up."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from run_rows import fresh_rng

from tutorloop.cluster.recording.recorder import Recorder
from tutorloop.cluster.recording.samples import ROLLOUTS_FILE
from tutorloop.contracts.errors import TutorloopError


def record(tmp_path) -> Recorder:
    async def run(_call, _wanted, number, fails):
        await asyncio.sleep(number % 7 / 1000)
        if fails:
            raise TutorloopError("a batch is read", "its replica is gone", "")
        return json.dumps({"kind": "train", "step": number}) + "\n"

    return Recorder(tmp_path, "all", None, SimpleNamespace(run=run))  # type: ignore[arg-type]


@pytest.mark.parametrize("trial", range(5))
def test_lines_are_written_once_and_in_order_whoever_collects_them(tmp_path, trial):
    rng = fresh_rng()
    recorder, fails = record(tmp_path), rng.random(60) < 0.2

    async def collects() -> None:
        others = []
        for number, fail in enumerate(fails):
            recorder.add([recorder._lines([], number, bool(fail))])
            if rng.random() < 0.3:
                others.append(asyncio.create_task(recorder.collect(wait=bool(rng.random() < 0.7))))
            if others and rng.random() < 0.2:
                others[-1].cancel()
            await asyncio.sleep(0)
            await recorder.collect()
        await recorder.collect(wait=True)
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(collects())
    written = [json.loads(line)["step"] for line in (tmp_path / ROLLOUTS_FILE).read_text().splitlines()]
    assert written == [number for number, fail in enumerate(fails) if not fail]
    assert recorder.lost == fails.sum()
    assert recorder.newest == {"kind": "train", "step": written[-1]}


def test_who_waits_is_not_kept_by_what_is_asked_for_later(tmp_path):
    recorder = record(tmp_path)

    async def collects() -> None:
        recorder.add([recorder._lines([], 1, False)])
        waiting = asyncio.create_task(recorder.collect(wait=True))
        await asyncio.sleep(0)
        recorder.add([asyncio.get_running_loop().create_future()])  # never there
        await asyncio.wait_for(waiting, 5)

    asyncio.run(collects())
    assert json.loads((tmp_path / ROLLOUTS_FILE).read_text()) == {"kind": "train", "step": 1}
