"""What a dataset's fields may hold (docs/data.md): text, numbers, messages, several golds, names with dots."""

import json
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_rows import SYSTEM, assistant, of_lines, of_table, user

from tutorloop.cluster.data import eval_data
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.data_config import Data, Eval
from tutorloop.contracts.errors import DataError
from tutorloop.contracts.records import Prompt


@pytest.fixture
def load(tmp_path: Path) -> Any:
    return partial(of_lines, tmp_path)


@pytest.fixture
def load_table(tmp_path: Path) -> Any:
    return partial(of_table, tmp_path)


# ---- text and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("3.50", "3.50"),
        ("0.5", "0.5"),
        ("-17", "-17"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("0.00001", "0.00001"),
        ('"1e-05"', "1e-05"),
        ('" x "', "x"),
        ('"a\\u0000b"', "a\x00b"),
    ],
)
def test_json_numbers_are_what_was_written(load: Any, written: str, read: str) -> None:
    (prompt,) = load(f'{{"prompt": {written}, "answer": {written}, "solution": {written}}}')
    assert prompt.answer == read and prompt.text.strip() == read and prompt.solution.strip() == read


@pytest.mark.parametrize("field", ["prompt", "answer", "solution", "strategy", "id", "teacher"])
@pytest.mark.parametrize(
    ("written", "found"),
    [
        *(("1e-05", "1e-05"), ("1e+16", r"1e\+16 in"), ("1E5", "1E5 in"), ("1e999", "1e999 in")),
        *(("NaN", "nan in"), ("-Infinity", "-inf in"), ("true", "is a bool"), ("false", "is a bool")),
        *(('{"style": 1}', "struct with keys style"), ('["x", ["y"]]', "is a list"), ('"\\ud83d"', r"\\ud83d")),
    ],
)
def test_what_is_no_text_is_refused_by_row_field_and_type(load: Any, field: str, written: str, found: str) -> None:
    bad = {"prompt": '"x"', "answer": '"1"', field: written}
    with pytest.raises(DataError, match=found) as error:
        load({"prompt": "x", "answer": "1"}, "{" + ", ".join(f'"{k}": {v}' for k, v in bad.items()) + "}")
    assert "line 2" in error.value.found and f"`{field}" in error.value.found and error.value.remedy


def test_parquet_columns_of_every_type(load_table: Any) -> None:
    columns = {
        "prompt": pa.array(["a", "b"]).dictionary_encode(),
        "answer": pa.array([0.1, 2.5], pa.float32()),
        "id": pa.array([7, 8], pa.int16()),
        "solution": pa.array(["x", None], pa.large_string()),
        "when": pa.array([1, 2], pa.timestamp("ns")),
        "source": pa.array([{"a": 1.5}, None]),
    }
    one, two = load_table(columns, {"keep_rows": True})
    assert (one.text, one.answer, one.prompt_id, one.solution, one.tags) == ("a", "0.1", "7", "x", "")
    assert (two.text, two.answer, two.prompt_id, two.solution) == ("b", "2.5", "8", "")
    assert json.loads(one.row)["when"] == "1970-01-01T00:00:00" and json.loads(one.row)["answer"] == pytest.approx(0.1)
    kinds = {
        "3.50": pa.array([Decimal("3.50")]),
        "0.0000001": pa.array([Decimal("0.0000001")], pa.decimal128(38, 7)),
        "3.0": pa.array([3.0]),
        "0.30000000000000004": pa.array([0.1 + 0.2]),
        "255": pa.array([255], pa.uint8()),
        "t": pa.array(["t"], pa.string_view()),
        "2.25": pa.array([[2.25]], pa.list_(pa.float16())),
    }
    for text, column in kinds.items():
        assert load_table({"prompt": ["x"], "answer": column})[0].answer == text
    nested = pa.array([{"ground_truth": 0.7}], pa.struct({"ground_truth": pa.float32()}))
    assert load_table({"prompt": ["x"], "r": nested}, answer_field="r.ground_truth")[0].answer == "0.7"


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array([1e-7]), "1e-07 in `answer`"),
        (pa.array([1e22]), r"1e\+22 in `answer`"),
        (pa.array([float("nan")]), "nan in `answer`"),
        (pa.array([1e-7], pa.float32()), "1e-07 in `answer`"),
        (pa.array([True]), "`answer` is a bool"),
        (pa.array([b"3"]), "`answer` is a bytes"),
        (pa.array([datetime(2024, 1, 1)]), "`answer` is a datetime"),
        (pa.array([{"style": "rule", "ground_truth": "3"}]), "`answer` is a struct with keys style, ground_truth"),
    ],
)
def test_parquet_values_that_are_no_text_are_refused(load_table: Any, column: pa.Array, found: str) -> None:
    with pytest.raises(DataError, match=f"row 0: {found}"):
        load_table({"prompt": ["x"], "answer": column})


