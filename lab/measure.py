"""Accuracy of a lab model: batched generation with a KV cache, exact match of the boxed answer.

`python -m tutorloop.lab.measure FOLDER` prints one line per split and context, greedy and sampled at temperature 1.
Generation is a plain loop of ours rather than `generate()`, so that it costs one small forward per token.
"""

import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from . import rows
from .contexts import render, skills_for
from .tokenizer import chat_prompt

CONDITIONS = ("plain", "answer", "hint:useful", "hint:misleading", "hint:irrelevant")
DRAWS = 4
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}\s*$")


@torch.no_grad()
def generate(
    model, tokenizer, prompts: list[str], *, temperature: float, seed: int = 0, limit: int = 80
) -> torch.Tensor:
    """Response token ids [prompt, time] for chat-rendered prompts, pad after the eos; temperature 0 is greedy."""
    random_state = torch.Generator().manual_seed(seed)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache, finished_B, written = DynamicCache(config=model.config), torch.zeros(len(prompts), dtype=torch.bool), []
    while len(written) < limit and not finished_B.all():
        logits_BV = model(
            ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        if temperature == 0:
            next_B = logits_BV.argmax(-1)
        else:
            next_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=random_state)[:, 0]
        next_B = next_B.masked_fill(finished_B, tokenizer.pad_token_id)
        written.append(next_B)
        finished_B = finished_B | (next_B == tokenizer.eos_token_id)
        ids_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
    return torch.stack(written, 1)


def boxed(response: str) -> str | None:
    """The answer in the box that ends a response, e.g. `83`; None without one."""
    found = _BOXED.search(response)
    return found.group(1) if found else None


def prompts(problems: Iterable[dict], condition: str, seed: int = 0) -> list[tuple[str, dict]]:
    """(user turn, row) in a condition; a hint is drawn per row among the skills of the named kind that fit it."""
    context, _, kind = condition.partition(":")
    rng = random.Random(seed)
    chosen = []
    for row in problems:
        hint = rng.choice(skills_for(row["family"], kind, row["tags"]))["text"] if context == "hint" else None
        chosen.append((render(context, row["prompt"], answer=row["answer"], hint=hint), row))
    return chosen


def accuracy(model, tokenizer, problems: list[dict], condition: str = "plain", *, temperature: float = 0.0,
             seed: int = 0, batch: int = 200) -> dict[str, float]:  # fmt: skip
    """Share of right answers: under `all`, and under each family's name."""
    chosen = prompts(problems, condition, seed)
    hits: dict[str, list[bool]] = {"all": []}
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        ids_BT = generate(
            model, tokenizer, [chat_prompt(p) for p, _ in part], temperature=temperature, seed=seed + start
        )
        texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        for text, (_, row) in zip(texts, part, strict=True):
            hits["all"].append(boxed(text) == row["answer"])
            hits.setdefault(row["family"], []).append(hits["all"][-1])
    return {name: sum(values) / len(values) for name, values in hits.items()}


def sampled_accuracy(model, tokenizer, problems: list[dict], condition: str) -> dict[str, float]:
    """Mean accuracy of DRAWS samples of every problem at temperature 1."""
    draws = [
        accuracy(model, tokenizer, problems, condition, temperature=1.0, seed=len(problems) * draw)
        for draw in range(DRAWS)
    ]
    return {name: sum(draw[name] for draw in draws) / DRAWS for name in draws[0]}


def table(folder: Path, limit: int = 400) -> list[dict]:
    """Every split and condition, greedy and sampled, as rows `{"split", "condition", "greedy", "sampled"}`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return [
        {
            "split": split,
            "condition": condition,
            "greedy": accuracy(model, tokenizer, rows(split)[:limit], condition),
            "sampled": sampled_accuracy(model, tokenizer, rows(split)[:limit], condition),
        }
        for split in ("test", "ood")
        for condition in CONDITIONS
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table(Path(sys.argv[1])):
        shares = " ".join(f"{name} {line['greedy'][name]:.3f}/{line['sampled'][name]:.3f}" for name in line["greedy"])
        print(f"{line['split']:5} {line['condition']:16} greedy/sampled: {shares}", flush=True)
