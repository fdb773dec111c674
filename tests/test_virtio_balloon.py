"""The balloon gives the host what the guest can spare, and nothing else happens to the guest."""

import json
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_pci import Board
from tests.test_pci import Driver as PciDriver
from tests.virtio_driver import NEEDS_RESET, NEXT, WRITE, Driver, Queue, Ram
from tinyvmm.devices.virtio import balloon
from tinyvmm.devices.virtio.balloon import PFNS_MAX, VirtioBalloon
from tinyvmm.memory import GuestMemory

PAGE = 4096
SIZE = 4 << 20
PFN = struct.Struct("<I")
INFLATE, DEFLATE, STATS, FREE, REPORTING = range(5)
RINGS = 1 << 20  # what Ram.alloc gives is below


class RealRam(Ram):
    """The RAM of a machine, which the driver's rings are in as well."""

    def __init__(self) -> None:
        super().__init__(RINGS, base=0)
        self.memory = GuestMemory(SIZE)
        self.whole = self.memory.view(0, SIZE)
        self.data = self.whole  # type: ignore[assignment]  # it is packed into, no more
        self.size = SIZE

    def fill(self, page: int, count: int = 1) -> None:
        self.memory.write(page * PAGE, bytes([page & 0xFF or 1]) * count * PAGE)

    def holds(self, page: int) -> bool:
        return any(self.memory.view(page * PAGE, PAGE))


@pytest.fixture
def ram() -> Iterator[RealRam]:
    ram = RealRam()
    yield ram
    ram.memory.close()


def start(ram: RealRam, size: int = 0) -> tuple[VirtioBalloon, Driver, list[Queue]]:
    device = VirtioBalloon(ram.memory, size)
    driver = Driver(device, ram)
    return device, driver, driver.start(size=16)


def pfns(*pages: int) -> bytes:
    return b"".join(map(PFN.pack, pages))


# --- taking and giving ------------------------------------------------------------------------


def test_it_is_a_balloon_that_says_how_large_it_would_be(ram: RealRam) -> None:
    _, driver, queues = start(ram, 3 << 20)
    assert driver.read(0x008) == 5
    assert driver.mmio.read(0x100, 4) == 3 << 20 >> 12
    assert driver.mmio.read(0x104, 4) == 0
    assert len(queues) == 5


def test_pages_in_the_balloon_are_the_hosts_and_read_as_zeros(ram: RealRam) -> None:
    device, _, queues = start(ram)
    ram.fill(600, 100)
    before = ram.memory.resident
    token = queues[INFLATE].send([pfns(*range(650, 700), *range(649, 599, -1))], [])
    assert queues[INFLATE].used() == [(token, 0)]
    assert before - ram.memory.resident == 100 * PAGE == device.reclaimed
    assert not any(ram.holds(page) for page in range(600, 700))


def test_only_the_pages_named_are_given(ram: RealRam) -> None:
    _, _, queues = start(ram)
    ram.fill(600, 8)
    queues[INFLATE].send([pfns(601, 603), pfns(604, 601)], [])
    assert [page for page in range(600, 608) if ram.holds(page)] == [600, 602, 605, 606, 607]


def test_a_page_taken_back_can_be_used_again(ram: RealRam) -> None:
    _, _, queues = start(ram)
    ram.fill(600)
    queues[INFLATE].send([pfns(600)], [])
    queues[DEFLATE].send([pfns(600)], [])
    assert len(queues[DEFLATE].used()) == 1
    ram.fill(600)
    assert ram.holds(600)


def test_resizing_interrupts_and_the_driver_says_how_far_it_has_come(ram: RealRam) -> None:
    device, driver, _ = start(ram)
    generation = driver.read(0x0FC)
    device.resize(1 << 20)
    assert driver.read(0x060) == 2  # a configuration change
    assert driver.interrupted()
    assert driver.mmio.read(0x100, 4) == 256
    assert driver.read(0x0FC) != generation
    driver.mmio.write(0x104, 4, 200)
    assert (device.actual, driver.mmio.read(0x104, 4)) == (200 * PAGE, 200)
    device.resize(0)
    assert (driver.mmio.read(0x100, 4), device.actual) == (0, 200 * PAGE)
    driver.write(0x070, 0)
    assert device.actual == 0


def test_a_driver_can_write_actual_and_nothing_else(ram: RealRam) -> None:
    device, driver, _ = start(ram, 1 << 20)
    for offset, size in ((0x100, 4), (0x104, 1), (0x104, 8), (0x106, 2), (0x108, 4), (0xFFC, 4)):
        driver.mmio.write(offset, size, 7)
    assert device.config == struct.pack("<II", 256, 0)


