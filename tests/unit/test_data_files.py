"""The files and folders that a dataset may be, and what is said of those that cannot be read (docs/data.md)."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from tutorloop.cluster.data import load_prompts
from tutorloop.cluster.rows import read_rows
from tutorloop.contracts.data_config import Data
from tutorloop.contracts.errors import DataError, InputError, SkillError
from tutorloop.contracts.json_files import Written, read_json_lines
from tutorloop.verifier_service.rows import read_rows as rows_to_verify
from tutorloop.verifier_service.skills.build import read_memories
from tutorloop.verifier_service.skills.published import load_published

ROWS = [{"prompt": "a\u2028b", "answer": "1"}, {"prompt": "é\u0085", "answer": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = pa.Table.from_pylist(ROWS)


def values(path: Any, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path), split=split)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def streamed(table: pa.Table) -> bytes:
    """Arrow's stream format, as `datasets` writes it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


def filed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, bytes] = {
    "plain.jsonl": LINES.encode(),
    "UPPER.JSONL": LINES.encode(),
    "other.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),
    "no_suffix": LINES.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode() + b"\r\n \r\n",
    "list.json": json.dumps(ROWS, indent=2).encode(),
    "BOM.JSON": b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "two.jsonl.gz": b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True) if line),
    "b.jsonl.bz2": bz2.compress(LINES.encode()),
    "c.jsonl.xz": lzma.compress(LINES.encode()),
    "d.jsonl.zst": zstd(LINES.encode()),
    "list.json.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "packed.jsonl": gzip.compress(LINES.encode()),
    "p.parquet": parquet(TABLE),
    "P.PARQUET": parquet(TABLE),
    "parquet": parquet(TABLE),
    "stream.arrow": streamed(TABLE),
    "file.ARROW": filed(TABLE),
}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file_holds_the_same_rows(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(FILES[name])
    assert values(file) == ROWS


BAD: dict[str, tuple[bytes, str]] = {
    "u16.jsonl": (LINES.encode("utf-16"), "line 1: UTF-16"),
    "u16be.jsonl": (LINES.encode("utf-16-be"), "line 1: UTF-16"),
    "u32.jsonl": (LINES.encode("utf-32"), "line 1: UTF-16"),
    "lat.jsonl": (LINES.encode() + b'{"prompt": "caf\xe9"}\n', "line 3: byte 16 is not UTF-8"),
    "lat.json": (b'[{"prompt": "caf\xe9"}]', "byte 17 is not UTF-8"),
    "deep.jsonl": (LINES.encode() + b'{"x":' + b"[" * 100_000, "line 3: nested too deep"),
    "deep.json": (b"[" * 100_000, "nested too deep"),
    "big.jsonl": (b'{"answer": ' + b"9" * 5000 + b"}", "line 1: .*digits"),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' stands twice"),
    "broken.jsonl": (LINES.encode() + b"\n{'prompt': 1}\n", "line 4: .*'prompt': 1"),
    "pretty.jsonl": (json.dumps(ROWS[0], indent=2).encode(), "line 1"),
    "pretty.json": (json.dumps(ROWS[0], indent=2).encode(), "line 1"),
    "list.jsonl": (json.dumps(ROWS).encode(), "line 1: list"),
    "numbers.json": (b"[1, 2]", "row 0: int"),
    "cut.json": (b'[{"prompt": "a"}', "Expecting"),
    "null.jsonl": (b"null\n", "line 1: null"),
    "number.jsonl": (b"1.5\n", "line 1: float"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 50)[:-20], "ended before"),
    "not.jsonl.gz": (b"\x1f\x8b" + b"nothing of the kind", "not.jsonl.gz"),
    "cut.jsonl.xz": (lzma.compress(LINES.encode())[:-9], "ended before"),
    "cut.jsonl.bz2": (bz2.compress(LINES.encode())[:-9], "ended before"),
    "cut.jsonl.zst": (zstd(LINES.encode() * 50)[:-9], "cut.jsonl.zst"),
    "x.csv": (b"prompt,answer\n1,2\n", r"x.csv: \.csv"),
    "X.TSV": (b"prompt\tanswer\n", r"X.TSV: \.tsv"),
    "x.csv.gz": (gzip.compress(b"prompt,answer\n1,2\n"), r"\.csv"),
    "x.xlsx": (b"PK\x03\x04", r"\.xlsx"),
    "zipped": (b"PK\x03\x04\x00\x00", "line 1"),
    "cut.parquet": (parquet(TABLE)[:-40], "cut.parquet"),
    "text.parquet": (LINES.encode(), "text.parquet"),
    "utf8.parquet": (parquet(pa.table({"p": pa.array([b"\xff"]).view(pa.utf8())})), "column `p`"),
    "names.parquet": (
        parquet(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])),
        "different names",
    ),
    "cut.arrow": (streamed(TABLE)[:100], "cut.arrow"),
    "empty.arrow": (b"", "empty.arrow"),
    "empty.parquet": (b"", "empty.parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told_with_file_and_line(name: str, tmp_path: Path) -> None:
    content, found = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=found) as error:
        values(tmp_path / name)
    assert str(tmp_path / name) in error.value.found and error.value.rule


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"[]", b"\xef\xbb\xbf"])
def test_empty_files_are_empty(content: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "e.json")
    Path(path).write_bytes(content)
    assert values(path) == []
    with pytest.raises(DataError, match="is empty"):
        load_prompts(Data(path=path), path, "train", tiny_tokenizer())


