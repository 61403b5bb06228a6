"""A verifier runs where something is judged and nowhere else: neither started, counted, nor asked golds of the data."""

import json

import pytest

from tutorloop.cluster.methods import compose_stages
from tutorloop.cluster.pools.services import judges, judges_training
from tutorloop.cluster.preflight import check_inputs, needs_of
from tutorloop.contracts.errors import DataError
from tutorloop.contracts.recipe import parse_config


def setting(method, folder="unused", **changes):
    tree = {
        "method": method,
        "output_dir": "unused",
        "steps": 1,
        "prompts_per_step": 1,
        "student": {"model": "lab:student"},
        "data": {"path": f"{folder}/data.jsonl"},
        "rollout": {"max_new_tokens": 16},
        **({"teacher": {"model": "lab:teacher"}} if method in ("opd", "kd") else {}),
        **changes,
    }
    config = parse_config(tree)
    return config, compose_stages(config)


@pytest.mark.parametrize(
    ("method", "changes", "training", "anything"),
    [
        ("sft", {}, False, False),
        ("sft", {"eval": {"path": "lab:test"}}, False, True),
        ("kd", {}, False, False),
        ("opd", {}, True, True),
        ("grpo", {}, True, True),
        ("opd", {"verifier": {"kind": "none"}}, False, False),
    ],
)
def test_a_verifier_is_started_where_something_is_judged(method, changes, training, anything):
    config, compositions = setting(method, **changes)
    assert (judges_training(config, compositions), judges(config, compositions)) == (training, anything)
    assert ("verifier" in {need.pool for need in needs_of(config, compositions)}) == anything


def test_solutions_alone_are_enough_to_train_on(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "solution": "2"}) + "\n")
    assert len(check_inputs(*setting("sft", tmp_path)).train) == 1
    with pytest.raises(DataError, match="answer"):
        check_inputs(*setting("opd", tmp_path))
