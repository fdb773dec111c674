"""The bus: who answers, and what happens where nobody does."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvmm import trace
from tinyvmm.bus import Bus
from tinyvmm.errors import ConfigError


class Recorder:
    """A device that remembers what it was asked and answers more bits than it should."""

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.seen: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("read", offset, size))
        return -1

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, value))


def test_a_device_sees_offsets_and_its_answer_is_cut_to_the_width() -> None:
    bus, device = Bus("port"), Recorder()
    bus.add(0x3F8, 8, device)
    assert bus.read(0x3FA, 2) == 0xFFFF
    bus.write(0x3FF, 1, 7)
    assert device.seen == [("read", 2, 2), ("write", 7, 7)]


def test_nobody_reads_as_all_ones_and_swallows_writes() -> None:
    bus, device = Bus("mmio"), Recorder()
    bus.add(0x1000, 0x10, device)
    for size in range(1, 9):
        assert bus.read(0x2000, size) == (1 << 8 * size) - 1
        bus.write(0x2000, size, 0)
    assert bus.read(0x100F, 2) == 0xFFFF  # straddles the end: nobody's
    assert bus.read(0x1000, 3) == 0xFFFFFF  # no such width on a bus
    assert device.seen == []


def test_overlapping_ranges_are_refused_by_name() -> None:
    bus = Bus("port")
    bus.add(0x60, 5, Recorder("i8042"))
    with pytest.raises(ConfigError, match="second at port 0x64 overlaps i8042 at 0x60"):
        bus.add(0x64, 1, Recorder("second"))
    bus.add(0x65, 1, Recorder("third"))


@given(
    ranges=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 9000)), max_size=8),
    address=st.integers(0, 1 << 16),
    size=st.sampled_from([1, 2, 4, 8]),
)
def test_look_up_agrees_with_a_linear_search(
    ranges: list[tuple[int, int]], address: int, size: int
) -> None:
    bus, model = Bus("mmio"), []
    for base, length in ranges:
        device = Recorder(str(base))
        try:
            bus.add(base, length, device)
        except ConfigError:
            continue
        model.append((base, length, device))
    expected = [
        (device, address - base)
        for base, length, device in model
        if base <= address and address + size <= base + length
    ]
    found = bus.find(address, size)
    assert [found] == expected if expected else found is None


def test_the_trace_hook_sees_accesses_and_who_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[trace.Record] = []
    monkeypatch.setattr(trace, "hook", seen.append)
    bus = Bus("port")
    bus.add(0xF4, 4, Recorder())
    bus.write(0xF4, 1, 0x2A)
    bus.read(0x80, 1)
    assert [trace.text(record) for record in seen] == [
        "port 0x00f4 <- 0x2a",
        "port 0x0080 -> 0xff (nobody's)",
    ]


def test_a_range_that_moves_about_leaves_nothing_behind() -> None:
    bus, device = Bus("mmio"), Recorder()
    tracemalloc.start()
    try:
        for place in range(1000):
            bus.add(place << 15, 1 << 15, device)
            bus.remove(device)
        assert tracemalloc.get_traced_memory()[0] < 64 << 10
    finally:
        tracemalloc.stop()
    assert bus.find(0, 4) is None
