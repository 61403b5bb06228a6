"""What keeping teacher scores costs and saves: an entry, the quickstart with and without, epochs of given answers.

    .venv/bin/python benchmarks/score_cache.py entries steps epochs pairs    # twenty minutes; each alone as well
    .venv/bin/python benchmarks/score_cache.py --table                 # the table again, from the results alone

`entries` is in one process, without Ray: a call as the recipe makes it, the engine beside writing and reading what it
answered, medians. `steps` keeps in every other step of one run. `pairs` runs the quickstart's training PAIRS times on
Ray, with and without, in turns: of each pair the ratio of a step's median seconds; it needs a quiet machine.
SmolLM2-135M must be there (`make real`).
"""

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tutorloop.cluster import run
from tutorloop.contracts.recipe import load_config
from tutorloop.contracts.records import Rollout, ScoreRequest, TeacherScores
from tutorloop.lab.real import real_models
from tutorloop.models.loading import locate_model
from tutorloop.teacher_service import score_cache
from tutorloop.teacher_service.engines import make_engine
from tutorloop.teacher_service.requests import only_numbers
from tutorloop.teacher_service.score_cache import FROZEN, CachePlace, CacheUse, ScoreCache

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAIRS, STEPS, COUNTED, TURNS = 5, 60, 20, 120  # steps of a run, and from which one on they count
# Times, and a call: rollouts, prompt and response tokens of each; about as in quickstart and smollm2_opd.
CALLS = {"lab:teacher": (15, 96, 22, 26), "SmolLM2-135M": (3, 16, 40, 48)}
REQUESTS = {
    "sampled": ScoreRequest(),
    "topk, 64": ScoreRequest(signal="topk", top_k=64),
    "exact": ScoreRequest(signal="hidden"),
}
# Qwen3-8B: 4096 hidden units in bf16; 2 · 8.2e9 operations a token at 400 · 10¹² a second (H100, half of its peak).
LARGE_HIDDEN, LARGE_MICROSECONDS = 4096, 2 * 8.2e9 / 400e12 * 1e6
DISK = 1e9  # bytes a second, of writing an entry of the large teacher


def call_of(rollouts: int, prompt: int, response: int) -> list[Rollout]:
    random = np.random.default_rng(0)
    ids = random.integers(3, 500, (rollouts, prompt + response)).astype(np.int32)
    shared: dict[str, Any] = {"prompt_id": "p", "group_id": "g", "prompt_length": prompt, "text": ""}
    shared |= {"logprobs": np.zeros(response, np.float32), "loss_mask": np.ones(response, bool)}
    return [Rollout(rollout_id=str(i), sample_index=i, token_ids=own, **shared) for i, own in enumerate(ids)]


class Answers:
    """What an engine has answered, at once."""

    def __init__(self, engine: Any, answers: list[TeacherScores]) -> None:
        self.tokens_per_batch, self.vocab, self.context = engine.tokens_per_batch, engine.vocab, engine.context
        self.largest_k, self.answers = engine.largest_k, answers

    def score(self, rollouts: Sequence[Rollout], request: ScoreRequest) -> list[TeacherScores]:
        return self.answers


def entries() -> list[dict[str, Any]]:
    """Microseconds a token of engine, writing and reading; the bytes of an entry."""
    score_cache.EXPECTED = dict.fromkeys(score_cache.EXPECTED, float("inf"))
    found = []
    for model, (rounds, *sizes) in CALLS.items():
        folder = str(real_models().teacher if model.startswith("Smol") else locate_model(model))
        engine = make_engine("transformers", folder, teacher_id="t", dtype="fp32")
        rollouts = call_of(*sizes)
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        for signal, request in REQUESTS.items():
            turns = [turn_of(engine, rollouts, request) for _ in range(rounds + 1)][1:]  # the first one warms up
            seconds = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            each = {name: 1e6 * seconds[name] / tokens for name in ("engine", "adds", "read")}
            found.append({"model": model, "signal": signal, "tokens": tokens, "bytes": seconds["bytes"], **each})
            print(found[-1], flush=True)
    return found


