"""A small run with strategies, by hand: an extractor fitted to the lab's chains, and rollouts as a run records them."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from run_rows import eval_row, step_row

from tutorloop.contracts.config import Config
from tutorloop.contracts.recipe import load_config
from tutorloop.lab import rows as lab_rows
from tutorloop.lab.strategies.problems import STUDENT, TEACHER, Problem, carelessly, distinct, jump, work
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.strategies import fit as fitting
from tutorloop.verifier_service.strategies.embedding import make_embedder
from tutorloop.verifier_service.strategies.extractor import version_of
from tutorloop.verifier_service.strategies.segments import StepLimits
from tutorloop.verifier_service.strategies.solutions import Problem as Solved

ROOT = Path(__file__).parents[1]
LAB_ROWS = [row for row in lab_rows("train") if len(row["solution"].splitlines()) >= 3][:24]
PROBLEMS, OUTSIDE = 36, 12  # chains, and longer ones
STEPS = 12
SUFFIX = "\nAnswer in a box."


@functools.cache
def _tokenizer() -> Any:
    return load_tokenizer("lab:student")


def fit_lab(folder: Path) -> Path:
    """An extractor of most of LAB_ROWS' solutions."""
    problems = [Solved(row["id"], row["prompt"], [row["solution"]]) for row in LAB_ROWS[:20]]
    limits = StepLimits(least=1, most=40)
    fitting.fit(problems, make_embedder("hidden:lab:teacher"), _tokenizer(), folder, limits=limits, codes=8, width=32)
    return folder


def small_sgpo(folder: Path, strategies: Path, *changes: str) -> Config:
    """A few rollouts a step of SGPO on LAB_ROWS."""
    data = folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in LAB_ROWS), encoding="utf-8")
    small = ["eval.path=", "eval.ood_path=", "checkpoint.every=0", "prompts_per_step=6", "record=all", "replay="]
    own = [f"data.path={data}", f"strategies.path={strategies}", f"output_dir={folder}", "max_staleness=0"]
    models = ["student.model=lab:student", "reference.model=lab:student", "rollout.samples_per_prompt=4"]
    rate = ["learner.decay=constant", "learner.min_learning_rate=0", "learner.warmup_steps=0"]
    return load_config(ROOT / "recipes" / "sgpo_lab.yaml", [*small, *own, *models, *rate, *changes])


def chains(seed: int) -> dict[str, Problem]:
    """Problems by their ids."""
    rng, taken = random.Random(seed), set[tuple[int, ...]]()
    inside, outside = distinct("test", rng, taken), distinct("ood", rng, taken)
    found = {f"chain-{number}": next(inside) for number in range(PROBLEMS)}
    return found | {f"long-{number}": next(outside) for number in range(OUTSIDE)}


def solved(problems: dict[str, Problem]) -> dict[str, Solved]:
    """With the teacher's solutions, by the problems' ids."""
    return {
        name: Solved(name, f"What is {one.expression}?", [work(one, s, TEACHER) for s in one.strategies])
        for name, one in problems.items()
    }


def fit_chains(folder: Path, problems: dict[str, Problem], extra: dict[str, str] | None = None) -> None:
    """An extractor of the teacher's solutions of `problems`; `extra`: one more solution by prompt id."""
    found = solved(problems)
    for name, text in (extra or {}).items():
        found[name].solutions.append(text)
    given = {"limits": StepLimits(least=1, most=48, steps=32), "codes": 16, "frozen": True}
    fitting.fit(list(found.values()), make_embedder("hidden:lab:teacher"), _tokenizer(), folder, **given)


