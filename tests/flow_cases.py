"""Work in flight, without Ray: stand-in pools write down what they are sent and answer in a random order.

What a stand-in answers depends on the request alone, so nothing may depend on the order.
"""

from collections import Counter
from dataclasses import replace

from tutorloop.cluster import flow as module
from tutorloop.cluster.busy import BusyTime
from tutorloop.cluster.flow import Flow, Services
from tutorloop.cluster.interrupt import Interrupt
from tutorloop.cluster.methods.composition import Ask, Composition, sampling_of, student_group
from tutorloop.contracts.config import REFERENCE
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import Receipt

ROWS, PROMPTS = 17, object()


class StandIn:
    """A pool that keeps its calls until the world answers them."""

    def __init__(self, name, world):
        self.name, self.world = name, world
        self.replicas, self.queue_depth, self.tokens, self.errors, self.busy = [name], 0, 0, Counter(), BusyTime(1)

    def submit(self, call):
        assert call.method == {"verifier": "judge", "skills": "retrieve"}.get(
            self.name, "generate" if "rollout" in self.name else "score"
        )
        self.world.submitted.append((self.name, call))
        self.world.pending.append((self.name, call))


class World:
    """Pools, what they were sent, and how they answer: who passes, how long a response is, under which weights."""

    def __init__(self, rng, monkeypatch, passes=lambda request: True):
        self.rng, self.passes, self.version = rng, passes, 0
        self.submitted, self.pending, self.answered = [], [], []
        names = ("rollout", "teacher_rollout", "dataset_rollout", "verifier", "skills", "a", "b", REFERENCE)
        self.pools = {name: StandIn(name, self) for name in names}
        monkeypatch.setattr(module, "pump", lambda pools: self.answer_one())

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
        services = Services(
            generators={
                "student": self.pools["rollout"],
                "teacher": self.pools["teacher_rollout"],
                "dataset": self.pools["dataset_rollout"],
            },
            teachers={name: self.pools[name] for name in ("a", "b", REFERENCE)},
            verifiers=self.pools["verifier"] if verifier else None,
            skills=self.pools["skills"],
        )
        self.teacher_of_row = ["ab"[row % 2] for row in range(ROWS)]
        flow = Flow(config, composition, services, PROMPTS, self.teacher_of_row, first, Interrupt(print))
        flow.admitted = max(first, step)  # a resumed stage has had its first steps
        return flow

    def answer_one(self):
        assert self.pending, "waits for an answer that nobody will give"
        name, call = self.pending.pop(self.rng.integers(len(self.pending)))
        self.answered.append((name, call))
        call.done(*self.result(name, call))

    def answer_all(self):
        while self.pending:
            self.answer_one()

    def result(self, name, call):
        if call.method == "generate":
            prompts, requests, _ = call.args
            assert prompts is PROMPTS
            sizes = tuple(self.length(request) for request in requests)
            return ("rollouts", requests), Receipt(
                rows=len(requests),
                tokens=sum(sizes),
                seconds=0.0,
                lengths=tuple(size + 10 for size in sizes),
                response_lengths=sizes,
                finish_reasons=tuple("length" if size == 6 else "stop" for size in sizes),
                weight_version=self.version,
            )
        if call.method == "retrieve":
            prompts, rows, _ = call.args
            assert prompts is PROMPTS
            return ("skills", tuple(rows)), Receipt(rows=len(rows), tokens=0, seconds=0.0)
        kind, requests = call.args[0]
        assert kind == "rollouts"
        if call.method == "score":
            return ("scores", name, requests), Receipt(rows=len(requests), tokens=1, seconds=0.0)
        passed = tuple(bool(self.passes(request)) for request in requests)
        verdict = Receipt(
            rows=len(passed),
            tokens=0,
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
        return [request for _, call in self.calls("generate") for request in call.args[1]]


def plain(config):
    return Composition(terms=(), asks=student_group(config), sampling=sampling_of(config))


def mixed(config):
    """The student always, the teacher at every third position, the dataset at every fourth."""

    def asks(step, position):
        extra = [Ask(source="teacher", samples=2)] * (position % 3 == 0) + [Ask(source="dataset")] * (position % 4 == 0)
        return (Ask(samples=3, context="clue@1"), *extra)

    return replace(plain(config), asks=asks, generators=("student", "teacher", "dataset"))


def run(world, composition, steps=3, **changes):
    """Admit and take `steps` steps; the shards of each."""
    flow = world.flow(composition, **changes)
    taken = []
    for step in range(steps):
        flow.admit(step)
        world.version = step
        taken.append(flow.take(step))
    return flow, taken
