"""PCI and virtio over it, from the driver's side: what a kernel does to find and start a device."""

import ctypes
import re
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    Ram,
)
from tests.virtio_driver import Driver as MmioDriver
from tinyvmm.bus import Bus
from tinyvmm.devices import msix, pci
from tinyvmm.devices.msix import Msix
from tinyvmm.devices.pci import ConfigPorts, Ecam, Function, PciBus
from tinyvmm.devices.virtio import pci as virtio_pci
from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.pci import VirtioPci
from tinyvmm.devices.virtio.queue import Virtqueue

HEADERS = Path("/usr/include/linux")
BAR_GPA = 0xE101_0000
CONFIG = bytes(range(0x11, 0x1C))


class Echo(VirtioDevice):
    """Gives every chain back, with the readable bytes in the writable ones."""

    def __init__(self) -> None:
        super().__init__("echo", 77, queue_sizes=(4, 8), features=1 << 40, config=CONFIG)

    def handle(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            data = b"".join(chain.readable)
            chain.writable[0][: len(data)] = data
            queue.push(chain, len(data))


class Line:
    """A MessageLine that remembers, in a list of all lines'."""

    def __init__(self, sent: list[tuple[int, int]]) -> None:
        self.sent = sent
        self.message = (0, 0)
        self.fd = -1

    def route(self, address: int, data: int) -> None:
        self.message = (address, data)

    def fire(self) -> None:
        self.sent.append(self.message)

    def fileno(self) -> int:
        return self.fd


class Board:
    """A bus with one virtio device, as a machine wires it."""

    def __init__(self, device: VirtioDevice | None = None) -> None:
        self.device = device or Echo()
        self.ram = Ram()
        self.sent: list[tuple[int, int]] = []
        self.lines: list[Line] = []
        self.transport = VirtioPci(self.device, self.ram, self.line)
        self.bus = PciBus()
        self.slot = self.bus.add(self.transport.function)
        self.ecam = Ecam(self.bus)
        self.ports = ConfigPorts(self.bus)
        self.mmio = Bus("mmio")
        self.transport.function.on_map = self.map
        self.transport.function.place(BAR_GPA)

    def line(self) -> Line:
        self.lines.append(Line(self.sent))
        return self.lines[-1]

    def map(self, gpa: int | None) -> None:
        self.mmio.remove(self.transport)
        if gpa is not None:
            self.mmio.add(gpa, virtio_pci.BAR_LEN, self.transport)

    def config(self, offset: int, size: int) -> int:
        return self.ecam.read(self.slot << 15 | offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.ecam.write(self.slot << 15 | offset, size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset) of each, walking the list as every kernel does."""
        found: list[tuple[int, int]] = []
        assert self.config(pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST
        at = self.config(pci.PCI_CAPABILITY_LIST, 1)
        while at:
            assert at % 4 == 0
            assert len(found) < 16
            found.append((self.config(at, 1), at))
            at = self.config(at + 1, 1)
        return found


class Driver:
    """Linux's virtio_pci_modern, in short."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.parts: dict[int, int] = {}
        for number, at in board.capabilities():
            if number == virtio_pci.PCI_CAP_ID_VNDR:
                cfg_type, bar = board.config(at + 3, 1), board.config(at + 4, 1)
                assert bar == 0
                base = board.config(pci.PCI_BASE_ADDRESS_0, 4)
                self.parts.setdefault(cfg_type, base + board.config(at + 8, 4))
                if cfg_type == virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG:
                    self.multiplier = board.config(at + 16, 4)
            elif number == msix.PCI_CAP_ID_MSIX:
                self.msix_at = at
        self.common = self.parts[virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG]

    def read(self, offset: int, size: int) -> int:
        return self.board.mmio.read(self.common + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.board.mmio.write(self.common + offset, size, value)

    def enable_msix(self) -> int:
        """Vector n sends data 0x40 + n; gives the number of vectors."""
        board = self.board
        control = board.config(self.msix_at + 2, 2)
        table = board.config(self.msix_at + 4, 4)
        base = board.config(pci.PCI_BASE_ADDRESS_0, 4) + (table & ~7)
        board.set_config(self.msix_at + 2, 2, control | 1 << 15)
        vectors = (control & 0x7FF) + 1
        for vector in range(vectors):
            for word, value in enumerate((0xFEE0_0000, 0, 0x40 + vector, 0)):
                board.mmio.write(base + 16 * vector + 4 * word, 4, value)
        return vectors

    def start(self, *, vectors: bool = True) -> list[int]:
        """Bring the device up; gives the descriptor table's address of each queue."""
        self.write(20, 1, 0)
        self.write(20, 1, ACKNOWLEDGE | DRIVER)
        features = 0
        for half in (0, 1):
            self.write(0, 4, half)
            features |= self.read(4, 4) << 32 * half
        for half in (0, 1):
            self.write(8, 4, half)
            self.write(12, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.read(20, 1) & FEATURES_OK
        if vectors:
            assert self.enable_msix() == self.read(18, 2) + 1
            self.write(16, 2, 0)
            assert self.read(16, 2) == 0
        tables = []
        for index in range(self.read(18, 2)):
            self.write(22, 2, index)
            size = self.read(24, 2)
            gpas = [
                self.board.ram.alloc(length) for length in (16 * size, 6 + 2 * size, 6 + 8 * size)
            ]
            for register, gpa in zip((32, 40, 48), gpas, strict=True):
                self.write(register, 4, gpa & 0xFFFF_FFFF)
                self.write(register + 4, 4, gpa >> 32)
            if vectors:
                self.write(26, 2, index + 1)
                assert self.read(26, 2) == index + 1
            self.write(28, 2, 1)
            assert self.read(28, 2) == 1
            tables.append(gpas[0])
        self.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return tables

    def notify(self, index: int) -> None:
        self.write(22, 2, index)
        place = self.parts[virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG]
        self.board.mmio.write(place + self.read(30, 2) * self.multiplier, 2, index)

    def exchange(self, index: int, data: bytes) -> bytes:
        """Send `data` through queue `index`, which must be fresh; gives what came back."""
        ram = self.board.ram
        self.write(22, 2, index)
        desc, avail, used = (
            self.read(register, 4) | self.read(register + 4, 4) << 32 for register in (32, 40, 48)
        )
        out, back = ram.alloc(len(data)), ram.alloc(len(data))
        ram.view(out, len(data))[:] = data
        ram.put("<QIHHQIHH", desc, out, len(data), 1, 1, back, len(data), 2, 0)
        ram.put("<HHH", avail, 0, 1, 0)
        self.notify(index)
        assert struct.unpack("<HHII", ram.view(used, 12)) == (0, 1, 0, len(data))
        return bytes(ram.view(back, len(data)))


def defines(header: str, *names: str) -> dict[str, int]:
    text = (HEADERS / header).read_text()
    found = {}
    for name in names:
        match = re.search(rf"#define\s+{name}\s+(0x[0-9a-fA-F]+|\d+)\b", text)
        assert match is not None, name
        found[name] = int(match[1], 0)
    return found


@pytest.mark.skipif(not HEADERS.exists(), reason="the kernel's headers are not installed")
def test_numbers_are_those_of_the_kernels_headers() -> None:
    names = [name for name in vars(pci) if name.startswith("PCI_") and "CLASS" not in name]
    for name, value in defines("pci_regs.h", *names).items():
        assert getattr(pci, name) == value, name
    names = [name for name in vars(msix) if name.startswith("PCI_")]
    for name, value in defines("pci_regs.h", *names).items():
        assert getattr(msix, name) == value, name
    names = [name for name in vars(virtio_pci) if name.startswith("VIRTIO_PCI_CAP_")]
    assert len(names) == 5
    for name, value in defines("virtio_pci.h", *names).items():
        assert getattr(virtio_pci, name) == value, name
    layout = defines("virtio_pci.h", "VIRTIO_PCI_COMMON_STATUS", "VIRTIO_PCI_COMMON_Q_ENABLE")
    registers = {register.name: register for register in virtio_pci.CommonConfiguration.REGISTERS}
    assert registers["device_status"].offset == layout["VIRTIO_PCI_COMMON_STATUS"]
    assert registers["queue_enable"].offset == layout["VIRTIO_PCI_COMMON_Q_ENABLE"]


# --- configuration space ------------------------------------------------------------------------


def test_a_scan_finds_a_bridge_and_the_device_and_nothing_else() -> None:
    board = Board()
    found = {}
    for slot in range(pci.SLOTS):
        for function in range(8):
            vendor = board.ecam.read(slot << 15 | function << 12, 4)
            if vendor != 0xFFFF_FFFF:
                found[slot, function] = vendor
    assert found.keys() == {(0, 0), (1, 0)}
    assert found[1, 0] == (0x1040 + 77) << 16 | 0x1AF4
    assert board.ecam.read(0 << 15 | 0x0A, 2) == pci.PCI_CLASS_BRIDGE_HOST
    assert board.config(0x0A, 2) == virtio_pci.PCI_CLASS_OTHERS
    assert Board(VirtioConsole([])).config(0x0A, 2) == 0x0780  # of communication


@given(slot=st.integers(0, 31), register=st.integers(0, 63), function=st.integers(0, 7))
def test_ports_and_ecam_lead_to_the_same_registers(slot: int, register: int, function: int) -> None:
    board = Board()
    board.ports.write(0, 4, 1 << 31 | slot << 11 | function << 8 | register << 2)
    whole = board.ports.read(4, 4)
    assert whole == board.ecam.read(slot << 15 | function << 12 | register << 2, 4)
    for byte in range(4):
        assert board.ports.read(4 + byte, 1) == whole >> 8 * byte & 0xFF


def test_ports_that_are_not_enabled_lead_nowhere() -> None:
    board = Board()
    board.ports.write(0, 4, 1 << 11)
    assert board.ports.read(4, 4) == 0xFFFF_FFFF
    board.ports.write(0, 4, 1 << 31 | 1 << 16)  # bus 1
    assert board.ports.read(4, 4) == 0xFFFF_FFFF
    board.ports.write(0, 1, 0xFF)  # not a write of the whole register
    assert board.ports.read(0, 4) == 1 << 31 | 1 << 16


def test_the_bar_tells_its_size_and_moves_where_it_is_put() -> None:
    board = Board()
    at = pci.PCI_BASE_ADDRESS_0
    board.set_config(pci.PCI_COMMAND, 2, 0)
    board.set_config(at, 4, 0xFFFF_FFFF)
    size = -board.config(at, 4) & 0xFFFF_FFFF
    assert size == virtio_pci.BAR_LEN
    board.set_config(at, 4, 0xE200_0000)
    assert board.mmio.read(0xE200_0012, 2) == 0xFFFF  # memory decoding is off
    board.set_config(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    assert board.mmio.read(0xE200_0012, 2) == 2  # num_queues
    assert board.mmio.read(BAR_GPA + 0x12, 2) == 0xFFFF


def test_read_only_registers_stay_as_they_are() -> None:
    board = Board()
    before = [board.config(offset, 4) for offset in range(0, 256, 4)]
    for offset in (0x00, 0x08, 0x0C, 0x14, 0x2C, 0x34):
        board.set_config(offset, 4, 0xFFFF_FFFF)
    assert [board.config(offset, 4) for offset in range(0, 256, 4)] == before
    assert board.config(256, 4) == board.config(0xFFC, 4) == 0  # no extended capabilities


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 255),
            st.sampled_from((1, 2, 4)),
            st.integers(0, 1 << 32),
        )
    )
)
def test_the_memory_of_a_bus_is_what_its_ecam_answers(
    writes: list[tuple[int, int, int, int]],
) -> None:
    board = Board()
    for slot, offset, size, value in writes:
        board.ecam.write(slot << 15 | offset, size, value & (1 << 8 * size) - 1)
    hva, length = board.bus.memory()
    assert length == 2 << 15
    shown = ctypes.string_at(hva, length)
    read = b"".join(board.ecam.read(at, 4).to_bytes(4, "little") for at in range(0, length, 4))
    window = board.capabilities()[-1][1] + 16
    assert shown[: 1 << 15 | window] == read[: 1 << 15 | window]
    assert shown[1 << 15 | window + 4 :] == read[1 << 15 | window + 4 :]
    if board.bus.passive:  # else these lead to the BAR
        assert shown == read


def test_a_bus_is_active_from_before_a_read_does_more_than_read() -> None:
    board = Board()
    told: list[bool] = []
    board.bus.on_active = lambda: told.append(board.bus.passive)
    for register in range(0, 256, 4):  # what every driver does
        board.set_config(register, 4, board.config(register, 4))
    assert (board.bus.passive, told) == (True, [])
    window = board.capabilities()[-1][1]
    board.set_config(window + 12, 4, 4)
    assert told == [False]
    board.set_config(window + 8, 4, 4)
    assert told == [False]
    again = Board()
    again.bus.on_active = lambda: told.append(again.bus.passive)
    again.ecam.load(Board().ecam.save())
    assert told == [False]
    again.ecam.load(board.ecam.save())
    assert told == [False] * 2


def test_a_bus_has_32_slots() -> None:
    bus = PciBus()
    for slot in range(1, 32):
        assert bus.add(Function(1, 2, 3)) == slot
    with pytest.raises(IndexError):
        bus.add(Function(1, 2, 3))


# --- virtio over it -----------------------------------------------------------------------------


def test_a_driver_starts_the_device_and_each_queue_interrupts_by_its_own_vector() -> None:
    board = Board()
    driver = Driver(board)
    driver.start()
    assert driver.exchange(1, b"by the second") == b"by the second"
    assert board.sent == [(0xFEE0_0000, 0x42)]
    assert driver.exchange(0, b"by the first") == b"by the first"
    assert board.sent[1:] == [(0xFEE0_0000, 0x41)]
    board.device.set_config(CONFIG[::-1])
    assert board.sent[2:] == [(0xFEE0_0000, 0x40)]
    where = driver.parts[virtio_pci.VIRTIO_PCI_CAP_DEVICE_CFG]
    assert bytes(board.mmio.read(where + at, 1) for at in range(11)) == CONFIG[::-1]


def test_all_queues_of_a_console_interrupt_by_one_vector() -> None:
    board = Board(VirtioConsole([ConsolePort("one"), ConsolePort("two")]))
    driver = Driver(board)
    driver.write(20, 1, ACKNOWLEDGE | DRIVER)
    queues = range(driver.read(18, 2))
    assert (driver.enable_msix(), len(queues)) == (2, 8)
    for index in queues:
        driver.write(22, 2, index)
        driver.write(26, 2, 2)
        assert driver.read(26, 2) == virtio_pci.VIRTIO_MSI_NO_VECTOR
        driver.write(26, 2, 1)
        assert driver.read(26, 2) == 1
        board.transport._interrupt(index)
    assert board.sent == [(0xFEE0_0000, 0x41)] * len(queues)


def test_without_msix_the_isr_tells_and_reading_takes() -> None:
    board = Board()
    driver = Driver(board)
    driver.start(vectors=False)
    driver.exchange(0, b"x")
    board.device.set_config(CONFIG)
    isr = driver.parts[virtio_pci.VIRTIO_PCI_CAP_ISR_CFG]
    assert board.mmio.read(isr, 1) == 3
    assert board.mmio.read(isr, 1) == 0
    assert board.sent == []


def test_a_masked_vector_waits_for_its_unmasking() -> None:
    board = Board()
    driver = Driver(board)
    driver.start()
    table = BAR_GPA + virtio_pci.TABLE
    board.mmio.write(table + 16 * 1 + 12, 4, 1)
    driver.exchange(0, b"x")
    assert board.sent == []
    assert board.mmio.read(BAR_GPA + virtio_pci.PENDING, 4) == 1 << 1
    board.mmio.write(table + 16 * 1 + 12, 4, 0)
    assert board.sent == [(0xFEE0_0000, 0x41)]
    assert board.mmio.read(BAR_GPA + virtio_pci.PENDING, 4) == 0


def test_what_a_masked_vector_waits_with_does_not_outlive_a_reset() -> None:
    board = Board()
    driver = Driver(board)
    driver.start()
    board.mmio.write(BAR_GPA + virtio_pci.TABLE + 16 * 1 + 12, 4, 1)
    driver.exchange(0, b"x")
    driver.write(20, 1, 0)
    assert board.mmio.read(BAR_GPA + virtio_pci.PENDING, 4) == 0
    driver.start()
    assert board.sent == []


def test_the_whole_function_can_be_masked() -> None:
    sent: list[tuple[int, int]] = []
    table = Msix("x", [Line(sent), Line(sent)])
    table.write(0, 8, 0xFEE0_1000)
    table.write(8, 8, 0x33)
    table.set_flags(1 << 15 | 1 << 14)
    table.fire(0)
    assert sent == []
    table.set_flags(1 << 15)
    assert sent == [(0xFEE0_1000, 0x33)]
    table.set_flags(0)
    table.fire(0)
    table.set_flags(1 << 15)
    assert len(sent) == 1  # what fired while disabled was not for MSI-X to remember


def test_a_vector_there_is_none_of_reads_as_no_vector_and_interrupts_nobody() -> None:
    board = Board()
    driver = Driver(board)
    driver.start()
    driver.write(22, 2, 0)
    driver.write(26, 2, 3)  # there are 0, 1 and 2
    assert driver.read(26, 2) == virtio_pci.VIRTIO_MSI_NO_VECTOR
    driver.exchange(0, b"x")
    assert board.sent == []


def test_reset_forgets_vectors_and_addresses() -> None:
    board = Board()
    driver = Driver(board)
    driver.start()
    driver.write(20, 1, 0)
    driver.write(22, 2, 1)
    assert driver.read(20, 1) == 0
    assert driver.read(26, 2) == virtio_pci.VIRTIO_MSI_NO_VECTOR
    assert (driver.read(28, 2), driver.read(24, 2), driver.read(32, 4)) == (0, 8, 0)


def test_the_window_in_configuration_space_reaches_the_bar() -> None:
    board = Board()
    at = next(
        at
        for number, at in board.capabilities()
        if number == virtio_pci.PCI_CAP_ID_VNDR
        and board.config(at + 3, 1) == virtio_pci.VIRTIO_PCI_CAP_PCI_CFG
    )

    def through(offset: int, size: int) -> int:
        board.set_config(at + 8, 4, offset)
        board.set_config(at + 12, 4, size)
        return board.config(at + 16, size)

    assert through(0x12, 2) == 2  # num_queues
    board.set_config(at + 8, 4, 20)
    board.set_config(at + 12, 4, 1)
    board.set_config(at + 16, 1, ACKNOWLEDGE)
    assert board.device.status == ACKNOWLEDGE
    for offset, size in ((virtio_pci.BAR_LEN, 4), (0xFFFF_FFFC, 4), (1, 2), (0, 3)):
        board.set_config(at + 8, 4, offset)
        board.set_config(at + 12, 4, size)
        board.set_config(at + 16, 4, 0xFFFF_FFFF)  # nowhere, and nobody minds


def test_state_survives_a_round_trip() -> None:
    board = Board()
    driver = Driver(board)
    driver.start()
    board.mmio.write(BAR_GPA + virtio_pci.TABLE + 16 * 2 + 12, 4, 1)
    saved = board.transport.save(), board.ecam.save(), board.ports.save()
    other = Board(Echo())
    other.ram = board.ram
    other.transport.device.attach(board.ram, other.transport._interrupt)
    other.ecam.load(saved[1])
    other.ports.load(saved[2])
    other.transport.load(saved[0])
    assert (other.transport.save(), other.ecam.save(), other.ports.save()) == saved
    again = Driver(other)
    assert again.exchange(0, b"restored") == b"restored"
    assert other.sent == [(0xFEE0_0000, 0x41)]


def test_no_interrupt_is_lost_to_a_mask_that_comes_and_goes() -> None:
    sent: list[int] = []
    fired = 0

    class Counting(Line):
        def fire(self) -> None:
            sent.append(fired)

    table = Msix("x", [Counting([])])
    table.set_flags(1 << 15)

    over = threading.Event()

    def mask() -> None:
        number = 0
        while not over.is_set():
            number += 1
            table.write(12, 4, number & 1)
            table.set_flags(1 << 15 | (number & 2) << 13)

    thread = threading.Thread(target=mask)
    thread.start()
    for _ in range(20000):
        fired += 1
        table.fire(0)
    over.set()
    thread.join()
    table.write(12, 4, 0)
    table.set_flags(1 << 15)
    assert sent[-1] == fired  # whatever was before the last may be in it
    assert table.pending(0, 4) == 0


# --- guests that mean ill -----------------------------------------------------------------------

accesses = st.tuples(
    st.sampled_from(["config", "bar", "ports"]),
    st.one_of(st.integers(0, 0x9000), st.integers(0, 64), st.integers(0x3FF0, 0x4040)),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(
        st.none(), st.sampled_from([0, 1, 0xFF, 0xFFFF, 0xFFFF_FFFF]), st.integers(0, 1 << 64)
    ),
)


@given(st.lists(accesses, max_size=60), st.booleans())
@settings(deadline=None)
def test_any_accesses_are_answered_and_memory_stays_the_drivers(
    asked: list[tuple[str, int, int, int | None]], running: bool
) -> None:
    board = Board()
    if running:
        Driver(board).start()
    devices = {"config": board.ecam, "bar": board.transport, "ports": board.ports}
    for where, anywhere, width, value in asked:
        offset, size = anywhere, width
        if where == "ports":
            offset, size = anywhere % 8, min(width, 4)
        elif where == "config":
            offset += board.slot << 15
        if value is None:
            assert 0 <= devices[where].read(offset, size) < 1 << 8 * size
        else:
            devices[where].write(offset, size, value & (1 << 8 * size) - 1)
    Driver(Board()).start()  # nothing is shared between boards


def test_the_same_device_works_behind_either_transport() -> None:
    queue = MmioDriver(Echo()).start()[0]
    token = queue.send([b"over mmio"], [20])
    assert queue.filled(token, 9) == b"over mmio"
    board = Board()
    driver = Driver(board)
    driver.start()
    assert driver.exchange(0, b"over pci") == b"over pci"
