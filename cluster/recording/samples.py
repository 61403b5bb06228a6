"""`rollouts.jsonl`: what the model wrote, one JSON line a rollout, with what the verifier and the learner made of it.

Lines are made beside the batches they come from (recording.py); nothing here needs Ray. A line's first keys are `kind`
("train" or "eval") and `step`, the steps done with it. What was not measured has no key: a rollout that nobody judged
has no `passed`, a given one no `logprobs`.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...contracts.data_config import GIVEN, REPLAY

ROLLOUTS_FILE = "rollouts.jsonl"
TAIL_BYTES = 2**18  # of the file's end, read first
OF_PROMPT = ("text", "turns", "answer", "other_answers")
SHOWN_LINES = 16  # of the file's end, from which the report chooses

Wanted = Sequence[tuple[int, int, Mapping[str, Any]]]  # row of the batch, row of the prompts, what else is known


def lines_of(wanted: Wanted, prompts: pa.RecordBatch, rollouts: pa.RecordBatch, verdicts: pa.RecordBatch | None) -> str:
    """The lines of some rollouts of one batch, in order. What else is known (kind, step, trained, …) comes in first."""
    lines = []
    for row, prompt, known in wanted:
        of_prompt = {name: prompts.column(name)[prompt].as_py() for name in OF_PROMPT}
        line = {**known, **_rollout(rollouts, row, of_prompt)}
        line["source"] = known.get("model", line["source"])  # an evaluation asks one model, whoever that is
        if verdicts is not None:
            line |= _verdict(verdicts, row)
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    return "".join(lines)


def _rollout(batch: pa.RecordBatch, row: int, prompt: dict[str, Any]) -> dict[str, Any]:
    def value(name: str) -> Any:
        return batch.column(name)[row].as_py()

    versions = value("weight_versions")
    return {
        "rollout_id": value("rollout_id"),
        "prompt_id": value("prompt_id"),
        "group_id": value("group_id"),
        "source": value("source"),
        "context": value("context"),
        **({"weight_versions": [min(versions), max(versions)]} if versions else {}),
        **({"turns": json.loads(prompt["turns"])} if prompt["turns"] else {}),
        "prompt": prompt["text"],
        "response": value("text"),
        "finish_reason": value("finish_reason"),
        "golds": [gold for gold in (prompt["answer"], *prompt["other_answers"]) if gold],
        "prompt_length": value("prompt_length"),
        "token_ids": value("token_ids"),
        **({"logprobs": [_float32(x) for x in value("logprobs")]} if value("source") not in GIVEN else {}),
    }


def _verdict(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    verdict = {name: batch.column(name)[row].as_py() for name in ("answer", "passed", "score", "abstained")}
    error = batch.column("error_class")[row].as_py()
    reward = verdict.pop("score")
    return {**verdict, "reward": reward if math.isfinite(reward) else None, **({"error_class": error} if error else {})}


def _float32(value: float) -> float | None:
    """The shortest decimal that is the same float32; None where it is no number."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def truncate_samples(folder: Path, step: int) -> None:
    """Forget what a run that resumes with `step` steps done will write again, and a last line that a crash cut off.
    The file is replaced whole or not at all."""
    path = folder / ROLLOUTS_FILE
    if not path.exists():
        return
    aside = path.with_suffix(".tmp")
    with path.open("rb") as lines, aside.open("wb") as kept:
        kept.writelines(line for line in lines if (row := _read(line)) is not None and row["step"] <= step)
    os.replace(aside, path)


def shown_samples(folder: Path) -> list[dict[str, Any]]:
    """What the report shows: the newest rollout that passed, the newest that did not, the newest of an evaluation; of
    rollouts that nobody judged the newest two. Replayed answers are none of the method's, and are not shown."""
    newest = list(reversed(_last_lines(folder / ROLLOUTS_FILE)))
    train = [row for row in newest if row["kind"] == "train"]
    judged = [next((row for row in train if row.get("passed") is passed), None) for passed in (True, False)]
    found = [row for row in judged if row] or train[:2]
    return found + [row for row in newest if row["kind"] == "eval"][:1]


def newest_sample(text: str) -> dict[str, Any] | None:
    """The last rollout of some lines; None where it is a replayed answer."""
    lines = text.splitlines()
    row = _read(lines[-1].encode() + b"\n") if lines else None
    return row if row and _of_method(row) else None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """Some whole lines of the file's end, however long they are, but for those of replayed answers."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size, want = file.seek(0, os.SEEK_END), TAIL_BYTES
        while True:
            file.seek(max(0, size - want))
            tail = file.read().splitlines(keepends=True)
            rows = list(filter(_of_method, filter(None, map(_read, tail if want >= size else tail[1:]))))
            if want >= size or len(rows) >= SHOWN_LINES:
                return rows
            want *= 4


def _of_method(row: Mapping[str, Any]) -> bool:
    return row.get("source") != REPLAY


def _read(line: bytes) -> dict[str, Any] | None:
    """A row; None of a line that was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row else None


def whole_groups(groups: Iterable[str], most: int) -> set[str]:
    """The first prompt groups (an entry a rollout, in order) of at most `most` rollouts together; at least one."""
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    chosen, rows = set[str](), 0
    for group, size in sizes.items():
        if chosen and rows + size > most:
            break
        chosen.add(group)
        rows += size
    return chosen
