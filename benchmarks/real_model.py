"""SmolLM2-135M, exact on-policy distillation on CPUs: seconds a step and memory, ours beside TRL's, in one go.

    .venv/bin/python benchmarks/real_model.py --peer PYTHON     # of an environment with trl==1.16.0; half an hour
    .venv/bin/python benchmarks/real_model.py --table           # the table again, from the results alone

Same models, prompts, tokens and machine; runs are interleaved, one system at a time. The real model must be there
(`make real`). Memory is the peak, over the run, of the proportional set size of all its processes together, driver and
Ray included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tutorloop.lab.real import real_models

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROMPTS, NEW_TOKENS, STEPS = 16, 48, 5  # a step; the first is not counted
# Of ours max_staleness and tokens a micro-batch.
SYSTEMS = {"synchronous": (0, 256), "one step ahead": (1, 256), "one process": (0, 1024), "TRL": None}
WORDS = ("apple", "river", "stone", "cloud", "tiger", "piano", "green", "winter", "basket", "engine")


def measure(system: str, peer: str, folder: Path) -> dict:
    """One run: seconds and tokens of each counted step, the peak memory in GiB."""
    models = real_models()
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"Tell me something about a {WORDS[i % 10]} and the number {i}."} for i in range(64)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ours = SYSTEMS[system]
    if ours is None:
        result = folder / "trl.json"
        sizes = [str(PROMPTS), str(NEW_TOKENS), str(STEPS), str(result)]
        script = str(ROOT / "benchmarks" / "real_model_trl.py")
        peak = _run([peer, script, str(models.student), str(models.teacher), str(prompts), *sizes], folder)
        found = json.loads(result.read_text(encoding="utf-8"))
        return {"system": system, "seconds": found["seconds"], "memory": peak, "stages": {}}
    run = folder / "run"
    staleness, tokens_per_batch = ours
    overrides = {
        "steps": STEPS,
        "prompts_per_step": PROMPTS,
        "max_staleness": staleness,
        "data.path": prompts,
        "rollout.max_new_tokens": NEW_TOKENS,
        "rollout.temperature": 1.0,
        "verifier.kind": "none",
        "eval.path": "",
        "eval.ood_path": "",
        "learner.tokens_per_batch": tokens_per_batch,
        "learner.learning_rate": 1e-4,
        "output_dir": run,
    }
    command = [sys.executable, "-m", "tutorloop.cli.main", "train", str(ROOT / "recipes" / "smollm2_opd.yaml")]
    local = ["--local"] if system == "one process" else []
    peak = _run([*command, *local, *(f"{key}={value}" for key, value in overrides.items())], folder)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"][1:]
    stages = {s: statistics.median(row["seconds"].get(s, 0.0) for row in steps) for s in ("wait", "learn", "publish")}
    return {
        "system": system,
        "seconds": [row["seconds"]["total"] for row in steps],
        "memory": peak,
        "stages": stages,
        "tokens": [row["tokens"]["trained"] for row in steps],
        "memory_by_pool": json.loads((run / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes_by_pool"],
    }


def _run(command: list[str], folder: Path) -> float:
    """Run a command to its end; the peak memory of it and all that it started, in GiB."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, sum(map(_pss, _tree(process.pid))))
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'log').read_text()[-3000:]}")
    return peak / 2**30


def _tree(pid: int) -> Iterator[int]:
    with suppress(psutil.Error):
        own = psutil.Process(pid)
        yield from [pid, *(child.pid for child in own.children(recursive=True))]


def _pss(pid: int) -> int:
    with suppress(OSError):  # it has ended meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def table(results: list[dict]) -> str:
    """Markdown: medians over all counted steps of a system, their range, and the ratio to TRL."""
    medians = {s: _of(results, s) for s in SYSTEMS}
    peer = medians["TRL"]
    lines = [
        "# A real model, side by side",
        "",
        f"`.venv/bin/python benchmarks/real_model.py --peer PYTHON`, {os.cpu_count()} cores. SmolLM2-135M, its",
        f"damaged copy, float32, exact reverse KL, {PROMPTS} prompts × {NEW_TOKENS} tokens a step. Runs interleaved;",
        "medians of all steps but each run's first (least – most). Memory: the peak of all processes together (PSS).",
        "",
        "| system | runs | seconds a step | to TRL | memory, GiB | to TRL | wait / learn / publish, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for system, (runs, seconds, memory, stages) in medians.items():
        middle = statistics.median(seconds)
        parts = " / ".join(f"{value:.1f}" for value in stages.values()) or "–"
        name = system if system == "TRL" else f"tutorloop, {system}"
        lines.append(
            f"| {name} | {runs} | {middle:.1f} ({min(seconds):.1f} – {max(seconds):.1f}) |"
            f" {middle / statistics.median(peer[1]):.2f}× | {memory:.1f} | {memory / peer[2]:.2f}× | {parts} |"
        )
    return "\n".join(lines) + "\n"


def _of(results: list[dict], system: str) -> tuple[int, list[float], float, dict[str, float]]:
    own = [row for row in results if row["system"] == system]
    stages = {name: statistics.median(row["stages"][name] for row in own) for name in own[0]["stages"]}
    seconds = [value for row in own for value in row["seconds"]]
    return len(own), seconds, statistics.median(row["memory"] for row in own), stages


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="the Python of an environment with TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    file = RESULTS / "real_model.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if not options.table:
        for number in range(options.rounds):
            for system in SYSTEMS:
                if sum(row["system"] == system for row in results) > number:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    results.append(measure(system, options.peer, Path(folder)))
                print(results[-1], flush=True)
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "real_model.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
