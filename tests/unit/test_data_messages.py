"""Lists of messages in a dataset's fields (docs/data.md): a prompt with its history, a solution, or refused by name."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_rows import SYSTEM, assistant, of_lines, of_table, user
from tiny import tiny_tokenizer

from tutorloop.contracts.errors import DataError


@pytest.fixture
def load(tmp_path: Path) -> Any:
    return partial(of_lines, tmp_path)


@pytest.fixture
def load_table(tmp_path: Path) -> Any:
    return partial(of_table, tmp_path)


def test_the_last_user_turn_is_the_prompt_and_those_before_it_are_its_turns(load: Any) -> None:
    talk = [SYSTEM, user("1 + 1 ="), assistant("2"), user("1 + 2 =")]
    plain, both = load(
        {"prompt": [user("1 + 2 =")], "answer": "3"}, {"prompt": talk, "answer": "3"}, prompt_suffix=" Now."
    )
    assert (plain.text, plain.turns, plain.solution) == ("1 + 2 = Now.", "", "")
    assert (both.text, json.loads(both.turns)) == ("1 + 2 = Now.", talk[:-1])
    shown = tiny_tokenizer().decode(both.token_ids)
    assert shown == "<assistant>Be brief.<user>1 + 1 =<assistant>2<eos><user>1 + 2 = Now.<assistant>"
    assert tiny_tokenizer().decode(plain.token_ids) == "<user>1 + 2 = Now.<assistant>"


def test_an_assistant_turn_at_the_very_end_is_the_solution(load: Any) -> None:
    row = {"messages": [user("x"), assistant("so")]}
    needs = {"need_answer": False}
    for fields in ({}, {"solution_field": "messages"}):
        (prompt,) = load(row, needs=needs, prompt_field="messages", **fields)
        assert (prompt.text, prompt.turns, prompt.solution) == ("x", "", "so")
        assert tiny_tokenizer().decode(prompt.solution_ids) == "so<eos>"
    for other in (None, "", "so ", [assistant("so")]):
        assert load({**row, "solution": other}, needs=needs, prompt_field="messages")[0].solution.strip() == "so"
    with pytest.raises(DataError, match="one solution"):
        load({**row, "solution": "other"}, needs=needs, prompt_field="messages")
    with pytest.raises(DataError) as error:
        load(row, needs=needs)
    assert error.value.remedy.endswith("data.prompt_field=messages")


def test_trl_s_prompt_and_completion(load: Any) -> None:
    lists = {"prompt": [SYSTEM, user("x")], "completion": [assistant("so")]}
    texts = {"prompt": "x", "completion": "so"}
    for row in (lists, texts):
        (prompt,) = load(row, needs={"need_answer": False}, solution_field="completion")
        assert (prompt.text, prompt.solution) == ("x", "so")
    for wrong in ([user("so")], [assistant("a"), assistant("b")], [user("x"), assistant("so")]):
        with pytest.raises(DataError, match="one message of the assistant"):
            load({**texts, "completion": wrong}, needs={"need_answer": False}, solution_field="completion")


def test_other_spellings_of_messages(load: Any) -> None:
    sharegpt = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}, {"from": "human", "value": "z"}]
    (prompt,) = load({"conversations": sharegpt, "answer": "1"}, prompt_field="conversations")
    assert (prompt.text, json.loads(prompt.turns)) == ("z", [user("x"), assistant("y")])
    empty = {"tool_calls": None, "name": "", "tools": [], "extra": {}, "reasoning_content": None}
    parts = user([{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}])
    assert load({"prompt": [{**parts, **empty}], "answer": "1"})[0].text == "a b"
    thought = assistant("so", reasoning_content="1 + 2\n")
    (prompt,) = load({"prompt": [user("x"), thought], "answer": "1"}, needs={"thinking": ("<t>", "</t>")})
    assert prompt.solution == "<t>\n1 + 2\n</t>\n\nso"


def test_messages_of_parquet_with_keys_that_only_some_have(load_table: Any) -> None:
    turns = [[SYSTEM, {**user("x"), "tool_calls": None}], [user("y"), assistant("z", reasoning_content="r")]]
    one, two = load_table({"prompt": pa.array(turns), "answer": ["1", "2"]})
    assert (one.text, json.loads(one.turns), two.text) == ("x", [SYSTEM], "y")
    assert two.solution == "<think>\nr\n</think>\n\nz"


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([], "no message"),
        ([SYSTEM], "system"),
        ([assistant("x")], "assistant"),
        ([user("x"), user("y")], "user, user"),
        ([SYSTEM, SYSTEM, user("x")], "system, system, user"),
        ([user("x"), SYSTEM, user("x")], "user, system, user"),
        ([SYSTEM, assistant("x"), user("x")], "system, assistant, user"),
        ([user("x"), assistant("y"), assistant("z")], "user, assistant, assistant"),
        ([user("x"), {"role": "tool", "content": "y"}], r"`prompt\[1\].role` is 'tool'"),
        ([{"role": "User", "content": "y"}], r"`prompt\[0\].role` is 'User'"),
        ([{"from": "observation", "value": "y"}], r"`prompt\[0\].from` is 'observation'"),
        ([{"from": ["human"], "value": "y"}], r"`prompt\[0\].from` is \['human'\]"),
        ([user("x"), assistant("", tool_calls=[{"name": "f"}])], r"`prompt\[1\]` has tool_calls too"),
        ([{**user("x"), "name": "Ann"}], "has name too"),
        ([{**user("x"), "reasoning_content": "why"}], "has reasoning_content too"),
        ([user("x"), assistant("y", reasoning_content=["r"])], "reasoning_content` is a list"),
        ([user(None)], r"`prompt\[0\].content` is a null"),
        ([user([])], r"`prompt\[0\].content` is a list"),
        ([user(3)], r"`prompt\[0\].content` is a int"),
        ([user([{"type": "image", "url": "u"}])], "a part of type 'image'"),
        ([user([{"type": "text", "text": "x"}, "y"])], "is a str"),
        ([user("x"), "y"], "`prompt` is a list"),
        (["x"], "`prompt` is a list"),
        (user("x"), "a struct with keys role, content"),
    ],
)
def test_messages_that_no_template_takes_are_refused(load: Any, turns: Any, found: str) -> None:
    with pytest.raises(DataError, match=found) as error:
        load({"prompt": "x", "answer": "1"}, {"prompt": turns, "answer": "1"})
    assert "line 2" in error.value.found


def test_an_empty_last_user_turn_is_no_prompt(load: Any) -> None:
    with pytest.raises(DataError, match="every row needs a value in `prompt`"):
        load({"prompt": [user(" ")], "answer": "1"})


def test_messages_within_a_struct_are_named(load: Any) -> None:
    row = {"prompt": {"tools": [], "messages": [user("x")]}, "answer": "1"}
    with pytest.raises(DataError) as error:
        load(row)
    assert error.value.remedy.endswith("data.prompt_field=prompt.messages")
    assert load(row, prompt_field="prompt.messages")[0].text == "x"
