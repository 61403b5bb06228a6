"""A port of this machine, for the learner's ranks to meet at."""

import random
import socket
from contextlib import suppress

from ...contracts.errors import LearnerError


def free_port() -> int:
    """A port of this machine that nobody listens at.

    Whoever asked listens there some seconds later. Ports of the range from which the system takes those of outgoing
    connections are left alone: one of Ray's many could have it by then.
    """
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port
    raise LearnerError("a node has a free port for the learner's ranks", "100 of 20000-29999 are taken")
