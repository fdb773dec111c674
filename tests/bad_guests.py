"""Every device there is, for tests that play a guest which wishes it ill.

A device joins by one line: of `ON_THE_BUS` if it has registers of its own, of `VIRTIO` if it has
queues. With each goes what shows that it still works: a good access or request, to be tried after
whatever was done to it.
"""

import os
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from examples.crc_device import CrcDevice
from examples.dice_port import Dice
from examples.pattern_rng import PatternRng
from tests.fake_vhost import Kernel
from tests.test_pci import BAR_GPA
from tests.test_pci import Board as PciBoard
from tests.test_pci import Driver as PciDriver
from tests.virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    Driver,
    Line,
    Queue,
    Ram,
)
from tinyvmm import ninep
from tinyvmm.bus import Bus
from tinyvmm.devices import pci
from tinyvmm.devices.debug_exit import DebugExit
from tinyvmm.devices.fw_cfg import FwCfg
from tinyvmm.devices.i8042 import I8042
from tinyvmm.devices.pci import ConfigPorts, Ecam, PciBus
from tinyvmm.devices.power import PowerControl
from tinyvmm.devices.reset_control import ResetControl
from tinyvmm.devices.rtc import Rtc
from tinyvmm.devices.uart import Uart
from tinyvmm.devices.virtio import pci as virtio_pci
from tinyvmm.devices.virtio.balloon import VirtioBalloon
from tinyvmm.devices.virtio.blk import VirtioBlk
from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole
from tinyvmm.devices.virtio.device import VirtioDevice
from tinyvmm.devices.virtio.net import VirtioNet
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.devices.virtio.vhost_vsock import VhostVsock
from tinyvmm.devices.virtio.vsock import VirtioVsock
from tinyvmm.disks.raw import RawDisk
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Session

# --- devices with registers of their own ------------------------------------------------------


class Registers(NamedTuple):
    """A device on a bus from `base`, and whether it still works."""

    bus: Bus
    base: int
    length: int
    works: Callable[[], bool]


def _nothing(*_: object) -> None:
    """Take what a machine would act upon."""


def _uart() -> Registers:
    bus = Bus("port")
    printed: list[bytes] = []
    bus.add(0x3F8, 8, Uart(Line(), printed.append))

    def works() -> bool:
        bus.write(0x3FB, 1, 0x03)  # LCR: the divisor latch is away
        bus.write(0x3FC, 1, 0)  # MCR: not looped back
        del printed[:]
        bus.write(0x3F8, 1, ord("x"))
        return b"".join(printed) == b"x" and bool(bus.read(0x3FD, 1) & 0x20)

    return Registers(bus, 0x3F8, 8, works)


def _rtc() -> Registers:
    bus = Bus("port")
    bus.add(0x70, 2, Rtc(lambda: 0.0))

    def works() -> bool:
        bus.write(0x70, 1, 0x0B)
        bus.write(0x71, 1, 0x06)  # 24 hours, binary, running
        bus.write(0x70, 1, 0x0D)
        return bus.read(0x71, 1) == 0x80

    return Registers(bus, 0x70, 2, works)


def _i8042() -> Registers:
    bus = Bus("port")
    bus.add(0x60, 5, I8042(lambda: None))

    def works() -> bool:
        bus.write(0x64, 1, 0xAA)  # self test
        return bus.read(0x60, 1) == 0x55

    return Registers(bus, 0x60, 5, works)


def _power() -> Registers:
    bus = Bus("port")
    off: list[bool] = []
    power = PowerControl(Line(), lambda: off.append(True), lambda: None)
    bus.add(0x600, power.length, power)

    def works() -> bool:
        del off[:]
        bus.write(0x600, 1, 1 << 5 | 5 << 2)  # SLP_EN, and S5 to sleep in
        return bool(off)

    return Registers(bus, 0x600, power.length, works)


def _debug_exit() -> Registers:
    bus = Bus("port")
    values: list[int] = []

    def take(value: int) -> None:
        values[:] = [value]

    bus.add(0xF4, 4, DebugExit(take))

    def works() -> bool:
        bus.write(0xF4, 4, 7)
        return values == [7]

    return Registers(bus, 0xF4, 4, works)


def _fw_cfg() -> Registers:
    bus = Bus("port")
    bus.add(0x510, 2, FwCfg(ram_size=1 << 20, cpus=1, files={"opt/a": b"content"}))

    def works() -> bool:
        bus.write(0x510, 2, 0x20)
        return bytes(bus.read(0x511, 1) for _ in range(8)) == b"content\0"

    return Registers(bus, 0x510, 2, works)


