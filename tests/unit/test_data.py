"""Reading problems: formats, the checks on every row, the order of prompts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutorloop.cluster.data import PromptOrder, fitting, load_prompts
from tutorloop.cluster.methods import compose_stages
from tutorloop.cluster.preflight import Inputs, check_inputs
from tutorloop.cluster.rows import read_rows
from tutorloop.contracts.config import Data
from tutorloop.contracts.errors import DataError
from tutorloop.contracts.json_files import gold_answer
from tutorloop.contracts.recipe import parse_config
from tutorloop.models.loading import load_tokenizer


class Characters:
    """A tokenizer without a chat template: one id a character."""

    chat_template, eos_token_id = None, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
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


def test_solutions_become_responses(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "answer": "1", "solution": "so"}, {"prompt": "x", "answer": "1", "solution": None}]
    rows += [{"prompt": "x", "answer": "steps #### 42"}, {"prompt": "x", "answer": "1", "s": "other"}]
    path = jsonl(tmp_path / "d.jsonl", *rows)
    prompts = load(path)
    assert [p.solution for p in prompts] == ["so", "", "", ""]
    assert [p.solution_ids.tolist() for p in prompts] == [[ord("s"), ord("o"), 0], [], [], []]
    assert all(p.solution_ids.dtype == np.int32 for p in prompts)
    assert [p.solution for p in load(path, solution_field="s")] == ["", "", "", "other"]


def test_a_strategy_is_a_text_that_rows_need_where_a_template_shows_it(tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "prompt": "1 + 1 =", "answer": "2", "plan": {"words": w}} for n, w in enumerate(["", "So"])]
    path = jsonl(tmp_path / "d.jsonl", *rows)
    assert [p.strategy for p in load(path, strategy_field="plan.words")] == ["", "So"]
    assert [p.strategy for p in load(path)] == ["", ""]
    tree = {"method": "sgpo_guided", "steps": 1, "prompts_per_step": 1, "output_dir": str(tmp_path / "run")}
    tree |= {"student": {"model": "lab:student"}, "teacher": {"model": "lab:student", "follows": "live"}}
    for field, found in (("plan.words", "row i0"), ("plan", "data.strategy_field=plan.words")):
        config = parse_config({**tree, "data": {"path": path, "strategy_field": field}})
        with pytest.raises(DataError, match=found) as error:
            check_inputs(config, compose_stages(config))
        assert "data.strategy_field=" in error.value.remedy
    rows[0]["plan"] = {"words": "Well"}
    config = parse_config({**tree, "data": {"path": jsonl(Path(path), *rows), "strategy_field": "plan.words"}})
    assert [p.strategy for p in check_inputs(config, compose_stages(config)).train] == ["Well", "So"]


def test_the_labs_solutions_are_turns_of_its_chat_template() -> None:
    tokenizer = load_tokenizer("lab:student")
    for prompt in load_prompts(Data(path="lab:train"), "lab:train", "train", tokenizer, 40):
        turns = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": prompt.solution}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        ids = [*prompt.token_ids.tolist(), *prompt.solution_ids.tolist()]
        assert ids == whole[: len(ids)] and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(whole[len(ids) :]) == "\n"
        assert tokenizer.decode(prompt.solution_ids, skip_special_tokens=True) == prompt.solution != ""


def test_answers_may_be_missing_where_nothing_verifies(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"prompt": "x"}, {"prompt": "y", "answer": None}, {"prompt": "z", "answer": 0})
    prompts = load_prompts(Data(path=path), path, "train", Characters(), need_answer=False)
    assert [p.answer for p in prompts] == ["", "", "0"]
    with pytest.raises(DataError, match="`answer`"):
        load(path)
    with pytest.raises(DataError, match="`prompt`"):
        bad = jsonl(tmp_path / "e.jsonl", {"answer": "1"})
        load_prompts(Data(path=bad), bad, "train", Characters(), need_answer=False)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "empty"),
        ([{"answer": "1"}], "`prompt`"),
        ([{"prompt": "x", "answer": "1"}, {"prompt": "x"}], "line 2"),
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
            list(read_rows(str(path)))
    with pytest.raises(DataError, match="train, test, ood"):
        read_rows("lab:tests")


def test_a_prompt_longer_than_a_context_is_named_or_left_out(tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "prompt": "x" * n, "answer": "1"} for n in (50, 10, 30)]
    path = jsonl(tmp_path / "d.jsonl", *rows)
    prompts, refuse, drop = load(path), Data(path=path), Data(path=path, too_long="drop")
    contexts = {"student": 100, "teacher t": 60}
    assert fitting(prompts, 10, contexts, "d", refuse) == fitting(prompts, 10, contexts, "d", drop) == prompts
    with pytest.raises(DataError, match="context of 60 tokens of the teacher t") as error:
        fitting(prompts, 11, contexts, "d", refuse)
    assert "prompt i50 of d: 50 + 11 new tokens = 61; 1 of 3 rows" in error.value.found
    assert "data.too_long=drop" in error.value.remedy
    assert [p.prompt_id for p in fitting(prompts, 11, contexts, "d", drop)] == ["i10", "i30"]
    assert [p.prompt_id for p in fitting(prompts, 50, contexts, "d", drop)] == ["i10"]
    with pytest.raises(DataError, match="3 of 3 rows"):
        fitting(prompts, 51, contexts, "d", drop)


def test_the_order_is_a_permutation_of_each_epoch_and_repeats() -> None:
    order = PromptOrder(7, seed=3)
    epochs = [[order.row(epoch * 7 + i) for i in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = PromptOrder(7, seed=3)
    positions = np.random.default_rng(0).permutation(21)
    assert all(again.row(int(p)) == epochs[p // 7][p % 7] for p in positions)


def test_a_run_leaves_out_what_is_too_long_and_evaluates_by_other_names(tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "prompt": "7 " * n, "answer": "1"} for n in (1, 2000, 3)]
    held_out = [{"id": row["id"], "q": [{"role": "user", "content": row["prompt"]}], "g": {"a": 7}} for row in rows]
    train, test = jsonl(tmp_path / "d.jsonl", *rows), jsonl(tmp_path / "e.jsonl", *held_out)
    models = {"student": {"model": "lab:student"}, "teacher": {"model": "lab:teacher"}}
    tree = {"method": "opd", "steps": 1, "prompts_per_step": 1, "output_dir": str(tmp_path / "run"), **models}
    tree |= {"data": {"path": train}, "eval": {"path": test, "prompt_field": "q", "answer_field": "g.a"}}

    def checked(*overrides: str) -> Inputs:
        config = parse_config(tree, list(overrides))
        return check_inputs(config, compose_stages(config))

    inputs = checked("data.too_long=drop")
    assert [p.prompt_id for p in inputs.train] == [p.prompt_id for p in inputs.in_distribution] == ["i1", "i3"]
    assert [p.answer for p in inputs.in_distribution] == ["7", "7"]
    assert inputs.left_out == {"too_long": 1, "too_long_eval": 1}
    assert checked("data.too_long=drop", "eval.problems=1").left_out == {"too_long": 1}
    with pytest.raises(DataError, match="prompt i2000"):
        checked()
    with pytest.raises(DataError, match="3 of 3 rows"):
        checked("data.too_long=drop", "rollout.max_new_tokens=100000")
