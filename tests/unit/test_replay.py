"""Replayed answers: which ones a step takes, who does not see them, what they change (nothing but their own loss), and
what is refused before a run starts."""

import hashlib
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flow_cases import REPLAYED, ROWS, World, in_loop, mixed, plain, run
from learner_cases import OneProcess, check_step, slow_losses
from learner_cases import World as Learning
from rich.console import Console
from run_rows import fresh_rng
from tiny import EOS, tiny_qwen3

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster.check import check
from tutorloop.cluster.data import PromptOrder
from tutorloop.cluster.identity import compare, identity_of
from tutorloop.cluster.methods import compose, compose_stages, dapo
from tutorloop.cluster.methods.parts.composition import Credit
from tutorloop.cluster.pools.services import judges_training
from tutorloop.cluster.preflight import Inputs, check_inputs
from tutorloop.cluster.recording.counters import RunCounters
from tutorloop.cluster.recording.samples import ROLLOUTS_FILE, newest_sample, shown_samples
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.config import REFERENCE, Config
from tutorloop.contracts.data_config import Replay
from tutorloop.contracts.errors import DataError, RunFolderError
from tutorloop.contracts.recipe import load_config, parse_config
from tutorloop.contracts.records import (
    Correction,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    ScoreRequest,
    StepReport,
    Term,
    TrainRow,
    seed_of,
)

ROOT = Path(__file__).parents[2]
REPLAY = {"replay.path": "r", "replay.rows_per_step": 3}
TERM = Term(name="nll", label="replay", weight=0.1, sources=("replay",))


def replayed(requests):
    return [request for request in requests if request.source == "replay"]


# ---- which answers, and in which order -------------------------------------------------------------------------------


