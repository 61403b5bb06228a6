"""Who answers and what it is shown: given solutions, and responses sampled after a hint that is then stripped."""

from dataclasses import replace

import numpy as np
import pytest
from service_rows import CONTEXT, VOCAB, chat_ids, fresh_random, random_prompts, slow_rollout
from tiny import EOS, tiny_qwen3

from tutorloop.actors.worker import RolloutWorker
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ConfigError, ModelError
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling
from tutorloop.models.loading import load_causal_lm


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


def asked(row, source="student", context="plain", number=0):
    name = f"{source}-{context}-{row}-{number}"
    seed = 1000 * row + number
    return SampleRequest(
        rollout_id=name, group_id=f"g{row}", sample_index=number, row=row, seed=seed, source=source, context=context
    )


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_the_dataset_answers_with_its_own_solution(engine, qwen3):
    """Among sampled rollouts, which it does not disturb."""
    random = fresh_random()
    solutions = [random.integers(5, VOCAB, n).astype(np.int32) for n in (4, 9, 0, 8)]
    prompts = [
        Prompt(prompt_id=f"p{i}", text="", token_ids=ids, answer="", solution_ids=solution)
        for i, (ids, solution) in enumerate(zip(random_prompts(random, [3, 5, 4, 6]), solutions, strict=True))
    ]
    worker = RolloutWorker(engine=engine, model=qwen3, dtype="fp32")
    sampled = [asked(row, source) for row in range(4) for source in ("student", "teacher")]
    sampled = [replace(request, seed=i) for i, request in enumerate(sampled)]
    given = [asked(row, "dataset") for row in range(4)]
    sampling = Sampling(max_new_tokens=8, topk_support=2)
    alone, _ = worker.generate(encode(Prompt, prompts), tuple(sampled), sampling)
    batch, receipt = worker.generate(encode(Prompt, prompts), (*given[:2], *sampled, *given[2:]), sampling)
    rollouts = decode(Rollout, batch)
    assert [r.token_ids.tolist() for r in rollouts[2:-2]] == [r.token_ids.tolist() for r in decode(Rollout, alone)]
    assert [r.source for r in rollouts[2:-2]] == [request.source for request in sampled]
    answers = [*rollouts[:2], *rollouts[-2:]]
    assert [r.finish_reason for r in answers] == ["stop", "length", "error", "stop"]
    for rollout, prompt, solution in zip(answers, prompts, solutions, strict=True):
        assert rollout.source == "dataset" and not rollout.logprobs.any() and not rollout.topk_ids.size
        assert rollout.token_ids.tolist() == [*prompt.token_ids, *solution[:8]]
        assert rollout.text == worker.engine.decode(solution[:8]) and rollout.loss_mask.all()
    assert receipt.finish_reasons == tuple(r.finish_reason for r in rollouts)
    assert receipt.errors == {"prompt": 1} and receipt.truncated == receipt.finish_reasons.count("length")


def test_a_hinted_rollout_keeps_the_plain_prompt(qwen3):
    """Sampled after the hint, recorded without it (STaR)."""
    random = fresh_random()
    own = {"clue@1": "{problem} {answer}!"}
    texts, answers = ["1+1", "2+3", "4"], ["2", "", "44"]
    prompts = [
        Prompt(prompt_id=f"p{i}", text=text, token_ids=np.array(chat_ids(text), np.int32), answer=answer)
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    contexts = ("plain", "clue@1", "answer@1")
    requests = [asked(row, "student", context) for row in range(3) for context in contexts]
    seeds = random.integers(0, 2**62, len(requests)).tolist()
    requests = [replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]
    sampling = Sampling(max_new_tokens=7)
    worker = RolloutWorker(engine="transformers", model=qwen3, dtype="fp32", templates=own)
    batch, receipt = worker.generate(encode(Prompt, prompts), tuple(requests), sampling)
    model = load_causal_lm(qwen3)
    for rollout, request in zip(decode(Rollout, batch), requests, strict=True):
        text, answer, prompt = texts[request.row], answers[request.row], prompts[request.row]
        assert (rollout.context, rollout.rollout_id) == (request.context, request.rollout_id)
        assert rollout.token_ids[: rollout.prompt_length].tolist() == prompt.token_ids.tolist()
        if not answer and request.context != "plain":
            assert rollout.finish_reason == "error" and rollout.response_length == 0
            continue
        shown = {"plain": text, "clue@1": f"{text} {answer}!", "answer@1": f"{text}\nAnswer: {answer}"}
        ids = np.array(chat_ids(shown[request.context]))
        ours = rollout.token_ids[rollout.prompt_length :].tolist()
        slow, logprobs, _ = slow_rollout(model, ids, request.seed, sampling, {EOS}, ours)
        assert ours == slow
        np.testing.assert_allclose(rollout.logprobs, logprobs, atol=1e-4)
    assert receipt.errors == {"prompt": 2} and receipt.finish_reasons.count("error") == 2


def test_contexts_need_a_tokenizer_and_a_known_name(qwen3):
    prompt = Prompt(prompt_id="p", text="1", token_ids=np.array([5], np.int32), answer="1")
    batch, sampling = encode(Prompt, [prompt]), Sampling(max_new_tokens=2)
    fake = RolloutWorker(engine="fake", model="nothing", dtype="fp32")
    assert fake.generate(batch, (asked(0),), sampling)[1].rows == 1
    with pytest.raises(ModelError, match="nothing"):
        fake.generate(batch, (asked(0, context="answer@1"),), sampling)
    worker = RolloutWorker(engine="transformers", model=qwen3, dtype="fp32")
    with pytest.raises(ConfigError, match="known template"):
        worker.generate(batch, (asked(0, context="answer@9"),), sampling)
