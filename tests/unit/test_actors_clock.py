"""Calls side by side share the seconds."""

from itertools import pairwise

import pytest
from service_rows import fresh_random

from tutorloop.actors.clock import BusyClock


def test_shares_sum_to_the_time_in_which_any_call_ran():
    random = fresh_random()
    for _ in range(50):
        calls = [sorted(random.random(2).tolist()) for _ in range(int(random.integers(1, 6)))]
        events = sorted((at, i, end) for i, call in enumerate(calls) for end, at in enumerate(call))
        times = iter([at for at, _, _ in events])
        clock, open_calls, shares = BusyClock(lambda times=times: next(times)), {}, {}
        for _, i, end in events:
            if end:
                shares[i] = clock.stop(open_calls[i])
            else:
                open_calls[i] = clock.start()
        edges = [at for at, _, _ in events]
        running = {gap: [i for i, (a, b) in enumerate(calls) if a <= gap[0] and gap[1] <= b] for gap in pairwise(edges)}
        for i in range(len(calls)):
            wanted = sum((b - a) / len(own) for (a, b), own in running.items() if i in own)
            assert shares[i] == pytest.approx(wanted)
        assert sum(shares.values()) == pytest.approx(sum(b - a for (a, b), own in running.items() if own))