def turn_of(engine: Any, rollouts: list[Rollout], request: ScoreRequest) -> dict[str, float]:
    """Seconds of the engine, of what the cache adds to a call that it does not know, and of one that it knows."""
    start = time.perf_counter()
    answers = engine.score(rollouts, request)
    answered = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = CachePlace(run=folder, teacher_id="t", most_bytes=2**30, scorer="s")
        cache = ScoreCache(place, Answers(engine, answers))
        cache._look_over()  # its folder is there
        checked = time.perf_counter()
        for answer in answers:
            only_numbers(answer)  # with a cache or without
        asks = time.perf_counter()
        _, missed = cache.score(rollouts, request, FROZEN)
        wrote = time.perf_counter()
        _, known = cache.score(rollouts, request, FROZEN)
        read = time.perf_counter()
    assert missed.bytes_written == known.bytes_read and len(known.hits) == len(rollouts)
    adds = (wrote - asks) - (asks - checked)
    return {"engine": answered - start, "adds": adds, "read": read - wrote, "bytes": missed.bytes_written}


def trained(folder: Path, recipe: str, *overrides: str, local: bool) -> dict[str, Any]:
    """A run's steps and summary."""
    command = [sys.executable, "-m", "tutorloop.cli.main", "train", str(ROOT / "recipes" / f"{recipe}.yaml")]
    own = [f"output_dir={folder}", "eval.path=", "eval.ood_path=", "checkpoint.every=0", *overrides]
    done = subprocess.run([*command, *own, *(["--local"] if local else [])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{recipe} {overrides}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"steps": [row for row in rows if row["kind"] == "step"], "summary": summary}


def pairs() -> list[dict[str, float]]:
    """Seconds of a step with and without, in turns, and who is first changes."""
    found = []
    for pair in range(PAIRS):
        seconds = {}
        for gib in (0, 1) if pair % 2 else (1, 0):
            with tempfile.TemporaryDirectory() as folder:
                own = (f"steps={STEPS}", f"teacher.cache_gib={gib}")
                steps = trained(Path(folder) / "run", "quickstart", *own, local=False)["steps"]
                seconds[gib] = statistics.median(row["seconds"]["total"] for row in steps[COUNTED:])
        found.append({"with": seconds[1], "without": seconds[0]})
        print(found[-1], seconds[1] / seconds[0], flush=True)
    return found


def steps() -> list[dict[str, float]]:
    """Steps of one synchronous run in this process, every other one without keeping: seconds of CPU and wall of each,
    all of whose scoring is waited for."""
    found: list[dict[str, float]] = []
    last = [0.0, 0.0]
    ask = ScoreCache.score

    def in_turns(cache: ScoreCache, rollouts: Sequence[Rollout], request: ScoreRequest, weights: str) -> Any:
        now = [time.process_time(), time.perf_counter()]
        if found:
            found[-1] |= {"cpu": now[0] - last[0], "wall": now[1] - last[1]}
        last[:] = now
        found.append({"kept": float(len(found) % 2)})
        if not found[-1]["kept"]:
            return [only_numbers(answer) for answer in cache.engine.score(rollouts, request)], CacheUse()
        scores, use = ask(cache, rollouts, request, weights)
        found[-1]["bytes"] = use.bytes_written
        return scores, use

    ScoreCache.score = in_turns
    with tempfile.TemporaryDirectory() as folder:
        own = ["eval.path=", "eval.ood_path=", "checkpoint.every=0", "max_staleness=0", f"steps={TURNS}"]
        config = load_config(ROOT / "recipes" / "quickstart.yaml", [f"output_dir={folder}/run", *own])
        run.train(config, False, None, Console(file=io.StringIO(), width=100), local=True)
    ScoreCache.score = ask
    return found[COUNTED:-1]


def epochs() -> list[dict[str, Any]]:
    """The lab's kd over 192 solutions for four epochs: the teacher's seconds and tokens."""
    found = []
    for gib, packed in ((0, 8192), (0, 1), (1, 1)):
        with tempfile.TemporaryDirectory() as folder:
            rows = (ROOT / "lab" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:192]
            data = Path(folder) / "data.jsonl"
            data.write_text("\n".join(rows) + "\n", encoding="utf-8")
            own = [f"data.path={data}", "steps=8", "max_staleness=0", f"teacher.cache_gib={gib}"]
            own += [f"teacher.tokens_per_batch={packed}", "verifier.kind=none"]
            summary = trained(Path(folder) / "run", "kd", *own, local=True)["summary"]
        busy = summary["pools"]["teacher"]["busy_seconds"]
        found.append({"gib": gib, "packed": packed, "busy": busy, "tokens": summary["tokens"]["scored"]})
        found[-1] |= summary.get("score_cache", {})
        print(found[-1], flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    lines = ["# Kept teacher scores, measured", ""]
    lines += [
        "2 hyperthreads of one core, no GPU, torch CPU build. `.venv/bin/python benchmarks/score_cache.py entries steps"
    ]
    lines += [
        "epochs`, with other work on the machine. What it all means: [docs/reliability.md](../../docs/reliability.md).",
        "",
    ]
    if own := results.get("entries"):
        lines += [
            "## An entry",
            "",
            "fp32; microseconds a token (prompt included), medians of 15 and 3 calls. `adds` is",
        ]
        lines += ["all that the cache does in a call that it does not know, `read` a call that it knows.", ""]
        lines += ["| teacher | signal | tokens in an entry | KiB | bytes a token | engine | adds | share | read |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in own:
            cells = [row["model"], row["signal"], f"{row['tokens']:,}", f"{row['bytes'] / 1024:,.0f}"]
            cells += [f"{row['bytes'] / row['tokens']:.0f}", f"{row['engine']:.1f}", f"{row['adds']:.2f}"]
            cells += [f"{row['adds'] / row['engine']:.1%}", f"{row['read']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *large(), ""]
    if own := results.get("pairs"):
        ratios = sorted(row["with"] / row["without"] for row in own)
        lines += ["## The quickstart with and without", ""]
        lines += [
            f"Seconds of a step, medians over steps {COUNTED + 1} to {STEPS}; {len(own)} pairs of runs in turns.",
            "",
        ]
        lines += ["| with | without | ratio |", "|---|---|---|"]
        lines += [f"| {r['with']:.4f} | {r['without']:.4f} | {r['with'] / r['without']:.4f} |" for r in own]
        middle = statistics.median(ratios)
        lines += ["", f"Median ratio {middle:.4f} ({ratios[0]:.4f} – {ratios[-1]:.4f}).", ""]
    if own := results.get("steps"):
        kept, plain = own[own[0]["kept"] == 0 :: 2], own[own[0]["kept"] == 1 :: 2]
        ratios = {
            name: statistics.median(a[name] / b[name] for a, b in zip(kept, plain, strict=False))
            for name in ("cpu", "wall")
        }
        middle = {name: statistics.median(row[name] for row in plain) for name in ("cpu", "wall")}
        lines += ["## A step with and without", ""]
        lines += [
            f"The quickstart's training, synchronous, in one process, every other of {len(own)} steps without; all"
        ]
        lines += [
            f"scoring is waited for. A step takes {middle['cpu']:.2f} s of CPU and {middle['wall']:.2f} s; medians of"
        ]
        lines += [f"the ratios of neighbours: CPU {ratios['cpu']:.4f}, wall {ratios['wall']:.4f}."]
        lines += [f"{sum(row['bytes'] > 0 for row in kept)} of {len(kept)} calls were kept.", ""]
    lines += epochs_table(results.get("epochs", []))
    return "\n".join(lines)


def epochs_table(own: list[dict[str, Any]]) -> list[str]:
    """Of the lab's kd; nothing where it was not run."""
    lines: list[str] = []
    if own:
        lines += [
            "## Epochs of given answers",
            "",
            "The lab's `kd`, 192 solutions, four epochs of two steps, one process.",
            "",
        ]
        lines += ["| teacher.cache_gib | teacher.tokens_per_batch | known | scored | tokens scored | teacher busy, s |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in own:
            cells = [str(row["gib"]), str(row["packed"]), f"{row.get('hits', 0)}", f"{row.get('misses', 768)}"]
            cells += [f"{row['tokens']:,}", f"{row['busy']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            "An answer is known again where it stands alone in its forward pass. With `tokens_per_batch=1` each",
        ]
        lines += ["does, which makes a pass over short answers slower and later epochs free.", ""]
    return lines


def large() -> list[str]:
    """An 8B teacher, computed."""
    lines = [
        f"Of an 8B teacher in bf16 on a GPU, computed ({LARGE_MICROSECONDS:.0f} µs a token, a disk of 1 GB/s):",
        "",
    ]
    lines += ["| signal | bytes a response token | tokens in 1 GiB | writing, µs a token | of the engine's time |"]
    lines += ["|---|---|---|---|---|"]
    for signal, size in (("sampled", 4), ("topk, 64", 4 + 64 * 8 + 4), ("exact", 4 + 2 * LARGE_HIDDEN)):
        seconds = 1e6 * size / DISK
        cells = (
            signal,
            f"{size:,}",
            f"{2**30 / size / 1e6:,.1f} M",
            f"{seconds:.3f}",
            f"{seconds / LARGE_MICROSECONDS:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    path = RESULTS / "score_cache.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = {"entries": entries, "steps": steps, "epochs": epochs, "pairs": pairs}
    for name in [name for name in sys.argv[1:] if name != "--table"]:
        results[name] = parts[name]()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = table(results)
    (RESULTS / "score_cache.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
