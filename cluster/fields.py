"""What a row's fields hold: text, a number, a list of messages, several golds. All else is refused with its name.

A field is a column's name, or one within structs: `reward_model.ground_truth`. JSON in a text is not read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from ..contracts.errors import DataError
from ..contracts.json_files import gold_answer, kind_of, written_number

ROLES = ("system", "user", "assistant")
SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LIKELY = {  # what other datasets call a field
    "data.prompt_field": ("prompt", "messages", "conversations", "problem", "question", "instruction", "query"),
    "data.answer_field": (
        "answer",
        "reward_model.ground_truth",
        "extra_info.answer",
        "final_answer",
        "ground_truth",
        "gold",
    ),
}

OPTIONAL = ("data.answer_field", "data.solution_field", "data.strategy_field")

Turn = dict[str, str]  # role, content


@dataclass(frozen=True, slots=True)
class Row:
    """A dataset's row. `place`: of it, for messages."""

    place: str
    values: Mapping[str, Any]

    def get(self, field: str) -> Any:
        """A field's value, None where there is none. A column whose own name has dots comes first."""
        return _look_up(self.values, field)

    def text(self, field: str, key: str) -> str:
        """A field as text, "" where it is null or not there; `key` names it in a recipe. Raises DataError."""
        return self._text(self.get(field), field, key)

    def golds(self, field: str, key: str) -> list[str]:
        """The golds of a field: one, or a list of them, each different. Raises DataError."""
        value = self.get(field)
        if not isinstance(value, list):
            return [gold] if (gold := gold_answer(self.text(field, key))) else []
        golds = [gold_answer(self._text(one, f"{field}[{i}]", key)) for i, one in enumerate(value)]
        if not all(golds):
            raise self.refused("each of several golds is a text or a number", f"an empty one in `{field}`", "drop it")
        return list(dict.fromkeys(golds))

    def turns(self, field: str, thinking: tuple[str, str]) -> list[Turn]:
        """A field's list of messages. Raises DataError."""
        return [self._turn(turn, f"{field}[{i}]", thinking) for i, turn in enumerate(self.get(field))]

    def refused(self, rule: str, found: str, remedy: str = "") -> DataError:
        return DataError(rule, f"{self.place}: {found}", remedy)

    def missing(self, field: str, key: str) -> DataError:
        """The error of a row without a value in a field that it needs."""
        rule, value = f"every row needs a value in `{field}`", self.get(field)
        if field in self.values or value is not None:
            return DataError(
                rule, f"{self.place}: it is {'null' if value is None else 'empty'}", "fill it, or drop the row"
            )
        found = f"{self.place} has keys {sorted(map(str, self.values))}"
        head = field.partition(".")[0]
        if field != head and isinstance(self.values.get(head), str):
            found += f", and `{head}` is text: JSON in a text is not read"
        likely = next((name for name in LIKELY.get(key, ()) if self.get(name)), "…")
        return DataError(rule, found, f"name the field with {key}={likely}")

    def whole(self, text: str, field: str) -> str:
        """The text, if it can be encoded: half a character (a lone surrogate) cannot. Raises DataError."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                found = f"half a character, \\u{ord(text[error.start]):04x}, at {error.start + 1} in `{field}`"
                raise self.refused("a text has whole characters", found, "mend or drop the row") from None
        return text

    def as_json(self) -> str:
        """The whole row, for verifiers that read it: dates in ISO 8601, decimals as text. Raises DataError."""
        try:
            for name, value in self.values.items():
                self._check_whole(value, name)
            return json.dumps(self.values, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            found = str(error) if isinstance(error, TypeError) else "it is nested too deep"
            raise self.refused(
                "a row that the verifier reads can be written as JSON", found, "drop such columns"
            ) from None

    def _check_whole(self, value: Any, field: str) -> None:
        if isinstance(value, str):
            self.whole(value, field)
        elif isinstance(value, list | tuple):
            for one in value:
                self._check_whole(one, field)
        elif isinstance(value, dict):
            for name, one in value.items():
                self.whole(str(name), field)
                self._check_whole(one, f"{field}.{name}")

    def _text(self, value: Any, field: str, key: str) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return self.whole(value, field)
        number = written_number(value)
        if number is not None:
            return number
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            found = f"{getattr(value, 'text', value)} in `{field}`"
            remedy = "write it so, or as text"
            raise self.refused("a number in a text field is written exactly and without an exponent", found, remedy)
        found, remedy = f"`{field}` is a {kind_of(value)}", "write it as text"
        if key in OPTIONAL:
            remedy += f", or set {key}=none where none is needed"
        if isinstance(value, dict) and not field.endswith("]"):
            names = [
                str(name)
                for name, one in value.items()
                if isinstance(one, str | int | float) or (one and is_messages(one))
            ] or ["…"]
            found = f"`{field}` is a struct with keys {', '.join(map(str, value))}"
            name = next((n for n in ("ground_truth", "answer", "content", "text") if n in names), names[0])
            remedy = f"name the one that is meant: {key}={field}.{name}"
        elif is_messages(value):
            found, remedy = f"`{field}` is a list of messages", "name another field"
        raise self.refused(f"{key} names a field of text or of a number", found, remedy)

    def _turn(self, turn: Any, field: str, thinking: tuple[str, str]) -> Turn:
        rule = f"a message has a role ({', '.join(ROLES)}) and a content, which is text, and nothing else"
        if not isinstance(turn, dict):
            raise self.refused(rule, f"`{field}` is a {kind_of(turn)}", "")
        turn = {
            name: value
            for name, value in turn.items()
            if value not in (None, "", [], {}) or name in ("content", "value")
        }
        if "role" not in turn and "from" in turn:
            shown, content = turn.pop("from"), turn.pop("value", None)
            if not isinstance(shown, str) or shown not in SHAREGPT:
                raise self.refused(rule, f"`{field}.from` is {shown!a}", f"known: {', '.join(SHAREGPT)}")
            turn |= {"role": SHAREGPT[shown], "content": content}
        role, content = turn.pop("role", None), turn.pop("content", None)
        reasoning = turn.pop("reasoning_content", "") if role == "assistant" else ""
        if role not in ROLES:
            raise self.refused(rule, f"`{field}.role` is {role!a}", "drop such rows, or write the turn as one of these")
        if turn:
            raise self.refused(
                rule, f"`{field}` has {', '.join(sorted(map(str, turn)))} too", "drop these keys, or such rows"
            )
        text = self._content(content, f"{field}.content", rule)
        if reasoning:
            if not isinstance(reasoning, str):
                raise self.refused(rule, f"`{field}.reasoning_content` is a {kind_of(reasoning)}", "write text")
            text = f"{thinking[0]}\n{self.whole(reasoning, field).strip()}\n{thinking[1]}\n\n{text}"
        return {"role": role, "content": text}

    def _content(self, content: Any, field: str, rule: str) -> str:
        """Text, or OpenAI's list of parts that are all text."""
        if isinstance(content, str):
            return self.whole(content, field)
        texts = []
        for part in content if isinstance(content, list) and content else [content]:
            named = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
            if named.keys() != {"type", "text"} or named["type"] != "text" or not isinstance(named["text"], str):
                kind = f"a part of type {named.get('type')!a}" if named else f"a {kind_of(part)}"
                raise self.refused(rule, f"`{field}` is {kind}", "write text, or drop such rows")
            texts.append(self.whole(named["text"], field))
        return "".join(texts)


def is_messages(value: Any) -> bool:
    """Whether a value is meant as a list of messages."""
    return isinstance(value, list) and all(isinstance(one, dict) and {"role", "from"} & one.keys() for one in value)


def by_turns(row: Row, turns: list[Turn], field: str) -> tuple[list[Turn], str, str]:
    """A conversation as the turns before the last user's, that one's text, and the assistant's text at the very end.

    Templates take a system turn first, then the user and the assistant by turns. Raises DataError.
    """
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
        rule = f"the messages of `{field}` are one of the system at most, then the user's and the assistant's by turns"
        raise row.refused(rule, ", ".join(roles[:8]) or "no message", "drop such rows")
    end = turns[-1]["content"] if roles[-1] == "assistant" else ""
    last = len(turns) - 1 - (roles[-1] == "assistant")
    return turns[:last], turns[last]["content"], end


def _look_up(values: Any, field: str) -> Any:
    if not isinstance(values, Mapping):
        return None
    if field in values:
        return values[field]
    head, _, rest = field.partition(".")
    return _look_up(values.get(head), rest) if rest else None


def _plain(value: Any) -> str:
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    raise TypeError(f"a {kind_of(value)}")
