"""Writes docs/configuration.md from the configuration's own classes: `.venv/bin/python docs/write_configuration.py`."""

import sys
import typing
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tutorloop.cluster.methods import METHODS
from tutorloop.cluster.methods.parts.composition import Composition
from tutorloop.cluster.resume_keys import TABLE, known_keys, rule_of
from tutorloop.contracts.config import Config, Section
from tutorloop.contracts.recipe import SECTIONS

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """# Configuration

A recipe is one YAML file; any key can be overridden on the command line as `key.path=value`. An unknown key is refused
with the nearest known one, and a key that stands twice in a recipe with both its lines. Written by
`docs/write_configuration.py`.

What stands behind the `=` of an override is

- the text itself where the key holds text (`str`, or words): `verifier.marker=####` and `data.prompt_suffix= # x` keep
  every character. In quotes that the shell leaves it is a YAML string, which is how a line break is written:
  `data.prompt_suffix='"\\nAnswer:"'`. `eval.path=` is the empty text;
- YAML elsewhere: `learner.learning_rate=1e-6`, `student.lora={rank: 8}`, `teacher.urls=[http://a:8000/v1]`. `key=`
  takes the default. A value that YAML would cut or drop (a comment, `~`) is refused.

`stages.0.steps=3` reaches into a list of the recipe. Of several overrides of a key the last one holds. In a recipe, as
in an override, numbers are those of YAML 1.2 and finite; `010`, which YAML's versions read in two ways, is refused.
Relative paths start where the command runs, and `~` is the home folder.

The column *resume* says what becomes of a key that a run which goes on (`--resume`) has changed:
[below](#what-a-resume-may-change).
"""

RESUME = """## What a resume may change

| kind | what becomes of it |
|---|---|
| free | taken as it is |
| last bits | taken, and told in a note: the same run, but for the last bits of its figures |
| result | refused by name, unless `--allow-change KEY` names it or its section; then told and written down |
| never | refused, with the reason |

What was changed, and after which step, stands in `changes.jsonl` of the run's folder and in its report. The place of
data and models may be another where it holds what the run read: that is compared by content, and a teacher may be
another with `--allow-change teacher.model`. A section that came or went counts by its name (`student.lora`). `stages.N`
of a stage that is done never changes; `steps` alters the result where `learner.decay` is not constant.
"""


def page() -> str:
    """The whole page."""
    top = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS}
    parts = [HEAD, _methods(), _table("The run", "", top)]
    parts += [_table(model.__doc__ or "", f"{name}.", model.model_fields) for name, model in SECTIONS.items()]
    return "\n".join([*parts, _resume()])


def _resume() -> str:
    rows = [f"| {', '.join(f'`{key}`' for key in rule.keys)} | {rule.kind} | {rule.why} |" for rule in TABLE]
    head = ["`*` is any part of a key; the first line that has a key decides. `teacher.` is also `teachers.NAME.`", ""]
    return "\n".join([RESUME, *head, "| keys | kind | why |", "|---|---|---|", *rows]) + "\n"


def _methods() -> str:
    """An option that means the same in several methods has one row."""
    rows: dict[str, list[str]] = {}
    bare = []
    for method, compose in METHODS.items():
        fields = options_of(compose).model_fields
        for name, field in fields.items():
            meaning = (field.description or "").replace("|", "\\|")
            rows.setdefault(f"`{name}` | {_type(field)} | {_default(field)} | {meaning}", []).append(method)
        if not fields:
            bare.append(method)
    table = [f"| {row} | {', '.join(methods)} |" for row, methods in sorted(rows.items())]
    head = ["| option | type | default | meaning | methods |", "|---|---|---|---|---|"]
    title = f"## Options of the methods (`method_options`)\n\nWithout any: {', '.join(bare)}.\n"
    return "\n".join([title, *head, *table]) + "\n"


def options_of(compose: Callable[[Config], Composition]) -> type[Section]:
    """The options' model of a method: the one that its module defines, or else the one that it imports."""
    module = sys.modules[compose.__module__]
    shared = (Section.__module__, Config.__module__)
    sections = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Section)]
    models = [section for section in sections if section.__module__ not in shared]
    own = [model for model in models if model.__module__ == module.__name__] or models
    assert len(own) == 1, f"{module.__name__} has one model of options, found {own}"
    return own[0]


def _table(title: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        f"| `{prefix}{name}` | {_type(f)} | {_default(f)} | {f.description} | {_on_resume(prefix + name)} |"
        for name, f in fields.items()
    ]
    heading = f"## `{prefix[:-1]}`\n\n{title}" if prefix else f"## {title}"
    return f"{heading}\n\n| key | type | default | meaning | resume |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _on_resume(key: str) -> str:
    """The kind of a key; of one that holds others, as they say."""
    kinds = {rule_of(known).kind for known in known_keys() if f"{known}.".startswith(f"{key}.")}
    return kinds.pop() if len(kinds) == 1 else "by its keys"


def _type(field: FieldInfo) -> str:
    kind = field.annotation
    if typing.get_origin(kind) is typing.Literal:
        return " \\| ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, (int, float, str)) and not issubclass(kind, BaseModel):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("|", "\\|").replace("tutorloop.contracts.config.", "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value in ("", None, PydanticUndefined) else f"{value}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
