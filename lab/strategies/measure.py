"""What a model of this lab does on a split: how often it is right, by which strategies, and how often by each.

`python -m tutorloop.lab.strategies.measure FOLDER` prints a JSON line for each split and prompt, greedy and at T=1.
"""

import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import rows
from ..measure import boxed, generate
from ..tokenizer import chat_prompt
from .lessons import DESCRIBED, shown
from .problems import recognise

DRAWS = 4
BATCH = 100
LIMIT = 200  # tokens of a response; the longest that was taught has fewer
PLAIN = "plain"
EVERY = (
    ("strategies-test", PLAIN),
    ("strategies-test", DESCRIBED),
    ("strategies-ood", PLAIN),
    ("strategies-ood", DESCRIBED),
    ("second-test", PLAIN),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Shares of responses: right ones in all, of each family, and by each strategy of those that follow it.

    `uses` has each strategy's own share, `jump` and `ends` among them and "other" for the rest; `followed`
    is the share of responses by the strategy that the prompt shows, None where it shows none.
    """

    right: float
    families: dict[str, float]
    uses: dict[str, float]
    right_by: dict[str, float]
    wordings: dict[str, float]
    followed: float | None = None


def responses(
    model: Any, tokenizer: Any, problems: list[dict], context: str, *, temperature: float, seed: int
) -> list[str]:
    """One response to each problem, under its question alone or with its strategy shown."""
    texts: list[str] = []
    for start in range(0, len(problems), BATCH):
        turns = [
            shown(row["prompt"], row["strategy"]) if context == DESCRIBED else row["prompt"]
            for row in problems[start : start + BATCH]
        ]
        ids_BT = generate(
            model, tokenizer, list(map(chat_prompt, turns)), temperature=temperature, seed=seed + start, limit=LIMIT
        )
        texts += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return texts


def usage(problems: list[dict], texts: list[str], context: str = PLAIN) -> Usage:
    """Counts the responses to problems, in their order."""
    hits = [boxed(text) == row["answer"] for row, text in zip(problems, texts, strict=True)]
    found = [recognise(text) for text in texts]
    families, right_by = defaultdict(list), defaultdict(list)
    for row, hit, (strategy, _) in zip(problems, hits, found, strict=True):
        families[row["family"]].append(hit)
        right_by[strategy or "other"].append(hit)
    followed = (
        [strategy == row["strategies"][0] for row, (strategy, _) in zip(problems, found, strict=True)]
        if (context == DESCRIBED)
        else []
    )
    wordings = [wording for _, wording in found if wording]
    return Usage(
        right=_mean(hits),
        families={name: _mean(values) for name, values in sorted(families.items())},
        uses={name: len(values) / len(texts) for name, values in sorted(right_by.items())},
        right_by={name: _mean(values) for name, values in sorted(right_by.items())},
        wordings={name: wordings.count(name) / len(wordings) for name in sorted(set(wordings))},
        followed=_mean(followed) if followed else None,
    )


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def table(folder: Path, size: int | None = None) -> list[dict]:
    """Every split and context, as rows of `split`, `context`, `greedy` and `sampled` (DRAWS of each problem)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for split, context in EVERY:
        problems = rows(split)[:size]
        greedy = responses(model, tokenizer, problems, context, temperature=0, seed=0)
        sampled = [
            text
            for draw in range(DRAWS)
            for text in responses(model, tokenizer, problems, context, temperature=1, seed=len(problems) * draw)
        ]
        found.append(
            {
                "split": split,
                "context": context,
                "greedy": usage(problems, greedy, context),
                "sampled": usage(problems * DRAWS, sampled, context),
            }
        )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table(Path(sys.argv[1])):
        print(json.dumps({**line, "greedy": asdict(line["greedy"]), "sampled": asdict(line["sampled"])}), flush=True)
