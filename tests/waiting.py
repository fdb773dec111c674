"""Waiting for what comes of itself: however slow the computer is, and no longer than it takes."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 120.0  # seconds; nothing takes them that comes at all


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def with_time_enough(
    attempt: Callable[[float], T], tries: Sequence[float] = (0.5, 4, 30, PATIENCE)
) -> T:
    """Give what comes of an `attempt` that ends after so many seconds: the first that is anything.

    For what is cut off in its midst, and has to have come so far.
    """
    for seconds in tries[:-1]:
        if result := attempt(seconds):
            return result
    return attempt(tries[-1])
