"""Scripted replicas: they take their time, hold weights, answer what their request decides, and
write down what they were asked. What is wrong with a call is raised where it is made.
"""

import asyncio
import random
import re
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from scripted_broadcast import HALF, Groups

from tutorloop.cluster.pools.busy import BusyTime
from tutorloop.cluster.pools.pool import Pool
from tutorloop.contracts import config as sections
from tutorloop.contracts.errors import (
    BatchLost,
    RolloutError,
    TeacherError,
    VerifierError,
    WeightsMismatch,
)
from tutorloop.contracts.receipts import Receipt, RolloutReceipt, ScoreReceipt, VerdictReceipt

PROMPTS = "prompts"
LATE = 864_000.0  # seconds
ERRORS = {"generate": RolloutError, "score": TeacherError, "judge": VerifierError, "retrieve": VerifierError}


class Broken(AssertionError):
    """An invariant of the run does not hold."""


@dataclass
class Fate:
    """What happens in one run beside the work itself, from its seed: how long calls take, what fails, who stops it."""

    rng: random.Random
    slow: float = 1.0  # mean seconds of a call
    spread: str = "even"  # | long: a few calls take a hundred times as long | none: all take nothing
    failing_call: int = 0  # the number of the call that raises; 0: none
    short_call: int = 0  # the number of the call whose receipt lacks a row
    failing_load: int = 0  # the number of the weight update that raises
    stop_at: float = 0.0  # seconds until Ctrl-C; 0: never
    deaths: list = field(default_factory=list)  # (seconds, how many replicas): who it is, is drawn
    resizes: list = field(default_factory=list)  # (seconds, pool, replicas)
    hanging_calls: tuple = ()  # numbers of calls that are answered ten days late, even by a replica that was ended
    poison: str = ""  # the rollout that takes down whatever replica it is sent to
    lost_batches: tuple = ()  # numbers of calls that find what they read gone
    flaky_calls: tuple = ()  # numbers of calls that fail there, and may succeed elsewhere
    learner_deaths: tuple = ()  # numbers of the learner's calls that it dies of
    learner_hangs: tuple = ()  # numbers of its calls that are answered ten days late
    learner_dies_at: float = 0.0  # seconds until it dies, whatever it does; 0: never
    stillborn: float = 0.0  # the share of later replicas that die while they start
    broadcast: bool = False  # weights go by broadcast
    group_deaths: tuple = ()  # numbers of meetings and transfers, by member, in which a replica of the group dies
    hangs: bool = False  # the learner does not hear the first time that its group breaks
    hung: bool = False  # it has not
    budget: float = 0.0  # CPUs that an autoscaler may give the pools, each replica of which takes 0.2; 0: none is there

    @property
    def learner_faults(self) -> int:
        return len(self.learner_deaths) + len(self.learner_hangs) + bool(self.learner_dies_at) + self.hung

    def delay(self, what: str = "", rollouts: int = 1) -> float:
        """Seconds that it takes: a pool's call about so many rollouts, or a start, a load, the learner's call."""
        if self.spread == "none":
            return 0.0
        long = self.spread == "long" and self.rng.random() < 0.05
        return self.slow * self.rng.random() * (100 if long else 1)


@dataclass
class World:
    """What has happened so far. `published`: by pool, the version that its replicas should hold for what is asked."""

    fate: Fate
    published: dict = field(default_factory=dict)
    calls: int = 0
    loads: int = 0
    steps_done: int = 0
    most_ahead: int = 0  # max_staleness
    per_step: int = 1  # prompt groups
    trained: list = field(default_factory=list)  # (step, rollout id, weight version, advantage)
    asked: set = field(default_factory=set)  # rollouts that were to be generated
    finished_steps: int = 0
    broken: Broken | None = None  # found where nobody would hear it raised
    replicas: list = field(default_factory=list)  # that are alive
    restarts: int = 0
    learner_calls: int = 0
    before: list = field(default_factory=list)  # what was trained before the learner died
    rank: Any = None  # of the learner that there is (scripted_learner.py)
    meetings: int = 0

    def __post_init__(self):
        self.groups = Groups(self)

    def go_on_from(self, before: "World") -> None:
        """What was trained before the run was interrupted."""
        self.trained = list(before.trained)
        self.finished_steps, self.steps_done = before.finished_steps, before.steps_done

    def kill_learner(self) -> None:
        self.rank.die()

    def kill(self, many: int) -> None:
        """Some replicas at once, as when their node dies."""
        for replica in self.fate.rng.sample(self.replicas, min(many, len(self.replicas))):
            replica.die()

    def passes(self, request) -> bool:
        return request.seed % 3 == 0

    def length(self, request) -> int:
        return request.seed % 7

    def check_admitted(self, requests) -> None:
        for request in requests:
            if not request.rollout_id.startswith("eval-"):
                step = position_of(request.rollout_id) // self.per_step
                if step > self.steps_done + self.most_ahead:
                    raise Broken(f"{request.rollout_id} of step {step} is asked for after {self.steps_done} steps")


