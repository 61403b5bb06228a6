"""Retrieval from a skill bank: `.venv/bin/python benchmarks/skills.py [ROUNDS]` writes results/skills.json and .md.

Speed: 256 problems at once on 10,000 entries, against LanceDB's own full-text search, one problem at a time, on the
same entries in a local table with an index; in turns, in the same process. Entries are those of SGSD's raw candidates
with words exchanged among them, problems are GSM8K's and MATH-500's (both from ../shared/data or TUTORLOOP_SHARED_DATA,
and made of the lab's problems where they are not there). Recall@8: of entries that were made from one problem each, the
share that this problem finds among the first 8 of their kind.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
from lancedb.index import FTS

from tutorloop import lab
from tutorloop.contracts.arrow import encode
from tutorloop.contracts.records import EMPTY_I, Prompt
from tutorloop.contracts.skills import BankEntry
from tutorloop.verifier_service.skills.extract import LabExtractor, Memory
from tutorloop.verifier_service.skills.published import load_published
from tutorloop.verifier_service.skills.retrieval import Retriever
from tutorloop.verifier_service.skills.store import create_bank
from tutorloop.verifier_service.skills.worker import SkillWorker

HERE = Path(__file__).parent
DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", HERE.parents[1] / "shared" / "data"))
ENTRIES, BATCH, K, SINGLE = 10_000, 256, 8, 64  # SINGLE: problems that LanceDB is asked in a round
LAB_STEP = 96  # prompts


def rows_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def entries_and_problems(rng: random.Random) -> tuple[list[BankEntry], list[str], str]:
    """ENTRIES entries, BATCH problems, and where they are from."""
    paths = sorted((DATA / "skills").glob("sgsd_*_raw_skill_candidates.json"))
    problems = [row["problem"] for name in ("gsm8k_test_public", "math500_public") for row in math_rows(name)]
    real = [entry for path in paths for entry in load_published(str(path))]
    source = "SGSD's raw candidates, GSM8K and MATH-500"
    if not real or not problems:
        lab_rows = rows_of(lab.ROOT / "data" / "train.jsonl")
        problems = [row["prompt"] for row in lab_rows]
        real = LabExtractor()(lab_memories(lab_rows, rng)).entries
        source = "the lab's problems"
    pool = {kind: [w for e in real if e.kind == kind for w in e.text.split(" ")] for kind in ("skill", "mistake")}
    varied = []
    for i in range(ENTRIES):
        kind = "skill" if i % 2 else "mistake"
        model = rng.choice([entry for entry in rng.sample(real, 20) if entry.kind == kind] or real)
        texts = tuple(
            " ".join(word if rng.random() < 0.7 else rng.choice(pool[kind]) for word in text.split(" "))
            for text in model.texts
        )
        varied.append(BankEntry(entry_id=f"e{i:05}", kind=kind, texts=(texts[0], texts[1], texts[2])))
    return varied, rng.sample(problems, BATCH), source


def math_rows(name: str) -> list[dict[str, Any]]:
    return rows_of(DATA / "problems" / f"{name}.jsonl")


def lab_memories(rows: Sequence[dict[str, Any]], rng: random.Random) -> list[Memory]:
    """Every solution as it is, and with one digit of its last step changed."""
    memories = []
    for row in rows:
        for passed in (True, False):
            response = row["solution"]
            if not passed:
                head, sign, last = response.rpartition("=")
                at = next((i for i, letter in enumerate(last) if letter.isdigit()), None)
                if at is None:
                    continue
                digit = str((int(last[at]) + rng.randrange(1, 10)) % 10)
                response = f"{head}{sign}{last[:at]}{digit}{last[at + 1 :]}"
            rollout = f"{row['id']}:{passed}"
            memories.append(
                Memory(problem=row["prompt"], response=response, answer="", passed=passed, rollout_id=rollout)
            )
    return memories


def seconds(work: Callable[[], object]) -> float:
    return both_seconds(work)[0]


def both_seconds(work: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of all cores."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def speed(rounds: int, rng: random.Random) -> dict[str, Any]:
    """Milliseconds a problem of both, round by round, and the ratio of each round."""
    entries, problems, source = entries_and_problems(rng)
    retriever = Retriever(entries)
    build = seconds(lambda: Retriever(entries))
    with tempfile.TemporaryDirectory() as folder:
        columns = {name: [getattr(e, name) for e in entries] for name in ("entry_id", "kind", "text")}
        table: Any = lancedb.connect(folder).create_table("entries", pa.table(columns))
        table.create_index("text", config=FTS())

        def one_at_a_time(asked: Sequence[str]) -> None:
            for problem in asked:
                table.search(problem, query_type="fts").limit(K).to_arrow()

        one_at_a_time(problems[:8])
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append([1000 * t / BATCH for t in both_seconds(lambda: retriever.pairs(problems, K))])
            asked = rng.sample(problems, SINGLE)
            theirs.append([1000 * t / SINGLE for t in both_seconds(lambda asked=asked: one_at_a_time(asked))])
    ratios = [b[0] / a[0] for a, b in zip(ours, theirs, strict=True)]
    cpu_ratios = [b[1] / a[1] for a, b in zip(ours, theirs, strict=True)]
    return {
        "entries": len(entries),
        "from": source,
        "rounds": rounds,
        "index_seconds": build,
        "ours_ms": statistics.median(row[0] for row in ours),
        "ours_cpu_ms": statistics.median(row[1] for row in ours),
        "lancedb_ms": statistics.median(row[0] for row in theirs),
        "lancedb_cpu_ms": statistics.median(row[1] for row in theirs),
        "ratio": statistics.median(ratios),
        "worst_ratio": min(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "worst_cpu_ratio": min(cpu_ratios),
    }


def lab_step(rounds: int) -> dict[str, Any]:
    """Milliseconds of the worker for LAB_STEP prompts of the lab's bank: all new, and all known."""
    rows = rows_of(lab.ROOT / "data" / "train.jsonl")[:LAB_STEP]
    prompts = [Prompt(prompt_id=row["id"], text=row["prompt"], token_ids=EMPTY_I, answer="") for row in rows]
    batch = encode(Prompt, prompts)
    entries = load_published(str(lab.ROOT / "data" / "bank.json"))
    with tempfile.TemporaryDirectory() as folder:
        worker = SkillWorker(path=create_bank(folder, entries, "", {}).path, embedder="lexical")
        found: dict[str, list[float]] = {"refresh_ms": [], "new_ms": [], "known_ms": []}
        for _ in range(rounds):
            found["refresh_ms"].append(1000 * seconds(lambda: worker.refresh(worker.version)))
            for name in ("new_ms", "known_ms"):
                found[name].append(1000 * seconds(lambda: worker.retrieve(batch, range(LAB_STEP), 4)))
    return {"entries": len(entries), **{name: statistics.median(values) for name, values in found.items()}}


