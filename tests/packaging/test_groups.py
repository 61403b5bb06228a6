"""Tests of one `xdist_group` run in one process, one after the other, with their fixtures made once: pytest 9.2 moved
what pytest-xdist 3.8 marks them by, and then it deals them out one by one and says nothing."""

import subprocess
import sys

FILE = """
import os
import pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(6))
def test(i, pytestconfig):
    (pytestconfig.rootpath / f"{i}.txt").write_text(os.environ["PYTEST_XDIST_WORKER"])
"""


def test_the_installed_pytest_and_xdist_know_groups(tmp_path):
    (tmp_path / "test_one.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", f"--rootdir={tmp_path}"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len({path.read_text() for path in tmp_path.glob("*.txt")}) == 1
