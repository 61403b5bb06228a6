"""The card of a trained student: what it is, how it was made, how good it is."""

from pathlib import Path
from typing import Any

import yaml

from ... import __version__
from ...contracts.config import Config

ADAPTERS = """The weights have the trained adapters merged in; `adapter/` holds them alone, as peft loads them.

"""


def write_model_card(path: Path, config: Config, summary: dict[str, Any]) -> None:
    """README.md of an exported model, with the front matter that model hubs read."""
    teachers = ", ".join(f"`{teacher.model}`" for teacher in config.named_teachers.values()) or "none"
    recipe = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    shown = {key: f"{100 * value:.1f} %" for key, value in summary["accuracy"].items()}
    split = {
        "in distribution": ("before", "after", "teacher"),
        "out of distribution": ("ood_before", "ood_after", "ood_teacher"),
    }
    rows = [f"| {name} | " + " | ".join(shown.get(key, "–") for key in keys) + " |" for name, keys in split.items()]
    front = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["tutorloop", *(stage.method for stage in config.plan)]},
        sort_keys=False,
    )
    path.write_text(
        f"""---
{front}---
# {Path(config.student.model).name or config.student.model}, trained

Trained by tutorloop {__version__} with `{summary["method"]}`, {summary["steps"]} steps, seed {config.seed}.
Student: `{config.student.model}`. Teacher: {teachers}. Data: `{config.data.path}`.

avg@{config.eval.samples} at temperature {config.eval.temperature}, first {config.eval.problems} problems of each set:

| | before | after | teacher |
|---|---|---|---|
{chr(10).join(rows)}

{ADAPTERS if config.student.lora else ""}## Recipe

```yaml
{recipe}```
""",
        encoding="utf-8",
    )
