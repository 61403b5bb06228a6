"""How far a step moves the policy, in all recipes of methods.py and in collapses: what the `update` guard sees.

    .venv/bin/python benchmarks/policy_shift.py       # writes results/policy_shift.{json,md}; half an hour

Forty steps of each, at seed 0, in one process; what policy_shift.json holds is not run again.
"""

import io
import json
import shutil
import statistics
from pathlib import Path

import guards
from rich.console import Console

from tutorloop.cluster import run
from tutorloop.cluster.recording.guards import RULES

STEPS = 40
FILE = guards.RESULTS / "policy_shift.json"
LIMIT = next(rule.room for rule in RULES if rule.kind == "update")


def shifts(name: str) -> list[float]:
    """KL of each step's policy from the one that sampled for it, by the versions between them; nats a token."""
    config = guards.configure(name)
    folder = Path(config.output_dir).with_name(f"shift-{name}")
    quiet = {
        "steps": STEPS,
        "output_dir": str(folder),
        "eval": config.eval.model_copy(update={"path": None, "every": 0}),
    }
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    if not run.train(config.model_copy(update=quiet), False, None, Console(file=io.StringIO(), width=100), local=True):
        raise KeyboardInterrupt
    own = guards.read(folder)["figures"].get("update", [])
    shutil.rmtree(folder)
    return [value for value in own if value is not None]


def table(found: dict[str, list[float]]) -> str:
    lines = [
        "# How far a step moves the policy\n",
        f"`.venv/bin/python benchmarks/policy_shift.py`: {STEPS} steps of each recipe, seed 0, one process. KL of the "
        f"policy that sampled from the one after the step, nats a token; the `update` guard's limit is {LIMIT}. –: the "
        "student samples nothing.\n",
        "| run | step 1 | step 2 | median | most | first beyond the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, own in found.items():
        if not own:
            lines.append(f"| {name} | – | – | – | – | – |")
            continue
        beyond = next((f"step {step}" for step, value in enumerate(own, 1) if value > LIMIT), "none")
        figures = " | ".join(f"{value:.4f}" for value in (*own[:2], statistics.median(own), max(own)))
        lines.append(f"| {name} | {figures} | {beyond} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for name in [name for name in guards.names() if guards.ROLLED_BACK not in name]:
        if name not in found:
            found[name] = shifts(name)
            print(f"{name}: most {max(found[name], default=0):.4f}", flush=True)
            FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")
    FILE.with_suffix(".md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
