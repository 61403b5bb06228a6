"""Writes docs/configuration.md from the configuration's own classes: `.venv/bin/python docs/write_configuration.py`."""

import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tutorloop.contracts.config import SECTIONS, Config

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """# Configuration

A recipe is one YAML file; any key can be overridden on the command line as `key.path=value`, the value being YAML. An
unknown key is refused with the nearest known one. Written by `docs/write_configuration.py`.

## Options of the methods (`method_options`)

| method | option | default | used with | meaning |
|---|---|---|---|---|
| opd | `direction` | reverse | topk, exact | reverse is KL(student‖teacher), forward KL(teacher‖student) |
| opd | `top_k` | 16 | topk | ids per token; the rest of the mass is one tail bucket |
| opd | `support` | teacher | topk | whose top-k ids: the teacher's, or the sampler's |
| opd | `importance_clip` | 2.0 | sampled | upper bound of the importance weight π_now/μ |
"""


def page() -> str:
    """The whole page."""
    top = {name: field for name, field in Config.model_fields.items() if name not in SECTIONS}
    parts = [HEAD, _table("The run", "", top)]
    parts += [_table(model.__doc__ or "", f"{name}.", model.model_fields) for name, model in SECTIONS.items()]
    return "\n".join(parts)


def _table(title: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [f"| `{prefix}{name}` | {_type(f)} | {_default(f)} | {f.description} |" for name, f in fields.items()]
    heading = f"## `{prefix[:-1]}`\n\n{title}" if prefix else f"## {title}"
    return f"{heading}\n\n| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


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
