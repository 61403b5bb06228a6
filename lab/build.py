"""Makes the lab from a seed: `python -m tutorloop.lab.build --seed 0 [--only STAGE] [--force]` (`make lab`).

Stages, in order: data (the three splits), tokenizer, teacher, student, cards. A stage whose files stand is skipped
unless `--force`; training resumes from its last checkpoint under `--work`. Teacher and student may be made by two
processes at once.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import torch

from . import SPLITS, card, data_path, lessons, model_path, pretrain, rows, tokenizer
from .problems import FAMILIES, Problem, draw, work

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
    """Trains the teacher or the student on its lessons."""
    size = SIZES[name]
    pairs = list(lessons.lessons(name, problem_pool(seed), size.steps * size.batch, seed))
    train_model(model_path(name), size, pairs, seed, work_folder / f"{name}.pt")


def train_model(folder: Path, size: pretrain.Size, pairs: list[tuple[str, str]], seed: int, checkpoint: Path) -> None:
    """Trains a model and saves it beside its tokenizer, with a record of the training (training.json) for the card."""
    made = tokenizer.load(folder)
    model = pretrain.new_model(size, made, seed)
    seconds = pretrain.train(model, size, pretrain.encode(made, pairs), seed, checkpoint)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    record = {"seed": seed, "steps": size.steps, "batch": size.batch, "seconds": round(seconds)}
    (folder / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    checkpoint.unlink()


def files_of(stage: str) -> list[Path]:
    """The files that a stage makes, those by which it is known to be done."""
    files = {
        "data": [data_path(split) for split in SPLITS],
        "tokenizer": [model_path(name) / "tokenizer.json" for name in SIZES],
        "cards": [model_path(name) / "README.md" for name in SIZES],
    }
    return files.get(stage) or [model_path(stage) / "model.safetensors"]


def run_stages(makers: Mapping[str, Callable[[int, Path], object]], files_of: Callable[[str], list[Path]]) -> None:
    """The command line of a build: makes each stage, from a seed and with a folder for its checkpoints."""
    parser = argparse.ArgumentParser(description="Makes the lab again from a seed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(makers), help="this stage alone")
    parser.add_argument("--force", action="store_true", help="make it again where it stands")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tutorloop-lab", help="checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    for stage in [options.only] if options.only else makers:
        if options.force or not all(path.exists() for path in files_of(stage)):
            print(f"lab: making {stage}", flush=True)
            if options.force:
                (options.work / f"{stage}.pt").unlink(missing_ok=True)
            makers[stage](options.seed, options.work)


def main() -> None:
    makers = {
        "data": lambda seed, _: build_data(seed),
        "tokenizer": lambda seed, _: build_tokenizer(seed),
        "teacher": lambda seed, work_folder: build_model("teacher", seed, work_folder),
        "student": lambda seed, work_folder: build_model("student", seed, work_folder),
        "cards": lambda *_: [card.write(name) for name in SIZES],
    }
    run_stages(makers, files_of)


if __name__ == "__main__":
    main()
