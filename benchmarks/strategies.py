"""SGPO beside SFT, OPD and GRPO on the lab's problems of several strategies; what each method forgets of another skill.

    .venv/bin/python benchmarks/strategies.py                       # every variant at three seeds: hours on two cores
    .venv/bin/python benchmarks/strategies.py --only grpo sgpo --seeds 0
    .venv/bin/python benchmarks/strategies.py --table               # the table again, from the results alone

Each variant trains from the same student, in this process, on as many answers: STEPS steps of 96. Then it is asked the
problems of three splits: in distribution, out of distribution, and of the second skill, which no variant trains on but
those with `replay`. Results are appended to strategies.jsonl, and what it holds is not run again; two processes with
other `--seeds` may run side by side.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import QUIET, evaluate, machine
from rich.console import Console

from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster import run
from tutorloop.cluster.data import load_prompts
from tutorloop.contracts.config import Data
from tutorloop.contracts.errors import InputError
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.verifier_config import Verifier
from tutorloop.lab.strategies.problems import ENDS, JUMP, STRATEGIES, TEACHER, recognise
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.worker import VerifierWorker

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "strategies_table"
RESULTS = ROOT / "benchmarks" / "results" / "strategies.jsonl"
STEPS, SAMPLES, PROBLEMS, NEW_TOKENS, BATCH = 60, 4, 300, 200, 128
SPLITS = {"test": "lab:strategies-test", "ood": "lab:strategies-ood", "second": "lab:second-test"}
NAMES = {"test": "in distribution", "ood": "out of distribution", "second": "second skill"}
STUDENT, TEACHER_MODEL = "lab:strategies-student", "lab:strategies-teacher"
LAB = [f"student.model={STUDENT}", "data.path=lab:strategies-train", f"rollout.max_new_tokens={NEW_TOKENS}"]
RATE = ["learner.learning_rate=1e-3", "learner.min_learning_rate=1e-4"]  # of every variant
REPLAY = ["replay.path=lab:second-train", "replay.rows_per_step=12"]
TAUGHT = [f"teacher.model={TEACHER_MODEL}"]
NO_REPLAY = ["replay="]
NOTHING = [f"method_options.{name}=0" for name in ("align_correct", "align_wrong", "diversity", "credit_weight")]
NOTHING.append("method_options.shaping=false")
LONGER = ["steps=100"]
FITTED, FROZEN = RUNS / "extractor", RUNS / "extractor-frozen"
# A variant: its recipe, and what it changes of it.
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "grpo": ("grpo", []),
    "sgpo": ("sgpo_lab", []),
    "sgpo, nothing of strategies": ("sgpo_lab", NOTHING),
    "sft": ("sft", []),
    "opd": ("opd_exact", TAUGHT),
    "sgpo_guided": ("sgpo_guided_lab", []),
    "sgpo, no replay": ("sgpo_lab", NO_REPLAY),
    "grpo, replay": ("grpo", REPLAY),
    "sft, replay": ("sft", REPLAY),
    "opd, replay": ("opd_exact", [*TAUGHT, *REPLAY]),
    "sgpo, frozen embeddings": ("sgpo_lab", [f"strategies.path={FROZEN}"]),
    "sgpo, no diversity": ("sgpo_lab", ["method_options.diversity=0"]),
    "sgpo, no shaping": ("sgpo_lab", ["method_options.shaping=false"]),
    "grpo, 100 steps": ("grpo", LONGER),
    "sgpo, 100 steps": ("sgpo_lab", LONGER),
    "sgpo, nothing of strategies, 100 steps": ("sgpo_lab", [*NOTHING, *LONGER]),
    "sft, 400 steps": ("sft", ["steps=400"]),
    "opd, 200 steps": ("opd_exact", [*TAUGHT, "steps=200"]),
}
MODELS = {"student": STUDENT, "teacher": TEACHER_MODEL}


def fit(folder: Path, *options: str) -> None:
    """The extractor of all sgpo variants, where it is not there yet."""
    if not folder.exists():
        command = [sys.executable, "-m", "tutorloop.cli.main", "strategies", "fit", "lab:strategies-train"]
        given = ["--to", str(folder), "--embedder", f"hidden:{TEACHER_MODEL}", "--least", "1", *options]
        subprocess.run([*command, *given], check=True)


def train(name: str, seed: int) -> tuple[str, dict[str, Any]]:
    """Train a variant; its model's folder, and what the run came to."""
    recipe, own = VARIANTS[name]
    folder = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    strategies = [f"strategies.path={FITTED}"] if recipe == "sgpo_lab" else []
    given = [*QUIET, *LAB, *RATE, *strategies, f"steps={STEPS}", f"seed={seed}", f"output_dir={folder}", *own]
    config = load_config(ROOT / "recipes" / f"{recipe}.yaml", given)
    if not run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True):
        raise KeyboardInterrupt
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return str(folder / "final"), json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def measure(model: str, seed: int) -> dict[str, Any]:
    """Split → `right`, the share of right answers with its interval, and `uses`, the answers' shares by strategy."""
    worker = RolloutWorker(engine="transformers", model=model, dtype="fp32", threads=1, max_batch=BATCH)
    verifier = VerifierWorker(config=Verifier())
    found = {}
    try:
        for split, path in SPLITS.items():
            prompts = load_prompts(Data(path=path), path, "test", load_tokenizer(model), PROBLEMS)
            accuracy, answers = evaluate(prompts, split, seed, worker, verifier, SAMPLES, NEW_TOKENS)
            uses = Counter(_kind(answer.text) for answer in answers)
            shares = {kind: round(count / len(answers), 4) for kind, count in sorted(uses.items())}
            found[split] = {"right": accuracy["avg_at_k"], "uses": shares}
    finally:
        verifier.close()
    return found


