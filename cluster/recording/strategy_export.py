"""An audit of strategies for a program: a JSON line a rollout, and one object of figures."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ...verifier_service.strategies.alignment import FEWEST_STEPS
from .progress import SPLITS
from .strategy_audit import Audit
from .strategy_checks import checks_of
from .strategy_rollouts import TRAIN

RECORDED = {
    "some": "record: some, so the file has the first prompt groups of each step",
    "all": "record: all, so the file has every rollout",
    "none": "record: none by now",
}


def lines_of(audit: Audit) -> Iterator[str]:
    """In the order of the run's file. `solution`: number of the best one in the extractor's folder; `steps` are
    [start, end) of the response's tokens, and their text, whole."""
    for one in audit.followed:
        own = one.recorded
        line = {
            "rollout_id": own.rollout_id,
            "prompt_id": own.prompt_id,
            "split": own.split,
            "step": own.step,
            "passed": own.passed,
            "alignment": one.best.found.alignment if one.best else None,
            "alignment_with_others": one.others,
            "solution": one.best.solution if one.best else None,
            "codes": one.codes,
            "steps": [asdict(step) for step in own.steps],
        }
        yield json.dumps(line, allow_nan=False) + "\n"


def figures_of(audit: Audit) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "run": audit.run,
        "version": audit.version,
        "recorded_version": audit.recorded_version,
        "record": audit.record,
        "read": len(audit.followed),
        "found": dict(audit.chosen.found),
        "left_out": dict(audit.chosen.left_out),
        "own": audit.own and asdict(audit.own),
        "others": audit.others and asdict(audit.others),
        "drop": audit.drop and asdict(audit.drop),
        "auc": {name: {"of": of, **asdict(found)} if found else None for name, (of, found) in audit.aucs.items()},
        "leakage": audit.leakage,
        "codes": [asdict(use) for use in audit.codes],
        "checks": [asdict(check) for check in checks_of(audit)],
        "alarms": alarms_of(audit),
    }


def alarms_of(audit: Audit) -> list[str]:
    """The run's, in order, each with its step."""
    said: dict[str, int] = {}
    for row in audit.rows:
        for alarm in row.get("warnings", ()):
            said.setdefault(alarm, row["step"])
    return [f"step {step}: {alarm}" for alarm, step in said.items()]


def read_of(audit: Audit) -> list[str]:
    """What was read, in sentences."""
    found, read = audit.chosen.found, [one.recorded.split for one in audit.followed]
    names = {TRAIN: "of training", **SPLITS}
    parts = [f"{read.count(split):,} of {count:,} {names[split]}" for split, count in found.items()]
    spread = ", spread evenly over the run" if len(read) < found.total() else ""
    whole = f"{len(read):,} of the student's recorded rollouts were read: {', '.join(parts)}{spread}"
    said = [f"{whole} ({RECORDED[audit.record]})."]
    if neutral := sum(one.best is None for one in audit.followed):
        said.append(
            f"{neutral:,} of them are neutral: fewer than {FEWEST_STEPS} steps, or no solution to compare with."
        )
    if left := [f"{count:,} {reason}" for reason, count in audit.chosen.left_out.items()]:
        said.append(f"Left out: {'; '.join(left)}.")
    if audit.recorded_version is None:
        said.append("Which extractor the run had was not recorded: this one is taken for it.")
    elif audit.recorded_version != audit.version:
        said.append(
            f"The extractor is another than the run's (version {audit.version}, then {audit.recorded_version}): the "
            "figures are not those that the student was rewarded by."
        )
    return said
