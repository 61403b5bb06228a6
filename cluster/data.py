"""Problems in, prompts out: check every row (docs/data.md), apply the student's chat template, fix the order.

The prompts live in the object store as one Arrow batch; everything after this file refers to them by row. The order is
a pure function of the seed: position p of the run is row `permutation(seed, epoch)[p mod n]`, so nothing about it needs
to be saved but p.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from ..contracts.data_config import REPLAY, Data, Eval, Replay
from ..contracts.errors import DataError, ModelError
from ..contracts.records import EMPTY_I, Prompt, seed_of
from ..contracts.sections import THINKING
from ..models.chat import tokenize_prompt, tokenize_response
from ..models.thinking import Marks
from .fields import Row, Turn, by_turns, is_messages
from .rows import read_rows


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
    prompts = []
    for number, (place, values) in enumerate(islice(read_rows(path, data.name, split), limit)):
        row = Row(place, values)
        try:
            prompts.append(_to_prompt(row, number, data, tokenizer, thinking, need_answer))
        except ModelError as error:
            raise ModelError(error.rule, f"{place}: {error.found}", error.remedy) from error
        if keep_rows:
            prompts[-1] = replace(prompts[-1], row=row.as_json())
    if not prompts:
        raise DataError("a dataset has at least one row", f"{path} is empty")
    ids = {prompt.prompt_id for prompt in prompts}
    if len(ids) < len(prompts):
        raise DataError("the ids of a dataset's rows are unique", f"{path}: {len(prompts) - len(ids)} repeat")
    return prompts


def eval_data(data: Data, evaluation: Eval) -> Data:
    """How an evaluation's rows are read: as the training data's, but for what has a name of its own."""
    own = {name: getattr(evaluation, name) for name in ("name", "prompt_field", "answer_field")}
    return data.model_copy(update={name: value for name, value in own.items() if value})


def load_replay(replay: Replay, data: Data, tokenizer: Any, thinking: Marks = THINKING) -> list[Prompt]:
    """The rows that are replayed, read as the training data are, but for what has a name of its own and without the
    words that follow every problem there. Each has a solution, and neither answer nor teacher; their ids are none of
    training's. Raises DataError, ModelError."""
    names = {name: own for name in ("name", "prompt_field", "solution_field") if (own := getattr(replay, name))}
    own = data.model_copy(update={**names, "answer_field": "", "prompt_suffix": ""})
    try:
        prompts = load_prompts(own, replay.path, replay.split, tokenizer, need_answer=False, thinking=thinking)
    except DataError as error:
        raise DataError(error.rule, error.found, error.remedy.replace("data.", "replay.")) from error
    for prompt in prompts:
        if not prompt.solution.strip():
            found, field = f"row {prompt.prompt_id} of {replay.path} has none", "replay.solution_field"
            raise DataError("a replayed row has a solution, which is imitated", found, f"name its field with {field}=…")
    return [replace(prompt, prompt_id=f"{REPLAY}/{prompt.prompt_id}", teacher="") for prompt in prompts]


def _to_prompt(row: Row, number: int, data: Data, tokenizer: Any, thinking: Marks, need_answer: bool) -> Prompt:
    turns, text, said = _conversation(row, data, thinking)
    if not text.strip():
        raise row.missing(data.prompt_field, "data.prompt_field")
    golds = row.golds(data.answer_field, "data.answer_field")
    if need_answer and not golds:
        raise row.missing(data.answer_field, "data.answer_field")
    solution = _solution(row, data, said, thinking)
    text = row.whole(text + data.prompt_suffix, "data.prompt_suffix")
    shown: dict[str, Any] = {"template_kwargs": data.chat_template_kwargs, "turns": turns, "suffix": data.prompt_suffix}
    solution_ids = EMPTY_I
    if solution.strip():
        solution_ids = tokenize_response(tokenizer, text, solution, thinking=thinking, **shown)
    tags = (row.get(name) for name in ("family", "source"))
    return Prompt(
        prompt_id=row.text("id", "id") or f"row-{number}",
        text=text,
        turns=json.dumps(turns) if turns else "",
        token_ids=tokenize_prompt(tokenizer, text, **shown),
        answer=golds[0] if golds else "",
        other_answers=tuple(golds[1:]),
        solution=solution,
        solution_ids=solution_ids,
        strategy=row.text(data.strategy_field, "data.strategy_field"),
        tags=next((row.whole(tag, "family or source") for tag in tags if isinstance(tag, str)), ""),
        teacher=row.text("teacher", "teacher"),
    )


def _conversation(row: Row, data: Data, thinking: tuple[str, str]) -> tuple[list[Turn], str, str]:
    """The turns before the last user's, that one's text, and what the assistant said after it, if anything."""
    if not is_messages(row.get(data.prompt_field)):
        return [], row.text(data.prompt_field, "data.prompt_field"), ""
    return by_turns(row, row.turns(data.prompt_field, thinking), data.prompt_field)


def _solution(row: Row, data: Data, said: str, thinking: tuple[str, str]) -> str:
    """The solution field's value, text or one message of the assistant; else what ends the prompt's conversation."""
    field, value = data.solution_field, row.get(data.solution_field)
    if field == data.prompt_field or value is None:
        return said
    if value and is_messages(value):
        turns = row.turns(field, thinking)
        if [turn["role"] for turn in turns] != ["assistant"]:
            found = f"`{field}` has the roles {', '.join(turn['role'] for turn in turns[:8])}"
            raise row.refused("a solution is a text, or one message of the assistant", found, "name another field")
        solution = turns[0]["content"]
    else:
        solution = row.text(field, "data.solution_field")
    if solution.strip() and said.strip() and solution.strip() != said.strip():
        found = f"the assistant's message at the end of `{data.prompt_field}`, and another text in `{field}`"
        raise row.refused("a row has one solution", found, "data.solution_field=none takes the messages'")
    return solution if solution.strip() else said


def fitting(
    prompts: Sequence[Prompt], new_tokens: int, contexts: Mapping[str, int], path: str, data: Data
) -> list[Prompt]:
    """The prompts that fit every context with a response of `new_tokens`: all of them, or what data.too_long leaves.
    Raises DataError."""
    who, context = min(contexts.items(), key=lambda item: item[1])
    kept = [prompt for prompt in prompts if len(prompt.token_ids) + new_tokens <= context]
    if len(kept) == len(prompts) or (kept and data.too_long == "drop"):
        return kept
    rule = f"prompt and response fit the context of {context} tokens of the {who}"
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    length = len(longest.token_ids)
    found = f"prompt {longest.prompt_id} of {path}: {length} + {new_tokens} new tokens = {length + new_tokens}"
    found += f"; {len(prompts) - len(kept)} of {len(prompts)} rows do not"
    remedy = "lower rollout.max_new_tokens, shorten the prompts, or use a model with a longer context"
    raise DataError(rule, found, f"{remedy}; data.too_long=drop leaves such rows out" if kept else remedy)


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
