"""Imported once by the fork server, so that every verifier process starts warm: verifiers imported and tried."""

from . import verifiers  # noqa: F401
from .math import warm_up

warm_up()
