"""Random prompts and rollouts for tests of the services, and the slow way to sample and to score one of them alone."""

from dataclasses import replace

import numpy as np
import torch
from tiny import tiny_tokenizer

from tutorloop.contracts.records import Rollout, WeightManifest
from tutorloop.models.weights import BucketWriter

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
def slow_rollout(model, prompt, seed, sampling, eos_ids, drawn):
    """One token at a time, the whole sequence read anew for each.

    Where the uniform falls on the border between two tokens, float32 and float64 may choose differently: there it
    follows `drawn`, the tokens to compare with.
    """
    ids, logprobs, support = prompt.tolist(), [], []
    for uniform in np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_new_tokens):
        if len(ids) == CONTEXT:
            break
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        scaled = (logits / (sampling.temperature or 1)).log_softmax(0).numpy()
        token = int(scaled.argmax())
        if sampling.temperature:
            ends = np.exp(scaled).cumsum()
            token = min(int(np.searchsorted(ends, uniform, side="right")), len(ends) - 1)
            other = drawn[len(logprobs)] if len(logprobs) < len(drawn) else token
            if abs(other - token) == 1 and abs(uniform - ends[min(other, token)]) < 1e-5:
                token = other
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


def sent_buckets(model, writer):
    """A model's buckets as they arrive: copies of it, read-only."""
    buckets = [bucket for name, tensor in model.named_parameters() for bucket in writer.add(name, tensor)]
    buckets += writer.flush()
    return [replace(bucket, arrays=tuple(map(_arrived, bucket.arrays))) for bucket in buckets]


def _arrived(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@torch.no_grad()
def published(model, version=1, capacity=20_000):
    """A model's weights as the learner publishes them: buckets and manifest."""
    writer = BucketWriter(version, capacity)
    buckets = sent_buckets(model, writer)
    canary = np.arange(5, 21, dtype=np.int32)
    ids = torch.from_numpy(canary).long()
    logprobs = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    manifest = WeightManifest(
        version=version,
        buckets=len(buckets),
        fingerprint=writer.fingerprint,
        canary_ids=canary,
        canary_logprobs=logprobs.numpy(),
        tolerance=1e-4,
    )
    return buckets, manifest
