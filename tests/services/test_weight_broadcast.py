"""A group of real processes over gloo: one is killed while weights are sent, the others say so and meet anew."""

import multiprocessing
import os
import signal
from typing import Any

import pytest
import torch

from tutorloop.cluster.pools.ports import free_port
from tutorloop.contracts.errors import BroadcastBroken
from tutorloop.models import weight_broadcast
from tutorloop.models.weight_broadcast import BroadcastGroup

BYTES, SENT_BEFORE, SENT = 2**22, 3, 200  # a bucket is more than what a socket holds


def member(rank: int, dies: int, ports: tuple[int, int], says: Any) -> None:
    """One dies after some buckets; the others meet at the second port, and the first of them sends one more."""
    group = BroadcastGroup("127.0.0.1", ports[0], rank, 3, "cpu")
    data = torch.full((BYTES,), 7 if rank == 0 else 0, dtype=torch.uint8)
    try:
        for number in range(SENT):
            if rank == dies and number == SENT_BEFORE:
                os.kill(os.getpid(), signal.SIGKILL)
            group.broadcast(data)
    except BroadcastBroken as error:
        says.put((rank, "broken", number >= SENT_BEFORE and group.broken and "rank" in error.found))
    with pytest.raises(BroadcastBroken):
        group.broadcast(data)  # it has left for good
    place = [other for other in range(3) if other != dies].index(rank)
    again = BroadcastGroup("127.0.0.1", ports[1], place, 2, "cpu")
    data = torch.full((BYTES,), 9 if place == 0 else 0, dtype=torch.uint8)
    again.broadcast(data)
    says.put((rank, "met anew", bool((data == 9).all())))
    again.leave()


@pytest.mark.parametrize("dies", [0, 2])
def test_the_others_of_a_killed_process_meet_anew(dies: int) -> None:
    """Of the learner, which sends and holds the meeting's address, or of a replica."""
    context = multiprocessing.get_context("spawn")
    says, ports = context.Queue(), (free_port(), free_port())
    processes = [context.Process(target=member, args=(rank, dies, ports, says)) for rank in range(3)]
    for process in processes:
        process.start()
    said = {says.get(timeout=120) for _ in range(4)}
    others = [rank for rank in range(3) if rank != dies]
    assert said == {(rank, what, True) for rank in others for what in ("broken", "met anew")}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if r == dies else 0 for r in range(3)]


@pytest.mark.parametrize("rank", [0, 1])
def test_who_meets_nobody_does_not_wait_for_ever(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_broadcast, "MEETING_SECONDS", 1.0)
    with pytest.raises(BroadcastBroken, match=f"rank {rank} of 2"):
        BroadcastGroup("127.0.0.1", free_port(), rank, 2, "cpu")
