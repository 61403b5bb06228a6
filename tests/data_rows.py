"""Prompts of rows that a test gives, through a file; messages in short."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import tiny_tokenizer

from tutorloop.cluster.data import load_prompts
from tutorloop.contracts.data_config import Data
from tutorloop.contracts.records import Prompt

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def of_lines(folder: Path, *rows: Any, needs: dict[str, Any] | None = None, **fields: Any) -> list[Prompt]:
    """Of rows written as JSON lines; a row may be a line itself."""
    path = folder / "d.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return load_prompts(Data(path=str(path), **fields), str(path), "train", tiny_tokenizer(), **(needs or {}))


def of_table(folder: Path, columns: dict[str, Any], needs: dict[str, Any] | None = None, **fields: Any) -> list[Prompt]:
    """Of an Arrow table written as Parquet."""
    path = str(folder / "d.parquet")
    pq.write_table(pa.table(columns), path)
    return load_prompts(Data(path=path, **fields), path, "train", tiny_tokenizer(), **(needs or {}))
