"""Whether a change of the code leaves what it computes: eight synchronous steps of a recipe of each kind, in two trees.

    git worktree add /tmp/before/tutorloop COMMIT
    .venv/bin/python benchmarks/unchanged.py /tmp/before . [--local]

Each tree is a folder that holds the package as `tutorloop`, or the repository itself. Compared are all figures of all
steps that no clock decides, and the final weights, bit for bit. `--local` runs the second tree in one process.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ["max_staleness=0", "seed=3", "eval.path=", "eval.ood_path=", "checkpoint.every=0"]
KINDS = {  # name → recipe, overrides
    "opd exact": ("opd_exact", ["steps=8", "prompts_per_step=16"]),
    "opd topk": ("opd", ["steps=8", "prompts_per_step=16", "teacher.signal=topk"]),
    "opd sampled": ("opd", ["steps=8", "prompts_per_step=16"]),
    "grpo": ("grpo", ["steps=8", "prompts_per_step=4"]),
    "dapo": ("dapo", ["steps=8", "prompts_per_step=4"]),
    "sgsd": ("sgsd_lab", ["steps=8", "prompts_per_step=8"]),
    "star": ("star", ["steps=8", "prompts_per_step=8", "method_options.round_steps=4"]),
    "stages": (
        "grpo",
        ["steps=", "method=", "prompts_per_step=4", "stages=[{method: raft, steps: 4}, {method: grpo, steps: 4}]"],
    ),
}
CLOCKED = ("seconds", "wall_seconds", "pools", "score_cache")


def run(tree: Path, name: str, folder: Path, local: bool) -> tuple[list[dict], str]:
    """The steps' figures and the digest of the final weights."""
    recipe, overrides = KINDS[name]
    command = [sys.executable, "-m", "tutorloop.cli.main", "train", str(ROOT / "recipes" / f"{recipe}.yaml")]
    command += [*SMALL, *overrides, f"output_dir={folder}", *(["--local"] if local else [])]
    environment = {**os.environ, "PYTHONPATH": str(tree)} if (tree / "tutorloop").exists() else dict(os.environ)
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} in {tree}:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    steps = [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows if row["kind"] == "step"]
    return steps, hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            before = run(options.before.resolve(), name, Path(folder) / "before", False)
            after = run(options.after.resolve(), name, Path(folder) / "after", options.local)
        differing = sorted(
            {k for a, b in zip(before[0], after[0], strict=False) for k in a | b if a.get(k) != b.get(k)}
        )
        said = f"differs in {', '.join(differing)}" if differing else "the same figures"
        weights = "the same weights" if before[1] == after[1] else "other weights"
        print(f"{name}: {len(before[0])} and {len(after[0])} steps, {said}, {weights}", flush=True)


if __name__ == "__main__":
    main()
