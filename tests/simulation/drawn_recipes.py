"""Recipes of a few thousand, drawn for simulated runs."""

import random
from functools import cache

from tutorloop.cluster.methods import METHODS
from tutorloop.contracts.recipe import parse_config

TEACHERS = {"teachers": {"a": {"model": "s"}, "b": {"model": "s"}}}
METHOD_OPTIONS = {  # methods that ask, annotate, follow up and publish in different ways
    "grpo": {},
    "dapo": {"method_options": {"max_refills": 2}},
    "star": {"method_options": {"round_steps": 2}},
    "rest": {"method_options": {"round_steps": 3}},
    "opd": TEACHERS,
    "sdpo": {**TEACHERS, "method_options": {"grpo_weight": 0.5}},
    "exopd": {**TEACHERS, "reference": {"model": "s"}},
    "sg_opd": {**TEACHERS, "method_options": {"cold_start": 1.0, "cold_steps": 1.0}},
    "sgsd": {"teachers": {"a": {"model": "s"}}, "method_options": {"pairs": 2}, "skills": {"path": "unused"}},
    "sft": {},
}


@cache
def setting(method: str, staleness: int, prompts: int, replicas: int, batch: int, steps: int, every: int):
    """A recipe and its composition. There are a few thousand of them, and each takes some milliseconds to check."""
    tree = {
        "method": method,
        "output_dir": "unused",
        "steps": steps,
        "prompts_per_step": prompts,
        "max_staleness": staleness,
        "seed": 5,
        "student": {"model": "s"},
        "data": {"path": "d"},
        "rollout": {"samples_per_prompt": 2, "batch_size": batch, "replicas": replicas},
        "eval": {"path": "e", "every": every},
        "checkpoint": {"every": every},
        **METHOD_OPTIONS[method],
    }
    config = parse_config(tree, [])
    return config, METHODS[method](config)


def recipe_of(rng: random.Random):
    """A recipe from a few thousand."""
    method = rng.choice(list(METHOD_OPTIONS))
    steps = rng.randint(3, 6)
    parts = (rng.choice([0, 0, 1, 2]), rng.randint(1, 4), rng.randint(1, 3), rng.choice([2, 4]))
    return method, *parts, steps, rng.choice([0, 2])