def _pci_ports() -> Registers:
    bus = Bus("port")
    resets: list[bool] = []
    bus.add(0xCF8, 8, ConfigPorts(PciBus(), ResetControl(lambda: resets.append(True))))

    def works() -> bool:
        del resets[:]
        bus.write(0xCF9, 1, 0x02)
        bus.write(0xCF9, 1, 0x06)
        bus.write(0xCF8, 4, 1 << 31)
        return bus.read(0xCFC, 2) == 0x1B36 and bool(resets)

    return Registers(bus, 0xCF8, 8, works)


def _ecam() -> Registers:
    bus = Bus("mmio")
    bus.add(0xE000_0000, 1 << 20, Ecam(PciBus()))
    return Registers(
        bus, 0xE000_0000, 1 << 20, lambda: bus.read(0xE000_0000 + pci.PCI_VENDOR_ID, 2) == 0x1B36
    )


def _crc() -> Registers:
    bus = Bus("mmio")
    bus.add(0xD800_0000, 0x1000, CrcDevice())

    def works() -> bool:
        bus.write(0xD800_000C, 4, 0)
        return bus.read(0xD800_0008, 4) == 0

    return Registers(bus, 0xD800_0000, 0x1000, works)


def _dice() -> Registers:
    bus = Bus("port")
    bus.add(0x500, 1, Dice())
    return Registers(bus, 0x500, 1, lambda: 1 <= bus.read(0x500, 1) <= 6)


ON_THE_BUS: dict[str, Callable[[], Registers]] = {
    "uart": _uart,
    "rtc": _rtc,
    "i8042": _i8042,
    "power": _power,
    "debug-exit": _debug_exit,
    "fw-cfg": _fw_cfg,
    "pci-config": _pci_ports,
    "pci-ecam": _ecam,
    "example crc": _crc,
    "example dice": _dice,
}

# --- devices with queues ----------------------------------------------------------------------


ANSWER_MAX = 60.0  # seconds: far more than any answer takes


class HeldRam(Ram):
    """RAM as a balloon sees it: giving a page back changes nothing that a test would look at."""

    def discard(self, buffer: memoryview) -> int:
        return len(buffer)


class Made(NamedTuple):
    """A device, whether it answers a good request, and how to let go of what it has."""

    device: VirtioDevice
    works: Callable[[list[Queue]], bool]
    asked: int | None = 0
    """The index of a queue of requests: one that the device looks at as soon as it is kicked.

    None if all of them are for the host's kernel to look at.
    """
    close: Callable[[], object] = _nothing
    """Lets go of what the device was given."""

    def end(self) -> None:
        """Take the device apart, as a machine does."""
        self.device.halt()
        self.device.detach()
        self.close()


def _rng() -> Made:
    return Made(VirtioRng(), lambda queues: len(_exchange(queues[0], [], 64)) == 64)


def _pattern() -> Made:
    return Made(PatternRng("abc"), lambda queues: _exchange(queues[0], [], 4) == b"abca")


def _console() -> Made:
    port = ConsolePort("name")
    device = VirtioConsole([port])

    def works(queues: list[Queue]) -> bool:
        queues[2].send([], [64])
        queues[3].send([struct.pack("<IHH", 0xFFFF_FFFF, 0, 1)], [])  # DEVICE_READY
        return queues[2].collect() == [struct.pack("<IHH", 1, 1, 1)]  # PORT_ADD of port 1

    return Made(device, works, asked=3)


def _p9() -> Made:
    directory = tempfile.mkdtemp(prefix="tinyvmm-test-")
    tree = HostTree(directory)
    device = Virtio9P("tag", Session(tree))

    def works(queues: list[Queue]) -> bool:
        request = ninep.encode(ninep.Tversion(8192, b"9P2000.L"), ninep.NOTAG)
        reply = ninep.encode(ninep.Rversion(8192, b"9P2000.L"), ninep.NOTAG)
        return _exchange(queues[0], [request], 100) == reply

    def close() -> None:
        tree.close()
        os.rmdir(directory)

    return Made(device, works, close=close)


def _balloon() -> Made:
    device = VirtioBalloon(HeldRam(), 1 << 20)
    frame = (0x10_0000 >> 12).to_bytes(4, "little")

    def works(queues: list[Queue]) -> bool:
        before = device.reclaimed
        _exchange(queues[0], [frame], 0)
        return device.reclaimed == before + 4096

    return Made(device, works)


class _Wire:
    """A backend that counts the bytes of the last frame."""

    vnet_header = False

    def __init__(self) -> None:
        self.sent = 0

    def send(self, views: Sequence[memoryview]) -> bool:
        self.sent = sum(map(len, views))
        return True

    def receive(self, views: Sequence[memoryview]) -> None:
        del views

    def watch(self, *, readable: bool) -> None:
        del readable

    def use(self, features: int) -> None:
        del features

    def enable(self, *, on: bool) -> None:
        del on


