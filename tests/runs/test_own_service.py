"""A service from outside the package: its credit of single tokens reaches the loss (on Ray: tests/ray)."""

from pathlib import Path

from own_service import credited_run


def test_credit_of_single_tokens_reaches_the_loss(tmp_path: Path) -> None:
    credited_run(tmp_path, None)
