"""What a guest of the worst kind does to every device there is, and none of them minds.

tests/bad_guests.py lists the devices. Whatever is done here, nothing is raised, memory stays
bounded, the VMM answers, and after a reset the device serves a good driver.

BAD_GUESTS=N plays N times as many games; `make bad-guests` does.
"""

import gc
import itertools
import os
import random
import struct
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bad_guests import ON_THE_BUS, TRANSPORTS, VIRTIO, Board, Made
from tests.virtio_driver import INDIRECT_TABLE, NEEDS_RESET, NEXT, WRITE, Queue
from tinyvmm import layout, ninep
from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.virtio.balloon import VirtioBalloon
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

Access = tuple[bool, int, int, int]  # whether to write; offset, width, value
Descriptor = tuple[int, int, int, int]

MEMORY_MAX = 1 << 20  # bytes that no request makes a device take at once: as much as there is RAM
LEAK_MAX = 16 << 10
MORE = int(os.environ.get("BAD_GUESTS", "1"))
FIGHT_ROUNDS = 600 * MORE
FIGHT_ENDS = 400.0 * MORE  # seconds: far more than it takes, to tell a deadlock

WIDTHS = (1, 2, 4, 8)
VALUES = (
    *(0, 1, 2, 3, 4, 7, 8, 0xF, 0x10, 0x7F, 0x80, 0xFE, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF),
    *(0x1000, 0x10_0000, 0x1F_FFFF, 0x20_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF),
    *(1 << 63, (1 << 64) - 0x1000, (1 << 64) - 1),
)


