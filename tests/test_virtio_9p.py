"""The 9P device carries requests to a session and its replies back, and knows nothing of them."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import Driver
from tinyvmm.devices.virtio import p9
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.errors import ConfigError

HEADERS = Path("/usr/include/linux")


class Stateless:
    """What a handler that is never saved has to have."""

    def save(self) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class Session(Stateless):
    """Answers with the request backwards, as far as there is room."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    def submit(self, request: list[memoryview], reply: list[memoryview]) -> int:
        data = b"".join(request)
        self.requests.append(data)
        rest = data[::-1]
        for buffer in reply:
            part, rest = rest[: len(buffer)], rest[len(buffer) :]
            buffer[: len(part)] = part
        return len(data) - len(rest)

    def close(self) -> None:
        self.requests.clear()


def test_the_tag_is_in_the_configuration_space() -> None:
    driver = Driver(Virtio9P("röot", Session()))
    assert driver.offered() & 1 << 0
    tag = "röot".encode()
    assert driver.mmio.read(0x100, 2) == len(tag)
    got = bytes(driver.mmio.read(0x102 + index, 1) for index in range(len(tag)))
    assert got == tag


@pytest.mark.parametrize("tag", ["", "x" * 256])
def test_a_tag_that_cannot_be_mounted_is_the_users_mistake(tag: str) -> None:
    with pytest.raises(ConfigError, match="1 to 255 bytes"):
        Virtio9P(tag, Session())


@pytest.mark.skipif(not HEADERS.exists(), reason="the kernel's headers are not installed")
def test_numbers_are_those_of_the_kernels_headers() -> None:
    nine = re.search(r"VIRTIO_ID_9P\s+(\d+)", (HEADERS / "virtio_ids.h").read_text())
    tag = re.search(r"VIRTIO_9P_MOUNT_TAG (\d+)", (HEADERS / "virtio_9p.h").read_text())
    assert nine is not None
    assert tag is not None
    assert int(nine[1]) == p9.VIRTIO_ID_9P == Driver(Virtio9P("t", Session())).read(0x008)
    assert 1 << int(tag[1]) == p9.VIRTIO_9P_MOUNT_TAG


@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4),
            st.lists(st.integers(1, 60), min_size=1, max_size=4),
        ),
        max_size=8,
    ),
    indirect=st.booleans(),
)
@settings(deadline=None)
def test_each_request_is_answered_once_in_order_with_the_sessions_length(
    requests: list[tuple[list[bytes], list[int]]], indirect: bool
) -> None:
    session = Session()
    driver = Driver(Virtio9P("root", session))
    queue = driver.start()[0]
    for readable, writable in requests:
        queue.add(readable, writable, indirect=indirect)
    queue.kick()
    asked = [b"".join(readable) for readable, _ in requests]
    assert session.requests == asked
    rooms = [sum(writable) for _, writable in requests]
    assert queue.collect() == [data[::-1][:room] for data, room in zip(asked, rooms, strict=True)]
    assert driver.interrupted() == bool(requests)


def test_a_reply_is_written_into_the_drivers_own_pages() -> None:
    class Sized(Stateless):
        """Answers with seven bytes of Rflush."""

        def submit(self, request: list[memoryview], reply: list[memoryview]) -> int:
            (tag,) = struct.unpack_from("<H", request[0], 5)
            struct.pack_into("<IBH", reply[0], 0, 7, 109, tag)
            return 7

        def close(self) -> None:
            """It knows nothing."""

    queue = Driver(Virtio9P("root", Sized())).start()[0]
    token = queue.send([struct.pack("<IBHH", 9, 108, 1, 2)], [11, 4096])
    assert queue.used() == [(token, 7)]
    data = queue.filled(token, 7)
    assert struct.unpack("<IBH", data) == (7, 109, 1)
