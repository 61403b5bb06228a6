"""How long a pool's replicas were busy, up to any moment: a call's time counts while it passes, not when it ends.

A replica is busy while at least one of its calls runs. Of a call that has ended its receipt says when it ran; one that
is open counts since it was sent. So between two moments a replica is busy for at most the time between them, whatever
runs side by side, and what was counted is never taken back.
"""

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Protocol


class BusyTime:
    """Busy seconds of a pool's replicas together, which come and go. `now` is the clock that receipts are stamped with.

    A replica is a number. What it was busy for stays counted when it leaves.
    """

    def __init__(self, replicas: Iterable[int] = (), now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._joined: dict[int, float] = {}  # replica → when
        self._open: dict[int, dict[Hashable, float]] = {}  # replica → call → when it was sent
        self._ended: dict[int, list[tuple[float, float]]] = {}  # an open call may overlap these
        self._settled = 0.0  # seconds that no call to come can overlap
        self._most = 0.0
        self._left = 0.0  # seconds that replicas which have left were there
        for replica in replicas:
            self.joined(replica)

    def joined(self, replica: int) -> None:
        self._joined[replica], self._open[replica], self._ended[replica] = self._now(), {}, []

    def left(self, replica: int) -> None:
        """It has died or was let go. What it still worked on counts until now."""
        if replica not in self._joined:
            return
        now, spans = self._now(), self._ended.pop(replica)
        spans += [(sent, now) for sent in self._open.pop(replica).values()]
        self._settled += sum(end - begin for begin, end in _merged(spans))
        self._left += now - self._joined.pop(replica)

    def sent(self, replica: int, call: Hashable) -> None:
        self._open[replica][call] = self._now()

    def done(self, replica: int, call: Hashable, seconds: float, ended: float) -> None:
        """The call has run for `seconds` until `ended`, which counts as far as it lies between its sending and now."""
        if call not in self._open.get(replica, {}):
            return  # of a replica that has left
        sent, now = self._open[replica].pop(call), self._now()
        end = min(max(ended, sent), now)
        self._ended[replica].append((max(end - seconds, sent), end))

    @property
    def seconds(self) -> float:
        """Until now; it never falls."""
        now, running = self._now(), 0.0
        for replica, calls in self._open.items():
            first = min(calls.values(), default=now)
            merged = _merged(self._ended[replica])
            self._settled += sum(end - begin for begin, end in merged if end <= first)
            self._ended[replica] = [(begin, end) for begin, end in merged if end > first]
            running += sum(end - begin for begin, end in _merged([*self._ended[replica], (first, now)]))
        self._most = max(self._most, self._settled + running)
        return self._most

    @property
    def available(self) -> float:
        """Seconds until now if every replica had always been busy while it was there."""
        now = self._now()
        return self._left + sum(now - since for since in self._joined.values())


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans in order, those that touch as one."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


class WatchedPool(Protocol):
    """What is read of a pool."""

    name: str
    busy: BusyTime


@dataclass(slots=True)
class Watched:
    """What was seen of pools while they were watched, by their names."""

    seconds: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)  # seconds of all replicas together
    available: dict[str, float] = field(default_factory=dict)  # the same if they had always been busy


class Watch:
    """Watches pools while a run trains, and not while it evaluates or saves. The busy share that every display shows is
    busy over available seconds of the time watched: at most 1, because both are read from one clock."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now, self._seen = now, Watched()
        self._pools: dict[WatchedPool, tuple[float, float]] = {}  # busy and available seconds when the watching began
        self._since = 0.0

    def begin(self, pools: Iterable[WatchedPool]) -> None:
        self._since = self._now()
        self._pools = {pool: (pool.busy.seconds, pool.busy.available) for pool in pools}

    def pause(self) -> None:
        seen = self._seen
        seen.seconds += self._now() - self._since if self._pools else 0.0
        for pool, (busy, available) in self._pools.items():
            seen.busy[pool.name] = seen.busy.get(pool.name, 0.0) + pool.busy.seconds - busy
            seen.available[pool.name] = seen.available.get(pool.name, 0.0) + pool.busy.available - available
        self._pools = {}

    def take(self) -> Watched:
        """What was seen since the last time; the watching goes on."""
        pools = list(self._pools)
        self.pause()
        seen, self._seen = self._seen, Watched()
        self.begin(pools)
        return seen