@in_loop
async def test_each_step_takes_its_own_positions_of_an_order_of_their_own():
    world = World(fresh_rng())
    _, taken = await run(world, mixed, steps=7, **REPLAY)
    order, seen = PromptOrder(REPLAYED, seed_of(5, "replay")), []
    for step, shards in enumerate(taken):
        (shard,) = [shard for shard in shards if shard.source == "replay"]
        assert shards[-1] is shard and shard.attempt == 1 and shard.ready
        for at, request in zip(range(3 * step, 3 * step + 3), shard.requests, strict=True):
            assert (request.rollout_id, request.group_id) == (f"r{at}-0", f"r{at}")
            assert request.row == ROWS + order.row(at) and request.context == "plain"
            seen.append(request.row - ROWS)
    epochs = [seen[at : at + REPLAYED] for at in range(0, 20, REPLAYED)]
    assert all(sorted(epoch) == list(range(REPLAYED)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    assert len({request.rollout_id for request in world.requests()}) == len(world.requests())


@in_loop
async def test_nothing_else_is_asked_otherwise():
    """Every request of two runs, with a replay and without, is what it was before there was one: their digest."""

    async def plan(**changes):
        first = World(fresh_rng())
        await run(first, mixed, steps=3, max_staleness=1, **changes)
        second = World(fresh_rng(), passes=lambda request: request.seed % 3 == 0)
        await run(second, dapo.compose, steps=3, method="dapo", **changes)
        return [*first.requests(), *second.requests()]

    without, beside = await plan(), await plan(**REPLAY)
    assert not replayed(without) and len(replayed(beside)) == 2 * 3 * 3 + 3
    assert sorted(without, key=repr) == sorted((r for r in beside if r.source != "replay"), key=repr)
    told = "\n".join(sorted(map(repr, without)))
    assert (len(without), hashlib.blake2b(told.encode(), digest_size=8).hexdigest()) == (127, "01b8b12afed15beb")


@in_loop
async def test_a_resumed_stage_replays_the_same_answers():
    whole = World(fresh_rng())
    await run(whole, plain, steps=5, **REPLAY)
    rest = World(fresh_rng())
    flow = rest.flow(plain, step=3, **REPLAY)
    for step in (3, 4):
        await rest.admit(flow, step)
        await rest.answer_all()
    assert replayed(rest.requests()) == replayed(whole.requests())[9:]
    others = World(fresh_rng())
    await run(others, plain, steps=5, seed=6, **REPLAY)
    assert [r.row for r in replayed(others.requests())] != [r.row for r in replayed(whole.requests())]


# ---- who does not see them -------------------------------------------------------------------------------------------


@in_loop
async def test_nobody_says_anything_of_them_and_the_method_does_not_see_them():
    credited, followed = [], []

    def composition(config):
        def credit(rollouts, step):
            credited.extend(rollouts)
            return ["unwanted" if rollout.source == "teacher" else Credit(advantage=2.0) for rollout in rollouts]

        def follow_up(rollouts, attempt):
            followed.extend(rollouts)
            return []

        asks = {"scoring": ScoreRequest(everyone=True), "scored": ("student", "teacher", "dataset"), "reference": True}
        return replace(mixed(config), credit=credit, follow_up=follow_up, **asks)

    world = World(fresh_rng())
    flow, (shards,) = await run(world, composition, steps=1, **REPLAY)
    for name, call in world.submitted:
        if call.method != "generate":
            _, requests = call.arguments["rollouts"]
            assert not replayed(requests) and {request.source for request in requests}, name
    rows = flow.trainable(0, shards)
    assert credited and followed and not {"replay"} & {rollout.source for rollout in (*credited, *followed)}
    lengths = [10 + world.length(request) for request in shards[-1].requests]
    expected = [(length, TrainRow(batch=len(shards) - 1, row=row)) for row, length in enumerate(lengths)]
    assert rows[-3:] == expected and all(row.advantage == 2.0 for _, row in rows[:-3])
    assert shards[-1].outcomes == [Credit()] * 3 and flow.dropped == {"unwanted": 2 * 2}
    assert shards[-1].staleness(9) == 0


@in_loop
async def test_a_step_of_which_the_method_trains_nothing_still_replays(monkeypatch):
    monkeypatch.setattr(World, "length", lambda self, request: 0 if request.rollout_id == "r1-0" else 4)
    world = World(fresh_rng())
    nothing = lambda rollouts, step: ["unwanted" for _ in rollouts]  # noqa: E731
    flow, (shards,) = await run(world, lambda c: replace(plain(c), credit=nothing), steps=1, **REPLAY)
    rows = flow.trainable(0, shards)
    assert [row.row for _, row in rows] == [0, 2]
    assert flow.dropped == {"unwanted": 12, "empty_response": 1}


# ---- what is counted -------------------------------------------------------------------------------------------------


async def counted(dropped=None, **changes):
    """The row of a step. `dropped`: what the learner says of the method's rollouts."""
    world = World(np.random.default_rng(3), passes=lambda request: request.seed % 2)
    flow, (shards,) = await run(world, mixed, steps=1, **changes)
    counters, rows = RunCounters(), flow.trainable(0, shards)
    counters.watch.begin(flow.pools)
    trained = len(rows) - sum((dropped or {}).values())
    own = {"rollouts": trained, "metrics": {"grad_norm": 1.0, "missing_scores": 0.0}, "dropped": dropped or {}}
    report = StepReport(loss=0.5, tokens=7, seconds=0.0, **own)
    return counters.step_row(1, shards, report, {"total": 1.0}, flow), world


@in_loop
async def test_they_are_counted_and_enter_no_figure_of_the_method():
    without, _ = await counted()
    row, world = await counted(**REPLAY)
    given = sum(world.length(request) for request in replayed(world.requests()))
    assert row.tokens["given"] - without.tokens["given"] == given > 0
    assert {name: row.rollouts[name] - without.rollouts[name] for name in row.rollouts} == {"taken": 3, "trained": 3}
    apart = ("wall_seconds", "pools", "tokens", "rollouts")
    assert {k: v for k, v in asdict(row).items() if k not in apart} == {
        k: v for k, v in asdict(without).items() if k not in apart
    }


@in_loop
async def test_a_step_without_any_score_is_told_of_beside_them():
    _, world = await counted()
    own = sum(request.source != "replay" for request in world.requests())
    for changes in ({}, REPLAY):
        row, _ = await counted({"teacher_refused": own}, **changes)
        (warning,) = row.warnings
        assert "no rollout got a score" in warning


def test_the_samples_that_are_shown_are_the_methods(tmp_path):
    row = {"kind": "train", "step": 1, "source": "student", "passed": True}
    lines = [json.dumps(row), *[json.dumps({"kind": "train", "step": 1, "source": "replay"})] * 40]
    (tmp_path / ROLLOUTS_FILE).write_text("\n".join(lines) + "\n")
    assert shown_samples(tmp_path) == [row]
    assert newest_sample("\n".join(lines)) is None and newest_sample(lines[0]) == row


def test_every_token_of_a_replayed_answer_trains_whatever_the_method_masks(tmp_path):
    worker = RolloutWorker(engine="fake", model=tiny_qwen3(tmp_path / "m"), dtype="fp32")
    solution = np.array([70, 71, EOS], np.int32)
    prompt = Prompt(prompt_id="p", text="", token_ids=np.array([5, 6], np.int32), answer="", solution_ids=solution)
    requests = tuple(
        SampleRequest(rollout_id=source, group_id="g", sample_index=0, row=0, seed=0, source=source)
        for source in ("replay", "dataset")
    )
    batch, receipt = worker.generate(encode(Prompt, [prompt]), requests, Sampling(max_new_tokens=8, mask_special=True))
    own, given = decode(Rollout, batch)
    assert own.source == "replay" and own.loss_mask.all() and not given.loss_mask[-1]
    assert receipt.tokens == 0 and receipt.surprisal == 0 and own.finish_reason == "stop"


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("recipes/*.yaml")))
def test_every_method_gets_the_term_and_keeps_its_own(name):
    config = load_config(ROOT / "recipes" / f"{name}.yaml").model_copy(update={"replay": None})
    given = config.model_copy(update={"replay": Replay(path="r", weight=0.3)})
    for one, other in zip(compose_stages(config), compose_stages(given), strict=True):
        assert other.terms == (*one.terms, replace(TERM, weight=0.3))
        assert other.generators == (*one.generators, "replay")
        assert judges_training(given, [other]) == judges_training(config, [one]), "nobody judges them"