def recall(entries: Sequence[BankEntry], problems: Sequence[str]) -> dict[str, Any]:
    """Of entries, each made from the problem at its place; and where K of a kind were drawn blindly."""
    retriever = Retriever(entries)
    hits = blind = 0.0
    for entry, problem in zip(entries, problems, strict=True):
        hits += entry in [found for found, _ in retriever.search(problem, K, entry.kind)]
        blind += min(1.0, K / sum(other.kind == entry.kind for other in entries))
    return {"entries": len(entries), "recall": hits / len(entries), "blind": blind / len(entries)}


def of_prm800k() -> tuple[list[BankEntry], list[str]]:
    """A mistake of each problem: its first step rated wrong, and the one that was chosen in its place."""
    entries, problems = [], []
    for row in rows_of(DATA / "skills" / "prm800k_steps_sample.jsonl"):
        wrong = [(c["text"], s["chosen"]) for s in row["steps"] for c in s["candidates"] if c["rating"] == -1]
        if wrong and row["problem"] not in problems:
            texts = (wrong[0][0], "", wrong[0][1] or "")
            entries.append(BankEntry(entry_id=row["id"], kind="mistake", texts=texts))
            problems.append(row["problem"])
    return entries, problems


def of_skillrl() -> tuple[list[BankEntry], list[str]]:
    """A skill of each memory of SkillRL's search agent: what a model wrote of it."""
    path = DATA / "skills" / "skillrl_search_generated_memories_search.json"
    memories = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    entries = [
        BankEntry(entry_id=memory["memory_id"], kind="skill", texts=(memory["contextual_description"], "", ""))
        for memory in memories
    ]
    return entries, [memory["content"]["task_meta"]["original_goal"] for memory in memories]


