"""Problems in, prompts out: read a dataset, check every row, apply the student's chat template, fix the order.

The prompts live in the object store as one Arrow batch; everything after this file refers to them by row. The order is
a pure function of the seed: position p of the run is row `permutation(seed, epoch)[p mod n]`, so nothing about it needs
to be saved but p.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from .. import lab
from ..contracts.data_config import Data
from ..contracts.errors import DataError, ModelError
from ..contracts.records import EMPTY_I, Prompt, seed_of
from ..contracts.sections import THINKING
from ..models.chat import tokenize_prompt, tokenize_response
from ..models.thinking import Marks


def read_rows(path: str, name: str = "", split: str = "train") -> list[dict[str, Any]]:
    """Rows of a JSONL or Parquet file, of `lab:SPLIT`, or of a hub dataset. Raises DataError."""
    if path.startswith("lab:"):
        try:
            return _read_jsonl(lab.data_path(path.removeprefix("lab:")))
        except ValueError as error:
            raise DataError("lab:SPLIT names a split of the lab", f"{path}: {error}") from error
    file = Path(path).expanduser()
    if file.is_file():
        if file.suffix == ".parquet":
            return _read_parquet(file)
        return _read_jsonl(file)
    if file.is_dir() or path.count("/") != 1 or path.startswith((".", "~")) or file.suffix in (".jsonl", ".parquet"):
        raise DataError("data.path is a JSONL or Parquet file, lab:SPLIT or a hub id", f"{path}: no such file")
    return _read_hub(path, name, split)


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    "every line of a JSONL file is a JSON object", f"{file} line {number}: {error}"
                ) from None
            if not isinstance(row, dict):
                raise DataError("every line of a JSONL file is a JSON object", f"{file} line {number}: {line[:60]!r}")
            rows.append(row)
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError("a .parquet file is readable as Parquet", f"{file}: {error}") from error


def _read_hub(path: str, name: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # extra `hub`: large, local files do without
    except ImportError as error:
        found = f"{path}: no such file, and the datasets library is not installed"
        raise DataError("a hub dataset needs the extra `hub`", found, "pip install 'tutorloop[hub]'") from error
    try:
        return [dict(row) for row in datasets.load_dataset(path, name or None, split=split)]
    except Exception as error:  # whatever the hub's client raises, the user needs one answer
        found = f"{path}: no such file, and as a hub id: {type(error).__name__}: {error}"
        raise DataError("data.path is a JSONL or Parquet file, lab:SPLIT or a hub id", found) from error


def load_prompts(
    data: Data,
    path: str,
    split: str,
    tokenizer: Any,
    limit: int | None = None,
    *,
    need_answer: bool = True,
    keep_rows: bool = False,
    thinking: Marks = THINKING,
) -> list[Prompt]:
    """Checked prompts of `path`, tokenised for the student, at most `limit`; a row needs an answer unless nothing
    compares with it. With `keep_rows` each has its whole row as JSON, for the verifier. `thinking`: the marks of the
    solutions' reasoning. Raises DataError, ModelError where the chat template does not take a row."""
    rows = read_rows(path, data.name, split)[:limit]
    if not rows:
        raise DataError("a dataset has at least one row", f"{path} is empty")
    needed = {data.prompt_field: "data.prompt_field"}
    if need_answer:
        needed[data.answer_field] = "data.answer_field"
    for number, row in enumerate(rows):
        _check_row(row, needed, f"row {number} of {path}")
    prompts = []
    for number, row in enumerate(rows):
        try:
            prompts.append(_to_prompt(row, number, data, tokenizer, thinking))
        except ModelError as error:
            raise ModelError(error.rule, f"row {number} of {path}: {error.found}", error.remedy) from error
    if keep_rows:
        texts = [json.dumps(row, default=str) for row in rows]
        prompts = [replace(prompt, row=text) for prompt, text in zip(prompts, texts, strict=True)]
    ids = {prompt.prompt_id for prompt in prompts}
    if len(ids) < len(prompts):
        raise DataError("the ids of a dataset's rows are unique", f"{path}: {len(prompts) - len(ids)} repeat")
    return prompts


def _check_row(row: dict[str, Any], needed: dict[str, str], place: str) -> None:
    for field, key in needed.items():
        if not _text(row, field).strip():
            found = f"{place} has keys {sorted(row)}"
            raise DataError(f"every row needs a value in `{field}`", found, f"name the field with {key}=…")


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    return "" if value is None else str(value)


def _to_prompt(row: dict[str, Any], number: int, data: Data, tokenizer: Any, thinking: Marks) -> Prompt:
    text = _text(row, data.prompt_field) + data.prompt_suffix
    solution = _text(row, data.solution_field)
    solution_ids = EMPTY_I
    shown: dict[str, Any] = {"template_kwargs": data.chat_template_kwargs, "suffix": data.prompt_suffix}
    if solution.strip():
        solution_ids = tokenize_response(tokenizer, text, solution, thinking=thinking, **shown)
    return Prompt(
        prompt_id=str(row.get("id", f"row-{number}")),
        text=text,
        token_ids=tokenize_prompt(tokenizer, text, **shown),
        answer=gold_answer(_text(row, data.answer_field)),
        solution=solution,
        solution_ids=solution_ids,
        tags=str(row.get("family", row.get("source", ""))),
        teacher=str(row.get("teacher", "")),
    )


def gold_answer(text: str) -> str:
    """The gold answer; GSM8K's published rows keep it behind `####`."""
    return text.rpartition("####")[2].strip()


def check_context(prompts: Sequence[Prompt], new_tokens: int, context: int, path: str, who: str) -> None:
    """Every prompt and its response must fit `who`'s context. Raises DataError."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    need = len(longest.token_ids) + new_tokens
    if need > context:
        found = f"prompt {longest.prompt_id} of {path}: {len(longest.token_ids)} + {new_tokens} new tokens = {need}"
        remedy = "lower rollout.max_new_tokens, shorten the prompts, or use a model with a longer context"
        raise DataError(f"prompt and response fit the {who}'s context of {context} tokens", found, remedy)


class PromptOrder:
    """Which row stands at which position of the run; the same for the same seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def row(self, position: int) -> int:
        epoch, index = divmod(position, self.rows)
        if epoch != self._epoch:
            rng = np.random.default_rng(seed_of(self.seed, "order", epoch))
            self._epoch, self._permutation = epoch, rng.permutation(self.rows)
        return int(self._permutation[index])
