"""The entropy device, without a guest."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import NEEDS_RESET, Driver
from tinyvmm.devices.virtio.rng import FILL_MAX, VirtioRng

VIRTIO_ID_RNG = 4  # <linux/virtio_ids.h>


def test_it_says_it_is_an_entropy_device_with_one_queue_and_no_configuration() -> None:
    driver = Driver(VirtioRng())
    assert driver.read(0x008) == VIRTIO_ID_RNG
    assert len(driver.start()) == 1
    assert driver.read(0x100) == 0


@given(chains=st.lists(st.lists(st.integers(1, 3000), min_size=1, max_size=3), max_size=8))
@settings(deadline=None)
def test_each_chain_is_filled_from_its_start_and_the_length_says_how_far(
    chains: list[list[int]],
) -> None:
    driver = Driver(VirtioRng())
    queue = driver.start()[0]
    for rooms in chains:
        queue.send([], rooms, indirect=True)
    lengths = [length for _, length in queue.used()]
    assert lengths == [min(sum(rooms), FILL_MAX) for rooms in chains]
    assert not driver.status & NEEDS_RESET


def test_the_bytes_are_the_hosts_in_order_over_all_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    given_out = bytearray()

    def urandom(count: int) -> bytes:
        data = bytes((len(given_out) + at) % 251 for at in range(count))
        given_out.extend(data)
        return data

    monkeypatch.setattr(os, "urandom", urandom)
    queue = Driver(VirtioRng()).start()[0]
    queue.send([], [10, 1, 300])
    assert queue.collect() == [bytes(given_out)]
    assert len(given_out) == 311


def test_two_requests_get_different_bytes() -> None:
    queue = Driver(VirtioRng()).start()[0]
    queue.send([], [32])
    queue.send([], [32])
    first, second = queue.collect()
    assert first != second


def test_what_it_is_given_to_read_it_ignores() -> None:
    driver = Driver(VirtioRng())
    queue = driver.start()[0]
    token = queue.send([b"seed"], [])
    assert queue.used() == [(token, 0)]
    assert not driver.status & NEEDS_RESET
