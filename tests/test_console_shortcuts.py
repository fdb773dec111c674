"""What a console's port does for several buffers at once is what it would do for one by one."""

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_virtio_console import Guest, Place
from tests.virtio_driver import NEEDS_RESET, NEXT, WRITE, Queue, Ram
from tinyvmm.devices.virtio.queue import Chain, Virtqueue

RAM_LEN = 1 << 20
PORT_QUEUE_SIZE = 32

# Of one descriptor: where (of 8 places, overlapping, one past RAM), length, flags.
descriptors = st.tuples(
    st.sampled_from((0, 0x100, 0x1000, 0x1FF0, 0x3000, 0x4000, 0x6000, RAM_LEN)),
    st.sampled_from((0, 1, 2, 10, 4096, 5000, RAM_LEN)),
    st.one_of(st.sampled_from((0, WRITE)), st.integers(0, 7)),
)
tables = st.lists(descriptors, min_size=1, max_size=PORT_QUEUE_SIZE)
heads = st.lists(st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)), max_size=PORT_QUEUE_SIZE)
ahead = st.one_of(st.just(0), st.just(0), st.integers(-40, 40))


def fill_ring(
    queue: Queue, ram: Ram, table: list[tuple[int, int, int]], chosen: list[int], more: int
) -> None:
    """Write descriptors and make heads available, as a driver that may mean ill."""
    base = ram.base + RAM_LEN // 2
    for index, (place, length, flags) in enumerate(table):
        following = index + 1 if flags & NEXT else 0
        queue.write_descriptor(index, base + place, length, flags, following)
    for head in chosen:
        queue.publish(head)
    ram.put("<H", queue.avail_gpa + 2, (queue.avail_idx + more) % 65536)


def nothing_filled(queue: Virtqueue, data: memoryview) -> int:
    """Virtqueue.fill that leaves all to `pop` and `push`."""
    del queue, data
    return 0


def nothing_gathered(queue: Virtqueue, most: int, longest: int) -> list[Chain]:
    """Virtqueue.gather that leaves all to `pop`."""
    del queue, most, longest
    return []


@settings(deadline=None, max_examples=150)
@given(tables, heads, ahead, st.sampled_from((1, 9, 4096, 30_000)))
def test_input_fills_buffers_as_one_by_one(
    table: list[tuple[int, int, int]], chosen: list[int], more: int, length: int
) -> None:
    def play() -> tuple[bytes, int, int]:
        guest = Guest("in", ram=Ram(RAM_LEN))
        guest.plug()
        ram = guest.driver.ram
        fill_ring(guest.receiveq(1), ram, table, chosen, more)
        data = bytes(range(251)) * (length // 251 + 1)
        taken = guest.ports[0].put_input(data[:length])
        return bytes(ram.data), taken, guest.driver.status

    at_once = play()
    with patch.object(Virtqueue, "fill", nothing_filled):
        assert play() == at_once


@settings(deadline=None, max_examples=150)
@given(tables, heads, ahead, st.sampled_from((1 << 30, 5000, 100, 0)))
def test_output_is_passed_on_as_one_by_one(
    table: list[tuple[int, int, int]], chosen: list[int], more: int, room: int
) -> None:
    def play() -> tuple[bytes, bytes, int]:
        guest = Guest("out", ram=Ram(RAM_LEN))
        guest.plug()
        place = Place(room)
        guest.ports[0].pass_to(place.send)
        queue = guest.transmitq(1)
        fill_ring(queue, guest.driver.ram, table, chosen, more)
        got = b""
        guest.device.notify(queue.index)
        while data := guest.ports[0].take_output():
            got += data
        used = bytes(guest.driver.ram.view(queue.used_gpa, 4 + 8 * queue.size))
        return bytes(place.got) + got, used, guest.driver.status

    at_once = play()
    with patch.object(Virtqueue, "gather", nothing_gathered):
        singly = play()
    if at_once[2] & NEEDS_RESET:  # of what came before the mistake some may have gone
        short, long = sorted((at_once[0], singly[0]), key=len)
        assert long.startswith(short)
        assert singly[2] == at_once[2]
    else:
        assert singly == at_once