def of_lab(rng: random.Random) -> tuple[list[BankEntry], list[str]]:
    """Candidates of the lab's extractor from a right and a wrong solution of each test problem, before they merge."""
    memories = lab_memories(rows_of(lab.ROOT / "data" / "test.jsonl"), rng)
    problem_of = {memory.rollout_id: memory.problem for memory in memories}
    entries = LabExtractor()(memories).entries
    return entries, [problem_of[entry.rollout_ids[0]] for entry in entries]


def written(found: dict[str, Any]) -> str:
    s, step = found["speed"], found["lab_step"]
    lines = [
        "# Retrieval from the skill bank",
        f"`{found['command']}`, {found['cpus']} cores, load {found['load']:.1f} before it",
        "",
        f"{s['entries']:,} entries, {BATCH} problems at once, {K} pairs each; from {s['from']}; medians over "
        f"{s['rounds']} rounds in turns. LanceDB's search gives {K} entries of either kind, ours {K} of each.",
        "",
        "| | ms a problem | problems a second | ms of all cores |",
        "|---|---|---|---|",
        f"| LanceDB, one at a time | {s['lancedb_ms']:.2f} | {1000 / s['lancedb_ms']:,.0f} "
        f"| {s['lancedb_cpu_ms']:.2f} |",
        f"| `Retriever.pairs` | {s['ours_ms']:.3f} | {1000 / s['ours_ms']:,.0f} | {s['ours_cpu_ms']:.3f} |",
        f"| ratio (worst round) | {s['ratio']:.1f} ({s['worst_ratio']:.1f}) | "
        f"| {s['cpu_ratio']:.1f} ({s['worst_cpu_ratio']:.1f}) |",
        "",
        f"A version's index takes {s['index_seconds']:.2f} s to make, once.",
        "",
        f"A lab step, {LAB_STEP} prompts on the lab's bank of {step['entries']}: {step['new_ms']:.1f} ms where all are "
        f"new, {step['known_ms']:.1f} ms where all are known; a new version {step['refresh_ms']:.1f} ms.",
        "",
        "| own problem found | entries | recall@8 | drawn blindly |",
        "|---|---|---|---|",
    ]
    for name, row in found["recall"].items():
        lines.append(f"| {name} | {row['entries']} | {row['recall']:.3f} | {row['blind']:.3f} |")
    lines += ["", "The lab's entries quote their problem, SkillRL's were written from it; PRM800K's only work on it."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    rounds, rng = int(arguments[0]) if arguments else 10, random.Random(0)
    corpora = {
        "the lab's candidates, unmerged": of_lab(rng),
        "PRM800K, a mistake of each problem's steps": of_prm800k(),
        "SkillRL's search memories, as described": of_skillrl(),
    }
    found = {
        "command": ".venv/bin/python benchmarks/skills.py" + "".join(f" {a}" for a in arguments),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "speed": speed(rounds, rng),
        "lab_step": lab_step(rounds),
        "recall": {name: recall(*made) for name, made in corpora.items() if made[0]},
    }
    (HERE / "results" / "skills.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "results" / "skills.md").write_text(written(found), encoding="utf-8")
    print(written(found))


if __name__ == "__main__":
    main(sys.argv[1:])
