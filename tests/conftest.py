"""What every test may ask for, and why a test may be skipped."""

import os
import sys
from collections.abc import Iterator

import pytest


def kvm_problem() -> str | None:
    """Why tiny guests cannot run on this computer, or None."""
    from tinyvmm import kvm
    from tinyvmm.errors import ConfigError

    try:
        with kvm.System():
            return None
    except ConfigError as error:
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("kvm") for item in items):
        problem = kvm_problem()
        for item in items:
            if problem and item.get_closest_marker("kvm"):
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(autouse=True)
def nothing_leaks_descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `kvm` leaves as many descriptors open as it found."""
    if request.node.get_closest_marker("kvm") is None:
        yield
        return
    before = set(os.listdir("/proc/self/fd"))
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
