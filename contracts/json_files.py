"""JSON and JSON lines as people's files hold them: UTF-8 with or without a BOM, whole or compressed.

What cannot be read is told with its file, its line and what to do; numbers stay as they are written.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa

from .errors import DataError, InputError

MOST_BYTES = 1 << 26  # of a line
SHOWN = 60  # characters of a line in a message
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # and UTF-32, whose other mark begins like the first
COMPRESSED: dict[bytes, Callable[[Path], Any]] = {  # by a file's first bytes: its name may say anything
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


class Written(float):
    """A number that keeps how it was written: `3.50` stays that."""

    text: str

    def __new__(cls, text: str) -> "Written":
        number = super().__new__(cls, text)
        number.text = text
        return number


def kind_of(value: Any) -> str:
    """What a value is called in messages."""
    return {"NoneType": "null", "Written": "float", "dict": "struct"}.get(type(value).__name__, type(value).__name__)


def gold_answer(text: str) -> str:
    """The gold answer in a field; GSM8K's published rows keep it behind a solution and `####`."""
    return text.rpartition("####")[2].strip()


def written_number(value: Any) -> str | None:
    """An integer, a float or a decimal exactly and without an exponent, as it was written where that is known; None
    for anything else."""
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    text = (
        value.text if isinstance(value, Written) else float.__repr__(value) if isinstance(value, float) else str(value)
    )
    return text if re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", text) else None


def read_json_lines(path: Path, rule: str, error: type[InputError] = DataError) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their lines' numbers, from 1; empty lines are passed over.

    Raises `error` with `rule` where a line is no object.
    """
    with _open(path, rule, error) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), 1):
            place = f"{path} line {number}"
            if len(line) == MOST_BYTES and not line.endswith(b"\n"):
                raise error(f"a line has less than {MOST_BYTES >> 20} MiB", place, "write one object a line")
            if line.removeprefix(BOM).strip():
                yield (
                    number,
                    an_object(_parsed(line, place, rule, "write one object a line", error), place, rule, error),
                )


def read_json(path: Path, rule: str, error: type[InputError] = DataError) -> Any:
    """What a JSON file holds. Raises `error` with `rule`."""
    with _open(path, rule, error) as file:
        return _parsed(file.read(), str(path), rule, "check the file", error)


def an_object(value: Any, place: str, rule: str, error: type[InputError] = DataError) -> dict[str, Any]:
    """The value, if it is a JSON object. Raises `error`."""
    if not isinstance(value, dict):
        raise error(rule, f"{place}: {kind_of(value)}", "write one object a line")
    return value


def begins_with(path: Path, first: bytes, rule: str) -> bool:
    """Whether `first` comes first in a file, decompressed, after spaces. Raises DataError."""
    with _open(path, rule, DataError) as file:
        return file.read(1024).removeprefix(BOM).lstrip().startswith(first)


@contextmanager
def _open(path: Path, rule: str, error: type[InputError]) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed. Raises `error`, for what is wrong while it is read too."""
    try:
        with _bytes_of(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as found:
        told = (found.strerror if isinstance(found, OSError) else None) or str(found)
        raise error(rule, f"{path}: {told}", "check the file") from found


@contextmanager
def _bytes_of(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as plain:
        start = plain.read(6)
        opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
        if opener is None:
            plain.seek(0)
            yield plain
            return
    with opener(path) as packed:
        yield packed if hasattr(packed, "peek") else io.BufferedReader(packed, 1 << 16)  # pyarrow's reads no lines


def _parsed(raw: bytes, place: str, rule: str, remedy: str, error: type[InputError]) -> Any:
    """JSON of bytes. Raises `error`."""

    def refuse(found: str, instead: str = remedy) -> NoReturn:
        raise error(rule, f"{place}: {found}", instead) from None

    if raw.startswith(UTF16) or b"\x00" in raw:
        refuse("UTF-16, or no text", "write UTF-8, e.g. iconv -f UTF-16 -t UTF-8 FILE")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as found:
        refuse(f"byte {found.start + 1} is not UTF-8", "write UTF-8, e.g. iconv -f LATIN1 -t UTF-8 FILE")
    try:
        return json.loads(text, parse_float=Written, object_pairs_hook=_unique)
    except RecursionError:
        refuse("nested too deep")
    except json.JSONDecodeError as found:
        refuse(f"{found}: {text.strip()[:SHOWN]!a}")
    except _Twice as found:
        refuse(str(found))
    except ValueError as found:  # an integer of more digits than Python reads
        refuse(str(found).partition(";")[0], "write it as text")


class _Twice(ValueError):
    """A key of an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(f"the key {next(key for key in keys if keys.count(key) > 1)!a} stands twice in one object")
    return read
