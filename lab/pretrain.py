"""Supervised training of the lab's models: a plain loop, deterministic from a seed, that resumes.

Muon (Jordan et al. 2024) steps the matrices of the blocks and AdamW the rest: in a trial of 500 steps the teacher's
loss at step 300 was 0.05, and 0.63 with AdamW alone. Batches hold examples of like length, padded on the right (causal
attention needs no mask there); the loss is on the response alone.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .tokenizer import END, END_ID, PAD_ID, chat_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Shape of a model and length of its training, e.g. Size(hidden=128, layers=4, ..., steps=3000).

    `by_tokens`: every token weighs the same. Else every batch does: since it holds examples of like length, a model
    then learns to begin short responses more often than its lessons do.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    steps: int
    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    warmup: int = 50
    by_tokens: bool = False


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A fresh Qwen3 with untied embeddings."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim,
            intermediate_size=size.intermediate,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=END_ID,
            pad_token_id=PAD_ID,
            dtype="float32",
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(prompt, response) pairs as (token ids with the closing eos, length of the prompt)."""
    prompts = tokenizer([chat_prompt(prompt) for prompt, _ in pairs])["input_ids"]
    answers = tokenizer([response + END for _, response in pairs])["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def batches(examples: list[tuple[list[int], int]], size: int, seed: int) -> Iterator[tuple]:
    """Yields (ids, labels), both [batch, time], of examples of like length; labels are -100 off the response."""
    rng = random.Random(seed)
    chunks = []
    for start in range(0, len(examples), 32 * size):
        window = sorted(examples[start : start + 32 * size], key=lambda example: len(example[0]))
        part = [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(part)
        chunks.extend(part)
    for chunk in chunks:
        longest = max(len(ids) for ids, _ in chunk)
        ids_BT = torch.full((len(chunk), longest), PAD_ID)
        labels_BT = torch.full((len(chunk), longest), -100)
        for row, (ids, prompt) in enumerate(chunk):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            labels_BT[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
        yield ids_BT, labels_BT


def response_loss(
    model: Qwen3ForCausalLM, ids_BT: torch.Tensor, labels_BT: torch.Tensor, tokens: float | None = None
) -> torch.Tensor:
    """Cross-entropy of the response tokens, summed and divided by `tokens`, by default by their number.

    The head sees their positions only.
    """
    hidden_BTD = model.model(ids_BT[:, :-1], use_cache=False).last_hidden_state
    targets_BT = labels_BT[:, 1:]
    keep_BT = targets_BT != -100
    logits_NV, targets_N = model.lm_head(hidden_BTD[keep_BT]), targets_BT[keep_BT]
    if tokens is None:
        return F.cross_entropy(logits_NV, targets_N)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum") / tokens


def optimizers(model: Qwen3ForCausalLM, size: Size) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=size.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=size.adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def train(
    model: Qwen3ForCausalLM, size: Size, examples: list[tuple[list[int], int]], seed: int, checkpoint: Path
) -> float:
    """Trains for `size.steps` steps (warm-up, then linear decay to zero); returns the core-seconds it took in all."""
    optims = optimizers(model, size)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optim, lambda step: min((step + 1) / size.warmup, 1.0) * (1 - step / size.steps)
        )
        for optim in optims
    ]
    start, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        start, seconds = saved["step"], saved["seconds"]
        model.load_state_dict(saved["model"])
        for part, state in zip([*optims, *schedules], saved["parts"], strict=True):
            part.load_state_dict(state)
    began = time.process_time() - seconds
    tokens = size.batch * mean(len(ids) - prompt for ids, prompt in examples) if size.by_tokens else None
    for step, (ids_BT, labels_BT) in enumerate(batches(examples, size.batch, seed), start=1):
        if step <= start:
            continue
        loss = response_loss(model, ids_BT, labels_BT, tokens)
        loss.backward()
        for part in [*optims, *schedules]:
            part.step()
        model.zero_grad()
        if step % 100 == 0 or step == size.steps:
            seconds = time.process_time() - began
            print(json.dumps({"step": step, "loss": round(loss.item(), 4), "seconds": round(seconds)}), flush=True)
        if step % 500 == 0 or step == size.steps:
            parts = [part.state_dict() for part in [*optims, *schedules]]
            state = {"step": step, "seconds": seconds, "model": model.state_dict(), "parts": parts}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return time.process_time() - began