def position_of(rollout_id: str) -> int:
    """Of its prompt group; a follow-up's id begins with that of the rollout that it follows."""
    return int(re.match(r"\d+", rollout_id)[0])


class ScriptedReplica:
    """Works on `concurrent` calls side by side, the first first; weights come in between two calls, or beside them."""

    def __init__(self, world: World, pool: str, concurrent: int, follows: bool) -> None:
        self.world, self.pool, self.concurrent, self.follows = world, pool, concurrent, follows
        self.version, self.running, self.where = -1, 0, "simulated"
        self.queue, self.answers, self.dead = deque(), [], False
        self.cut_off = False  # it hears of nothing any more, and works on
        self.died_at = 0.0
        self.group, self.ranks = None, ()

    async def ready(self):
        if self.dead:
            raise lost(self.pool)

    def call(self, method, arguments):
        world = self.world
        world.calls += 1
        number, wanted = world.calls, world.published.get(self.pool)
        if method == "generate":
            world.check_admitted(arguments["requests"])
            world.asked.update(request.rollout_id for request in arguments["requests"])
        answer = self._answer()

        began = 0.0

        def begin():
            nonlocal began
            began = asyncio.get_running_loop().time()
            if self.follows and self.version != wanted:
                raise Broken(f"{method} with weights {self.version} in place of {wanted}")
            if world.fate.poison and world.fate.poison in rollouts_of(arguments):
                self.die()
            if number in world.fate.hanging_calls:
                self.cut_off = True
                return LATE
            return world.fate.delay(self.pool, len(rollouts_of(arguments)))

        def end():
            if answer.done():
                return
            if number in world.fate.lost_batches and method != "generate":
                answer.set_exception(BatchLost("a batch is there until it is trained", f"call {number}"))
            elif number in world.fate.flaky_calls:
                error = ERRORS[method]("a service can fail", f"call {number}")
                error.again = True
                answer.set_exception(error)
            elif number == world.fate.failing_call:
                answer.set_exception(ERRORS[method]("a service can fail", f"call {number}"))
            else:
                now = asyncio.get_running_loop().time()
                took = replace(getattr(self, method)(**arguments)[1], seconds=now - began, ended=now)
                answer.set_result(self._short(took, number))

        batch = getattr(self, method)(**arguments)[0]
        self._enqueue(begin, end)
        return batch, answer

    def ask(self, method, *args):
        if method == "join_broadcast":
            _, port, _, size = args
            return self._in_turn(lambda: self.world.groups.enter(self, port, size))
        if method == "receive_weights":
            return self._in_turn(lambda: self._receive(args[0]))
        if method != "load_weights":
            return _done(None)
        answer = self._answer()
        manifest, *_ = args
        self.world.loads += 1
        fails = self.world.loads == self.world.fate.failing_load

        def end():
            if answer.done():
                return
            if fails:
                answer.set_exception(WeightsMismatch("a replica proves its weights", f"version {manifest}"))
                return
            self.version = manifest
            answer.set_result(0.1)

        self._enqueue(partial(self.world.fate.delay, "load"), end)
        return answer

    async def _receive(self, manifest):
        self.version = HALF
        weights = await self.group.transfer(self)
        if weights != manifest:
            raise WeightsMismatch("a canary proves what was sent", f"{weights} in place of {manifest}")
        await asyncio.sleep(self.world.fate.delay("load"))
        self.version = weights

    def _in_turn(self, work):
        """`work()` once it is its turn; what it raises is the answer."""
        answer = self._answer()

        def end(done):
            error = done.exception()
            if not answer.done() and error:
                answer.set_exception(error)
            elif not answer.done():
                answer.set_result(None)

        self._enqueue(lambda: asyncio.ensure_future(work()), end)
        return answer

    def die(self):
        """What it was asked ends with the error that Ray would raise."""
        if self.dead:
            return
        self.dead, self.died_at = True, asyncio.get_running_loop().time()
        self.world.replicas.remove(self)
        if self.group:
            self.group.leave(self)
        for answer in [] if self.cut_off else self.answers:
            if not answer.done():
                answer.set_exception(lost(self.pool))

    def end(self):
        self.die()

    def _answer(self):
        answer = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        if self.dead:
            answer.set_exception(lost(self.pool))
        return answer

    def _enqueue(self, begin, end):
        self.queue.append((begin, end))
        self._next()

    def _next(self):
        while self.queue and self.running < self.concurrent and not self.dead:
            begin, end = self.queue.popleft()
            self.running += 1
            try:
                delay = begin()
            except Broken as error:
                self.world.broken = error
                delay = 0.0
            if isinstance(delay, asyncio.Future):
                delay.add_done_callback(lambda done, end=end: self._over(partial(end, done)))
                continue
            asyncio.get_running_loop().call_later(delay, self._over, end)

    def _over(self, end):
        self.running -= 1
        if not self.dead or self.cut_off:
            end()
        self._next()

    def _short(self, receipt, number):
        if number != self.world.fate.short_call:
            return receipt
        short = {"rows": receipt.rows - 1}
        short |= {name: getattr(receipt, name)[:-1] for name in receipt.PER_ROW}
        return replace(receipt, **short)

    # ---- what it answers: a function of the request ----

    def generate(self, prompts, requests, sampling):
        assert prompts == PROMPTS
        sizes = tuple(self.world.length(request) for request in requests)
        receipt = RolloutReceipt(
            rows=len(requests),
            tokens=sum(sizes),
            seconds=0.0,
            lengths=tuple(size + 10 for size in sizes),
            response_lengths=sizes,
            finish_reasons=tuple("length" if size == 6 else "stop" for size in sizes),
            weight_version=max(0, self.version),
        )
        return ("rollouts", requests), receipt

    def retrieve(self, prompts, rows, k):
        return ("skills", tuple(rows)), Receipt(rows=len(rows), seconds=0.0)

    def score(self, rollouts, request, prompts=None, verdicts=None, skills=None):
        _, requests = rollouts
        if verdicts is not None and verdicts[1] is not requests:
            raise Broken("a teacher is shown another shard's verdicts")
        return ("scores", requests), ScoreReceipt(rows=len(requests), tokens=1, seconds=0.0)

    def judge(self, rollouts, prompts):
        _, requests = rollouts
        passed = tuple(self.world.passes(request) for request in requests)
        receipt = VerdictReceipt(
            rows=len(passed),
            seconds=0.0,
            rewards=tuple(map(float, passed)),
            passed=passed,
            abstained=tuple(request.seed % 11 == 0 for request in requests),
            answers=tuple(str(request.seed % 5) for request in requests),
            paths=tuple(str(request.seed % 2) for request in requests),
        )
        return ("verdicts", requests), receipt


