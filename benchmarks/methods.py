"""Every method on the lab, from the same student with the same token budget: table and plot in benchmarks/results/.

    make methods                                            # all recipes at three seeds: hours on two cores
    .venv/bin/python benchmarks/methods.py --only opd grpo --seeds 0
    .venv/bin/python benchmarks/methods.py --table          # table and plot again, from the results alone

methods.json is written after every run, and what it holds is not run again: stop at any time, start again to go on. A
run that fails is recorded with its error and tried again the next time. A method runs `--steps` steps; where that is
not what the budget allows (a method that asks for more answers uses more), it runs anew with steps in proportion.

The models are evaluated in this process, with the workers that the pools run: the answers are those of a run's own
evaluation at that seed, and nothing has to be started. They also say how long they are and, as the mean of −log π over
tokens sampled at temperature 1, the model's entropy: what a run's metrics tell of methods that train on their own
answers alone.
"""

import argparse
import io
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from methods_table import (
    BASELINES,
    JSON_FILE,
    PLOT_FILE,
    SPLITS,
    TABLE_FILE,
    Results,
    Row,
    finite,
    plot,
    steps_for,
    table,
)
from ray.cluster_utils import Cluster
from rich.console import Console

from tutorloop import __version__
from tutorloop.actors.worker import RolloutWorker
from tutorloop.cluster import run
from tutorloop.cluster.data import load_prompts
from tutorloop.cluster.recording.statistics import summarise
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.config import Config, Data
from tutorloop.contracts.errors import DataError, InputError
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.records import Prompt, Rollout, SampleRequest, Sampling, seed_of
from tutorloop.contracts.verifier_config import Verifier
from tutorloop.models.loading import load_tokenizer
from tutorloop.verifier_service.worker import VerifierWorker

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "methods"
NOT_COMPARED = (  # opd again, and other models and problems
    *("quickstart", "gsm8k_qwen3", "sgsd_qwen3", "smollm2_opd", "sgpo_lab", "sgpo_guided_lab", "sgpo_qwen3"),
)
TOKENS_PER_STEP = 2500  # about 96 answers of 25 tokens; times --steps is the budget
SAMPLES, PROBLEMS, NEW_TOKENS, BATCH = 8, 400, 64, 128
DATA = {"in_distribution": "lab:test", "out_of_distribution": "lab:ood"}
QUIET = ["eval.path=", "eval.ood_path=", "eval.every=0", "checkpoint.every=0", "checkpoint.keep=1"]


def recipes() -> list[str]:
    """Names of the recipes of one method each."""
    trees = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / "recipes").glob("*.yaml")}
    return sorted(name for name, tree in trees.items() if "method" in tree and name not in NOT_COMPARED)


