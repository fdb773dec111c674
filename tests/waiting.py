"""Waiting for what comes of itself: however slow the computer is, and no longer than it takes."""

import time
from collections.abc import Callable

PATIENCE = 120.0  # seconds; nothing takes them that comes at all


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