def _net() -> Made:
    wire = _Wire()

    def works(queues: list[Queue]) -> bool:
        _exchange(queues[1], [bytes(12), b"x" * 60], 0)
        return wire.sent == 60

    return Made(VirtioNet([wire], b"\x52\0\0\0\0\1"), works, asked=1)


def _net_of_several() -> Made:
    wires = [_Wire() for _ in range(3)]

    def works(queues: list[Queue]) -> bool:
        use = struct.pack("<BBH", 4, 0, 3)  # VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
        if _exchange(queues[6], [use], 1) != b"\0":
            return False
        _exchange(queues[5], [bytes(12), b"x" * 60], 0)
        return wires[2].sent == 60

    return Made(VirtioNet(wires, b"\x52\0\0\0\0\1"), works, asked=6)


def _vsock() -> Made:
    class NobodyHome:
        def dial(self, port: int) -> None:
            del port

    request = struct.pack("<QQIIIHHIII", 3, 2, 1000, 80, 0, 1, 1, 0, 0, 0)

    def works(queues: list[Queue]) -> bool:
        rx, tx, _ = queues
        token = rx.send([], [4096])
        _exchange(tx, [request], 0)
        return (token, 44) in rx.used()

    return Made(VirtioVsock(3, NobodyHome()), works, asked=1)


def _vhost_vsock() -> Made:
    opened: list[Kernel] = []

    def open_kernel() -> Kernel:
        opened[:] = [Kernel([])]
        return opened[0]

    def failed(error: BaseException) -> None:
        raise error

    device = VhostVsock(3, open_kernel, failed)

    def works(queues: list[Queue]) -> bool:
        """A kick has to reach the kernel that serves now; the rest is for it to do."""
        kick = opened[0].eventfds[1][0]
        os.eventfd_read(kick)  # that of the start
        queues[1].driver.write(0x050, 1)  # QueueNotify, or what is that on PCI
        served = opened[0].running and set(opened[0].eventfds) == {0, 1}
        return served and os.eventfd_read(kick) == 1

    return Made(device, works, asked=None)


def _block() -> Made:
    fd, path = tempfile.mkstemp(prefix="tinyvmm-test-")
    os.truncate(fd, 64 << 10)
    os.close(fd)
    disk = RawDisk(path)
    header = struct.pack("<IIQ", 8, 0, 0)  # VIRTIO_BLK_T_GET_ID

    def works(queues: list[Queue]) -> bool:
        return _exchange(queues[0], [header], 21) == b"serial".ljust(20, b"\0") + b"\0"

    def close() -> None:
        disk.close()
        os.unlink(path)

    return Made(VirtioBlk(disk, serial="serial"), works, close=close)


VIRTIO: dict[str, Callable[[], Made]] = {
    "rng": _rng,
    "console": _console,
    "9p": _p9,
    "balloon": _balloon,
    "block": _block,
    "vsock": _vsock,
    "vhost vsock": _vhost_vsock,
    "net": _net,
    "net of several": _net_of_several,
    "example pattern": _pattern,
}


def _exchange(queue: Queue, readable: list[bytes], room: int) -> bytes:
    """Send a chain, and return what came back in it; a device's own thread may bring it."""
    token = queue.send(readable, [room] if room else [])
    end = time.monotonic() + ANSWER_MAX
    while not (found := queue.used()) and time.monotonic() < end:
        time.sleep(0.001)
    ((used, length),) = found
    assert used == token
    return queue.filled(token, length)


class OverMmio:
    """A device behind virtio-mmio."""

    def __init__(self, device: VirtioDevice) -> None:
        self.driver = Driver(device, HeldRam())
        self.ram = self.driver.ram
        self.ranges = [(self.driver.mmio.read, self.driver.mmio.write, 0x1000)]
        every = (0, 0x10_0000, 0x10_1000, 0x10_2000, 0xFFFF_FFF0)
        self.moves = [  # (write, offset, width, values) of what a driver does, in any order
            (self.driver.mmio.write, 0x070, 4, (0, 1, 3, 11, 11, 15, 15, 15)),
            (self.driver.mmio.write, 0x020, 4, (0, 1, 1 << 28, 1 << 29, 0xFFFF_FFFF)),
            (self.driver.mmio.write, 0x024, 4, (0, 1)),
            (self.driver.mmio.write, 0x030, 4, range(6)),
            (self.driver.mmio.write, 0x038, 4, (0, 1, 2, 8, 16)),
            (self.driver.mmio.write, 0x044, 4, (0, 1, 1, 1)),
            (self.driver.mmio.write, 0x050, 4, range(6)),
            (self.driver.mmio.write, 0x064, 4, (1, 2, 3)),
            *((self.driver.mmio.write, at, 4, every) for at in (0x080, 0x090, 0x0A0)),
            (self.driver.mmio.write, 0x104, 4, range(9)),
        ]

    def start(self, size: int = 16) -> list[Queue]:
        """Do what a good driver does, from the beginning."""
        self.driver.ram.rewind(0)
        return self.driver.start(size=size)

    def notify(self, index: int) -> None:
        self.driver.write(0x050, index)

    def set_status(self, value: int) -> None:
        self.driver.write(0x070, value)

    @property
    def status(self) -> int:
        return self.driver.status