def test_a_struct_s_remedy_names_the_key(load: Any) -> None:
    row = {"prompt": "x", "reward_model": {"style": "rule", "ground_truth": "3"}}
    with pytest.raises(DataError) as error:
        load(row, answer_field="reward_model")
    assert "a struct with keys style, ground_truth" in error.value.found
    assert error.value.remedy.endswith("data.answer_field=reward_model.ground_truth")
    assert load(row, answer_field="reward_model.ground_truth")[0].answer == "3"


def test_a_column_whose_own_name_has_dots_comes_first_and_json_in_text_is_not_read(load: Any) -> None:
    row = {"prompt": "x", "a.b": "own", "a": {"b": "nested", "c": {"d": 4}, "e.f": 5}, "t": '{"b": "1"}'}
    for field, answer in {"a.b": "own", "a.c.d": "4", "a.e.f": "5"}.items():
        assert load(row, answer_field=field)[0].answer == answer
    with pytest.raises(DataError, match="`t` is text: JSON in a text is not read"):
        load(row, answer_field="t.b")
    for field in ("a.x", "a.b.c", "x.y", "prompt.", ".prompt"):
        with pytest.raises(DataError, match="every row needs a value"):
            load(row, answer_field=field)


def test_optional_labels_may_be_anything(load: Any) -> None:
    rows = [{"source": {"a": 1}}, {"source": ["x"], "family": None}, {"source": "s", "family": None}, {"family": "f"}]
    prompts = load(*({"prompt": "x", "answer": "1", "id": None, **row} for row in rows))
    assert [p.tags for p in prompts] == ["", "", "s", "f"]
    assert [p.prompt_id for p in prompts] == [f"row-{i}" for i in range(4)]


# ---- lone surrogates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x\ud83d"},
        {"prompt": [SYSTEM, user("\udfff")]},
        {"prompt": [{**SYSTEM, "content": "\ud83d"}, user("x")]},
        {"prompt": [user("x"), assistant("y", reasoning_content="\ud83d")]},
        {"prompt": [user([{"type": "text", "text": "\ud83d"}])]},
        {"answer": "\udc80"},
        {"answer": ["1", "\udc80"]},
        {"solution": "a\ud800"},
        {"id": "\ud800"},
        {"teacher": "\ud800"},
        {"family": "\ud800"},
        {"other": [{"deep": "\ud800"}]},
        {"other": {"\ud800": 1}},
    ],
)
def test_half_characters_are_refused_before_arrow(load: Any, row: dict[str, Any]) -> None:
    good = {"prompt": "x", "answer": "1"}
    with pytest.raises(DataError, match="half a character") as error:
        load(good, {**good, **row}, needs={"keep_rows": True})
    assert "line 2" in error.value.found and f"`{next(iter(row))}" in error.value.found.replace(
        "family or source", "family"
    )
    error.value.found.encode()


def test_a_suffix_of_half_a_character_too_and_odd_text_is_text(load: Any) -> None:
    with pytest.raises(DataError, match=r"data\.prompt_suffix"):
        load({"prompt": "x", "answer": "1"}, prompt_suffix="\ud800")
    odd = "\x00 \x1b[31m \ufeff \u2028 \u202e {x} \U0010ffff \ufffe"
    rows = [{"prompt": odd, "answer": odd, "solution": odd, "id": odd, "teacher": odd, "source": odd}]
    prompts = load(*rows, needs={"keep_rows": True})
    (again,) = decode(Prompt, encode(Prompt, prompts))
    assert {again.text, again.solution, again.prompt_id, again.teacher, again.tags} == {odd}
    assert again.answer == odd.strip() and json.loads(again.row) == rows[0]


# ---- several golds --------------------------------------------------------------------------------------------------


def test_several_golds(load: Any) -> None:
    line = '{"prompt": "x", "answer": ["so\\n#### 3", 3.0, 3, "3"]}'
    prompts = load(line, {"prompt": "x", "answer": ["a"]}, {"prompt": "x", "answer": "b"})
    assert [(p.answer, p.other_answers) for p in prompts] == [("3", ("3.0",)), ("a", ()), ("b", ())]
    assert decode(Prompt, encode(Prompt, prompts))[0].other_answers == ("3.0",)
    (none,) = load({"prompt": "x", "answer": []}, needs={"need_answer": False})
    assert (none.answer, none.other_answers) == ("", ())


