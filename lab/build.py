"""Makes the lab from a seed: `python -m tutorloop.lab.build --seed 0 [--only STAGE] [--force]` (`make lab`).

Stages, in order: data (the three splits), tokenizer, teacher, student, cards. A stage whose files stand is skipped
unless `--force`; training resumes from its last checkpoint under `--work`. Teacher and student may be made by two
processes at once.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

import torch

from . import SPLITS, card, data_path, lessons, model_path, pretrain, rows, tokenizer
from .problems import FAMILIES, Problem, draw, work

STAGES = ("data", "tokenizer", "teacher", "student", "cards")
SPLIT_SIZES = {
    "test": {"chain_sum": 300, "leg_counting": 100},
    "ood": {"long_chain": 200, "mixed": 200},
    "train": {"chain_sum": 3000, "leg_counting": 1000},
}
POOL = 40_000
SIZES = {
    "teacher": pretrain.Size(hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate=384, steps=900),
    "student": pretrain.Size(hidden=96, layers=4, heads=3, kv_heads=1, head_dim=32, intermediate=288, steps=1200),
}


def to_row(split: str, index: int, problem: Problem) -> dict:
    """A problem as a row of a split, with its right solution; tags name the misconceptions that would change it."""
    return {
        "id": f"{split}-{index:04d}",
        "prompt": problem.question,
        "answer": problem.answer,
        "solution": work(problem).text,
        "family": problem.family,
        "tags": sorted(set(work(problem, lambda misconception: True).errors)),
    }


def build_data(seed: int) -> None:
    """Writes the three splits; every question occurs once over all of them."""
    streams = {family: draw(family, f"splits {seed}") for family in FAMILIES}
    for split in ("test", "ood", "train"):
        problems = [p for family, count in SPLIT_SIZES[split].items() for p in islice(streams[family], count)]
        lines = [json.dumps(to_row(split, index, problem)) for index, problem in enumerate(problems)]
        data_path(split).parent.mkdir(parents=True, exist_ok=True)
        data_path(split).write_text("\n".join(lines) + "\n", encoding="utf-8")


def problem_pool(seed: int, size: int = POOL) -> list[Problem]:
    """The problems that both models learn from; the questions of the two test splits are held out."""
    held_out = {row["prompt"] for split in ("test", "ood") for row in rows(split)}
    return lessons.problem_pool(size, seed, held_out)


def build_tokenizer(seed: int) -> None:
    """Learns the merges from lessons of the teacher and saves the tokenizer into both models' folders."""
    pairs = lessons.lessons("teacher", problem_pool(seed, 6000), 12000, seed)
    made = tokenizer.train(tokenizer.chat_prompt(prompt) + response for prompt, response in pairs)
    for name in SIZES:
        made.save_pretrained(model_path(name))


def build_model(name: str, seed: int, work_folder: Path) -> None:
    """Trains a model and saves it beside its tokenizer, with a record of the training (training.json) for the card."""
    made, size = tokenizer.load(model_path(name)), SIZES[name]
    pairs = list(lessons.lessons(name, problem_pool(seed), size.steps * size.batch, seed))
    model = pretrain.new_model(size, made, seed)
    checkpoint = work_folder / f"{name}.pt"
    seconds = pretrain.train(model, size, pretrain.encode(made, pairs), seed, checkpoint)
    model.generation_config.do_sample = True
    model.save_pretrained(model_path(name))
    record = {"seed": seed, "steps": size.steps, "batch": size.batch, "seconds": round(seconds)}
    (model_path(name) / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    checkpoint.unlink()


def stands(stage: str) -> bool:
    """Whether a stage's files are there already."""
    files = {
        "data": [data_path(split) for split in SPLITS],
        "tokenizer": [model_path(name) / "tokenizer.json" for name in SIZES],
        "cards": [model_path(name) / "README.md" for name in SIZES],
    }
    return all(path.exists() for path in files.get(stage) or [model_path(stage) / "model.safetensors"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the lab again from a seed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=STAGES, help="this stage alone")
    parser.add_argument("--force", action="store_true", help="make it again where it stands")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tutorloop-lab", help="checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    makers = {
        "data": lambda: build_data(options.seed),
        "tokenizer": lambda: build_tokenizer(options.seed),
        "teacher": lambda: build_model("teacher", options.seed, options.work),
        "student": lambda: build_model("student", options.seed, options.work),
        "cards": lambda: [card.write(name) for name in SIZES],
    }
    for stage in [options.only] if options.only else STAGES:
        if options.force or not stands(stage):
            print(f"lab: making {stage}", flush=True)
            if options.force:
                (options.work / f"{stage}.pt").unlink(missing_ok=True)
            makers[stage]()


if __name__ == "__main__":
    main()