def test_numbers_stay_as_written_and_are_numbers_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"a": 3.50, "b": [1e2]}\n')
    ((number, row),) = read_json_lines(tmp_path / "d.jsonl", "a rule")
    assert number == 1 and row == {"a": 3.5, "b": [100.0]} and isinstance(row["a"], Written) and row["a"].text == "3.50"
    assert json.dumps(row) == '{"a": 3.5, "b": [100.0]}'


def test_only_as_many_rows_are_read_as_are_asked_for(tmp_path: Path) -> None:
    path = str(tmp_path / "d.jsonl")
    Path(path).write_text(LINES + "broken\n", encoding="utf-8")
    assert len(load_prompts(Data(path=path), path, "train", tiny_tokenizer(), 2)) == 2
    with pytest.raises(DataError, match="line 3"):
        load_prompts(Data(path=path), path, "train", tiny_tokenizer(), 3)


# ---- folders and patterns -------------------------------------------------------------------------------------------


def saved(folder: Path, tables: list[pa.Table], **state: Any) -> Path:
    """As `datasets` 3 saves a dataset with `save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        (folder / name).write_bytes(streamed(table))
    told = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": "train", **state}
    (folder / "state.json").write_text(json.dumps(told))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    assert values(saved(tmp_path / "one", [TABLE.slice(0, 1), TABLE.slice(1)])) == ROWS
    saved(tmp_path / "both" / "train", [TABLE])
    saved(tmp_path / "both" / "test", [TABLE.slice(1)])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert values(tmp_path / "both") == ROWS and values(tmp_path / "both", "test") == ROWS[1:]
    with pytest.raises(DataError, match="train, test, and not dev"):
        values(tmp_path / "both", "dev")
    for state in ({"_data_files": []}, {"_data_files": [{}]}, {"_indices_data_files": [{"filename": "i.arrow"}]}):
        with pytest.raises(DataError, match="a saved dataset is whole"):
            values(saved(tmp_path / str(state), [TABLE], **state))
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="data-00001"):
        values(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json"):
        values(tmp_path / "one")


def shards(folder: Path, *names: str) -> Path:
    """Files with one row each that says its file's name."""
    folder.mkdir()
    for name in names:
        row = {"prompt": name, "answer": "1"}
        data = parquet(pa.Table.from_pylist([row])) if name.endswith(".parquet") else json.dumps(row).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (("b.parquet", "a.parquet", "README.md", "info.json"), ["a.parquet", "b.parquet"]),
        (("2.jsonl", "1.jsonl.gz"), ["1.jsonl.gz", "2.jsonl"]),
        (
            ("train-1-of-2.parquet", "train-0-of-2.parquet", "test-0.parquet"),
            ["train-0-of-2.parquet", "train-1-of-2.parquet"],
        ),
        (("train.jsonl", "validation.jsonl", "other.jsonl"), ["train.jsonl"]),
        (("trainer.jsonl", "testing.jsonl"), ["testing.jsonl", "trainer.jsonl"]),
    ],
)
def test_a_folder_of_shards_is_read_in_its_names_order(
    names: tuple[str, ...], train: list[str], tmp_path: Path
) -> None:
    assert [row["prompt"] for row in values(shards(tmp_path / "s", *names))] == train


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), "no JSONL or Parquet file"),
        (("README.md",), "no JSONL or Parquet file"),
        (("a.parquet", "b.jsonl"), "several kinds"),
        (("test-0.parquet", "x.parquet"), "train: test-0.parquet, x.parquet"),
    ],
)
def test_a_folder_that_may_mean_several_things_is_refused(names: tuple[str, ...], found: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=found):
        values(shards(tmp_path / "s", *names))