def of_method(world, name, terms, sources):
    """A random rollout for a method's terms, whose one teacher is `big`."""
    example = world.example(name, source=str(world.rng.choice(sources)), teachers=("big", REFERENCE))
    ones = np.ones(example.rollout.response_length, np.float32)
    credits = {term.credit: ones for term in terms if term.credit}
    return replace(example, rollout=replace(example.rollout, teacher="big"), credits=credits)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("recipes/*.yaml")))
def test_the_replay_changes_no_figure_of_a_method_but_its_own(name):
    """Where the answers have a micro-batch of their own, to the last bit; where they share one, within rounding."""
    config = load_config(ROOT / "recipes" / f"{name}.yaml").model_copy(update={"replay": None})
    made, world = compose(config.of_stage(config.plan[-1])), Learning()
    sources = sorted({source for term in made.terms for source in term.sources})
    own = [of_method(world, f"m{i}", made.terms, sources) for i in range(8)]
    given = [replace(world.example(f"r{i}", source="replay", teachers=()), weight=1.0) for i in range(4)]
    loss = slow_losses(world, world.student(torch.float64), given, [TERM])["replay"].item()
    options = {"correction": made.correction, "heads": world.heads}
    before = OneProcess(world.student(), made.terms, **options).learn(own)
    wanted = {key: value for key, value in before.metrics.items() if key != "grad_norm"}
    for parts in ([range(8), range(8, 12)], [range(12)]):
        after = OneProcess(world.student(), (*made.terms, TERM), **options).learn([*own, *given], [parts])
        found = {key: value for key, value in after.metrics.items() if key not in ("loss_replay", "grad_norm")}
        assert found == (wanted if len(parts) == 2 else pytest.approx(wanted, rel=1e-5, abs=1e-6))
        assert after.metrics["loss_replay"] == pytest.approx(loss, rel=1e-5)
        assert after.loss == pytest.approx(before.loss + 0.1 * loss, rel=1e-5, abs=1e-6)
        assert after.dropped == before.dropped and after.rollouts == before.rollouts + 4
        assert after.tokens == before.tokens + sum(int(e.rollout.loss_mask.sum()) for e in given)


def test_its_gradient_is_added_and_other_denominators_stay():
    """Over random cuts and sources, with terms that count the tokens of the batch."""
    world = Learning()
    terms = (
        Term(name="policy_gradient", weight=0.5, teacher="small", of_batch=True),
        Term(name="clipped_policy_gradient", weight=0.3, of_batch=True),
        Term(name="nll", weight=0.2, sources=("dataset",), of_batch=True),
    )
    own = [world.example(f"m{i}", source=("student", "dataset")[i % 2]) for i in range(9)]
    given = [replace(world.example(f"r{i}", source="replay"), weight=1.0) for i in range(5)]
    student = world.student(torch.float64)
    old = {e.rollout.rollout_id: e.rollout.logprobs for e in own}
    losses = slow_losses(world, student, own, terms, old=old) | slow_losses(world, student, given, [TERM])
    learner = OneProcess(world.student(), (*terms, TERM), Correction(proximal="behaviour"))
    report = learner.learn([*own, *given], [world.cut(14, 4)])
    check_step(learner, report, (*terms, TERM), losses, student)


