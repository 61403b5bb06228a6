"""Reading problems: formats, the checks on every row, the order of prompts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutorloop.cluster.data import PromptOrder, check_context, gold_answer, load_prompts, read_rows
from tutorloop.contracts.config import Data
from tutorloop.contracts.errors import DataError


class Characters:
    """A tokenizer without a chat template: one id a character."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str, **fields: str) -> list:
    return load_prompts(Data(path=path, **fields), path, "train", Characters())


def test_jsonl_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "answer": "1"}, {"prompt": "c", "answer": "2"}]
    one = load(jsonl(tmp_path / "d.jsonl", *rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    two = load(str(tmp_path / "d.parquet"))
    assert [p.text for p in one] == [p.text for p in two] == ["a\u2028b", "c"]
    assert one[0].token_ids.tolist() == [ord("a"), 0x2028, ord("b")]


def test_fields_and_suffix_by_configuration(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"q": "2+2", "a": "so it is\n#### 4"})
    (prompt,) = load(path, prompt_field="q", answer_field="a", prompt_suffix="?")
    assert (prompt.text, prompt.answer) == ("2+2?", "4")
    assert gold_answer(" 12 ") == "12"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "empty"),
        ([{"answer": "1"}], "`prompt`"),
        ([{"prompt": "x", "answer": "1"}, {"prompt": "x"}], "row 1"),
        ([{"prompt": " ", "answer": "1"}], "`prompt`"),
        ([{"prompt": "x", "answer": None}], "`answer`"),
        ([["x"]], "JSON object"),
        ([{"id": "i", "prompt": "x", "answer": "1"}] * 2, "unique"),
    ],
)
def test_each_bad_row_is_named(tmp_path: Path, rows: list, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load(jsonl(tmp_path / "d.jsonl", *rows))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"\n')
    truncated = tmp_path / "broken.parquet"
    truncated.write_bytes(b"PAR1nothing")
    for path in (broken, truncated, tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(DataError):
            read_rows(str(path))
    with pytest.raises(DataError, match="train, test, ood"):
        read_rows("lab:tests")


def test_a_prompt_longer_than_the_context_is_named(tmp_path: Path) -> None:
    prompts = load(jsonl(tmp_path / "d.jsonl", {"id": "long", "prompt": "x" * 50, "answer": "1"}))
    check_context(prompts, 10, 60, "d", "student")
    with pytest.raises(DataError, match="prompt long of d: 50"):
        check_context(prompts, 11, 60, "d", "student")


def test_the_order_is_a_permutation_of_each_epoch_and_repeats() -> None:
    order = PromptOrder(7, seed=3)
    epochs = [[order.row(epoch * 7 + i) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = PromptOrder(7, seed=3)
    positions = np.random.default_rng(0).permutation(21)
    assert all(again.row(int(p)) == epochs[p // 7][p % 7] for p in positions)
