"""The split queue against a driver of our own: what goes in comes out, and nothing breaks it."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import virtio_driver
from tests.virtio_driver import (
    EVENT_IDX,
    INDIRECT,
    INDIRECT_TABLE,
    NEEDS_RESET,
    NEXT,
    WRITE,
    Driver,
    Queue,
    Ram,
)
from tinyvmm.devices.virtio import queue as virtqueue
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.queue import INDIRECT_MAX, Virtqueue

HEADER = Path("/usr/include/linux/virtio_ring.h")
SIZE = 8
USED_BUFFER, CONFIGURATION_CHANGE = 1, 2


class Echo(VirtioDevice):
    """Gives every chain its readable bytes back, as far as there is room."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__("echo", 42, queue_sizes=(size,))
        self.seen: list[bytes] = []

    def handle(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            data = b"".join(chain.readable)
            self.seen.append(data)
            done = 0
            for buffer in chain.writable:
                part = data[done : done + len(buffer)]
                buffer[: len(part)] = part
                done += len(part)
            queue.push(chain, done)


class Reader(Echo):
    """Takes chains as many as there are at a time, and asks for a kick only after that."""

    def handle(self, queue: Virtqueue) -> None:
        while True:
            taken = []
            for _ in range(queue.waiting):
                chain = queue.pop()
                if chain is None:
                    return
                taken.append(chain)
                self.seen.append(b"".join(chain.readable))
            queue.push_read(taken)
            if queue.expect(1):
                return


def started(without: int = 0, size: int = SIZE, kind: type[Echo] = Echo) -> tuple[Driver, Queue]:
    driver = Driver(kind(size))
    return driver, driver.start(without=without)[0]


# --- what goes in comes out -----------------------------------------------------------------------

pieces = st.lists(st.binary(min_size=1, max_size=9), max_size=4)
rooms = st.lists(st.integers(1, 9), max_size=4)
chains = st.tuples(pieces, rooms, st.booleans()).filter(lambda c: bool(c[0] or c[1]))


@given(
    batches=st.lists(st.lists(chains, min_size=1, max_size=6), max_size=6),
    without=st.sampled_from((0, EVENT_IDX, INDIRECT, EVENT_IDX | INDIRECT)),
    start=st.sampled_from((0, 1, 32767, 65527, 65534, 65535)),
    size=st.sampled_from((8, 16, 64)),
)
@settings(deadline=None)
def test_any_buffers_in_any_layout_arrive_whole_and_once(
    batches: list[list[tuple[list[bytes], list[int], bool]]], without: int, start: int, size: int
) -> None:
    driver, queue = started(without, size)
    queue.jump(start)
    for batch in batches:
        expected = {}
        for readable, writable, indirect in batch:
            inside = indirect and not without & INDIRECT
            if (1 if inside else len(readable) + len(writable)) > len(queue.free):
                continue  # no room; a driver waits
            token = queue.add(readable, writable, indirect=inside)
            expected[token] = b"".join(readable)[: sum(writable)]
        queue.kick()
        assert driver.interrupted() == bool(expected)
        got = {token: queue.filled(token, length) for token, length in queue.used()}
        assert got == expected
    assert not driver.status & NEEDS_RESET


def test_both_indices_pass_through_zero_with_chains_in_flight() -> None:
    _, queue = started()
    mark = queue.ram.mark()
    for count in range(65536 + 2 * SIZE):
        queue.send([b"x"], [])
        if count % SIZE == SIZE - 1:
            for token, _ in queue.used():
                queue.filled(token, 0)
            queue.ram.rewind(mark)
    assert queue.avail_idx == 2 * SIZE


def test_descriptors_are_views_onto_ram_not_copies() -> None:
    driver, queue = started()
    token = queue.add([b"before"], [4])
    chain = driver.device.queues[0].pop()
    assert chain is not None
    chain.writable[0][:] = b"mine"
    assert queue.filled(token, 4) == b"mine"
    gpa = struct.unpack_from("<Q", queue.ram.view(queue.desc_gpa + 16 * token, 8))[0]
    queue.ram.view(gpa, 6)[:] = b"after!"
    assert bytes(chain.readable[0]) == b"after!"


def test_used_entries_carry_head_and_length_as_the_structure_says() -> None:
    driver, queue = started()
    token = queue.send([b"four"], [100])
    assert struct.unpack_from("<HHII", queue.ram.view(queue.used_gpa, 12)) == (0, 1, token, 4)
    assert driver.read(0x060) == USED_BUFFER


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_constants_are_those_of_the_kernels_header() -> None:
    text = HEADER.read_text()
    defined = dict(re.findall(r"^#define\s+((?:VRING|VIRTIO)_\w+)\s+(\d+)", text, re.MULTILINE))
    for name in ("DESC_F_NEXT", "DESC_F_WRITE", "DESC_F_INDIRECT", "AVAIL_F_NO_INTERRUPT"):
        assert getattr(virtqueue, f"VIRTQ_{name}") == int(defined[f"VRING_{name}"])
    for name in ("VIRTIO_RING_F_INDIRECT_DESC", "VIRTIO_RING_F_EVENT_IDX"):
        ours = getattr(virtqueue, name.replace("RING_F", "F_RING"))
        assert ours == 1 << int(defined[name])
    for name in ("NEXT", "WRITE"):
        assert getattr(virtio_driver, name) == int(defined[f"VRING_DESC_F_{name}"])
    assert int(defined["VRING_DESC_F_INDIRECT"]) == INDIRECT_TABLE


# --- being told, and not being told -----------------------------------------------------------


def test_a_driver_with_event_idx_need_not_kick_while_the_device_is_behind() -> None:
    driver, queue = started()
    device = driver.device.queues[0]
    for _ in range(4):
        queue.add([b"x"], [])
        queue.wants_kick()
    assert device.pop() is not None
    queue.add([b"x"], [])
    assert not queue.wants_kick()
    while device.pop() is not None:
        pass
    queue.add([b"x"], [])
    assert queue.wants_kick()


def test_a_driver_without_event_idx_is_interrupted_unless_its_flag_says_no() -> None:
    driver, queue = started(without=EVENT_IDX)
    queue.send([b"x"], [])
    assert driver.interrupted()
    queue.ram.put("<H", queue.avail_gpa, 1)
    queue.send([b"x"], [])
    assert not driver.interrupted()
    assert len(queue.used()) == 2


def test_a_driver_with_event_idx_is_interrupted_once_until_it_looks() -> None:
    driver, queue = started()
    queue.send([b"x"], [])
    assert driver.interrupted()
    queue.send([b"x"], [])
    assert not driver.interrupted()
    assert len(queue.used()) == 2
    queue.send([b"x"], [])
    assert driver.interrupted()


def test_a_queue_begins_by_asking_for_the_first_kick_whatever_was_in_its_ring() -> None:
    driver, queue = started()
    driver.write(0x030, 0)
    driver.write(0x044, 0)
    queue.ram.put("<H", queue.used_gpa + 4 + 8 * SIZE, 77)
    driver.write(0x044, 1)
    queue.send([b"x"], [])
    assert queue.kicks == 1


@given(
    counts=st.lists(st.integers(1, SIZE), max_size=8),
    looks=st.lists(st.booleans(), min_size=8, max_size=8),
    without=st.sampled_from((0, EVENT_IDX)),
    start=st.sampled_from((0, 65530)),
)
def test_chains_given_back_together_interrupt_at_most_once_and_whenever_one_of_them_would(
    counts: list[int], looks: list[bool], without: int, start: int
) -> None:
    driver, queue = started(without=without, kind=Reader)
    queue.jump(start)
    asked = True
    for count, look in zip(counts, looks, strict=False):
        rises = driver.line.rises
        while len(queue.free) < count:
            queue.used()
            queue.free = list(range(SIZE))
            asked = True
        for _ in range(count):
            queue.add([b"x"], [])
        queue.kick()
        assert driver.line.rises - rises == (asked or bool(without))
        driver.interrupted()
        asked = look
        if look:
            queue.used()


@pytest.mark.parametrize("start", [0, 65533])
def test_a_device_that_waits_for_several_chains_is_kicked_when_they_are_there(start: int) -> None:
    driver, queue = started()
    queue.jump(start)
    device = driver.device.queues[0]
    assert device.expect(3)
    for added in range(1, 4):
        queue.add([b"x"], [])
        assert device.waiting == added
        assert queue.wants_kick() == (added == 3)
    assert not device.expect(3)
    assert [device.pop() is not None for _ in range(3)] == [True] * 3
    device.unpop(2)
    assert device.waiting == 2


class Meanwhile:
    """A ring with another CPU in it: the driver acts before each of our loads and stores."""

    def __init__(self, ring: memoryview, act: Callable[[], None]) -> None:
        self._ring = ring
        self._act = act

    def __getitem__(self, index: int) -> int:
        self._act()
        return int(self._ring[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._act()
        self._ring[index] = value


@given(
    moves=st.lists(st.sampled_from(("add", "collect", "nothing")), min_size=30, max_size=300),
    event_idx=st.booleans(),
    start=st.sampled_from((0, 65533)),
    kind=st.sampled_from((Echo, Reader)),
)
@settings(deadline=None, max_examples=300)
def test_no_kick_and_no_interrupt_is_lost_whenever_the_driver_acts(
    moves: list[str], event_idx: bool, start: int, kind: type[Echo]
) -> None:
    driver, queue = started(without=0 if event_idx else EVENT_IDX, kind=kind)
    queue.jump(start)
    rest = iter(moves)
    kicked = False
    added = collected = 0

    def collect() -> None:
        nonlocal collected
        # As a driver does: ask for the next interrupt, and look again after asking.
        while found := queue.used():
            collected += len(found)
            for token, length in found:
                queue.filled(token, length)

    def act() -> None:
        nonlocal kicked, added
        move = next(rest, "nothing")
        if (move == "collect" or not queue.free) and driver.interrupted():
            collect()
        if move == "add" and queue.free:
            queue.add([b"data"], [])
            added += 1
            kicked |= queue.wants_kick()

    device: Any = driver.device.queues[0]
    for ring in ("_avail", "_used", "_used_ring"):
        setattr(device, ring, Meanwhile(getattr(device, ring), act))
    for _ in moves:
        act()
        if kicked:
            kicked = False
            driver.write(0x050, 0)
    while kicked:
        kicked = False
        driver.write(0x050, 0)
    assert isinstance(driver.device, Echo)
    assert driver.device.seen == [b"data"] * added
    if driver.interrupted():
        collect()
    assert collected == added


# --- rules broken -----------------------------------------------------------------------------

RAM = Ram().base
FAR = RAM + (1 << 20)
GOOD = RAM + 0x8_0000  # the tests put a table here in which every descriptor is a whole chain


def table(*descriptors: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors)


BROKEN: dict[str, list[tuple[int, int, int, int]]] = {
    "a loop": [(RAM, 1, NEXT, 1), (RAM, 1, NEXT, 0)],
    "a descriptor that follows itself": [(RAM, 1, NEXT, 0)],
    "a next beyond the table": [(RAM, 1, NEXT, SIZE)],
    "an address below RAM": [(RAM - 1, 2, 0, 0)],
    "an address beyond RAM": [(FAR, 1, 0, 0)],
    "a length over the end of RAM": [(FAR - 4, 5, 0, 0)],
    "a range that wraps around": [((1 << 64) - 1, 2, 0, 0)],
    "the greatest address and length": [((1 << 64) - 1, (1 << 32) - 1, WRITE, 0)],
    "no bytes": [(RAM, 0, 0, 0)],
    "no bytes to write": [(RAM, 1, NEXT, 1), (RAM, 0, WRITE, 0)],
    "readable after writable": [(RAM, 1, NEXT | WRITE, 1), (RAM, 1, 0, 0)],
    "an empty indirect table": [(GOOD, 0, INDIRECT_TABLE, 0)],
    "an indirect table with half a descriptor": [(GOOD, 24, INDIRECT_TABLE, 0)],
    "an indirect table outside RAM": [(FAR, 16, INDIRECT_TABLE, 0)],
    "an indirect table too large": [(GOOD, 16 * (INDIRECT_MAX + 1), INDIRECT_TABLE, 0)],
    "indirect and next": [(GOOD, 16, INDIRECT_TABLE | NEXT, 1), (RAM, 1, 0, 0)],
}

BROKEN_TABLES: dict[str, bytes] = {
    "a table in a table": table((GOOD + 16, 16, INDIRECT_TABLE, 0), (RAM, 1, 0, 0)),
    "a loop": table((RAM, 1, NEXT, 1), (RAM, 1, NEXT, 0)),
    "a next beyond the table": table((RAM, 1, NEXT, 1)),
    "no bytes": table((RAM, 0, 0, 0)),
    "readable after writable": table((RAM, 1, NEXT | WRITE, 1), (RAM, 1, 0, 0)),
    "an address beyond RAM": table((FAR, 1, 0, 0)),
}


def assert_stopped_until_reset(driver: Driver, queue: Queue) -> None:
    """The device asked for a reset, said so, does nothing more, and is well after the reset."""
    assert driver.status & NEEDS_RESET
    assert driver.read(0x060) == CONFIGURATION_CHANGE
    used_idx = queue.ram.u16(queue.used_gpa + 2)
    queue.write_descriptor(7, RAM, 1)
    queue.publish(7)
    driver.write(0x050, 0)
    assert queue.ram.u16(queue.used_gpa + 2) == used_idx
    driver.write(0x070, 0)
    assert driver.status == 0
    assert not driver.line.level
    again = driver.start()[0]
    token = again.send([b"well"], [4])
    assert again.filled(*again.used()[0]) == b"well"
    assert token not in again.in_flight


@pytest.mark.parametrize("descriptors", BROKEN.values(), ids=BROKEN)
def test_a_chain_that_breaks_a_rule_stops_the_device_until_reset(
    descriptors: list[tuple[int, int, int, int]],
) -> None:
    driver, queue = started()
    good = table((RAM, 1, 0, 0)) * (INDIRECT_MAX + 1)
    queue.ram.view(GOOD, len(good))[:] = good
    for index, descriptor in enumerate(descriptors):
        queue.write_descriptor(index, *descriptor)
    queue.publish(0)
    driver.write(0x050, 0)
    assert_stopped_until_reset(driver, queue)


@pytest.mark.parametrize("content", BROKEN_TABLES.values(), ids=BROKEN_TABLES)
def test_an_indirect_table_that_breaks_a_rule_stops_the_device_until_reset(content: bytes) -> None:
    driver, queue = started()
    queue.ram.view(GOOD, len(content))[:] = content
    queue.write_descriptor(0, GOOD, len(content), INDIRECT_TABLE)
    queue.publish(0)
    driver.write(0x050, 0)
    assert_stopped_until_reset(driver, queue)


def test_an_indirect_table_that_was_not_negotiated_stops_the_device() -> None:
    driver, queue = started(without=INDIRECT)
    queue.add([b"one", b"two"], [], indirect=True)
    driver.write(0x050, 0)
    assert_stopped_until_reset(driver, queue)


@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 0xFFFF])
def test_a_head_beyond_the_table_stops_the_device(head: int) -> None:
    driver, queue = started()
    queue.publish(head)
    driver.write(0x050, 0)
    assert_stopped_until_reset(driver, queue)


@pytest.mark.parametrize("jump", [SIZE + 1, 0x8000, 0xFFFF])
def test_an_available_idx_further_than_the_ring_is_long_stops_the_device(jump: int) -> None:
    driver, queue = started()
    for index in range(SIZE):
        queue.write_descriptor(index, RAM, 1)
    queue.ram.put("<H", queue.avail_gpa + 2, jump)
    driver.write(0x050, 0)
    assert_stopped_until_reset(driver, queue)


def test_a_loop_is_followed_no_further_than_the_table_is_long() -> None:
    driver, queue = started()
    device: Any = driver.device.queues[0]
    visits = []

    def visit(gpa: int, length: int) -> memoryview:
        visits.append(gpa)
        return driver.ram.view(gpa, length)

    device._view = visit
    for index in range(SIZE):
        queue.write_descriptor(index, RAM + index, 1, NEXT, (index + 1) % SIZE)
    queue.publish(0)
    driver.write(0x050, 0)
    assert visits == [RAM + index for index in range(SIZE)]
    assert_stopped_until_reset(driver, queue)


def test_a_chain_may_use_every_descriptor_of_its_table() -> None:
    _, queue = started()
    queue.send([b"abcd"] * 4, [4] * 4)
    assert queue.collect() == [b"abcd" * 4]


def test_an_indirect_chain_may_be_longer_than_the_queue_and_marked_writable() -> None:
    driver, queue = started()
    token = queue.add([b"x"] * 100, [50] * 3, indirect=True)
    gpa, length, flags, _ = struct.unpack("<QIHH", queue.ram.view(queue.desc_gpa + 16 * token, 16))
    queue.write_descriptor(token, gpa, length, flags | WRITE)
    queue.kick()
    assert queue.collect() == [b"x" * 100]
    assert not driver.status & NEEDS_RESET


def test_an_indirect_table_may_end_a_direct_chain() -> None:
    _, queue = started()
    ram = queue.ram
    first, room = ram.alloc(4), ram.alloc(8)
    ram.view(first, 4)[:] = b"head"
    inner = ram.alloc(32)
    ram.view(inner, 32)[:] = table((first, 4, NEXT, 1), (room, 8, WRITE, 0))
    queue.write_descriptor(3, first, 4, NEXT, 5)
    queue.write_descriptor(5, inner, 32, INDIRECT_TABLE)
    queue.publish(3)
    queue.kick()
    assert queue.used() == [(3, 8)]
    assert bytes(ram.view(room, 8)) == b"headhead"


# --- hostile rings ----------------------------------------------------------------------------

addresses = st.one_of(
    st.integers(RAM, RAM + 64),
    st.integers(FAR - 64, FAR + 64),
    st.sampled_from((FAR - 64, FAR - 32)),  # where the test puts an indirect table
    st.sampled_from((0, RAM - 1, (1 << 32) - 1, (1 << 63), (1 << 64) - 1)),
)
lengths = st.one_of(
    st.sampled_from((0, 1, 16, 32, 48, 64, 17, 0xFFFF_FFFF, 0x8000_0000)), st.integers(0, 200)
)
descriptor = st.tuples(addresses, lengths, st.integers(0, 7), st.integers(0, SIZE))


def walk(
    queue: Queue, head: int, indirect_allowed: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]] | None:
    """Read a chain as section 2.7.5 says, slowly; None if it breaks a rule."""

    def in_ram(gpa: int, length: int) -> bool:
        return length > 0 and gpa >= RAM and gpa + length <= FAR

    def descriptors(gpa: int, count: int, index: int) -> list[tuple[int, int, int]] | None:
        found, seen = [], set()
        while True:
            if index >= count or index in seen:
                return None
            seen.add(index)
            entry = struct.unpack("<QIHH", queue.ram.view(gpa + 16 * index, 16))
            found.append(entry[:3])
            if entry[2] & NEXT:
                if entry[2] & INDIRECT_TABLE:
                    return None
                index = entry[3]
            else:
                return found

    chain = descriptors(queue.desc_gpa, SIZE, head)
    if chain is None:
        return None
    if chain[-1][2] & INDIRECT_TABLE:
        gpa, length, _ = chain.pop()
        if not indirect_allowed or length % 16 or not in_ram(gpa, length):
            return None
        inner = descriptors(gpa, length // 16, 0)
        if inner is None:
            return None
        chain += inner
    writing = False
    for gpa, length, flags in chain:
        if flags & INDIRECT_TABLE or not in_ram(gpa, length) or (writing and not flags & WRITE):
            return None
        writing = bool(flags & WRITE)
    return (
        [(gpa, length) for gpa, length, flags in chain if not flags & WRITE],
        [(gpa, length) for gpa, length, flags in chain if flags & WRITE],
    )


@given(
    descriptors=st.lists(descriptor, min_size=SIZE, max_size=SIZE),
    inner=st.lists(descriptor, max_size=4),
    head=st.integers(0, SIZE),
    without=st.sampled_from((0, INDIRECT)),
)
@settings(deadline=None, max_examples=400)
def test_a_random_table_is_taken_exactly_when_the_rules_allow_it(
    descriptors: list[tuple[int, int, int, int]],
    inner: list[tuple[int, int, int, int]],
    head: int,
    without: int,
) -> None:
    driver, queue = started(without)
    ram = queue.ram
    ram.view(FAR - 64, 16 * len(inner))[:] = table(*inner)
    for index, entry in enumerate(descriptors):
        queue.write_descriptor(index, *entry)
    queue.publish(head)
    expected = walk(queue, head, not without & INDIRECT)
    chain = driver.device.queues[0].pop()
    assert bool(driver.status & NEEDS_RESET) == (expected is None)
    if expected is None:
        assert chain is None
    else:
        assert chain is not None
        base = [bytes(ram.view(gpa, length)) for gpa, length in expected[0]]
        assert [bytes(view) for view in chain.readable] == base
        assert [len(view) for view in chain.writable] == [length for _, length in expected[1]]


@given(
    rings=st.binary(min_size=400, max_size=400),
    scribbles=st.lists(st.tuples(st.integers(0, 399), st.binary(max_size=8)), max_size=12),
)
@settings(deadline=None)
def test_random_bytes_in_the_rings_stop_at_most_the_device(
    rings: bytes, scribbles: list[tuple[int, bytes]]
) -> None:
    driver, queue = started()
    area = queue.ram.view(queue.desc_gpa, 400)
    area[:] = rings
    for offset, data in scribbles:
        driver.write(0x050, 0)
        area[offset : offset + len(data)] = data[: 400 - offset]
    driver.write(0x050, 0)
    assert isinstance(driver.device, Echo)
    assert len(driver.device.seen) <= SIZE * (len(scribbles) + 1)


# --- starting a queue -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, SIZE * 2, 0xFFFF_FFFF])
def test_a_size_that_is_no_power_of_two_up_to_the_greatest_is_refused(size: int) -> None:
    driver = Driver(Echo())
    assert driver.negotiate(driver.offered())
    driver.write(0x030, 0)
    driver.write(0x038, size)
    for offset in (0x080, 0x090, 0x0A0):
        driver.write(offset, RAM)
    driver.write(0x044, 1)
    assert driver.read(0x044) == 0
    assert driver.status & NEEDS_RESET
    assert not driver.line.level  # the driver is not yet ready to be told: 2.1.2


@pytest.mark.parametrize(
    ("offset", "gpa"),
    [
        (0x080, RAM + 8),
        (0x090, RAM + 1),
        (0x0A0, RAM + 2),
        (0x080, FAR - 16),
        (0x090, FAR),
        (0x0A0, FAR - 8),
        (0x0A0, 0),
    ],
)
def test_rings_out_of_ram_or_out_of_line_are_refused(offset: int, gpa: int) -> None:
    driver = Driver(Echo())
    assert driver.negotiate(driver.offered())
    for each in (0x080, 0x090, 0x0A0):
        driver.write(each, RAM)
    driver.write(offset, gpa)
    driver.write(0x044, 1)
    assert driver.read(0x044) == 0
    assert driver.status & NEEDS_RESET


@given(
    sent=st.integers(0, 3),
    start=st.sampled_from((0, 65533)),
    without=st.sampled_from((0, EVENT_IDX)),
)
@settings(deadline=None)
def test_a_queue_saved_and_loaded_goes_on_where_it_was(sent: int, start: int, without: int) -> None:
    driver, queue = started(without)
    queue.jump(start)
    for _ in range(sent):
        queue.send([b"old"], [3])
    queue.add([b"between"], [7])
    state: dict[str, Any] = driver.mmio.save()
    driver.device.reset()
    driver.mmio.load(state)
    assert driver.mmio.save() == state
    driver.write(0x050, 0)
    assert queue.collect() == [b"old"] * sent + [b"between"]