def test_a_balloon_no_machine_can_have_is_refused(ram: RealRam) -> None:
    for size in (-1, 1 << 44):
        with pytest.raises(ValueError, match="balloon"):
            VirtioBalloon(ram.memory, size)


# --- free page reporting ----------------------------------------------------------------------


@pytest.mark.parametrize("index", [FREE, REPORTING])  # Linux's, and the specification's
def test_memory_reported_free_returns_to_the_host(ram: RealRam, index: int) -> None:
    device, _, queues = start(ram)
    ram.fill(512, 512)
    queue = queues[index]
    queue.write_descriptor(0, 512 * PAGE, 256 * PAGE, NEXT | WRITE, 1)
    queue.write_descriptor(1, 800 * PAGE, 16 * PAGE, WRITE)
    queue.publish(0)
    before = ram.memory.resident
    queue.kick()
    assert queue.used() == [(0, 0)]
    assert before - ram.memory.resident == device.reclaimed == 272 * PAGE
    assert ram.holds(768)
    assert not ram.holds(767)
    assert not ram.holds(800)


def test_without_statistics_queue_2_is_one_for_reports(ram: RealRam) -> None:
    device = VirtioBalloon(ram.memory)
    driver = Driver(device, ram)
    queue = driver.start(without=1 << 1, size=2)[STATS]
    ram.fill(600, 4)
    queue.write_descriptor(0, 600 * PAGE, 4 * PAGE, WRITE)
    queue.publish(0)
    queue.kick()
    assert queue.used() == [(0, 0)]
    assert device.reclaimed == 4 * PAGE


def test_of_a_buffer_only_whole_pages_go(ram: RealRam) -> None:
    device, _, queues = start(ram)
    ram.fill(600, 4)
    queue = queues[REPORTING]
    queue.write_descriptor(0, 600 * PAGE + 1, 3 * PAGE, WRITE)
    queue.publish(0)
    queue.kick()
    assert device.reclaimed == 2 * PAGE
    assert all(ram.memory.read(600 * PAGE, PAGE))
    assert all(ram.memory.read(603 * PAGE, PAGE))


# --- statistics -------------------------------------------------------------------------------


def stat(tag: int, value: int) -> bytes:
    return struct.pack("<HQ", tag, value)


def test_statistics_are_kept_and_their_buffer_returned_when_newer_are_wanted(ram: RealRam) -> None:
    device, _, queues = start(ram)
    queue = queues[STATS]
    token = queue.send([stat(4, 100) + stat(5, 200) + stat(999, 1) + b"odd"], [])
    assert queue.used() == []
    assert device.stats(timeout=0) is None  # asked, but there is no answer yet
    assert queue.used() == [(token, 0)]
    assert device.stats(timeout=0) is None  # asked already
    answers: list[dict[str, int] | None] = []
    asking = threading.Thread(target=lambda: answers.append(device.stats(timeout=60)))
    asking.start()
    queue.filled(token, 0)
    while not device._news._waiters:  # type: ignore[attr-defined]
        assert asking.is_alive()
    queue.send([stat(4, 50), stat(5, 200)], [])
    asking.join()
    assert answers == [{"free": 50, "total": 200}]


def test_there_are_no_statistics_of_a_guest_without_a_driver(ram: RealRam) -> None:
    device = VirtioBalloon(ram.memory)
    assert device.stats(timeout=60) is None
    Driver(device, ram)
    assert device.stats(timeout=60) is None


def test_a_second_buffer_of_statistics_takes_the_place_of_the_first(ram: RealRam) -> None:
    device, driver, queues = start(ram)
    first = queues[STATS].send([stat(4, 1)], [])
    queues[STATS].send([stat(4, 2)], [])
    assert queues[STATS].used() == [(first, 0)]
    assert not driver.status & NEEDS_RESET
    driver.write(0x070, 0)
    assert device._stats_chain is None


# --- what a guest must not do -----------------------------------------------------------------


def test_page_frames_that_are_not_ram_are_ignored(ram: RealRam) -> None:
    device, driver, queues = start(ram)
    ram.fill(1020, 4)
    wrong = (1024, 1025, 1026, 0xC_0000, 0xFFFF_FFFF, 0xFFFF_FFFE)
    queues[INFLATE].send([pfns(*range(1020, 1024), *wrong)], [])
    assert device.reclaimed == 4 * PAGE
    assert len(queues[INFLATE].used()) == 1
    assert not driver.status & NEEDS_RESET


