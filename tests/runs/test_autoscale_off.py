"""A run in one process has no autoscaler, and says so."""

import io

from loop_cases import make_models, recipe
from rich.console import Console

from tutorloop.cluster import run


def test_one_process_scales_nothing(tmp_path):
    config = recipe(make_models(tmp_path), tmp_path / "run", steps=1, autoscale={"cpus": 4.0})
    said = io.StringIO()
    assert run.train(config, False, None, Console(file=said, width=200), local=True)
    assert said.getvalue().count("autoscale is off: a run in one process has the replicas of its recipe") == 1
