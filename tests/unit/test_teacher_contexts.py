"""Teachers in a context: scores after its prompt against dense forwards, and who is shown whose response."""

from dataclasses import replace

import numpy as np
import pytest
from service_rows import CONTEXT, SUPPORT, VOCAB, chat_ids, dense, fresh_random
from tiny import EOS, tiny_qwen3, tiny_tokenizer

from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.errors import ConfigError, TeacherError
from tutorloop.contracts.records import Prompt, Rollout, ScoreRequest, TeacherScores, Verdict
from tutorloop.models.contexts import TEMPLATES, fields_of
from tutorloop.models.loading import load_causal_lm
from tutorloop.teacher_service.worker import TeacherWorker

SIGNALS = ("sampled", "topk", "given", "hidden")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab=VOCAB, context=CONTEXT)


def groups_of_rollouts(random, groups=4, samples=5):
    """Prompts, and rollouts of them in groups with verdicts; rows in no order."""
    tokenizer = tiny_tokenizer()
    prompts, rollouts, verdicts = [], [], []
    for g in range(groups):
        text, answer = f"{g}+{g}", str(random.integers(100)) if g else ""
        ids = np.array(chat_ids(text), np.int32)
        own = {"solution": f"it is {answer}" if answer else "", "strategy": "Double it." if g != 1 else ""}
        prompts.append(Prompt(prompt_id=f"p{g}", text=text, token_ids=ids, answer=answer, **own))
        for i in range(samples):
            said = "".join(random.choice(list("abc{}1<"), random.integers(1, 9)))
            response = np.array([*tokenizer(said)["input_ids"], EOS], np.int32)
            rollouts.append(
                Rollout(
                    rollout_id=f"r{g}-{i}",
                    prompt_id=f"p{g}",
                    group_id=f"g{g}",
                    sample_index=i,
                    token_ids=np.concatenate([ids, response]),
                    prompt_length=len(ids),
                    text=f"<think>{random.integers(9)}</think>{said}" if random.random() < 0.5 else said,
                    logprobs=np.zeros(len(response), np.float32),
                    loss_mask=np.ones(len(response), bool),
                    topk_ids=random.integers(0, VOCAB, (len(response), SUPPORT)).astype(np.int32),
                    finish_reason=str(random.choice(["stop", "length"])),
                )
            )
            passed, abstained = bool(random.random() < 0.4), bool(random.random() < 0.2)
            verdicts.append(
                Verdict(
                    rollout_id=f"r{g}-{i}",
                    score=0.0,
                    passed=passed and not abstained,
                    abstained=abstained,
                    answer=str(random.choice(["", "17"])),
                )
            )
    order, other = random.permutation(len(rollouts)), random.permutation(len(rollouts))
    return prompts, [rollouts[i] for i in order], [verdicts[i] for i in other]


def slow_context(context, rollout, prompt, rollouts, verdicts):
    """The text of the context, or None, by looking through everything."""
    verdict = {v.rollout_id: v for v in verdicts}
    found = verdict[rollout.rollout_id]
    peer = None
    for step in range(1, 100):  # the next samples of the group, from the start again at its end
        for other in rollouts:
            ahead = other.group_id == rollout.group_id and other.sample_index == (rollout.sample_index + step) % 5
            if ahead and verdict[other.rollout_id].passed and other.rollout_id != rollout.rollout_id and not peer:
                peer = other
    feedback = ""
    if not found.passed and not found.abstained:
        ended = "The response ended before an answer." if rollout.finish_reason == "length" else "No answer was found."
        feedback = f"The answer {found.answer} is wrong." if found.answer else ended
    values = {
        "problem": prompt.text,
        "answer": prompt.answer,
        "solution": prompt.solution,
        "strategy": prompt.strategy,
        "peer": peer.text.rpartition("</think>")[2] if peer else "",
        "peer_answer": verdict[peer.rollout_id].answer if peer else "",
        "feedback": feedback,
    }
    template = {**TEMPLATES, "own@1": "{problem} {peer_answer}?"}[context]
    if context == "peer_feedback@1":
        if not values["peer"] and not feedback:
            return None
        parts = template.replace("]]", "[[").split("[[")
        template = parts[0] + (parts[1] if values["peer"] else "") + (parts[3] if feedback else "") + parts[4]
    pieces = template.replace("}", "{").split("{")
    if any(not values[field] for field in pieces[1::2]):
        return None
    return "".join(values[piece] if i % 2 else piece for i, piece in enumerate(pieces))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("context", [*(c for c in TEMPLATES if not fields_of(c, {}) & {"skill", "title"}), "own@1"])