# ---- what a run reads ------------------------------------------------------------------------------------------------

ROWS_OF = [{"id": f"i{n}", "prompt": f"{n} + {n}", "answer": str(2 * n), "solution": f"{2 * n}"} for n in range(4)]


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(folder: Path, *overrides: str) -> Config:
    tree = {"method": "grpo", "steps": 1, "prompts_per_step": 2, "output_dir": str(folder / "run")}
    tree |= {"student": {"model": "lab:student"}, "data": {"path": lines(folder / "d.jsonl", *ROWS_OF)}}
    tree["data"]["prompt_suffix"] = " Say so."
    return parse_config(tree, list(overrides))


def read(folder: Path, *rows, **changes: str) -> tuple[Config, Inputs]:
    own = [f"replay.path={lines(folder / 'r.jsonl', *rows)}", *(f"{key}={value}" for key, value in changes.items())]
    config = recipe(folder, *own)
    return config, check_inputs(config, compose_stages(config))


def test_rows_are_read_by_their_own_names_and_may_be_those_of_training(tmp_path):
    config, inputs = read(tmp_path, *ROWS_OF)
    assert [p.prompt_id for p in inputs.replay] == [f"replay/{row['id']}" for row in ROWS_OF]
    assert [p.text for p in inputs.replay] == [row["prompt"] for row in ROWS_OF], "no words follow"
    assert [p.text for p in inputs.train] == [f"{row['prompt']} Say so." for row in ROWS_OF]
    assert all(len(prompt.solution_ids) for prompt in inputs.replay)
    (said,) = [note for note in inputs.notes if note.startswith("replay: ")]
    assert said == f"replay: {config.replay.path}: 4 rows, 8 in each step, of weight 0.1"
    console = Console(file=io.StringIO(), width=200)
    assert check(config, False, console) and said in console.file.getvalue().splitlines()
    named = [{"q": [{"role": "user", "content": "hm"}], "a": "yes", "answer": {"of": ["no", "kind"]}, "teacher": "x"}]
    names = {"replay.prompt_field": "q", "replay.solution_field": "a"}
    (prompt,) = read(tmp_path, *named, **names)[1].replay
    assert (prompt.text, prompt.solution, prompt.answer, prompt.teacher) == ("hm", "yes", "", "")
    assert (
        recipe(tmp_path).replay is None and not check_inputs(recipe(tmp_path), compose_stages(recipe(tmp_path))).replay
    )


def test_what_cannot_be_replayed_is_refused_by_its_own_names(tmp_path):
    bare = {name: value for name, value in ROWS_OF[1].items() if name != "solution"}
    with pytest.raises(DataError, match=r"replay\.solution_field") as error:
        read(tmp_path, ROWS_OF[0], bare)
    assert "i1 of" in error.value.found and "r.jsonl" in error.value.found
    with pytest.raises(DataError) as error:
        read(tmp_path, *ROWS_OF, **{"replay.prompt_field": "problem"})
    assert "replay.prompt_field=" in error.value.remedy and "data." not in error.value.remedy
    long = {"prompt": "7 " * 2000, "solution": "7"}
    with pytest.raises(DataError, match="context"):
        read(tmp_path, ROWS_OF[0], long)
    _, inputs = read(tmp_path, ROWS_OF[0], long, **{"data.too_long": "drop"})
    assert len(inputs.replay) == 1 and inputs.left_out == {"too_long_replay": 1}


def test_a_run_that_goes_on_replays_what_it_began_with(tmp_path):
    before = identity_of(*read(tmp_path, *ROWS_OF))
    assert before["replay data"]["rows"] == 4
    assert compare(before, identity_of(*read(tmp_path, *ROWS_OF))) == []
    changed = [*ROWS_OF[:3], {**ROWS_OF[3], "solution": "9"}]
    with pytest.raises(RunFolderError, match="reads what it began with") as error:
        compare(before, identity_of(*read(tmp_path, *changed)))
    assert error.value.found.startswith("replay data: ") and "data:" in error.value.found
    assert "replay data" not in identity_of(
        recipe(tmp_path), check_inputs(recipe(tmp_path), compose_stages(recipe(tmp_path)))
    )