def test_a_buffer_of_very_many_page_frames_costs_no_more_than_a_long_one(ram: RealRam) -> None:
    device, _, queues = start(ram)
    ram.fill(600, 2)
    gpa = 2 << 20
    ram.memory.write(gpa, pfns(601) * PFNS_MAX + pfns(600))
    queue = queues[INFLATE]
    queue.write_descriptor(0, gpa, 1 << 20)
    queue.publish(0)
    queue.kick()
    assert len(queue.used()) == 1
    assert (ram.holds(600), ram.holds(601)) == (True, False)
    assert device.reclaimed == PAGE


@settings(deadline=None, max_examples=60)
@given(
    script=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.lists(
                st.tuples(
                    st.sampled_from([0, 0x1000, 0x3F_FFFF, 0x40_0000, 0x30_0001, (1 << 64) - 1]),
                    st.sampled_from([0, 1, 3, 4, 10, PAGE, SIZE, 0xFFFF_FFFF]),
                    st.integers(0, 7),
                    st.integers(0, 5),
                ),
                min_size=1,
                max_size=4,
            ),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_whatever_a_guest_sends_the_balloon_serves_a_good_driver_after_reset(
    script: list[tuple[int, list[tuple[int, int, int, int]], bool]],
) -> None:
    ram = RealRam()
    try:
        device, driver, queues = start(ram)
        mark = ram.mark()
        for index, descriptors, reset in script:
            if index < len(queues):
                for place, descriptor in enumerate(descriptors):
                    queues[index].write_descriptor(place, *descriptor)
                queues[index].publish(0)
            driver.write(0x050, index)  # also where there is none
            if device._stats_chain is not None:
                device.stats(timeout=0)
            driver.mmio.load(json.loads(json.dumps(driver.mmio.save())))
            if reset:
                driver.write(0x070, 0)
        ram.rewind(0)
        queues = driver.start(size=16)
        assert driver.status == 0x0F
        ram.rewind(mark)
        ram.fill(600)
        queues[INFLATE].send([pfns(600)], [])
        assert len(queues[INFLATE].used()) == 1
        assert not ram.holds(600)
    finally:
        ram.memory.close()


# --- state, transports ------------------------------------------------------------------------


def test_a_balloon_saved_with_a_buffer_in_hand_goes_on_elsewhere(ram: RealRam) -> None:
    _, driver, queues = start(ram, 1 << 20)
    token = queues[STATS].send([stat(4, 7)], [])
    driver.mmio.write(0x104, 4, 99)
    state = json.loads(json.dumps(driver.mmio.save()))

    other = VirtioBalloon(ram.memory)
    driver.device = other
    driver.mmio = type(driver.mmio)(other, ram, driver.line)
    driver.mmio.load(state)
    assert driver.mmio.save() == state
    assert other.actual == 99 * PAGE
    assert driver.mmio.read(0x100, 4) == 256
    assert other.stats(timeout=0) is None
    assert queues[STATS].used() == [(token, 0)]
    queues[STATS].filled(token, 0)
    queues[STATS].send([stat(4, 8)], [])
    assert other._stats == {"free": 8}


def test_it_works_behind_pci_and_its_configuration_can_be_written_there(ram: RealRam) -> None:
    device = VirtioBalloon(ram.memory, 1 << 20)
    board = Board(device)
    driver = PciDriver(board)
    base = driver.parts[4]  # VIRTIO_PCI_CAP_DEVICE_CFG
    assert board.mmio.read(base, 4) == 256
    board.mmio.write(base + 4, 4, 77)
    board.mmio.write(base, 4, 1)
    assert board.mmio.read(base, 8) == 77 << 32 | 256
    assert device.actual == 77 * PAGE


def test_names_of_statistics_are_in_the_order_of_the_header() -> None:
    with open("/usr/include/linux/virtio_balloon.h") as file:
        text = file.read()
    defined = {
        line.split()[1]: line.split()[2]
        for line in text.splitlines()
        if "VIRTIO_BALLOON_S_" in line and line.startswith("#define") and line.split()[2].isdigit()
    }
    assert defined["VIRTIO_BALLOON_S_MEMFREE"] == str(balloon.STAT_NAMES.index("free"))
    assert defined["VIRTIO_BALLOON_S_MEMTOT"] == str(balloon.STAT_NAMES.index("total"))
    assert defined["VIRTIO_BALLOON_S_AVAIL"] == str(balloon.STAT_NAMES.index("available"))
    assert defined["VIRTIO_BALLOON_S_HTLB_PGFAIL"] == str(len(balloon.STAT_NAMES) - 1)