def test_scores_in_a_context_equal_dense_forwards_after_its_prompt(context, signal, tmp_path_factory):
    random = fresh_random()
    name = tiny_qwen3(tmp_path_factory.mktemp("long"), context=512)
    prompts, rollouts, verdicts = groups_of_rollouts(random)
    worker = TeacherWorker(
        teacher_id="big",
        engine="transformers",
        model=name,
        dtype="fp32",
        templates={"own@1": "{problem} {peer_answer}?"},
    )
    request = ScoreRequest(signal=signal, top_k=SUPPORT, context=context)
    batches = (encode(Rollout, rollouts), request, encode(Prompt, prompts[::-1]), encode(Verdict, verdicts))
    batch, receipt = worker.score(*batches)
    model, by_id = load_causal_lm(name), {prompt.prompt_id: prompt for prompt in prompts}
    lengths, refused, means = [], {}, {}
    for rollout, score in zip(rollouts, decode(TeacherScores, batch), strict=True):
        text = slow_context(context, rollout, by_id[rollout.prompt_id], rollouts, verdicts)
        assert (score.rollout_id, score.context, score.teacher_version) == (rollout.rollout_id, context, 0)
        if text is None:
            assert score.error_class == "no_context" and not score.logprobs.size
            refused[rollout.rollout_id] = "no_context"
            continue
        response = rollout.token_ids[rollout.prompt_length :]
        ids = np.array([*chat_ids(text), *response], np.int32)
        lengths.append(len(ids))
        hidden, logprobs = dense(model, replace(rollout, token_ids=ids, prompt_length=len(ids) - len(response)))
        rows = np.arange(len(response))
        np.testing.assert_allclose(score.logprobs, logprobs[rows, response], atol=1e-4)
        means[rollout.rollout_id] = pytest.approx(float(logprobs[rows, response].mean()), abs=1e-4)
        if signal == "given":
            given = logprobs.numpy()[rows[:, None], rollout.topk_ids]
            np.testing.assert_allclose(score.topk_logprobs, given, atol=1e-4)
        if signal == "topk":
            np.testing.assert_allclose(score.topk_logprobs, logprobs.topk(SUPPORT).values, atol=1e-4)
            np.testing.assert_allclose(score.entropy, -(logprobs.exp() * logprobs).sum(1), atol=1e-4)
        if signal == "hidden":
            np.testing.assert_allclose(score.hidden, hidden, atol=1e-4)
    assert receipt.errors == ({"no_context": len(refused)} if refused else {}) and receipt.mean_logprobs == means
    assert receipt.lengths == tuple(lengths) and receipt.tokens == sum(lengths) and receipt.rows == len(rollouts)


def test_peers_spread_over_those_who_passed(qwen3):
    """Of 0..4 where 1, 3 and 4 passed: each reads the next of them, none itself; nobody reads the lone one's own."""
    random = fresh_random()
    prompts, rollouts, verdicts = groups_of_rollouts(random, groups=1)
    rollouts = [replace(r, text=f"sample {r.sample_index}") for r in rollouts]
    seen = {}

    class Recorder:
        def score(self, shown, request):
            texts = [tiny_tokenizer().decode(r.token_ids[: r.prompt_length]) for r in shown]
            seen.update({r.sample_index: text.split("sample ")[1][0] for r, text in zip(shown, texts, strict=True)})
            return [TeacherScores(rollout_id=r.rollout_id, teacher_id="big") for r in shown]

    worker = TeacherWorker(teacher_id="big", engine="fake", model=qwen3, dtype="fp32")
    worker.engine = Recorder()
    for passing, expected in (({1, 3, 4}, {0: "1", 1: "3", 2: "3", 3: "4", 4: "1"}), ({2}, dict.fromkeys("0134", "2"))):
        seen.clear()
        judged = [replace(v, passed=int(v.rollout_id[-1]) in passing, abstained=False) for v in verdicts]
        request = ScoreRequest(context="peer@1")
        worker.score(encode(Rollout, rollouts), request, encode(Prompt, prompts), encode(Verdict, judged))
        assert {int(i): peer for i, peer in expected.items()} == seen


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_a_context_asks_for_what_it_shows(engine, qwen3):
    prompts, rollouts, verdicts = groups_of_rollouts(fresh_random(), groups=2)
    worker = TeacherWorker(teacher_id="big", engine=engine, model=qwen3, dtype="fp32")
    batch, shown = encode(Rollout, rollouts), encode(Prompt, prompts)
    with pytest.raises(TeacherError, match="prompts"):
        worker.score(batch, ScoreRequest(context="answer@1"))
    with pytest.raises(TeacherError, match="verdicts"):
        worker.score(batch, ScoreRequest(context="peer@1"), shown)
    with pytest.raises(ConfigError, match="known template"):
        worker.score(batch, ScoreRequest(context="answer@9"), shown, encode(Verdict, verdicts))
    scores, _ = worker.score(batch, ScoreRequest(context="answer@1"), encode(Prompt, prompts[1:]))
    absent = {r.rollout_id for r in rollouts if r.prompt_id == "p0"}
    assert {s.rollout_id for s in decode(TeacherScores, scores) if s.error_class == "no_context"} == absent