def test_a_pattern_is_its_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "s", "b.jsonl", "a.parquet", "c.jsonl")
    assert [row["prompt"] for row in values(folder / "[ab].*")] == ["a.parquet", "b.jsonl"]
    with pytest.raises(DataError, match="no file is called so"):
        values(folder / "*.csv")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(values("~/s/*.jsonl")) == 2 and len(values("~/s/a.parquet")) == 1


@pytest.mark.parametrize(
    "path", ["absent.JSONL", "data/absent.PARQUET", "data/x.jsonl.gz", "a/b/c", "data/x.csv", "./x"]
)
def test_absent_files_are_not_sought_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="no such file") as error:
        values(path)
    assert "hub`" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["x" * 300, "~nobody_here/x.jsonl", "a\x00b.jsonl", "/", "/dev/null", "/proc/self/mem"]
)
def test_paths_that_nothing_can_be_read_from(path: str) -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        values(path)


def test_messages_name_the_place_in_each_kind(tmp_path: Path) -> None:
    bad = [{"prompt": "x", "answer": "1"}, {"prompt": "y", "answer": {"a": "1"}}]
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "0.jsonl").write_text("\n\n".join(map(json.dumps, bad)))
    (folder / "1.json").write_text(json.dumps(bad))
    (folder / "2.arrow").write_bytes(streamed(pa.Table.from_pylist([{"answer": {"a": "1"}, "prompt": "y"}] * 3)))
    for name, place in (("0.jsonl", "line 3"), ("1.json", "row 1"), ("2.arrow", "row 0")):
        with pytest.raises(DataError, match=f"{name} {place}: `answer` is a struct"):
            load_prompts(Data(path=str(folder / name)), str(folder / name), "train", tiny_tokenizer())


# ---- the other files of rows: verify's and a bank's -----------------------------------------------------------------


def memories(path: Path) -> list[Any]:
    return read_memories(path, lambda _: [])[0]


MEMORY = '{"problem": "p", "response": "r", "passed": true}\n'
TO_VERIFY = '{"prediction": "1", "gold": 3.50}\n'
READERS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: list(rows_to_verify(path)), TO_VERIFY),
    (memories, MEMORY),
]


@pytest.mark.parametrize("reader", range(2))
def test_rows_to_verify_and_memories_are_read_alike(reader: int, tmp_path: Path) -> None:
    read, line = READERS[reader]
    path = tmp_path / "d.jsonl"
    for content in (
        b"\xef\xbb\xbf" + line.encode(),
        gzip.compress(line.encode()),
        line.replace("\n", "\r\n\r\n").encode(),
    ):
        path.write_bytes(content * 2)
        assert len(read(path)) == 2
    for content, found in (
        (line.encode("utf-16"), "line 1: UTF-16"),
        (line.encode() + b"\xff", "line 2: byte 1 is not UTF-8"),
        (line.encode() + b"[" * 100_000, "line 2: nested too deep"),
        (b'{"x": ' + b"9" * 5000 + b"}", "line 1: .*digits"),
        (gzip.compress(line.encode() * 99)[:-9], "ended before"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=found):
            read(path)
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "absent.jsonl")


def test_a_row_s_gold_is_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    golds = {
        "3.50": ("3.50", ()),
        "7": ("7", ()),
        '["1", 2, 2.0, "1", " "]': ("1", ("2", "2.0")),
        '" "': (" ", ()),
        "[]": ("", ()),
    }
    path.write_text("".join(f'{{"prediction": "1", "gold": {gold}}}\n' for gold in golds))
    read = [(row.response.gold, row.response.other_golds) for row in rows_to_verify(path)]
    assert read == list(golds.values())
    for gold, found in (
        ("1e-5", "float"),
        ("NaN", "float"),
        ("true", "bool"),
        ('["1", null]', "list"),
        ("{}", "struct"),
        ("null", "null"),
    ):
        path.write_text(f'{{"prediction": "1", "gold": {gold}}}\n')
        with pytest.raises(DataError, match=f"line 1: {found} in `gold`"):
            list(rows_to_verify(path))


def test_a_published_bank_is_read_with_a_mark_and_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    bank = {"general_skills": [{"skill_id": "s", "title": "t", "principle": "p", "when_to_apply": "w"}]}
    for content in (b"\xef\xbb\xbf" + json.dumps(bank).encode(), gzip.compress(json.dumps(bank).encode())):
        path.write_bytes(content)
        assert [entry.entry_id for entry in load_published(str(path))] == ["s"]
    for content in (json.dumps(bank).encode("utf-16"), b"\xff", b"[" * 100_000, b'{"x": ' + b"9" * 5000 + b"}", b""):
        path.write_bytes(content)
        with pytest.raises(SkillError, match=r"bank\.json"):
            load_published(str(path))
        assert issubclass(SkillError, InputError)
