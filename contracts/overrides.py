"""`key.path=value` on a command line: the value is read by what the key holds.

Where the configuration's classes have text, the text after `=` is that text, every space, `#` and backslash of it; one
that is a whole quoted YAML string is read as such. Everywhere else the value is YAML, of which nothing may be lost.
"""

import re
from typing import Any

import yaml

from .config import Config
from .errors import ConfigError
from .recipe_text import AMBIGUOUS, below, compose, construct, is_list, is_text

RULE = "an override reads key.path=value"
FORM = re.compile(r"[^\s=:.+-][^\s=:]*")  # of a key


def apply(tree: dict[str, Any], override: str) -> None:
    """Put an override's value into a recipe's tree; a later override of a key takes the place of an earlier one.

    Raises ConfigError.
    """
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not FORM.fullmatch(key) or "" in parts:
        raise ConfigError(RULE, override, _right_form(override))
    *parents, leaf = parts
    node: Any = tree
    kind: Any = Config
    for depth, parent in enumerate(parents):
        above, kind = node, below(kind, parent)
        node = _inside(above, parent, ".".join(parents[:depth]), key)
        if node is None:
            if is_list(kind):
                _inside([], parts[depth + 1], ".".join(parts[: depth + 1]), key)
            node = above[parent if isinstance(above, dict) else int(parent)] = {}
    kind = below(kind, leaf)
    _inside(node, leaf, ".".join(parents), key)
    value = _value(override, text, kind)
    if value is None and isinstance(node, dict):
        node.pop(leaf, None)
    else:
        node[leaf if isinstance(node, dict) else int(leaf)] = value


def _inside(node: Any, part: str, place: str, key: str) -> Any:
    """What `part` names in `node`, None where that has none. Raises ConfigError."""
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list | tuple):
        if part.isdecimal() and int(part) < len(node):
            return node[int(part)]
        remedy = f"name one of these by its number from 0, or give all of them: {place}=[…]"
        raise ConfigError("an override reaches into what the recipe lists", f"{key}: {place} has {len(node)}", remedy)
    raise ConfigError("an override's path leads through sections", f"{key}: {place} is a value")


def _right_form(override: str) -> str:
    """What was meant, where that can be seen."""
    key, separator, value = override.partition("=")
    if not separator:
        key, separator, value = override.partition(":")
    key, value = key.strip().lstrip("+-").strip(), value.strip()
    if separator and FORM.fullmatch(key) and "" not in key.split("."):
        return f"write {key}={value}"
    return "e.g. learner.learning_rate=1e-4, without spaces around ="


def _value(override: str, text: str, kind: Any) -> Any:
    """The value that `text` gives a `kind`; None: the default. Raises ConfigError."""
    if is_text(kind):
        return _unquoted(text)
    if not text:
        return None
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken | yaml.DirectiveToken):
                raise ConfigError("an override holds neither anchors nor tags", override, "put the text in quotes")
        node = compose(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError("an override's value must be YAML", f"{override}: {problem}", _quoting(override)) from error
    if node is None or node.tag == "tag:yaml.org,2002:null":
        remedy = f"{override.partition('=')[0]}= takes the default"
        raise ConfigError("an override with text behind = has a value", override, remedy)
    word = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag == "tag:yaml.org,2002:str"
    if word and not AMBIGUOUS.fullmatch(node.value):
        return text  # a word or a sentence: as it stands
    if text[node.end_mark.index :].strip():
        remedy = f"leave out the comment; {_quoting(override)}"
        raise ConfigError("an override's value is all that stands behind =", override, remedy)
    return construct(node, kind, text, override.partition("=")[0])


def _unquoted(text: str) -> str:
    """The text as it stands, or what is in the quotes of a whole quoted YAML string."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return text
    try:
        node = compose(text)
    except yaml.YAMLError:
        return text
    return node.value if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text) else text


def _quoting(override: str) -> str:
    key, _, value = override.partition("=")
    quoted = value.replace("'", "''")
    return f"text goes into quotes of its own: \"{key}='{quoted}'\""
