"""The real autoscaler with its patience taken: it moves replicas at every step that gives it a reason."""

import random

from scripted import Broken, Fate

from tutorloop.cluster.flow.flow import Flow
from tutorloop.cluster.pools.autoscaler import Autoscaler
from tutorloop.contracts.reliability import Autoscale


def scaled_by_itself(fate: Fate, rng: random.Random) -> None:
    """In some runs the autoscaler moves replicas, at every step that it can see a reason."""
    fate.budget = rng.choice([2.0, 2.4, 3.2]) if rng.random() < 0.3 else 0.0


class JumpyAutoscaler(Autoscaler):
    """Decides from a single step, and is watched: each move keeps to the budget and to what its pools need."""

    def step(self, row):
        self._rows.clear()
        self._rows.append(row)
        self._step = row.step
        self._decide(row)

    def _error(self, busy):
        return 0.0

    def _go(self, loads, run, move, row):
        super()._go(loads, run, move, row)
        wanted = {pool.name: pool.members.wanted for pool in self.pools}
        if sum(0.2 * size for size in wanted.values()) > self.budget["CPU"] + 1e-9 or not all(wanted.values()):
            raise Broken(f"{wanted} replicas of 0.2 CPU each, of {self.budget}")


def jumpy_autoscaler(fate: Fate, flow: Flow, pools: list) -> Autoscaler | None:
    if not fate.budget:
        return None
    return JumpyAutoscaler(Autoscale(cpus=fate.budget), flow, pools, lambda: {"CPU": 10.0}, lambda _: None)
