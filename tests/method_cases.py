"""Recipes of a method alone, whose models and data nobody reads."""

from typing import Any

from tutorloop.contracts.config import Config
from tutorloop.contracts.recipe import parse_config

TEACHER = {"model": "t"}
SELF = {"model": "s"}
REFERENCE = {"model": "s"}


def config(method: str, teacher: dict | None = None, options: dict | None = None, **keys: Any) -> Config:
    return parse_config(
        {
            "method": method,
            "method_options": options or {},
            "output_dir": "x",
            "steps": 100,
            "prompts_per_step": 1,
            "student": {"model": "s"},
            "data": {"path": "d"},
            **({"teacher": teacher} if teacher else {}),
            **keys,
        }
    )