def _kind(text: str) -> str:
    """`strategy (teacher's words)`, `strategy`, `ends`, `jump`, or `other`."""
    name, wording = recognise(text)
    if name in STRATEGIES:
        return "strategy (teacher's words)" if wording == TEACHER else "strategy"
    return name if name in (ENDS, JUMP) else "other"


def rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def one(name: str, seed: int) -> dict[str, Any]:
    begun = time.monotonic()
    model, summary = (MODELS[name], {}) if name in MODELS else train(name, seed)
    tokens, seconds = summary.get("tokens", {}), summary.get("wall_seconds", 0.0)
    row = {"name": name, "seed": seed, "steps": summary.get("steps", 0), "tokens": tokens, "seconds": round(seconds, 1)}
    row |= {"splits": measure(model, seed), "dropped": summary.get("dropped", {}), "machine": machine()}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}, seed {seed}: {_shares([row])} ({time.monotonic() - begun:.0f} s)", flush=True)
    return row


def _shares(of: Sequence[dict[str, Any]]) -> str:
    return " · ".join(_accuracy(of, split) for split in SPLITS)


def _accuracy(of: Sequence[dict[str, Any]], split: str) -> str:
    values = sorted(100 * row["splits"][split]["right"]["value"] for row in of)
    middle = statistics.mean(values)
    return f"**{middle:.1f}** ({values[0]:.1f} – {values[-1]:.1f})" if len(of) > 1 else f"**{middle:.1f}**"


def _uses(of: Sequence[dict[str, Any]], split: str) -> str:
    kinds = sorted({kind for row in of for kind in row["splits"][split]["uses"]})
    means = {kind: statistics.mean(row["splits"][split]["uses"].get(kind, 0.0) for row in of) for kind in kinds}
    return ", ".join(f"{kind} {share:.0%}" for kind, share in means.items() if share >= 0.005)


def table() -> str:
    """strategies.md."""
    by_name = {name: [row for row in rows() if row["name"] == name] for name in (*MODELS, *VARIANTS)}
    by_name = {name: own for name, own in by_name.items() if own}
    made_on = " and ".join(sorted({row["machine"] for own in by_name.values() for row in own}))
    lines = [
        "# Strategies on the lab",
        "",
        f"`python benchmarks/strategies.py`; {made_on}.",
        f"Each variant trains {STEPS} steps of 96 answers (where it says so, more) from the same student, all at a",
        "learning rate of 0.001; `replay` adds 12 rows of the second skill a step; all sgpo but `no replay` have it.",
        f"Accuracy in %, of {SAMPLES} samples at temperature 1 of each problem: mean (least – most) over the seeds.",
        "`nothing of strategies` is GRPO with sgpo's other settings (no division by the deviation, reference, replay).",
        "The last column: how a variant answers problems out of distribution.",
        "",
        f"| variant | seeds | {' | '.join(NAMES.values())} | answers out of distribution |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in by_name.items():
        accuracies = " | ".join(_accuracy(own, split) for split in SPLITS)
        lines.append(f"| {name} | {len(own)} | {accuracies} | {_uses(own, 'ood')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="SGPO, its ablations, and what is forgotten.")
    known = [*MODELS, *VARIANTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=known, default=known, help="; ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="write the table from the results, and run nothing")
    given = parser.parse_args()
    if not given.table:
        RUNS.mkdir(parents=True, exist_ok=True)
        fit(FITTED)
        fit(FROZEN, "--frozen")
        done = {(row["name"], row["seed"]) for row in rows()}
        for name, seed in ((name, seed) for seed in given.seeds for name in given.only):
            if (name, seed) not in done and not (name in MODELS and seed):
                one(name, seed)
    RESULTS.with_suffix(".md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