def configure(name: str, seed: int, steps: int) -> Config:
    """The recipe over about `steps` steps: warm-up and rounds keep their share, and rounds are whole."""
    file = ROOT / "recipes" / f"{name}.yaml"
    recipe = load_config(file)
    own = []
    if round_steps := recipe.method_options.get("round_steps"):
        rounds = recipe.steps // round_steps
        round_steps = max(2, steps // rounds)
        steps, own = rounds * round_steps, [f"method_options.round_steps={round_steps}"]
    own += [f"steps={steps}", f"learner.warmup_steps={recipe.learner.warmup_steps * steps // recipe.steps}"]
    return load_config(file, [*QUIET, *own, f"seed={seed}", f"output_dir={RUNS / f'{name}-{seed}'}"])


def train(name: str, seed: int, results: Results, address: str | None) -> Row:
    """Train with the steps that the budget allows, which the method's first run finds out. No accuracy yet."""
    steps = results.steps.get(name, results.first_steps)
    row = _run(configure(name, seed, steps), name, seed, address)
    if name not in results.steps:
        fitting = configure(name, seed, steps_for(results.budget, row.steps, row.used))
        if fitting.steps != row.steps:
            print(f"    {row.used:,} tokens in {row.steps} steps: again with {fitting.steps}", flush=True)
            row = _run(fitting, name, seed, address)
        results.steps[name] = row.steps
    return row


def _run(config: Config, name: str, seed: int, address: str | None) -> Row:
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    if not run.train(config, False, address, Console(file=io.StringIO(), width=100)):
        raise KeyboardInterrupt
    shutil.rmtree(folder / "checkpoints")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tokens = summary["tokens"]
    return Row(
        name=name,
        seed=seed,
        steps=summary["steps"],
        tokens={
            "student": tokens["generated"],
            "teacher": tokens["teacher_generated"],
            "given": tokens["given"],
            "scored": tokens["scored"],
            "trained": tokens["trained"],
        },
        wall_seconds=round(summary["wall_seconds"], 1),
        dropped=summary["dropped"],
    )


def measure(row: Row, model: str) -> Row:
    """The row with the accuracy, entropy and length of `model`. Raises DataError for a model without finite figures."""
    # One thread: several wait for each other many times as long where anything else runs.
    worker = RolloutWorker(engine="transformers", model=model, dtype="fp32", threads=1, max_batch=BATCH)
    verifier = VerifierWorker(config=Verifier())
    accuracy, answers = {}, {}
    try:
        for split in SPLITS:
            prompts = load_prompts(Data(path=DATA[split]), DATA[split], "test", load_tokenizer(model), PROBLEMS)
            accuracy[split], answers[split] = evaluate(prompts, split, row.seed, worker, verifier, SAMPLES, NEW_TOKENS)
    finally:
        verifier.close()
    logprobs = np.concatenate([answer.logprobs for answer in answers["in_distribution"]])
    return Row(
        **{name: getattr(row, name) for name in ("name", "seed", "steps", "tokens", "wall_seconds", "dropped")},
        accuracy=accuracy,
        entropy=round(finite(-float(logprobs.mean())), 4),
        length=round(len(logprobs) / len(answers["in_distribution"]), 2),
    )


def evaluate(
    prompts: Sequence[Prompt],
    split: str,
    seed: int,
    worker: RolloutWorker,
    verifier: VerifierWorker,
    samples: int,
    new_tokens: int,
) -> tuple[dict[str, dict[str, float]], list[Rollout]]:
    """avg@k and pass@k with their intervals, and the answers. Seeds as in cluster/evaluation.py."""
    requests = tuple(
        SampleRequest(
            rollout_id=f"eval-{row}-{sample}",
            group_id=str(row),
            sample_index=sample,
            row=row,
            seed=seed_of(seed, "eval", split, row, sample),
        )
        for row in range(len(prompts))
        for sample in range(samples)
    )
    batch, _ = worker.generate(encode(Prompt, prompts), requests, Sampling(max_new_tokens=new_tokens))
    _, verdicts = verifier.judge(batch)
    correct = np.array(verdicts.passed).reshape(len(prompts), samples)
    answers = [list(verdicts.answers[at : at + samples]) for at in range(0, len(requests), samples)]
    stats = summarise(correct, answers)
    figures = {
        figure: {name: round(value, 5) for name, value in stats[figure].items()} for figure in ("avg_at_k", "pass_at_k")
    }
    return figures, decode(Rollout, batch)


def one(name: str, seed: int, results: Results, address: str | None) -> Row:
    """Train and measure one method at one seed; whatever stops it but the user becomes its row's error."""
    try:
        if name in BASELINES:
            return measure(Row(name=name, seed=seed), BASELINES[name])
        return measure(train(name, seed, results, address), str(RUNS / f"{name}-{seed}" / "final"))
    except Exception as error:
        return Row(name=name, seed=seed, error=f"{type(error).__name__}: {error}".splitlines()[0])  # no paths below it


def machine() -> str:
    """What the rows were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "transformers"))
    software = f"Python {platform.python_version()}, tutorloop {__version__}, {others}"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, no GPU used, {software}"


def start(folder: Path, steps: int) -> Results:
    """What is there already, or nothing yet. Raises DataError where it was made with another budget."""
    if not (folder / JSON_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        return Results(first_steps=steps, budget=steps * TOKENS_PER_STEP, samples=SAMPLES, problems=PROBLEMS)
    results = Results.load(folder / JSON_FILE)
    if (results.first_steps, results.budget) != (steps, steps * TOKENS_PER_STEP):
        found = f"{folder / JSON_FILE}: {results.first_steps} steps, {results.budget:,} tokens"
        remedy = f"give --steps {results.first_steps}, or another --results"
        raise DataError(f"a table holds runs of one budget, here {steps * TOKENS_PER_STEP:,} tokens", found, remedy)
    return results


def write(results: Results, folder: Path) -> None:
    results.save(folder / JSON_FILE)
    (folder / TABLE_FILE).write_text(table(results), encoding="utf-8")
    plot(results, folder / PLOT_FILE)


def arguments() -> argparse.Namespace:
    known = [*BASELINES, *recipes()]
    parser = argparse.ArgumentParser(description="Every method on the lab with the same token budget.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=known, default=known, help=", ".join(known))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help=f"of {TOKENS_PER_STEP:,} tokens each: the budget")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--table", action="store_true", help="write table and plot from the results, and run nothing")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.table:
        write(Results.load(given.results / JSON_FILE), given.results)
        return
    results = start(given.results, given.steps)
    todo = results.pending(given.only, given.seeds)
    results.machine = machine()
    command = shlex.join(["python", "benchmarks/methods.py", *sys.argv[1:]])
    results.commands = [*(old for old in results.commands if old != command), command]
    ray_cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False}
    )
    try:
        for count, (name, seed) in enumerate(todo, 1):
            begun = time.monotonic()
            row = one(name, seed, results, ray_cluster.address)
            results.put(row)
            write(results, given.results)
            value = row.error or f"{100 * row.accuracy['in_distribution']['avg_at_k']['value']:.1f} %"
            print(f"{count}/{len(todo)} {name} seed {seed}: {value} ({time.monotonic() - begun:.0f} s)", flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
    finally:
        ray_cluster.shutdown()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
