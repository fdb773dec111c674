"""The 9P transport device, against handlers of our own and a real session; no guest."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import NEEDS_RESET, Driver
from tinyvmm import ninep
from tinyvmm.devices.virtio.p9 import VIRTIO_9P_MOUNT_TAG, Virtio9P
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Session

HEADERS = Path("/usr/include/linux")


class Recorder:
    """Takes every request, and answers with the bytes it was told to."""

    def __init__(self, answer: bytes = b"") -> None:
        self.answer = answer
        self.requests: list[bytes] = []

    def handle(self, request: list[memoryview], reply: list[memoryview]) -> int:
        self.requests.append(b"".join(request))
        rest = self.answer
        for room in reply:
            part = rest[: len(room)]
            room[: len(part)] = part
            rest = rest[len(part) :]
        return len(self.answer) - len(rest)


def configuration(driver: Driver, length: int) -> bytes:
    return bytes(driver.mmio.read(0x100 + at, 1) for at in range(length))


def test_id_and_feature_are_those_of_the_headers() -> None:
    ids = re.search(r"VIRTIO_ID_9P\s+(\d+)", (HEADERS / "virtio_ids.h").read_text())
    bit = re.search(r"VIRTIO_9P_MOUNT_TAG\s+(\d+)", (HEADERS / "virtio_9p.h").read_text())
    assert ids is not None
    assert bit is not None
    driver = Driver(Virtio9P("root", Recorder()))
    assert driver.read(0x008) == int(ids[1])
    assert 1 << int(bit[1]) == VIRTIO_9P_MOUNT_TAG
    assert driver.offered() & VIRTIO_9P_MOUNT_TAG


@given(tag=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
def test_the_tag_is_counted_in_bytes_and_zeros_follow_it(tag: str) -> None:
    name = tag.encode()
    driver = Driver(Virtio9P(tag, Recorder()))
    expected = len(name).to_bytes(2, "little") + name + bytes(4)
    assert configuration(driver, len(name) + 6) == expected


@pytest.mark.parametrize("tag", ["", "x" * 256, "é" * 128])
def test_a_tag_of_no_or_too_many_bytes_is_the_users_mistake(tag: str) -> None:
    with pytest.raises(ConfigError, match="mount tag"):
        Virtio9P(tag, Recorder())


@given(
    request=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5),
    rooms=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    answer=st.binary(max_size=150),
    indirect=st.booleans(),
)
@settings(deadline=None)
def test_request_and_reply_pass_whole_however_they_are_cut(
    request: list[bytes], rooms: list[int], answer: bytes, indirect: bool
) -> None:
    handler = Recorder(answer)
    queue = Driver(Virtio9P("root", handler)).start()[0]
    token = queue.send(request, rooms, indirect=indirect)
    fits = answer[: sum(rooms)]
    assert queue.used() == [(token, len(fits))]
    assert queue.filled(token, len(fits)) == fits
    assert handler.requests == [b"".join(request)]


def test_requests_are_answered_in_order_and_all_with_one_notification() -> None:
    handler = Recorder(b"reply")
    queue = Driver(Virtio9P("root", handler)).start()[0]
    tokens = [queue.add([bytes([number])], [9]) for number in range(50)]
    queue.kick()
    assert handler.requests == [bytes([number]) for number in range(50)]
    assert queue.used() == [(token, 5) for token in tokens]
    assert queue.kicks == 1


def test_a_reset_forgets_the_queue_and_the_next_driver_is_served() -> None:
    handler = Recorder(b"reply")
    driver = Driver(Virtio9P("root", handler))
    old = driver.start()[0]
    old.add([b"never notified"], [9])
    driver.write(0x070, 0)
    driver.write(0x050, 0)
    assert handler.requests == []
    new = driver.start()[0]
    new.send([b"again"], [9])
    assert handler.requests == [b"again"]


# --- with a real session --------------------------------------------------------------------------


def test_used_length_is_the_size_field_of_every_reply(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some text\n")
    tree = HostTree(str(tmp_path))
    session = Session(tree)
    queue = Driver(Virtio9P("root", session)).start()[0]
    conversation: list[tuple[ninep.Message, type[ninep.Message]]] = [
        (ninep.Tversion(8192, b"9P2000.L"), ninep.Rversion),
        (ninep.Tattach(0, ninep.NOFID, b"", b"", 0), ninep.Rattach),
        (ninep.Twalk(0, 1, (b"file",)), ninep.Rwalk),
        (ninep.Tgetattr(1, ninep.P9_GETATTR_BASIC), ninep.Rgetattr),
        (ninep.Tlopen(1, os.O_RDONLY), ninep.Rlopen),
        (ninep.Tread(1, 0, 4096), ninep.Rread),
        (ninep.Twalk(0, 2, (b"nowhere",)), ninep.Rlerror),
        (ninep.Tclunk(1), ninep.Rclunk),
    ]
    for tag, (message, answer) in enumerate(conversation):
        token = queue.send([ninep.encode(message, tag)], [7, 5, 8000], indirect=True)
        ((used, length),) = queue.used()
        data = queue.filled(used, length)
        assert used == token
        assert int.from_bytes(data[:4], "little") == length
        back, reply = ninep.decode(data)
        assert (back, type(reply)) == (tag, answer)
    session.close()
    tree.close()


@given(
    request=st.lists(st.binary(min_size=1, max_size=64), max_size=3),
    rooms=st.lists(st.integers(1, 64), max_size=3),
)
@settings(deadline=None)
def test_whatever_a_guest_sends_is_answered_within_its_room(
    tmp_path_factory: pytest.TempPathFactory, request: list[bytes], rooms: list[int]
) -> None:
    if not request and not rooms:
        return
    tree = HostTree(str(tmp_path_factory.getbasetemp()))
    session = Session(tree)
    driver = Driver(Virtio9P("root", session))
    queue = driver.start()[0]
    token = queue.send(request, rooms)
    ((used, length),) = queue.used()
    assert used == token
    data = queue.filled(used, length)
    if data:
        assert isinstance(ninep.decode(data)[1], ninep.Rlerror | ninep.Rversion)
    assert not driver.status & NEEDS_RESET
    session.close()
    tree.close()
