"""A made-up run that can be asked and told, for the tests of who asks it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tutorloop.cluster.control.live import LIVE
from tutorloop.contracts.status import PoolStatus, ReplicaStatus, RunStatus, StepStatus


class Scripted:
    """A run with two pools, which does what it is told, or raises what it was given."""

    def __init__(self) -> None:
        self.have = {"rollout": 1, "teacher": 2}
        self.told: list[Mapping[str, int]] = []
        self.fails: Exception | None = None

    def status(self) -> RunStatus:
        if self.fails:
            raise self.fails
        replica = ReplicaStatus(number=0, state="serving", seconds=1.5, version=7, calls=2, where="process 1 on here")
        fixed = {"least": 1, "most": 4, "waiting": 0, "oldest_seconds": 3.0, "restarts": 0, "retries": 0}
        return RunStatus(
            method="opd",
            phase="training",
            step=7,
            steps=20,
            version=7,
            seconds=61.0,
            pools=[PoolStatus(name=name, wanted=n, replicas=[replica] * n, **fixed) for name, n in self.have.items()],
            in_flight=[StepStatus(step=8, seconds=2.0, shards=4, ready=1, waits_for=Counter(teacher=3))],
            dropped=Counter(stale=5),
        )

    def scale(self, wanted: Mapping[str, int]) -> dict[str, int]:
        self.told.append(wanted)
        if self.fails:
            raise self.fails
        before = {pool: self.have[pool] for pool in wanted}
        self.have |= wanted
        return before


def live(folder: Path) -> dict:
    return json.loads((folder / LIVE).read_text())


def rewrite(folder: Path, **changes) -> None:
    (folder / LIVE).write_text(json.dumps({**live(folder), **changes}))


def address(folder: Path) -> tuple[str, int]:
    host, port = live(folder)["url"].removeprefix("http://").rsplit(":", 1)
    return host, int(port)
