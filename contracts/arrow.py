"""Records to Arrow and back: `encode` turns records of one kind into a `RecordBatch`, `decode` reads them as views."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .errors import RecordError
from .records import EMPTY_FF, STRINGS, Prompt, Rollout, TeacherScores, TokenCredit, Verdict
from .skills import SkillPairs

Record = TypeVar("Record", Prompt, Rollout, TeacherScores, TokenCredit, Verdict, SkillPairs)

MATRIX_COLUMNS = ("topk_ids", "topk_logprobs", "views")  # [R,K], stored flat; R is the length of the row's `logprobs`
HIDDEN_DTYPE = b"hidden_dtype"


def encode(kind: type[Record], records: Sequence[Record]) -> pa.RecordBatch:
    """Records of one kind as one RecordBatch with that kind's schema."""
    schema: pa.Schema = kind.SCHEMA
    columns = []
    for column in schema:
        values = [getattr(record, column.name) for record in records]
        if column.type == STRINGS:
            columns.append(pa.array(values, STRINGS))
        elif pa.types.is_list(column.type):
            columns.append(_ragged(values, column.type))
        elif pa.types.is_large_binary(column.type):
            columns.append(_binary(values))
            dtypes = {v.dtype for v in values if v.size} or {EMPTY_FF.dtype}
            if len(dtypes) > 1:
                raise RecordError("hidden states of one batch share a dtype", str(sorted(map(str, dtypes))))
            schema = schema.with_metadata({HIDDEN_DTYPE: str(dtypes.pop()).encode()})
        else:
            columns.append(pa.array(values, column.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _ragged(values: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([v.size for v in values], out=offsets[1:])
    flat = np.concatenate([v.reshape(-1) for v in values]) if values else np.zeros(0)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.astype(kind.value_type.to_pandas_dtype(), copy=False))
    )


def _binary(values: Sequence[np.ndarray]) -> pa.Array:
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([v.nbytes for v in values], out=offsets[1:])
    flat = [np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in values if v.size]
    data = np.concatenate(flat) if flat else np.zeros(0, np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def decode(kind: type[Record], batch: pa.RecordBatch, rows: Sequence[int] | None = None) -> list[Record]:
    """The records of `batch` (those at `rows`, if given). Arrays are read-only views of the batch's buffers."""
    if not batch.schema.equals(kind.SCHEMA):
        raise RecordError(f"a batch of {kind.__name__} has its schema", str(batch.schema.names))
    wanted = range(batch.num_rows) if rows is None else rows
    columns = {f.name: _column(batch, f.name, wanted) for f in fields(kind)}
    records = []
    for i in range(len(wanted)):
        row = {name: values[i] for name, values in columns.items()}
        for name in MATRIX_COLUMNS:
            if name in row:
                row[name] = row[name].reshape(len(row["logprobs"]), -1) if row[name].size else row[name].reshape(0, 0)
        if "hidden" in row:
            row["hidden"] = row["hidden"].reshape(len(row["logprobs"]), -1) if row["hidden"].size else EMPTY_FF
        records.append(kind(**row))
    return records


def rows_named(batch: pa.RecordBatch, column: str, names: pa.Array) -> pa.RecordBatch:
    """The rows of `batch` whose `column`, unique in it, is one of `names`: each once, by first mention."""
    wanted = pc.unique(names)  # pyright: ignore[reportAttributeAccessIssue]  # pyarrow makes its functions at import
    found = pc.index_in(wanted, value_set=batch.column(column))  # pyright: ignore[reportAttributeAccessIssue]
    return batch.take(found.drop_null())


def _column(batch: pa.RecordBatch, name: str, rows: Sequence[int]) -> list[Any]:
    column = batch.column(name)
    if column.type == STRINGS:
        return [tuple(column[i].as_py()) for i in rows]
    if pa.types.is_list(column.type):
        offsets = column.offsets.to_numpy()
        flat = column.values.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type.value_type))
        return [flat[offsets[i] : offsets[i + 1]] for i in rows]
    if pa.types.is_large_binary(column.type):
        dtype = np.dtype(batch.schema.metadata[HIDDEN_DTYPE].decode())
        return [np.frombuffer(column[i].as_buffer(), dtype) for i in rows]
    if isinstance(rows, range) and len(rows) == len(column):
        return column.to_pylist()
    return [column[i].as_py() for i in rows]
