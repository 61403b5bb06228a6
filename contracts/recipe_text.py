"""The YAML of recipes: read by what each key is to hold, so that nothing of it is lost or taken for something else.

Text where the configuration's classes have text is the text as it was written (`no`, `010`, `2024-01-01`); elsewhere
numbers are those of YAML 1.2 (`1e-6` is one), and what versions of YAML read as different numbers is refused. So is a
key that is given twice: plain YAML keeps the last and forgets the others.
"""

import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from .errors import ConfigError

MOST_NODES, DEEPEST = 100_000, 100  # of a recipe with its aliases written out
CORE_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
MERGE = "tag:yaml.org,2002:merge"
AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+")  # 010: 8 to YAML 1.1, 10 to YAML 1.2


class _Loader(yaml.SafeLoader):
    """PyYAML's, with floats that need no dot, and without octal numbers, sexagesimal ones and dates."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*)(\.[0-9_]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|[-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


# ---- what a key is to hold -------------------------------------------------------------------------------------------


def members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, without None; of any other type, itself."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(part for part in parts if part is not type(None))


def below(kind: Any, key: str) -> Any:
    """The type of what `key` holds in a `kind`; Any where nothing is known of it."""
    for part in members(kind):
        origin, arguments = get_origin(part), get_args(part)
        if isinstance(part, type) and issubclass(part, BaseModel):
            field = part.model_fields.get(key)
            return field.annotation if field else Any
        if origin is dict:
            return arguments[1]
        if origin is tuple and key.isdecimal():
            return arguments[0] if arguments[-1] is Ellipsis else dict(enumerate(arguments)).get(int(key), Any)
    return Any


def is_text(kind: Any) -> bool:
    """Whether a `kind` is text and nothing else."""
    return all(part is str or _all(part, str) for part in members(kind))


def is_list(kind: Any) -> bool:
    """Whether a `kind` may be a list."""
    return any(get_origin(part) is tuple for part in members(kind))


def _is_number(kind: Any) -> bool:
    return all(part in (int, float) or _all(part, int) for part in members(kind))


def _all(part: Any, kind: type) -> bool:
    return get_origin(part) is Literal and all(type(value) is kind for value in get_args(part))


# ---- a text and its nodes --------------------------------------------------------------------------------------------


def read(text: str, kind: Any) -> Any:
    """The value of a YAML text of one document that is to hold a `kind`. Raises yaml.YAMLError, ConfigError."""
    node = compose(text)
    if node is None:
        return None
    return construct(node, kind, text)


def compose(text: str) -> yaml.Node | None:
    """The root of a text of one document, None of an empty one. Raises yaml.YAMLError."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def construct(node: yaml.Node, kind: Any, text: str, key: str = "") -> Any:
    """The value of `node`, which was composed from `text` and is what `key`, a `kind`, is to hold.

    Raises ConfigError with all faults.
    """
    reader = _Reader(text)
    value = reader.value(node, kind, (key,) if key else ())
    if reader.faults:
        rule = "a recipe says each thing once, and in one way"
        raise ConfigError(rule, "\n         ".join(reader.faults), "mend these keys")
    return value


class _Reader:
    """Makes values of nodes, and gathers what is wrong with them."""

    def __init__(self, text: str) -> None:
        self.text, self.faults = text, []
        self._nodes, self._lost = 0, False
        self._depth = 0

    def value(self, node: yaml.Node, kind: Any, place: tuple[str, ...]) -> Any:
        self._nodes += 1
        if self._nodes > MOST_NODES or self._depth > DEEPEST:  # an alias that holds itself has no bottom
            if not self._lost:
                self._fault(place, node, "nested too deeply, or too many aliases")
            self._lost = True
            return None
        self._depth += 1
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, kind, place)
            if node.tag not in CORE_TAGS:
                return self._fault(place, node, f"the tag {node.tag} is not read here")
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, kind, place)
            return [self.value(n, below(kind, str(i)), (*place, str(i))) for i, n in enumerate(node.value)]
        finally:
            self._depth -= 1

    def _mapping(self, node: yaml.MappingNode, kind: Any, place: tuple[str, ...]) -> dict[str, Any]:
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fault(place, key, "a key is a word")
                continue
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                self._fault((*place, name), None, f"given twice, in line {lines[name]} and in line {line}")
                continue
            lines[name] = line
            if key.tag == MERGE:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):  # the first one that has a key gives it
                    found = self.value(source, kind, place)
                    merged |= found if isinstance(found, dict) else {}
                    if not isinstance(found, dict):
                        self._fault(place, source, "<< takes in mappings")
            else:
                own[name] = self.value(value, below(kind, name), (*place, name))
        return merged | own

    def _scalar(self, node: yaml.ScalarNode, kind: Any, place: tuple[str, ...]) -> Any:
        plain, null = node.style is None, node.tag == "tag:yaml.org,2002:null"
        if node.tag not in CORE_TAGS and not (plain and node.tag == MERGE):
            return self._fault(place, node, f"the tag {node.tag} is not read here")
        if is_text(kind):
            if null and not node.value and self._comment_behind(node):
                return self._fault(place, node, "holds nothing but a comment; write the text in quotes, or remove it")
            return None if null and plain else node.value
        if not plain and node.tag == "tag:yaml.org,2002:str":
            return node.value
        if plain and AMBIGUOUS.fullmatch(node.value):
            decimal = node.value.replace("0", "", 1)
            return self._fault(
                place, node, f"{node.value} is octal or decimal by the version of YAML; is it {decimal}?"
            )
        if _is_number(kind) and node.tag == "tag:yaml.org,2002:bool":
            return node.value  # `on` is no 1
        try:
            return _constructor.construct_object(node)
        except (yaml.YAMLError, ValueError):
            return self._fault(place, node, f"{node.value[:20]}… has too many digits, or is not what its tag says")

    def _comment_behind(self, node: yaml.ScalarNode) -> bool:
        line = self.text[node.end_mark.index :].split("\n", 1)[0]
        return line.lstrip().startswith("#")

    def _fault(self, place: tuple[str, ...], node: yaml.Node | None, what: str) -> None:
        where = f" (line {node.start_mark.line + 1})" if node else ""
        self.faults.append(f"{'.'.join(place) or 'recipe'}{where}: {what}")


_constructor: Any = yaml.constructor.SafeConstructor()


def leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every value of a tree that holds no others, by its dotted key."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*place, str(number)))
    else:
        yield ".".join(place), value
