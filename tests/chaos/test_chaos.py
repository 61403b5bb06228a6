"""A short part of what chaos.py does to runs; `make chaos` does all of it."""

import random
from pathlib import Path

import chaos
import pytest


@pytest.mark.parametrize("seed", [1])
def test_a_driver_that_is_killed_at_a_random_moment_costs_nothing(seed: int, tmp_path: Path) -> None:
    assert "always the undisturbed weights" in chaos.driver(tmp_path, random.Random(seed), many=1, steps=6)
