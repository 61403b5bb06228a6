"""A scripted process group: those who meet in it, what is sent through it, and what becomes of both when one dies."""

import asyncio
from itertools import count

from tutorloop.contracts.errors import BroadcastBroken

MEETING = 60.0  # seconds
HALF = -2  # the weights of a replica whose broadcast broke


def broken(what):
    return BroadcastBroken("a scripted group is whole", what)


def sent_by_broadcast(fate, rng) -> None:
    """Some runs send their weights that way; then somebody may die while they meet or send."""
    fate.broadcast = rng.random() < 0.4
    if fate.broadcast:
        fate.group_deaths = tuple(rng.randint(1, 40) for _ in range(rng.randint(0, 2)))
        fate.hangs = rng.random() < 0.2


class Groups:
    """Of one run, by the port at which each meets."""

    def __init__(self, world):
        self.world, self.ports, self.at_port = world, count(1), {}

    async def enter(self, who, port, size):
        """Leave the group that `who` was in, and meet the others."""
        if who.group:
            who.group.leave(who)
        who.group = self.at_port.setdefault(port, Group(self.world, size))
        await who.group.meet(who)


class Group:
    """`size`: the members that it has once all have met."""

    def __init__(self, world, size):
        self.world, self.size, self.here, self.broken = world, size, [], False
        self.met = asyncio.get_running_loop().create_future()
        self.waiting = {}  # member → the future of what is sent

    async def meet(self, who):
        self.here.append(who)
        self._somebody_dies()
        if len(self.here) == self.size and not self.broken:
            await asyncio.sleep(self.world.fate.delay())
            if not self.broken and not self.met.done():
                self.met.set_result(None)
        await asyncio.wait({self.met}, timeout=MEETING)
        if not self.met.done() or self.broken:
            raise broken("not all were there")

    async def transfer(self, who, weights=None):
        """The weights, which one of them gives, once all have them."""
        if self.broken or who not in self.here:
            raise broken("one had left before")
        assert who not in self.waiting, "one is sent weights twice at a time"
        done = self.waiting[who] = asyncio.get_running_loop().create_future()
        if weights is not None:
            self.weights = weights
        if len(self.waiting) == self.size:
            asyncio.get_running_loop().call_later(self.world.fate.delay(), self._sent)
        self._somebody_dies()
        return await done

    def _sent(self):
        waiting, self.waiting = self.waiting, {}
        for done in waiting.values():
            if not done.done():
                done.set_result(self.weights)

    def leave(self, who):
        """Or die. The others hear of it, one after the other; those who have all that is sent may not notice."""
        if self.broken:
            return
        self.broken, fate = True, self.world.fate
        waiting, self.waiting = self.waiting, {}
        almost_done = len(waiting) == self.size and fate.rng.random() < 0.5
        for other, done in waiting.items():
            if other is not who and fate.hangs and other.ranks:
                fate.hangs, fate.hung = False, True  # once a run, the learner does not notice
            elif other is not who and almost_done and fate.rng.random() < 0.5:
                done.set_result(self.weights)
            else:
                asyncio.get_running_loop().call_later(fate.delay(), _break, done)

    def _somebody_dies(self):
        """In the middle of it, where the fate says so."""
        self.world.meetings += 1
        if self.world.meetings in self.world.fate.group_deaths:
            members = [one for one in self.here if not one.ranks]
            if members:
                victim = self.world.fate.rng.choice(members)
                asyncio.get_running_loop().call_later(self.world.fate.delay(), victim.die)


def _break(done):
    if not done.done():
        done.set_exception(broken("one has left"))
        done.exception()
