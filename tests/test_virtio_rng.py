"""The entropy device fills what it is given with bytes of the host's."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import NEEDS_RESET, Driver
from tinyvmm.devices.virtio.rng import FILL_MAX, VirtioRng


def test_it_is_an_entropy_device_with_one_queue_and_no_configuration() -> None:
    driver = Driver(VirtioRng())
    assert driver.read(0x008) == 4
    assert driver.mmio.read(0x100, 8) == 0
    assert len(driver.start()) == 1


@given(rooms=st.lists(st.integers(1, 6000), min_size=1, max_size=5), indirect=st.booleans())
@settings(deadline=None)
def test_it_fills_all_of_a_chain_up_to_its_limit(rooms: list[int], indirect: bool) -> None:
    queue = Driver(VirtioRng()).start()[0]
    queue.send([], rooms, indirect=indirect)
    (data,) = queue.collect()
    assert len(data) == min(sum(rooms), FILL_MAX)


def test_the_bytes_are_the_hosts_in_order_and_no_others_are_touched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.urandom", lambda length: bytes([length]) * length)
    queue = Driver(VirtioRng()).start()[0]
    token = queue.send([b"question"], [3, 5])
    assert queue.used() == [(token, 8)]
    assert queue.filled(token, 8) == b"\3\3\3\5\5\5\5\5"


def test_two_answers_differ_and_every_value_occurs() -> None:
    queue = Driver(VirtioRng()).start()[0]
    queue.send([], [4096])
    queue.send([], [4096])
    first, second = queue.collect()
    assert first != second
    assert len(Counter(first + second)) == 256  # fails once in 10^11


def test_a_request_larger_than_ram_can_hold_costs_no_more_than_a_small_one() -> None:
    driver = Driver(VirtioRng())
    queue = driver.start()[0]
    table = driver.ram.alloc(16 * 1024)
    for index in range(1024):
        more = index < 1023
        driver.ram.put(
            "<QIHH", table + 16 * index, driver.ram.base + 0x8_0000, 0x8_0000, 2 | more, index + 1
        )
    queue.write_descriptor(0, table, 16 * 1024, 4)
    queue.publish(0)
    queue.kick()
    assert queue.used() == [(0, FILL_MAX)]


def test_a_chain_without_room_is_given_back_empty() -> None:
    driver = Driver(VirtioRng())
    queue = driver.start()[0]
    token = queue.send([b"no room"], [])
    assert queue.used() == [(token, 0)]
    assert not driver.status & NEEDS_RESET
