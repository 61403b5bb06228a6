"""Ray's own processes end with the process that started them, however that ends.

Those that Ray ties to their parent go at once, its agents only after a minute. So a small process waits until this one
is gone (its end of a pipe closes), and then ends their process groups.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

WATCH = """
import os, signal, sys, time
if not sys.stdin.read():
    time.sleep(1)
    for group in sys.argv[1:]:
        try:
            os.killpg(int(group), signal.SIGKILL)
        except OSError:
            pass
"""


@contextmanager
def ended_with_us(groups: Sequence[int]) -> Iterator[None]:
    """In this block the process groups do not outlive this process."""
    command = [sys.executable, "-I", "-S", "-c", WATCH, *map(str, groups)]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        with suppress(OSError):
            watch.communicate(b"they have ended", timeout=10)
