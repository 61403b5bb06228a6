"""Random prompts and rollouts for tests of the services, and the slow way to sample and to score one of them alone."""

import numpy as np
import torch
from tiny import tiny_tokenizer

from tutorloop.contracts.records import Rollout

CONTEXT, VOCAB, SUPPORT = 128, 300, 5


def fresh_random():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def random_rollout(random, number, prompt, response):
    return Rollout(
        rollout_id=f"r{number}",
        prompt_id="p",
        group_id="g",
        sample_index=number,
        token_ids=random.integers(0, VOCAB, prompt + response).astype(np.int32),
        prompt_length=prompt,
        text="",
        logprobs=np.zeros(response, np.float32),
        loss_mask=np.ones(response, bool),
        topk_ids=random.integers(0, VOCAB, (response, SUPPORT)).astype(np.int32),
    )


def random_rollouts(random, count=12):
    lengths = random.integers(1, 30, (count, 2)).tolist()
    return [random_rollout(random, i, *pair) for i, pair in enumerate([*lengths, (1, 1), (1, 127), (127, 1)])]


@torch.no_grad()
def dense(model, rollout):
    """Hidden states `[R, D]` and logprobs `[R, V]` that predict the response, by one forward of the rollout alone."""
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
    out = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
    predicting = slice(rollout.prompt_length - 1, len(ids) - 1)
    return out.hidden_states[-1][0, predicting], out.logits[0, predicting].double().log_softmax(-1)


def random_prompts(random, lengths):
    return [random.integers(5, VOCAB, length).astype(np.int32) for length in lengths]


@torch.no_grad()
def slow_rollout(model, prompt, seed, sampling, eos_ids):
    """One token at a time, the whole sequence read anew for each."""
    ids, logprobs, support = prompt.tolist(), [], []
    for uniform in np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_new_tokens):
        if len(ids) == CONTEXT:
            break
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        scaled = (logits / (sampling.temperature or 1)).log_softmax(0).numpy()
        token = int(scaled.argmax())
        if sampling.temperature:
            token, total = 0, np.exp(scaled[0])
            while total <= uniform:
                token += 1
                total += np.exp(scaled[token])
        ids.append(token)
        logprobs.append(scaled[token])
        support.append(np.argsort(-logits.numpy())[: sampling.topk_support])
        if token in eos_ids:
            break
    return ids[len(prompt) :], logprobs, support


def chat_ids(text):
    """A user's turn by the tiny tokenizer's own chat template, with the generation prompt."""
    turns = [{"role": "user", "content": text}]
    return tiny_tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