@pytest.mark.parametrize(
    ("golds", "found"),
    [
        ([], "needs a value in `answer`"),
        ("solved\n####", "needs a value in `answer`"),
        (["1", ""], "an empty one in `answer`"),
        (["1", None], "an empty one in `answer`"),
        (["1", ["2"]], r"`answer\[1\]` is a list"),
        (["1", {"a": 1}], r"`answer\[1\]` is a struct\n  write it as text"),
        (["1", True], r"`answer\[1\]` is a bool"),
        ([1e-5], r"1e-05 in `answer\[0\]`"),
    ],
)
def test_golds_that_are_none_are_refused(load: Any, golds: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        load({"prompt": "x", "answer": golds})


# ---- whole rows, evaluation's own fields, public forms --------------------------------------------------------------


def test_rows_for_the_verifier_are_plain_or_refused(load_table: Any) -> None:
    columns = {"prompt": ["x"], "answer": ["1"], "price": [Decimal("3.50")], "day": [datetime(2024, 1, 2)]}
    (prompt,) = load_table(columns, {"keep_rows": True})
    assert json.loads(prompt.row) == {"prompt": "x", "answer": "1", "price": "3.50", "day": "2024-01-02T00:00:00"}
    assert load_table({**columns, "image": [b"PNG"]})[0].row == ""
    with pytest.raises(DataError, match="row 0: a bytes"):
        load_table({**columns, "image": [b"PNG"]}, {"keep_rows": True})


def test_a_row_nested_deep_is_read_or_refused(load: Any) -> None:
    told = set()
    for depth in (*range(100, 1100, 50), *range(940, 1000, 3), 100_000):
        deep = '{"prompt": "x", "answer": "1", "z": ' + "[" * depth + "]" * depth + "}"
        try:
            json.loads(load(deep, needs={"keep_rows": True})[0].row)
        except DataError as error:
            told.add("too deep" in error.found)
    assert told == {True}


def test_an_evaluation_has_fields_of_its_own(load: Any) -> None:
    data = Data(path="p", name="main", prompt_field="q", answer_field="a", prompt_suffix="!")
    assert eval_data(data, Eval()) == data
    own = eval_data(data, Eval(name="socratic", prompt_field="problem", answer_field="gold"))
    assert (own.name, own.prompt_field, own.answer_field, own.prompt_suffix) == ("socratic", "problem", "gold", "!")


PUBLIC: dict[str, tuple[dict[str, Any], dict[str, str], tuple[str, str, str]]] = {
    "GSM8K": (
        {"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        {"prompt_field": "question", "solution_field": "answer"},
        ("3 + 4?", "7", "3 + 4 = <<3+4=7>>7\n#### 7"),
    ),
    "MATH": (
        {"problem": "3 + 4?", "solution": "It is $\\boxed{7}$.", "level": "Level 1", "type": "Algebra"},
        {"prompt_field": "problem", "answer_field": "solution"},
        ("3 + 4?", "It is $\\boxed{7}$.", "It is $\\boxed{7}$."),
    ),
    "MATH-500": (
        {"problem": "3 + 4?", "solution": "It is $7$.", "answer": "7", "unique_id": "test/1.json"},
        {"prompt_field": "problem"},
        ("3 + 4?", "7", "It is $7$."),
    ),
    "verl": (
        {"data_source": "gsm8k", "prompt": [user("3 + 4?")], "reward_model": {"style": "rule", "ground_truth": "7"}},
        {"answer_field": "reward_model.ground_truth"},
        ("3 + 4?", "7", ""),
    ),
    "OpenR1": (
        {"problem": "3 + 4?", "answer": "7", "solution": "s", "messages": [user("3 + 4?"), assistant("<think>…")]},
        {"prompt_field": "problem"},
        ("3 + 4?", "7", "s"),
    ),
    "OpenR1's traces": (
        {"problem": "3 + 4?", "answer": "7", "solution": "s", "messages": [user("3 + 4?"), assistant("<think>…")]},
        {"prompt_field": "messages", "solution_field": "none"},
        ("3 + 4?", "7", "<think>…"),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_forms(load: Any, name: str) -> None:
    row, fields, expected = PUBLIC[name]
    (prompt,) = load(row, **fields)
    assert (prompt.text, prompt.answer, prompt.solution) == expected


def test_a_missing_field_s_remedy_names_a_likely_one(load: Any) -> None:
    for row, key in (
        ({"question": "x"}, "data.prompt_field=question"),
        ({"prompt": "x", "reward_model": {"ground_truth": "1"}}, "data.answer_field=reward_model.ground_truth"),
        ({"prompt": "x", "solution": "s"}, "data.answer_field=…"),
    ):
        with pytest.raises(DataError) as error:
            load(row)
        assert error.value.remedy.endswith(key)


@pytest.mark.parametrize("field", ["answer", "solution"])
def test_a_column_that_nothing_needs_can_be_left_unread(load: Any, field: str) -> None:
    row = {"prompt": "x", field: [{"code": "y"}]}
    with pytest.raises(DataError, match=f"`{field}") as error:
        load(row, needs={"need_answer": False})
    assert f"data.{field}_field=" in error.value.remedy
    (prompt,) = load(row, needs={"need_answer": False, "keep_rows": True}, **{f"{field}_field": "none"})
    assert (prompt.answer, prompt.solution, json.loads(prompt.row)) == ("", "", row)