def line(rollout_id: str, prompt_id: str, problem: str, response: str, **known: Any) -> dict[str, Any]:
    """As samples.py writes it."""
    clean = response.encode("utf-8", "replace").decode()
    ids = _tokenizer()(clean, add_special_tokens=False)["input_ids"]
    return {
        "kind": "train",
        "step": 1,
        "trained": True,
        "rollout_id": rollout_id,
        "prompt_id": prompt_id,
        "group_id": f"{prompt_id}-group",
        "source": "student",
        "context": "plain",
        "prompt": problem + SUFFIX,
        "response": response,
        "finish_reason": "eos",
        "golds": ["7"],
        "prompt_length": 3,
        "token_ids": [1, 2, 3, *ids],
        "answer": "7",
        "passed": True,
        "abstained": False,
        "reward": 1.0,
        **known,
    }


def lines_of(problems: dict[str, Problem], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Four answers to three problems a step: mostly worked, later more often; and an evaluation of either split, with a
    right answer and a wrong one among the worked."""
    inside, outside = ([name for name in problems if name.startswith(start)] for start in ("chain", "long"))

    def answer(name: str, worked: float) -> tuple[str, bool]:
        one = problems[name]
        if rng.random() < worked:
            return work(one, str(rng.choice(one.strategies)), STUDENT), bool(rng.random() < 0.9)
        tens = work(one, "columns", STUDENT).split("\n")
        cut = "\n".join([*tens[: int(rng.integers(1, 4))], jump(one, carelessly(one))])
        return cut, bool(rng.random() < 0.2)

    found = []
    for step in range(1, STEPS + 1):
        for name in rng.choice(inside, 3, replace=False):
            for sample in range(4):
                text, passed = answer(str(name), 0.3 + 0.5 * step / STEPS)
                question = f"What is {problems[str(name)].expression}?"
                known = {"step": step, "passed": passed, "reward": float(passed)}
                found.append(line(f"{step}-{name}-{sample}", str(name), question, text, **known))
    for split, names in (("in_distribution", inside[:8]), ("out_of_distribution", outside)):
        for row, name in enumerate(names):
            text, passed = answer(name, 0.6 if row > 1 else 1)
            passed = passed if row > 1 else row == 0
            known = {"kind": "eval", "step": STEPS, "split": split, "model": "student", "passed": passed}
            found.append(line(f"eval-{row}-0", name, f"What is {problems[name].expression}?", text, **known))
    return found


def metric_rows(rng: np.random.Generator, alarm: str = "") -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, whose `method` has what SGPO says of its steps."""
    rows: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        method = {
            "alignment": 0.3 + 0.02 * step,
            "alignment_right": 0.35 + 0.02 * step,
            "alignment_wrong": 0.25 + 0.02 * step,
            "effective_strategies": 8.0 - 0.2 * step,
            "top_code_share": 0.2 + 0.01 * step,
            "neutral_share": 0.1,
            "strategy_scale": 1.0 if step < 9 else 0.5,
        }
        warnings = [alarm] if alarm and step == 9 else []
        row = step_row(rng, step, method=method, warnings=warnings)
        rows.append({"kind": "step", **json.loads(json.dumps(row, default=vars_of))})
        if step % 3 == 0:
            rows.append({"kind": "eval", **json.loads(json.dumps(eval_row(rng, step), default=vars_of))})
    return rows


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def write_run(
    folder: Path, extractor: Path, lines: list[dict[str, Any]], rows: list[dict[str, Any]], **changes: Any
) -> Path:
    """A run's folder; `changes` are of its configuration."""
    folder.mkdir(parents=True)
    recipe = load_config(Path("sgpo_lab")).model_dump(mode="json", exclude_unset=True)
    recipe |= {"student": {"model": "lab:student"}, "strategies": {"path": str(extractor)}, "record": "all"}
    recipe["data"] = {"path": "lab:strategies-train", "prompt_suffix": SUFFIX}
    config = {key: value for key, value in (recipe | changes).items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "identity.json").write_text(json.dumps({"strategies": {"digest": version_of(extractor), "place": ""}}))
    for name, written in (("rollouts.jsonl", lines), ("metrics.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in written))
    return folder