class ScriptedBackend:
    """Starts scripted replicas, in place of Ray."""

    def __init__(self, world: World, follows: set[str]) -> None:
        self.world, self.follows = world, follows

    def start(self, who, worker, error_type, need, concurrent_calls, arguments):
        replica = ScriptedReplica(self.world, need.pool, concurrent_calls, need.pool in self.follows)
        self.world.replicas.append(replica)
        return replica

    async def started(self, need, replicas, tell):
        """At once the first ones; later ones take their time, and some die of it."""
        if not self.world.published:
            return
        self.world.restarts += 1
        (replica,) = replicas
        await asyncio.sleep(self.world.fate.delay("start"))
        if self.world.fate.rng.random() < self.world.fate.stillborn:
            replica.die()
        if replica.dead:
            raise lost(replica.pool)


class ScriptedPool(Pool):
    """Notes which weights were published, and the tokens of what it answered."""

    world: World
    answered = 0

    async def call(self, method, cost, *, counted=True, **arguments):
        batch, receipt = await super().call(method, cost, counted=counted, **arguments)
        self.answered += receipt.tokens if counted else 0
        return batch, receipt

    def publish(self, version, method, *args):
        self.world.published[self.name] = version
        super().publish(version, method, *args)

    def send(self, version, members, method, *args):
        self.world.published[self.name] = version
        return super().send(version, members, method, *args)


def scripted_pool(
    name: str, world: World, backend: ScriptedBackend, replicas: int, concurrent: int, **own: Any
) -> ScriptedPool:
    settings = sections.Pool(replicas=replicas, max_restarts_per_minute=1000, max_attempts=20, **own)
    pool = ScriptedPool(name, object, settings, RolloutError, backend, concurrent_calls=concurrent)
    pool.world = world
    pool.busy = pool.members.busy = BusyTime(now=asyncio.get_running_loop().time)
    return pool


def lost(pool):
    """A replica's death, as the pool hears it."""
    return RolloutError("a pool keeps its replicas", pool).as_lost()


def rollouts_of(arguments):
    """Ids of the rollouts that a call is about."""
    requests = arguments["requests"] if "requests" in arguments else arguments.get("rollouts", ("", ()))[1]
    return [request.rollout_id for request in requests]


def _done(value):
    answer = asyncio.get_running_loop().create_future()
    answer.set_result(value)
    return answer
