"""Busy time accrues while it passes: a fake clock, random calls, and a slow reference on a grid of moments."""

from itertools import pairwise

import pytest
from run_rows import fresh_rng

from tutorloop.cluster.pools.busy import BusyTime


class Clock:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def test_a_long_call_counts_in_every_step_that_it_spans():
    clock = Clock()
    busy = BusyTime(range(2), clock)
    busy.sent(0, "long")
    seen = [busy.seconds]
    for _ in range(3):
        clock.at += 10
        seen.append(busy.seconds)
    busy.done(0, "long", seconds=30, ended=clock.at)
    clock.at += 10
    assert [*seen, busy.seconds] == [0, 10, 20, 30, 30]


def test_calls_side_by_side_count_once_a_replica():
    clock = Clock()
    busy = BusyTime(range(2), clock)
    for replica, call in ((0, "a"), (0, "b"), (1, "c")):
        busy.sent(replica, call)
    clock.at += 10
    assert busy.seconds == 20
    busy.done(0, "a", seconds=4, ended=104)  # noticed late
    busy.done(0, "b", seconds=9, ended=110)
    busy.done(1, "c", seconds=3, ended=110)
    assert busy.seconds == 20  # what was counted is not taken back
    clock.at += 20
    busy.sent(0, "d")
    clock.at += 5
    busy.done(0, "d", seconds=99, ended=999)  # by another clock: it counts between its sending and now
    assert busy.seconds == 20  # 10 + 3 + 5 have passed
    busy.sent(1, "e")
    clock.at += 5
    assert busy.seconds == 23


def test_no_moment_counts_twice_and_the_sum_is_right():
    rng = fresh_rng()
    for _ in range(50):
        clock, replicas = Clock(), int(rng.integers(1, 4))
        busy = BusyTime(range(replicas), clock)
        open_calls, spans, last = {}, [[] for _ in range(replicas)], 0.0
        for number in range(60):
            before = clock.at
            clock.at += float(rng.random())
            replica = int(rng.integers(replicas))
            if rng.random() < 0.5:
                busy.sent(replica, number)
                open_calls[number] = (replica, clock.at)
            elif open_calls:
                call = list(open_calls)[int(rng.integers(len(open_calls)))]
                own, sent = open_calls.pop(call)
                begin = sent + float(rng.random()) * (clock.at - sent)
                busy.done(own, call, clock.at - begin, clock.at)
                spans[own].append((begin, clock.at))
            now = busy.seconds
            assert -1e-9 <= now - last <= replicas * (clock.at - before) + 1e-9
            last = now
        for call, (own, sent) in open_calls.items():
            busy.done(own, call, clock.at - sent, clock.at)
            spans[own].append((sent, clock.at))
        truth = 0.0
        for own in spans:
            edges = sorted({edge for span in own for edge in span})
            gaps = pairwise(edges)
            truth += sum(b - a for a, b in gaps if any(begin <= a and b <= end for begin, end in own))
        fresh = BusyTime(range(replicas), clock)  # without a look on the way nothing is counted too early
        clock.at = 100.0
        for replica, own in enumerate(spans):
            for i in range(len(own)):
                fresh.sent(replica, i)
        clock.at = 1000.0
        for replica, own in enumerate(spans):
            for i, (begin, end) in enumerate(own):
                fresh.done(replica, i, end - begin, end)
        assert fresh.seconds == pytest.approx(truth) and truth <= last + 1e-9
