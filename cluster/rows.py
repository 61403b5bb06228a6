"""Where a dataset's rows come from: JSON lines, Parquet, Arrow, a folder of shards or of `datasets`, the lab, the hub.

A row comes with its place, for messages. What is no data is refused with its name and a remedy.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import lab
from ..contracts.errors import DataError
from ..contracts.json_files import COMPRESSED_SUFFIXES, Written, an_object, begins_with, read_json, read_json_lines

Rows = Iterator[tuple[str, dict[str, Any]]]

KINDS = "data.path is a JSONL, JSON, Parquet or Arrow file, a folder or a pattern of these, lab:SPLIT or a hub id"
LINE = "every line of a JSONL file is a JSON object"
JSON_SUFFIXES, COLUMN_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow")
OTHERS = (".csv", ".tsv", ".xlsx", ".xls", ".txt", ".yaml", ".yml", ".pkl", ".zip", ".tar", ".tgz")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # what shards are called after


def read_rows(path: str, name: str = "", split: str = "train") -> Rows:
    """Rows of a dataset, each with its place; `name` and `split` are of a hub dataset, `split` of a folder too. Raises
    DataError."""
    try:
        return _found(path, name, split)
    except (OSError, RuntimeError) as error:  # a name that no disk takes, a folder that may not be read, ~nobody
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(KINDS, f"{path}: {found}", "check the path") from error


def _found(path: str, name: str, split: str) -> Rows:
    if path.startswith("lab:"):
        try:
            return _read_file(lab.data_path(path.removeprefix("lab:")))
        except ValueError as error:
            raise DataError("lab:SPLIT names a split of the lab", f"{path}: {error}") from error
    file = Path(path).expanduser()
    if file.is_file():
        return _read_file(file)
    if file.is_dir():
        return _read_folder(file, split)
    if glob.has_magic(path):
        if found := sorted(one for one in glob.glob(str(file), recursive=True) if Path(one).is_file()):
            return (row for one in found for row in _read_file(Path(one)))
        raise DataError(KINDS, f"{path}: no file is called so", "check the pattern")
    known = (*JSON_SUFFIXES, *COLUMN_SUFFIXES, *COMPRESSED_SUFFIXES, *OTHERS)
    if path.count("/") != 1 or path.startswith((".", "~")) or file.suffix.lower() in known:
        raise DataError(KINDS, f"{path}: no such file")
    return _read_hub(path, name, split)


# ---- files ----------------------------------------------------------------------------------------------------------


def _kind(file: Path) -> str:
    """A file's suffix, in lower case and without that of its compression."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _read_file(file: Path) -> Rows:
    kind = _kind(file)
    if kind in OTHERS:
        remedy = f"e.g. in pandas: read_{kind[1:]}(…).to_json('data.jsonl', orient='records', lines=True)"
        raise DataError(KINDS, f"{file}: {kind} is read as none of them", remedy if kind == ".csv" else "write JSONL")
    if kind == ".arrow" or begins_with(file, b"ARROW1", KINDS):
        return _read_arrow(file)
    if kind == ".parquet" or begins_with(file, b"PAR1", KINDS):
        return _read_parquet(file)
    if kind == ".json" and begins_with(file, b"[", KINDS):
        return _read_list(file)
    return ((f"{file} line {number}", row) for number, row in read_json_lines(file, LINE))


def _read_list(file: Path) -> Rows:
    rule = "a .json file holds one list of objects, or an object a line"
    for number, value in enumerate(read_json(file, rule)):
        yield f"{file} row {number}", an_object(value, f"{file} row {number}", rule)


def _read_parquet(file: Path) -> Rows:
    rule = "a .parquet file is readable as Parquet"
    try:
        with pq.ParquetFile(file) as table:
            yield from _rows(file, table.iter_batches())
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(rule, f"{file}: {error}") from error


def _read_arrow(file: Path) -> Rows:
    """Arrow's stream format, which `datasets` writes, or its file format."""
    try:
        with pa.memory_map(str(file)) as source:
            if begins_with(file, b"ARROW1", KINDS):
                reader = pa.ipc.open_file(source)
                yield from _rows(file, (reader.get_batch(i) for i in range(reader.num_record_batches)))
            else:
                yield from _rows(file, pa.ipc.open_stream(source))
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError("an .arrow file is readable as Arrow", f"{file}: {error}") from error


