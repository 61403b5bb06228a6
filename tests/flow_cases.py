"""Work in flight, without Ray: stand-in pools write down what they are sent and answer in a random order.

What a stand-in answers depends on the request alone, so nothing may depend on the order.
"""

import asyncio
import functools
from collections import Counter
from dataclasses import dataclass, replace

from tutorloop.cluster.flow.flow import Flow, Services
from tutorloop.cluster.methods.parts.composition import Composition, SampleSpec, sampling_of, student_group
from tutorloop.cluster.pools.busy import BusyTime
from tutorloop.cluster.pools.services import annotators
from tutorloop.contracts.config import REFERENCE
from tutorloop.contracts.receipts import Receipt, RolloutReceipt, ScoreReceipt, VerdictReceipt
from tutorloop.contracts.recipe import parse_config

ROWS, REPLAYED, PROMPTS = 17, 5, object()


@dataclass(eq=False)
class Asked:
    """A call that was sent, and the future that its caller waits for."""

    method: str
    cost: int
    arguments: dict
    answer: asyncio.Future


def in_loop(test):
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run_it(*args, **arguments):
        return asyncio.run(test(*args, **arguments))

    return run_it


class StandIn:
    """A pool that keeps its calls until the world answers them."""

    def __init__(self, name, world):
        self.name, self.world = name, world
        self.replicas, self.queue_depth, self.tokens, self.errors, self.busy = [name], 0, 0, Counter(), BusyTime([0])

    async def call(self, method, cost, *, counted=True, **arguments):
        assert method == {"verifier": "judge", "skills": "retrieve"}.get(
            self.name, "generate" if "rollout" in self.name else "score"
        )
        asked = Asked(method, cost, arguments, asyncio.get_running_loop().create_future())
        self.world.submitted.append((self.name, asked))
        self.world.pending.append((self.name, asked))
        return await asked.answer


class World:
    """Pools, what they were sent, and how they answer: who passes, how long a response is, under which weights."""

    def __init__(self, rng, passes=lambda request: True):
        self.rng, self.passes, self.version = rng, passes, 0
        self.submitted, self.pending, self.answered = [], [], []
        generators = ("rollout", "teacher_rollout", "dataset_rollout", "replay_rollout")
        names = (*generators, "verifier", "skills", "a", "b", REFERENCE)
        self.pools = {name: StandIn(name, self) for name in names}

    def flow(self, composition, *, first=0, step=0, verifier=True, **changes):
        tree = {
            "method": "grpo",
            "output_dir": "unused",
            "steps": 100,
            "prompts_per_step": 4,
            "seed": 5,
            "student": {"model": "s"},
            "data": {"path": "d"},
            "rollout": {"samples_per_prompt": 3, "batch_size": 6},
        }
        config = parse_config(tree, [f"{key}={value}" for key, value in changes.items()])
        composition = composition(config) if callable(composition) else composition
        teachers = {name: self.pools[name] for name in ("a", "b", REFERENCE)}
        services = Services(
            generators={
                "student": self.pools["rollout"],
                "teacher": self.pools["teacher_rollout"],
                "dataset": self.pools["dataset_rollout"],
                "replay": self.pools["replay_rollout"],
            },
            annotators=annotators(teachers, self.pools["verifier"] if verifier else None, self.pools["skills"]),
        )
        self.teacher_of_row = ["ab"[row % 2] for row in range(ROWS)]
        flow = Flow(config, composition, services, PROMPTS, self.teacher_of_row, first, replayed=REPLAYED)
        flow.admitted = max(first, step)  # a resumed stage has had its first steps
        return flow

    async def settle(self):
        """Let everything go on that waits for no answer."""
        for _ in range(30):
            await asyncio.sleep(0)

    async def admit(self, flow, step):
        flow.admit(step)
        await self.settle()

    async def take(self, flow, step):
        """Take a step while answers come in a random order."""
        taking = asyncio.ensure_future(flow.take(step))
        await self.settle()
        while not taking.done():
            self.answer_one()
            await self.settle()
        return taking.result()

    def answer(self, name, call):
        """Answer one of the calls that wait."""
        self.pending.remove((name, call))
        self.answered.append((name, call))
        if not call.answer.done():
            call.answer.set_result(self.result(name, call))

    def answer_one(self):
        assert self.pending, "waits for an answer that nobody will give"
        self.answer(*self.pending[self.rng.integers(len(self.pending))])

    async def answer_all(self):
        while self.pending:
            self.answer_one()
            await self.settle()

    def result(self, name, call):
        given = call.arguments
        if call.method == "generate":
            assert given["prompts"] is PROMPTS
            requests = given["requests"]
            sizes = tuple(self.length(request) for request in requests)
            return ("rollouts", requests), RolloutReceipt(
                rows=len(requests),
                tokens=sum(sizes),
                seconds=0.0,
                lengths=tuple(size + 10 for size in sizes),
                response_lengths=sizes,
                finish_reasons=tuple("length" if size == 6 else "stop" for size in sizes),
                weight_version=self.version,
            )
        if call.method == "retrieve":
            assert given["prompts"] is PROMPTS
            return ("skills", tuple(given["rows"])), Receipt(rows=len(given["rows"]), seconds=0.0)
        kind, requests = given["rollouts"]
        assert kind == "rollouts"
        if call.method == "score":
            return ("scores", name, requests), ScoreReceipt(rows=len(requests), tokens=1, seconds=0.0)
        passed = tuple(bool(self.passes(request)) for request in requests)
        verdict = VerdictReceipt(
            rows=len(passed),
            seconds=0.0,
            rewards=tuple(map(float, passed)),
            passed=passed,
            abstained=(False,) * len(passed),
            answers=tuple(request.rollout_id for request in requests),
            paths=("",) * len(passed),
        )
        return ("verdicts", requests), verdict

    def length(self, request):
        return 1 + request.seed % 6

    def calls(self, method):
        return [(name, call) for name, call in self.submitted if call.method == method]

    def requests(self):
        return [request for _, call in self.calls("generate") for request in call.arguments["requests"]]


def plain(config):
    return Composition(terms=(), samples=student_group(config), sampling=sampling_of(config))


def mixed(config):
    """The student always, the teacher at every third position, the dataset at every fourth."""

    def samples(step, position):
        extra = [SampleSpec(source="teacher", samples=2)] * (position % 3 == 0) + [SampleSpec(source="dataset")] * (
            position % 4 == 0
        )
        return (SampleSpec(samples=3, context="clue@1"), *extra)

    return replace(plain(config), samples=samples, generators=("student", "teacher", "dataset"))


async def run(world, composition, steps=3, **changes):
    """Admit and take `steps` steps; the shards of each."""
    flow = world.flow(composition, **changes)
    taken = []
    for step in range(steps):
        flow.admit(step)
        world.version = step
        taken.append(await world.take(flow, step))
    return flow, taken
