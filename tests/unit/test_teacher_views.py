"""Views: each rollout after its prompt with every skill-mistake pair, against dense forwards of each alone."""

from dataclasses import replace

import numpy as np
import pytest
from service_rows import CONTEXT, VOCAB, chat_ids, dense, fresh_random
from tiny import EOS, tiny_qwen3, tiny_tokenizer

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import TeacherError
from tutorloop.contracts.records import Prompt, Rollout, ScoreRequest, TeacherScores
from tutorloop.contracts.skills import SkillPairs
from tutorloop.models.loading import load_causal_lm
from tutorloop.teacher_service.worker import TeacherWorker

TEMPLATE = {"pair@t": "{skill}/{mistake}/{problem}"}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


def rows(random, count=6):
    """Prompts, a rollout or two of each, and pairs: one prompt has none, one fewer than asked for, one repeats."""
    tokenizer, prompts, rollouts, pairs = tiny_tokenizer(), [], [], []
    for p in range(count):
        text = f"{p}+{p}"
        ids = np.array(chat_ids(text), np.int32)
        prompts.append(Prompt(prompt_id=f"p{p}", text=text, token_ids=ids, answer="1"))
        for i in range(1 + p % 2):
            said = "".join(random.choice(list("abc1<"), random.integers(1, 9)))
            response = np.array([*tokenizer(said)["input_ids"], EOS], np.int32)
            rollouts.append(
                Rollout(
                    rollout_id=f"r{p}-{i}",
                    prompt_id=f"p{p}",
                    group_id=f"g{p}",
                    sample_index=i,
                    token_ids=np.concatenate([ids, response]),
                    prompt_length=len(ids),
                    text=said,
                    logprobs=np.zeros(len(response), np.float32),
                    loss_mask=np.ones(len(response), bool),
                )
            )
        if p != 1:
            own = 2 if p == 2 else 3
            weights = random.random(own).astype(np.float32)
            pairs.append(
                SkillPairs(
                    prompt_id=f"p{p}",
                    skill_ids=tuple(f"s{k}" for k in range(own)),
                    mistake_ids=tuple(f"m{k}" for k in range(own)),
                    skills=tuple("s" if p == 3 else "s" * (k + 1) for k in range(own)),
                    mistakes=tuple("m" if p == 3 else "m" * (k + 1) for k in range(own)),
                    weights=weights / weights.sum(),
                )
            )
    return prompts, rollouts, pairs


def score(qwen3, prompts, rollouts, pairs, request, tokens_per_batch=96):
    worker = TeacherWorker(
        teacher_id="t",
        engine="transformers",
        model=str(qwen3),
        dtype="fp32",
        tokens_per_batch=tokens_per_batch,
        templates=TEMPLATE,
    )
    batches = (encode(Rollout, rollouts), request, encode(Prompt, prompts), None, encode(SkillPairs, pairs))
    batch, receipt = worker.score(*batches)
    return decode(TeacherScores, batch), receipt


@pytest.mark.parametrize("top_k", [0, 4])
def test_views_are_the_scores_of_each_context_alone(qwen3, top_k):
    random = fresh_random()
    prompts, rollouts, pairs = rows(random)
    signal = "topk" if top_k else "sampled"
    request = ScoreRequest(signal=signal, top_k=top_k, context="pair@t", views=3)
    scores, receipt = score(qwen3, prompts, rollouts, pairs, request)
    model, pairs_of = load_causal_lm(str(qwen3), "fp32"), {own.prompt_id: own for own in pairs}
    distinct = set()
    for rollout, found in zip(rollouts, scores, strict=True):
        own = pairs_of.get(rollout.prompt_id)
        assert found.rollout_id == rollout.rollout_id
        if own is None:
            assert found.error_class == "no_context" and not found.views.size
            continue
        text = {prompt.prompt_id: prompt.text for prompt in prompts}[rollout.prompt_id]
        response = rollout.token_ids[rollout.prompt_length :]
        assert found.views.shape == (len(response), 3)
        np.testing.assert_allclose(found.view_weights[: len(own.weights)], own.weights, atol=1e-6)
        assert not found.view_weights[len(own.weights) :].any()
        for k, (skill, mistake) in enumerate(zip(own.skills, own.mistakes, strict=True)):
            shown = np.array(chat_ids(f"{skill}/{mistake}/{text}"), np.int32)
            distinct.add((*shown.tolist(), -1, *response.tolist()))
            alone = replace(rollout, token_ids=np.concatenate([shown, response]), prompt_length=len(shown))
            logprobs = dense(model, alone)[1].numpy()
            expected = logprobs[np.arange(len(response)), response]
            np.testing.assert_allclose(found.views[:, k], expected, atol=1e-4)
            if top_k:
                ids = found.topk_ids[:, k * top_k : (k + 1) * top_k]
                best = -np.sort(-logprobs, 1)[:, :top_k]
                np.testing.assert_allclose(found.topk_logprobs[:, k * top_k : (k + 1) * top_k], best, atol=1e-4)
                np.testing.assert_allclose(np.take_along_axis(logprobs, ids.astype(int), 1), best, atol=1e-4)
    assert receipt.rows == len(rollouts) and len(receipt.lengths) == len(distinct)  # what repeats was scored once
    assert receipt.tokens == sum(len(ids) - 1 for ids in distinct)


def test_a_view_that_does_not_fit_is_left_out_and_counted(qwen3):
    random = fresh_random()
    prompts, rollouts, pairs = rows(random)
    long = [replace(own, skills=(*own.skills[:-1], "x " * CONTEXT)) for own in pairs]
    request = ScoreRequest(signal="sampled", context="pair@t", views=3)
    scores, receipt = score(qwen3, prompts, rollouts, long, request)
    good = [found for found in scores if not found.error_class]
    assert receipt.errors == {"view_too_long": len(good), "no_context": len(scores) - len(good)}
    for found in good:
        assert found.view_weights[-1] == 0 and np.isclose(found.view_weights.sum(), 1.0)


def test_the_views_after_a_refused_one_keep_their_places(qwen3):
    """The k-th view is the k-th pair's, whatever became of the others: what is found of it is counted for that pair."""
    prompts, rollouts, pairs = rows(fresh_random())
    request = ScoreRequest(signal="sampled", context="pair@t", views=3)
    whole, _ = score(qwen3, prompts, rollouts, pairs, request)
    broken = [replace(own, skills=("x " * CONTEXT, *own.skills[1:])) for own in pairs]
    scores, _ = score(qwen3, prompts, rollouts, broken, request)
    for before, found in zip(whole, scores, strict=True):
        if not before.error_class:
            assert found.view_weights[0] == 0
            kept = before.view_weights[1:] > 0
            np.testing.assert_allclose(found.views[:, 1:][:, kept], before.views[:, 1:][:, kept], atol=1e-5)


def test_views_without_pairs_are_an_error_of_ours(qwen3):
    prompts, rollouts, _ = rows(fresh_random())
    worker = TeacherWorker(teacher_id="t", engine="transformers", model=str(qwen3), dtype="fp32", templates=TEMPLATE)
    request = ScoreRequest(signal="sampled", context="pair@t", views=2)
    with pytest.raises(TeacherError, match="skills"):
        worker.score(encode(Rollout, rollouts), request, encode(Prompt, prompts))