def _rows(file: Path, batches: Any) -> Rows:
    start = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise DataError("a dataset's columns have different names", f"{file}: {names}", "rename one")
        columns = [_values(f"{file}: column `{name}`", batch.column(name)) for name in names]
        for i in range(batch.num_rows):
            yield f"{file} row {start + i}", {name: column[i] for name, column in zip(names, columns, strict=True)}
        start += batch.num_rows


def _values(place: str, column: pa.Array) -> list[Any]:
    """Python's values of a column. Raises DataError."""
    try:
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":  # Python's clock has microseconds
            column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
        values = column.to_pylist()
        return [_short(value, column.type) for value in values] if "float" in str(column.type) else values
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError("a column's values can be read", f"{place}: {error}", "write it as text, or drop it") from error


def _short(value: Any, kind: pa.DataType) -> Any:
    """A value with its half and single floats as short as they print, and not with the digits of the nearest double."""
    if value is None:
        return None
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return Written(str(np.dtype(kind.to_pandas_dtype()).type(value)))
    if pa.types.is_struct(kind):
        return {field.name: _short(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_short(one, kind.value_type) for one in value]
    return value


# ---- folders and the hub --------------------------------------------------------------------------------------------


def _read_folder(folder: Path, split: str) -> Rows:
    """What `save_to_disk` of `datasets` wrote, or the shards of one split in their names' order. Raises DataError."""
    if (folder / "dataset_dict.json").is_file():
        splits = _told(folder / "dataset_dict.json").get("splits") or []
        if split not in splits:
            found = f"{folder}: {', '.join(map(str, splits))}, and not {split}"
            raise DataError("a saved dataset has the split that is asked for", found, "set data.split, eval.split")
        folder = folder / split
    if (folder / "state.json").is_file():
        state = _told(folder / "state.json")
        told = state.get("_data_files") or []
        files = [str(one["filename"]) for one in told if isinstance(one, dict) and "filename" in one]
        if not files or len(files) < len(told) or state.get("_indices_data_files"):
            remedy = "save it again with a newer release of `datasets`, or write it as Parquet"
            raise DataError("a saved dataset is whole in its data-*.arrow files", str(folder), remedy)
        return (row for one in files for row in _read_arrow(folder / Path(one).name))
    shards = [one for one in sorted(folder.iterdir()) if _kind(one) in (".jsonl", ".ndjson", ".parquet")]
    of_split = {one: next((s for s in (split, *SPLITS) if _is_of(one.name, s)), "") for one in shards}
    if found := set(of_split.values()) - {""}:
        if split not in found:
            names = ", ".join(one.name for one in shards[:8])
            raise DataError("a folder's files are of the split that is asked for", f"{folder}, {split}: {names}")
        shards = [one for one in shards if of_split[one] == split]
    if not shards or len({_kind(one) for one in shards}) > 1:
        found = "files of several kinds" if shards else "no JSONL or Parquet file, and nothing that `datasets` saved"
        raise DataError(KINDS, f"{folder}: {found}", "name a file or a pattern, e.g. FOLDER/*.parquet")
    return (row for one in shards for row in _read_file(one))


def _is_of(name: str, split: str) -> bool:
    """Whether a shard is called after a split: train.parquet, train-00000-of-00002.parquet."""
    return name.startswith(split) and not name[len(split) : len(split) + 1].isalnum()


def _told(file: Path) -> dict[str, Any]:
    rule = "a folder that `datasets` saved says what it holds"
    return an_object(read_json(file, rule), str(file), rule)


def _read_hub(path: str, name: str, split: str) -> Rows:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # extra `hub`: large, local files do without
    except ImportError as error:
        found = f"{path}: no such file, and the datasets library is not installed"
        raise DataError("a hub dataset needs the extra `hub`", found, "pip install 'tutorloop[hub]'") from error
    try:
        for number, row in enumerate(datasets.load_dataset(path, name or None, split=split)):
            yield f"{path} row {number}", dict(row)
    except Exception as error:  # whatever the hub's client raises, the user needs one answer
        found = f"{path}: no such file, and as a hub id: {type(error).__name__}: {error}"
        raise DataError(KINDS, found) from error