class OverPci:
    """A device behind virtio-pci: its BAR, its configuration space by both ways, and its driver."""

    def __init__(self, device: VirtioDevice) -> None:
        self.board = board = PciBoard(device)
        self.pci = PciDriver(board)
        self.ram = board.ram
        self.features = 0
        self.ranges = [
            (board.transport.read, board.transport.write, board.transport.function.bar_len),
            (board.ecam.read, board.ecam.write, 0x10_0000),
            (board.ports.read, board.ports.write, 8),
        ]
        write, configure = board.transport.write, board.set_config
        every = (0, 0x10_0000, 0x10_1000, 0x10_2000, 0xFFFF_FFF0)
        self.moves = [
            (write, 20, 1, (0, 1, 3, 11, 11, 15, 15, 15)),
            (write, 12, 4, (0, 1, 1 << 28, 1 << 29, 0xFFFF_FFFF)),
            (write, 8, 4, (0, 1)),
            (write, 22, 2, range(6)),
            (write, 24, 2, (0, 1, 2, 8, 16)),
            (write, 26, 2, (0, 1, 2, 0xFFFF)),
            (write, 28, 2, (0, 1, 1, 1)),
            *((write, virtio_pci.NOTIFY + at, 2, (0,)) for at in (0, 4, 8, 12)),
            *((write, at, 4, every) for at in (32, 40, 48)),
            (write, virtio_pci.CONFIG + 4, 4, range(9)),
            *((write, virtio_pci.TABLE + at, 4, (0, 1, 0xFEE0_0000)) for at in (0, 8, 12)),
            (configure, self.pci.msix_at + 2, 2, (0, 1 << 15, 1 << 14, 3 << 14)),
            (configure, pci.PCI_COMMAND, 2, (0, 2, 6)),
            (configure, pci.PCI_BASE_ADDRESS_0, 4, (BAR_GPA, 0xFFFF_FFFF, 0, BAR_GPA + 0x1_0000)),
        ]

    def start(self, size: int = 16) -> list[Queue]:
        """As firmware and a good driver would: the BAR first, wherever it has been moved."""
        self.ram.rewind(0)
        board = self.board
        board.set_config(pci.PCI_COMMAND, 2, 0)
        board.set_config(pci.PCI_BASE_ADDRESS_0, 4, BAR_GPA)
        board.set_config(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
        self.pci = driver = PciDriver(board)
        driver.write(20, 1, 0)
        driver.write(20, 1, ACKNOWLEDGE | DRIVER)
        self.features = 0
        for half in (0, 1):
            driver.write(0, 4, half)
            offered = driver.read(4, 4)
            self.features |= offered << 32 * half
            driver.write(8, 4, half)
            driver.write(12, 4, offered)
        driver.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        queues = []
        for index in range(driver.read(18, 2)):
            driver.write(22, 2, index)
            queue = Queue(self, index, min(size, driver.read(24, 2)))  # type: ignore[arg-type]
            driver.write(24, 2, queue.size)
            gpas = (queue.desc_gpa, queue.avail_gpa, queue.used_gpa)
            for register, gpa in zip((32, 40, 48), gpas, strict=True):
                driver.write(register, 4, gpa)
                driver.write(register + 4, 4, 0)
            driver.write(28, 2, 1)
            queues.append(queue)
        driver.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return queues

    def write(self, offset: int, value: int) -> None:
        """Be the `driver` of a Queue, which kicks by virtio-mmio's QueueNotify."""
        assert offset == 0x050
        self.notify(value)

    def notify(self, index: int) -> None:
        place = self.pci.parts[2]  # VIRTIO_PCI_CAP_NOTIFY_CFG
        self.board.mmio.write(place + index * self.pci.multiplier, 2, index)

    def set_status(self, value: int) -> None:
        self.pci.write(20, 1, value)

    @property
    def status(self) -> int:
        return self.pci.read(20, 1)


Board = OverMmio | OverPci
TRANSPORTS: dict[str, Callable[[VirtioDevice], Board]] = {"mmio": OverMmio, "pci": OverPci}
