"""The smallest device: a number out, the run's end."""

import pytest

from tinyvmm import layout
from tinyvmm.bus import Bus
from tinyvmm.devices.debug_exit import DebugExit


@pytest.mark.parametrize(("size", "value"), [(1, 0x2A), (2, 0x1234), (4, 0xDEAD_BEEF)])
def test_the_value_written_is_handed_over_in_every_width(size: int, value: int) -> None:
    values: list[int] = []
    bus = Bus("port")
    bus.add(layout.DEBUG_EXIT_PORT, 4, DebugExit(values.append))
    bus.write(0xF4, size, value)
    assert values == [value]


def test_reading_ends_nothing() -> None:
    values: list[int] = []
    assert DebugExit(values.append).read(0, 4) == 0
    assert values == []
