"""SGSD as a composition, what it is refused for, and its way through the flow: retrieve, then score every view."""

import numpy as np
import pytest
from flow_cases import PROMPTS, World, in_loop

from tutorloop.cluster.methods import compose
from tutorloop.cluster.methods.parts.composition import Composition, RolloutSummary, sampling_of, student_group
from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import Prompt, SampleRequest, ScoreRequest
from tutorloop.lab import model_path
from tutorloop.models.chat import special_ids
from tutorloop.models.loading import load_tokenizer

TREE = {
    "method": "sgsd",
    "output_dir": "unused",
    "steps": 10,
    "prompts_per_step": 2,
    "student": {"model": "s"},
    "teacher": {"model": "s", "signal": "sampled", "follows": "live"},
    "skills": {"path": "bank"},
    "data": {"path": "d"},
}


def composed(options=None, **changes):
    tree = {**TREE, **changes}
    return compose(parse_config({**tree, "method_options": options or {}}, []))


def rollout(**known):
    base = {"rollout_id": "r", "group_id": "g", "source": "student", "context": "plain", "length": 3}
    return RolloutSummary(**{**base, "truncated": False, **known})


def test_the_defaults_are_the_papers():
    made = composed()
    assert made.scoring == ScoreRequest(signal="sampled", context="skills@1", views=8)
    [term] = made.terms
    assert (term.name, term.reduction, made.needs_verdicts, made.sampling.mask_special) == (
        "skill_gate",
        "sequences",
        True,
        True,
    )
    own = {"validated": True, "tau": 1.0, "delta_clip": 3.0, "confidence": 0.05, "support": "sampled"}
    assert term.options == own and made.correction.kind == "truncated"


def test_the_local_support_asks_for_the_views_best_ids():
    made = composed({"support": "local", "top_k": 5}, teacher={"model": "s", "signal": "topk", "follows": "ema"})
    assert made.scoring and (made.scoring.signal, made.scoring.top_k, made.scoring.views) == ("topk", 5, 8)


def test_outcomes_become_signs():
    rollouts = [
        rollout(passed=True),
        rollout(passed=False),
        rollout(passed=False, abstained=True),
        rollout(passed=False, truncated=True),
    ]
    signs = [credit.advantage for credit in composed().credit(rollouts, 0)]
    assert signs == [1.0, -1.0, 0.0, -1.0]
    signs = [credit.advantage for credit in composed({"truncated": "neutral"}).credit(rollouts, 0)]
    assert signs == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"skills": None}, "skills.path"),
        ({"template": "answer@1"}, {}, "shows a skill"),
        ({"top_k": 3}, {}, "top_k is for support=local"),
        ({"pairs": 0}, {}, "pairs"),
        ({}, {"teacher": {"model": "t", "signal": "sampled"}}, "student's own model"),
        ({}, {"verifier": {"kind": "none"}}, "verdicts"),
        ({"support": "local"}, {}, "teacher.signal=topk"),
        ({"template": "peer@1"}, {}, "shows what is known"),
    ],
)
def test_what_cannot_be_is_refused(options, changes, message):
    with pytest.raises(ConfigError, match=message):
        composed(options, **changes)


def test_a_bank_that_no_method_shows_is_refused():
    from tutorloop.cluster.methods import compose_stages

    tree = {**TREE, "method": "opsd", "method_options": {}}
    with pytest.raises(ConfigError, match="no teacher skills"):
        compose_stages(parse_config(tree, []))
    with pytest.raises(ConfigError, match="no skill is retrieved"):
        compose(parse_config({**tree, "method_options": {"template": "hint@1"}}, []))


def viewed(config):
    asked = ScoreRequest(signal="sampled", context="skills@1", views=3)
    return Composition(terms=(), samples=student_group(config), sampling=sampling_of(config), scoring=asked)


@in_loop
async def test_teachers_wait_for_the_skills_of_a_shard_and_get_them():
    """In whatever order generation, retrieval and verdicts come, each score call has the pairs of its own prompts."""
    for seed in range(20):
        world = World(np.random.default_rng(seed))
        flow = world.flow(viewed)
        flow.admit(0)
        shards = await world.take(flow, 0)
        await world.answer_all()
        assert len(world.calls("retrieve")) == len(shards)
        for shard in shards:
            assert shard.skills == ("skills", tuple(request.row for request in shard.requests))
        for _, call in world.calls("score"):
            (_, requests), given = call.arguments["rollouts"], call.arguments
            assert given["request"].views == 3 and given["prompts"] is PROMPTS and "verdicts" not in given
            assert given["skills"] == ("skills", tuple(asked.row for asked in requests))


def test_special_tokens_and_newlines_are_masked():
    tokenizer = load_tokenizer(str(model_path("student")))
    masked = set(special_ids(tokenizer).tolist())
    assert set(tokenizer.all_special_ids) <= masked
    for token in masked:
        text = tokenizer.decode([token])
        assert not text.strip() or token in tokenizer.all_special_ids or text.startswith("<")
    for word in ("1", "+", "=", " 7"):
        assert not masked & set(tokenizer(word, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("mask", [False, True])
def test_a_rollout_worker_masks_them_where_it_is_asked_to(mask):
    from dataclasses import replace

    from tutorloop.actors.worker import RolloutWorker
    from tutorloop.contracts.arrow import decode, encode
    from tutorloop.contracts.records import Rollout, Sampling

    model = str(model_path("student"))
    tokenizer = load_tokenizer(model)
    worker = RolloutWorker(engine="transformers", model=model, dtype="fp32")
    ids = np.asarray(tokenizer("3 + 4 =")["input_ids"], np.int32)
    prompts = encode(Prompt, [Prompt(prompt_id="p", text="3 + 4 =", token_ids=ids, answer="7")])
    requests = tuple(SampleRequest(rollout_id=str(i), group_id="g", sample_index=i, row=0, seed=i) for i in range(4))
    sampling = replace(Sampling(max_new_tokens=24), mask_special=mask)
    special = special_ids(tokenizer)
    for rollout in decode(Rollout, worker.generate(prompts, requests, sampling)[0]):
        response = rollout.token_ids[rollout.prompt_length :]
        expected = ~np.isin(response, special) if mask else np.ones(len(response), bool)
        np.testing.assert_array_equal(rollout.loss_mask, expected)
        assert not mask or not rollout.loss_mask.all() or rollout.finish_reason == "length"