# Accesses of every width and alignment, most of them where registers usually are.
accesses = st.lists(
    st.tuples(
        st.booleans(),
        st.one_of(st.integers(0, 0x117), st.integers(0, (1 << 20) + 7)),
        st.sampled_from(WIDTHS),
        st.one_of(st.sampled_from(VALUES), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=60,
)


# --- registers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_THE_BUS)
@settings(deadline=None, max_examples=60 * MORE)
@given(script=accesses)
def test_registers_bear_every_access(name: str, script: list[Access]) -> None:
    device = ON_THE_BUS[name]()
    for write, offset, size, value in script:
        address = device.base + offset % (device.length + 7)  # also past the end
        if write:
            device.bus.write(address, size, value & (1 << 8 * size) - 1)
        else:
            assert 0 <= device.bus.read(address, size) < 1 << 8 * size
    assert device.works()


both = [(name, transport) for name in VIRTIO for transport in TRANSPORTS]
every_device = pytest.mark.parametrize(("name", "transport"), both)


@pytest.fixture
def made(name: str) -> Iterator[Made]:
    """A device with queues."""
    made = VIRTIO[name]()
    yield made
    made.end()


@every_device
@settings(deadline=None, max_examples=25 * MORE)
@given(started=st.booleans(), script=st.lists(accesses, min_size=3, max_size=3))
def test_a_transport_bears_every_access(
    name: str, transport: str, started: bool, script: list[list[Access]]
) -> None:
    made = VIRTIO[name]()
    try:
        board = TRANSPORTS[transport](made.device)
        if started:
            board.start()
        for (read, write, length), part in zip(board.ranges, script, strict=False):
            for writes, offset, size, value in part:
                place = offset % (length - size + 1)
                if writes:
                    write(place, size, value & (1 << 8 * size) - 1)
                else:
                    assert read(place, size) >= 0
        assert made.works(board.start())
    finally:
        made.end()


# --- queues -----------------------------------------------------------------------------------

BASE, END = 0x10_0000, 0x20_0000  # where Ram is
GPAS = (
    *(BASE, BASE + 1, BASE + 0x1000, BASE + 0x8000, END - 1, END - 0x1000, END, BASE - 1, 0),
    *((1 << 64) - 1, (1 << 64) - 0x1000, 1 << 63),
)
LENGTHS = (0, 1, 3, 8, 16, 17, 64, 4096, 16 * 1024, 16 * 1025, END - BASE, 0xFFFF_FFF0, 0xFFFF_FFFF)

# Beginnings of requests that some device knows, for a driver to put where its descriptors point.
REQUESTS = (
    *(struct.pack("<IIQ", kind, 0, sector) for kind in (0, 1, 4, 8, 11, 13) for sector in (0, 1)),
    ninep.encode(ninep.Tversion(8192, b"9P2000.L"), ninep.NOTAG),
    ninep.encode(ninep.Tattach(0, ninep.NOFID, b"", b"", 0), 1),
    ninep.encode(ninep.Twalk(0, 1, (b"..",)), 2),
    *(struct.pack("<IHH", port, event, 1) for port in (0, 1, 9) for event in (0, 3, 6)),
    struct.pack("<8I", *range(BASE >> 12, (BASE >> 12) + 8)),
    b"\xff" * 64,
)
REQUEST_GPA = BASE + 0x1000

descriptors = st.tuples(
    st.sampled_from(GPAS), st.sampled_from(LENGTHS), st.integers(0, 7), st.integers(0, 17)
)
steps = st.one_of(
    st.tuples(st.just("describe"), st.lists(descriptors, min_size=1, max_size=6)),
    st.tuples(st.just("indirect"), st.lists(descriptors, min_size=1, max_size=6)),
    st.tuples(st.just("request"), st.sampled_from(REQUESTS)),
    st.tuples(st.just("proper"), st.integers(0, 64)),
    st.tuples(st.just("publish"), st.integers(0, 18)),
    st.tuples(st.just("jump"), st.sampled_from((0, 1, 2, 16, 17, 255, 0x8000, 0xFFFF))),
    st.tuples(st.just("nowhere"), st.integers(0, 0x3FF)),
    st.tuples(st.just("reset"), st.sampled_from((0, 0, 0xF, 0x80, 0xFF))),
    st.tuples(st.just("restart"), st.sampled_from((1, 2, 16))),
)


class BadDriver:
    """Starts a device properly, and goes astray."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.table = board.ram.base + 0x8000  # one of GPAS, to be an indirect table
        self.queues = board.start()

    def describe(self, queue: Queue, chosen: list[Descriptor]) -> None:
        for place, descriptor in enumerate(chosen):
            queue.write_descriptor(place, *descriptor)

    def indirect(self, queue: Queue, chosen: list[Descriptor]) -> None:
        for place, descriptor in enumerate(chosen):
            self.board.ram.put("<QIHH", self.table + 16 * place, *descriptor)
        queue.write_descriptor(0, self.table, 16 * len(chosen), INDIRECT_TABLE)

    def request(self, queue: Queue, data: bytes) -> None:
        del queue
        self.board.ram.view(REQUEST_GPA, len(data))[:] = data

    def proper(self, queue: Queue, room: int) -> None:
        """A chain as it should be, of whatever request is there."""
        length = (16, 21, 8, 64)[room % 4]
        queue.write_descriptor(0, REQUEST_GPA, length, NEXT, 1 % queue.size)
        queue.write_descriptor(1 % queue.size, BASE + 0x8000, room + 1, WRITE)
        self.publish(queue, 0)

    def publish(self, queue: Queue, head: int) -> None:
        queue.publish(head)
        self.board.notify(queue.index)

    def jump(self, queue: Queue, idx: int) -> None:
        self.board.ram.put("<H", queue.avail_gpa + 2, idx)
        self.board.notify(queue.index)

    def nowhere(self, queue: Queue, index: int) -> None:
        del queue
        self.board.notify(index)

    def reset(self, queue: Queue, status: int) -> None:
        del queue
        self.board.set_status(status)

    def restart(self, queue: Queue, size: int) -> None:
        del queue
        self.queues = self.board.start(size)


@every_device
@settings(deadline=None, max_examples=60 * MORE)
@given(script=st.lists(st.tuples(st.integers(0, 5), steps), max_size=30))
def test_the_worst_driver_breaks_only_its_own_device(
    name: str, transport: str, script: list[tuple[int, tuple[str, Any]]]
) -> None:
    made = VIRTIO[name]()
    try:
        board = TRANSPORTS[transport](made.device)
        driver = BadDriver(board)
        for index, (what, value) in script:
            getattr(driver, what)(driver.queues[index % len(driver.queues)], value)
        assert made.works(board.start())
    finally:
        made.end()


BROKEN: dict[str, list[Descriptor]] = {
    "a loop": [(BASE, 1, NEXT, 1), (BASE, 1, NEXT, 0)],
    "a loop of one": [(BASE, 1, NEXT, 0)],
    "an end that wraps around": [((1 << 64) - 16, 32, 0, 0)],
    "an address that is no RAM": [(END, 16, 0, 0)],
    "a length that leaves RAM": [(BASE, END - BASE + 1, WRITE, 0)],
    "no bytes": [(BASE, 0, WRITE, 0)],
    "a link out of the table": [(BASE, 1, NEXT, 999)],
    "readable after writable": [(BASE, 1, WRITE | NEXT, 1), (BASE, 1, 0, 0)],
    "an indirect table that is no RAM": [(END, 16, INDIRECT_TABLE, 0)],
    "an indirect table of no length": [(BASE, 0, INDIRECT_TABLE, 0)],
    "an indirect table of half a descriptor": [(BASE, 24, INDIRECT_TABLE, 0)],
    "an indirect table larger than any may be": [(BASE, 16 * 1025, INDIRECT_TABLE, 0)],
    "an indirect table in an indirect table": [
        (BASE + 0x8000, 16, INDIRECT_TABLE, 0),
    ],
}


@pytest.mark.parametrize(("name", "transport"), [way for way in both if way[0] != "vhost vsock"])
@pytest.mark.parametrize("broken", BROKEN)
def test_what_breaks_the_queues_rules_makes_a_device_ask_for_a_reset(
    made: Made, transport: str, broken: str
) -> None:
    board = TRANSPORTS[transport](made.device)
    assert made.asked is not None
    queue = board.start()[made.asked]
    board.ram.put("<QIHH", BASE + 0x8000, BASE, 16, INDIRECT_TABLE, 0)
    for place, descriptor in enumerate(BROKEN[broken]):
        queue.write_descriptor(place, *descriptor)
    queue.publish(0)
    board.notify(queue.index)
    assert board.status & NEEDS_RESET
    queue.publish(0)
    board.notify(queue.index)  # it does nothing more until then
    assert queue.used() == []
    assert made.works(board.start())


@every_device
def test_a_queue_that_does_not_exist_cannot_be_notified_and_nothing_comes_of_it(
    made: Made, transport: str
) -> None:
    board = TRANSPORTS[transport](made.device)
    queues = board.start()
    for index in (len(queues), len(queues) + 1, 0x100, 0x3FF):
        board.notify(index)
    assert not board.status & NEEDS_RESET
    assert made.works(queues)


# --- memory -----------------------------------------------------------------------------------


@every_device
def test_the_largest_request_there_can_be_costs_little_memory(made: Made, transport: str) -> None:
    """1,024 descriptors of all RAM each: 1 GiB to read, or to write, or half and half."""
    board = TRANSPORTS[transport](made.device)
    count = len(board.start())
    gpa, size = BASE + 0x4_0000, 1024
    for index, readable in itertools.product(range(count), (0, 512, 1024)):
        queue = board.start()[index]
        for place in range(size):
            flags = (WRITE if place >= readable else 0) | (NEXT if place + 1 < size else 0)
            board.ram.put("<QIHH", gpa + 16 * place, BASE, END - BASE, flags, place + 1)
        queue.write_descriptor(0, gpa, 16 * size, INDIRECT_TABLE)
        tracemalloc.start()
        try:
            for _ in range(4):
                queue.publish(0)
            board.notify(index)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MEMORY_MAX
    assert made.works(board.start())


@every_device
def test_ever_more_of_it_leaves_nothing_behind(made: Made, transport: str) -> None:
    board = TRANSPORTS[transport](made.device)
    chosen = random.Random(1)  # noqa: S311 (a test is to be repeated)

    def once() -> None:
        queues = board.start()
        for queue in queues:
            for place in range(queue.size):
                gpa = BASE + chosen.randrange(0x8_0000, 0xF_0000)
                queue.write_descriptor(place, gpa, 256, chosen.choice((0, WRITE)), 0)
                queue.publish(place)
            board.notify(queue.index)

    for _ in range(20):
        once()
    tracemalloc.start()
    try:
        for _ in range(5):
            once()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(30):
            once()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < LEAK_MAX
    finally:
        tracemalloc.stop()


# --- two drivers ------------------------------------------------------------------------------


@every_device
def test_two_drivers_that_fight_over_a_device_break_nothing(made: Made, transport: str) -> None:
    board = TRANSPORTS[transport](made.device)
    board.start()
    chosen = random.Random(2)  # noqa: S311
    for at in range(0, 0x3000, 16):  # whatever they take for a table has some good descriptors
        gpa = BASE + chosen.randrange(0x8_0000, 0xF_0000)
        board.ram.put(
            "<QIHH", BASE + at, gpa, 64, chosen.choice((0, 1, WRITE)), chosen.randrange(9)
        )
    raised: list[BaseException] = []

    def fight(seed: int) -> None:
        own = random.Random(seed)  # noqa: S311
        try:
            for _ in range(FIGHT_ROUNDS):
                write, offset, size, values = own.choice(board.moves)
                write(offset, size, own.choice(values))
                board.ram.put("<H", BASE + own.randrange(0, 0x3000, 2), own.randrange(20))
                made.device.save()
        except BaseException as error:  # noqa: BLE001 (it is told below)
            raised.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        drivers = [threading.Thread(target=fight, args=(seed,), daemon=True) for seed in (3, 4)]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join(FIGHT_ENDS)
        assert not any(driver.is_alive() for driver in drivers)
    finally:
        sys.setswitchinterval(interval)
    assert raised == []
    assert made.works(board.start())


# --- a guest with a processor -----------------------------------------------------------------

# Every port below 0x7F8, written and read in each width; then a good write, which ends the run.
HAMMER = bytes.fromhex(
    "31 d2"  #              xor dx, dx
    "66 b8 55 55 55 55"  #  mov eax, 0x55555555     asks nobody to reset or to sleep
    "ee ef 66 ef"  #        out dx, al / ax / eax
    "ec ed 66 ed"  #        in al / ax / eax, dx
    "42"  #                 inc dx
    "81 fa f8 07"  #        cmp dx, 0x7f8
    "75 eb"  #              jne -21
    "b0 07 ee"  #           mov al, 7; out dx, al
    "f4"  #                 hlt
)


@pytest.mark.kvm
def test_a_guest_that_hammers_on_every_port_ends_when_it_says_so() -> None:
    with Machine(memory=1 << 20) as machine:
        machine.add_board(console=lambda data: None)
        machine.add_virtio(VirtioRng())  # so that there is PCI, and its ports
        machine.ports.add(0x7F8, 1, DebugExit(machine.end))
        machine.boot_real_mode(HAMMER)
        machine.start()
        assert machine.wait(60) == StopCause.DEVICE
        assert machine.exit_value == 7


@pytest.mark.kvm
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("seed", range(6 * MORE))
def test_doorbells_and_vectors_that_a_guest_moves_about_stay_with_their_devices(
    transport: str, seed: int
) -> None:
    """KVM itself is told of each: ioeventfds wherever a BAR is put, routes for whatever message."""
    chosen = random.Random(seed)  # noqa: S311
    places = (0, 0x1000, 0xC000_0000, *range(0xE100_0000, 0xE108_0000, 0x1_0000), 0xFEE0_0000)
    with Machine(memory=1 << 22, transport=transport, ioeventfd=True) as machine:
        machine.add_board(console=lambda data: None)
        for _ in range(3):
            machine.add_virtio(VirtioRng())
            machine.add_virtio(VirtioBalloon(machine.memory))
        for _ in range(400):
            size = chosen.choice(WIDTHS)
            value = chosen.choice((*VALUES, *places)) & (1 << 8 * size) - 1
            slot = chosen.randrange(8)
            register = chosen.choice((0x04, 0x10, 0x10, 0x14, 0x40, 0x42, chosen.randrange(0x100)))
            window = layout.PCI_WINDOW_GPA + slot * layout.PCI_SLOT_STRIDE
            part = chosen.randrange(6) << 12 | chosen.choice((chosen.randrange(64), 0xFFF))
            mmio = layout.VIRTIO_MMIO_GPA + (slot << 12) + chosen.randrange(0x110)
            machine.mmio.write(layout.PCI_ECAM_GPA + (slot << 15) + register, size, value)
            machine.mmio.write(chosen.choice((window + part, mmio)), size, value)
            machine.mmio.read(chosen.choice((window + part, mmio)), size)
            machine.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | register & 0xFC)
            machine.ports.write(0xCFC, min(size, 4), value & 0xFFFF_FFFF)
        assert not machine.cause
        vendor = machine.mmio.read(layout.PCI_ECAM_GPA + (1 << 15), 2)
        assert vendor == (0x1AF4 if transport == "pci" else 0xFFFF)
