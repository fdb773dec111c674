"""vhost without a guest: the ABI beside the header, what the kernel is told in which order, and the
vsock device with a kernel that only remembers. tests/linux/test_vsock.py has a real one.
"""

import argparse
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_vhost import RING_FEATURES, Kernel
from tests.test_eventfds import run, writes
from tests.test_kvm_abi import wrong_facts
from tests.test_pci import BAR_GPA, Board
from tests.test_pci import Driver as PciDriver
from tests.virtio_driver import NEEDS_RESET, Driver
from tinyvmm import layout, vhost
from tinyvmm.cli.run import parse_vsock
from tinyvmm.devices.virtio.mmio import VirtioMmio
from tinyvmm.devices.virtio.pci import NOTIFY, NOTIFY_OFF_MULTIPLIER, TABLE
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.devices.virtio.vhost_vsock import VIRTIO_VSOCK_F_SEQPACKET, VhostVsock
from tinyvmm.errors import ConfigError
from tinyvmm.kvm import Struct
from tinyvmm.machine import Machine
from tinyvmm.memory import Region

RX, TX, EVENT = 0, 1, 2
REGIONS = (
    Region(0, 0x8000_0000, 0, 0x7F00_0000_0000),
    Region(1 << 32, 0x1000_0000, 0x8000_0000, 0x7F00_8000_0000),
)


def test_every_size_offset_and_number_is_the_headers(tmp_path: Path) -> None:
    facts = {
        name: value
        for name, value in vars(vhost).items()
        if name.startswith("VHOST_") and isinstance(value, int)
    }
    structs = [
        value
        for value in vars(vhost).values()
        if isinstance(value, type) and issubclass(value, Struct) and value is not Struct
    ]
    for struct_ in structs:
        name = struct_.__name__
        facts[f"sizeof(struct {name})"] = ctypes.sizeof(struct_)
        for field, *_ in struct_._fields_:
            descriptor = getattr(struct_, field)
            facts[f"offsetof(struct {name}, {field})"] = descriptor.offset
            facts[f"sizeof(((struct {name} *)0)->{field})"] = descriptor.size
    assert wrong_facts(tmp_path, "linux/vhost.h", facts) == {}
    assert len(facts) > 40


# --- what the kernel is told ----------------------------------------------------------------


class Ioctls:
    """ioctl(2), as it is called here: names and arguments; `refused` fail with their errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.refused: dict[str, int] = {}
        names = {
            value: name
            for name, value in vars(vhost).items()
            if name.startswith("VHOST_") and isinstance(value, int)
        }

        def ioctl(_fd: int, request: int, argument: Any) -> int:
            name = names[request]
            self.calls.append((name, b"" if argument == 0 else bytes(argument)))
            if name in self.refused:
                raise OSError(self.refused[name], "refused")
            if name == "VHOST_GET_FEATURES":
                argument[:] = struct.pack("<Q", RING_FEATURES | 1 << 26)
            elif name == "VHOST_GET_VRING_BASE":
                argument.num = 77
            return 0

        monkeypatch.setattr("fcntl.ioctl", ioctl)
        open_ = os.open
        monkeypatch.setattr(os, "open", lambda _path, flags: open_("/dev/null", flags))

    def take(self) -> list[tuple[str, bytes]]:
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture
def ioctls(monkeypatch: pytest.MonkeyPatch) -> Ioctls:
    return Ioctls(monkeypatch)


def test_the_owner_comes_first_then_memory_and_who_the_guest_is(ioctls: Ioctls) -> None:
    kernel = vhost.VhostVsock(7, REGIONS)
    table = struct.pack("<II", 2, 0)
    for region in REGIONS:
        table += struct.pack("<QQQQ", region.gpa, region.size, region.hva, 0)
    assert [call for call in ioctls.take() if call[0] != "VHOST_GET_FEATURES"] == [
        ("VHOST_SET_OWNER", b""),
        ("VHOST_SET_MEM_TABLE", table),
        ("VHOST_VSOCK_SET_GUEST_CID", struct.pack("<Q", 7)),
    ]
    assert kernel.features == RING_FEATURES | 1 << 26
    kernel.close()
    kernel.close()


def test_a_ring_is_told_by_our_addresses_and_its_kick_last(ioctls: Ioctls) -> None:
    kernel = vhost.VhostVsock(7, REGIONS)
    ioctls.take()
    ring = Virtqueue(1, 128, print)
    ring.desc_gpa, ring.avail_gpa, ring.used_gpa = 0x1000, (1 << 32) + 0x2000, 0x7FFF_F000
    ring.last_avail = 65535
    kernel.set_ring(ring, 10, 11, 12)
    assert ioctls.take() == [
        ("VHOST_SET_VRING_NUM", struct.pack("<II", 1, 128)),
        ("VHOST_SET_VRING_BASE", struct.pack("<II", 1, 65535)),
        (
            "VHOST_SET_VRING_ADDR",
            struct.pack(
                "<IIQQQQ",
                *(1, 0, 0x7F00_0000_1000, 0x7F00_7FFF_F000, 0x7F00_8000_2000, 0),
            ),
        ),
        ("VHOST_SET_VRING_ERR", struct.pack("<Ii", 1, 12)),
        ("VHOST_SET_VRING_CALL", struct.pack("<Ii", 1, 11)),
        ("VHOST_SET_VRING_KICK", struct.pack("<Ii", 1, 10)),
    ]
    assert kernel.ring_base(1) == 77
    kernel.set_running(True)
    kernel.set_running(False)
    assert ioctls.take()[1:] == [
        ("VHOST_VSOCK_SET_RUNNING", struct.pack("<i", 1)),
        ("VHOST_VSOCK_SET_RUNNING", struct.pack("<i", 0)),
    ]
    for gpa in (0x8000_0000, (1 << 32) + 0x1000_0000):
        with pytest.raises(ValueError, match="is not RAM"):
            kernel.hva(gpa)
    ioctls.refused["VHOST_VSOCK_SET_RUNNING"] = errno.EFAULT
    with pytest.raises(OSError, match="VHOST_VSOCK_SET_RUNNING: Bad address"):
        kernel.set_running(True)
    kernel.close()


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("VHOST_SET_OWNER", errno.ENOMEM, r"/dev/vhost-vsock: VHOST_SET_OWNER: Cannot allocate"),
        ("VHOST_SET_MEM_TABLE", errno.E2BIG, r"VHOST_SET_MEM_TABLE: Argument list too long"),
        ("VHOST_VSOCK_SET_GUEST_CID", errno.EADDRINUSE, r"has CID 7: give .* vhost,cid=8\)"),
        ("VHOST_VSOCK_SET_GUEST_CID", errno.EINVAL, r"vhost,cid=7: VHOST_VSOCK_SET_GUEST_CID: Inv"),
    ],
)
def test_what_the_kernel_refuses_at_first_is_one_line_and_leaves_nothing_open(
    ioctls: Ioctls, name: str, number: int, words: str
) -> None:
    ioctls.refused[name] = number
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=words) as raised:
        vhost.VhostVsock(7, REGIONS)
    assert "\n" not in str(raised.value)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, r"/dev/vhost-vsock does not exist: load its module \(modprobe vhost_vsock"),
        (errno.EACCES, r"/dev/vhost-vsock may not be opened: join its group"),
        (errno.ENODEV, r"cannot open /dev/vhost-vsock: No such device"),
    ],
)
def test_a_host_without_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(path: str, _flags: int) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=f"^--vsock vhost: {words}"):
        vhost.VhostVsock(3, REGIONS)


def test_the_option_is_a_path_or_vhost() -> None:
    assert parse_vsock("vhost") == (None, 3)
    assert parse_vsock("vhost,cid=9") == (None, 9)
    assert parse_vsock("./vhost,cid=9") == (os.path.abspath("vhost"), 9)
    with pytest.raises(argparse.ArgumentTypeError, match="give a CID of 3 to"):
        parse_vsock("vhost,cid=2")
    with pytest.raises(argparse.ArgumentTypeError, match="give vhost or vhost,cid=N"):
        parse_vsock("vhost,port=2")


# --- the device -----------------------------------------------------------------------------


class Host:
    """A device, and every kernel it opened."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.kernels: list[Kernel] = []
        self.errors: list[BaseException] = []
        self.taken = False
        self.device = VhostVsock(3, self.open, self.errors.append)

    def open(self) -> Kernel:
        if self.taken:
            raise ConfigError("another guest has CID 3")
        self.kernels.append(Kernel(self.log))
        return self.kernels[-1]

    def take(self) -> list[Any]:
        log = list(self.log)
        self.log.clear()
        return log

    @property
    def kernel(self) -> Kernel:
        return self.kernels[-1]


def eventually(condition: Any) -> None:
    """Wait for the device's thread."""
    done = threading.Event()
    for _ in range(3000):
        if condition():
            return
        done.wait(0.01)
    raise AssertionError("it does not become so")


@pytest.fixture
def host() -> Iterator[Host]:
    files, threads = os.listdir("/proc/self/fd"), threading.active_count()
    host = Host()
    yield host
    host.device.detach()
    host.device.close()
    assert host.errors == []
    assert all(kernel.closed for kernel in host.kernels)
    assert set(os.listdir("/proc/self/fd")) <= set(files)
    assert threading.active_count() <= threads


def test_the_kernel_serves_from_driver_ok_on_with_what_was_agreed(host: Host) -> None:
    driver = Driver(host.device)
    offered = driver.offered()
    assert offered == RING_FEATURES | VIRTIO_VSOCK_F_SEQPACKET
    driver.start(without=VIRTIO_VSOCK_F_SEQPACKET)
    agreed = offered & ~VIRTIO_VSOCK_F_SEQPACKET
    assert host.take() == [("features", agreed), ("ring", RX, 0), ("ring", TX, 0), "run"]
    for index in (RX, TX):  # what came before it served
        assert os.eventfd_read(host.kernel.eventfds[index][0]) > 0


def test_what_the_kernel_does_not_know_is_not_offered(host: Host) -> None:
    def old() -> Kernel:
        kernel = Kernel([])
        kernel.features = 1 << 32
        return kernel

    device = VhostVsock(4, old, host.errors.append)
    assert device.features == 1 << 32
    device.close()


def test_a_kick_that_is_an_exit_reaches_the_kernel(host: Host) -> None:
    driver = Driver(host.device)
    driver.start()
    kick = host.kernel.eventfds[TX][0]
    os.eventfd_read(kick)
    driver.write(0x050, TX)
    assert os.eventfd_read(kick) == 1


def test_over_mmio_its_calls_are_interrupts_with_a_status(host: Host) -> None:
    driver = Driver(host.device)
    driver.start()
    for rises, index in ((1, RX), (2, TX)):
        os.eventfd_write(host.kernel.eventfds[index][1], 1)
        eventually(lambda: driver.line.level)
        assert driver.interrupted()
        assert driver.line.rises == rises


def test_over_pci_it_writes_what_interrupts_the_guest_unless_that_is_masked(host: Host) -> None:
    board = Board(host.device)
    vectors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    for line, fd in zip(board.lines, vectors, strict=True):
        line.fd = fd
    driver = PciDriver(board)
    driver.start()
    host.take()
    kernel = host.kernel
    assert [kernel.eventfds[index][1] for index in (RX, TX)] == vectors[1:3]
    control = BAR_GPA + TABLE + 16 * 2 + 12
    board.mmio.write(control, 4, 1)
    assert kernel.eventfds[RX][1] == vectors[1]
    ours = kernel.eventfds[TX][1]
    assert ours not in vectors
    board.sent.clear()
    os.eventfd_write(ours, 1)
    eventually(lambda: board.transport.msix.pending(0, 1) == 1 << 2)
    assert board.sent == []
    board.mmio.write(control, 4, 0)
    assert board.sent == [(0xFEE0_0000, 0x42)]
    assert kernel.eventfds[TX][1] == vectors[2]
    flags = driver.msix_at + 2  # and with MSI-X turned off it is the ISR
    board.set_config(flags, 2, board.config(flags, 2) & ~(1 << 15))
    assert kernel.eventfds[TX][1] == ours
    os.eventfd_write(ours, 1)
    eventually(lambda: board.mmio.read(BAR_GPA + 0x1000, 1) == 1)
    assert "stop" not in host.take()
    for fd in vectors:
        os.close(fd)


def test_a_ring_that_the_kernel_finds_broken_has_the_device_need_a_reset(host: Host) -> None:
    driver = Driver(host.device)
    driver.start()
    host.take()
    os.eventfd_write(host.kernel.eventfds[RX][2], 1)
    eventually(lambda: driver.status & NEEDS_RESET)
    assert host.take() == ["stop"]
    driver.write(0x050, TX)
    assert host.take() == []
    driver.start()  # which resets it
    assert host.take()[-1] == "run"
    assert not driver.status & NEEDS_RESET


def test_a_kernel_that_will_not_begin_or_end_is_a_device_that_needs_a_reset(host: Host) -> None:
    host.kernel.refuses = True
    driver = Driver(host.device)
    driver.start()
    assert driver.status & NEEDS_RESET
    driver.start()  # with a new one
    assert not driver.status & NEEDS_RESET
    host.kernel.refuses = True
    host.device.suspend()
    assert driver.status & NEEDS_RESET
    host.device.resume()


def test_without_both_queues_it_does_not_begin(host: Host) -> None:
    driver = Driver(host.device)
    driver.negotiate(driver.offered())
    driver.set_up(RX)
    driver.write(0x070, 15)
    assert host.take() == []
    driver.set_up(TX)  # late, but then it does
    assert host.take()[-1] == "run"
    driver.write(0x030, RX)
    driver.write(0x044, 0)
    assert host.take() == ["stop"]


def test_a_reset_opens_the_kernels_side_anew_so_that_the_host_hears_of_it(host: Host) -> None:
    driver = Driver(host.device)
    driver.write(0x070, 0)
    assert host.take() == []  # there was nothing to hear of
    driver.start()
    host.take()
    driver.write(0x070, 0)
    assert host.take() == ["close"]
    assert len(host.kernels) == 2


def test_once_closed_a_driver_that_still_runs_has_it_open_nothing(host: Host) -> None:
    driver = Driver(host.device)
    driver.start()
    host.device.close()
    host.take()
    driver.start()
    driver.write(0x050, TX)
    assert host.take() == []
    assert len(host.kernels) == 1


def test_a_cid_that_somebody_took_during_a_reset_is_asked_for_again(host: Host) -> None:
    driver = Driver(host.device)
    driver.start()
    host.taken = True
    driver.start()
    assert driver.status & NEEDS_RESET
    host.taken = False
    driver.start()
    assert not driver.status & NEEDS_RESET
    assert host.take()[-1] == "run"


def test_while_suspended_it_leaves_ram_alone_and_goes_on_where_it_was(host: Host) -> None:
    driver = Driver(host.device)
    queues = driver.start()
    host.kernel.base = [5, 65535]
    driver.ram.put("<H", queues[TX].used_gpa + 2, 65534)
    host.take()
    host.device.suspend()
    host.device.suspend()
    assert host.take() == ["stop"]
    saved = host.device.save()
    assert host.take() == []
    assert [queue["last_avail"] for queue in saved["queues"]] == [5, 65535, 0]
    assert saved["queues"][TX]["used_idx"] == 65534
    host.device.resume()
    assert host.take()[1:] == [("ring", RX, 5), ("ring", TX, 65535), "run"]


def test_saved_and_loaded_elsewhere_it_goes_on_and_tells_of_lost_connections(host: Host) -> None:
    driver = Driver(host.device)
    queues = driver.start()
    host.kernel.base = [300, 400]
    saved = driver.mmio.save()
    assert host.take()[-1] == "run"  # it goes on here as well
    other = Host()
    mmio = VirtioMmio(other.device, driver.ram, driver.line)
    mmio.load(saved)
    assert other.take()[1:] == [("ring", RX, 300), ("ring", TX, 400), "run"]
    driver.mmio = mmio
    token = queues[EVENT].send([], [4])
    assert queues[EVENT].used() == [(token, 4)]
    assert queues[EVENT].filled(token, 4) == struct.pack("<I", 0)  # TRANSPORT_RESET
    assert driver.interrupted()
    mmio.load(saved)  # over one that serves: the host's ends are reset
    assert other.take()[0] == "close"
    other.device.detach()


# --- in a machine ---------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_its_doorbells_are_the_kernels_and_no_exits(host: Host, transport: str) -> None:
    with Machine(memory=1 << 20, transport=transport) as machine:
        machine.add_virtio(host.device)
        if transport == "pci":
            bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY
            rings = [(bell + NOTIFY_OFF_MULTIPLIER * index, index) for index in (TX, EVENT)]
        else:
            bell = layout.VIRTIO_MMIO_GPA + VirtioMmio.QUEUE_NOTIFY
            rings = [(bell, index) for index in (TX, EVENT)]
        exits = run(machine, writes(*rings))
        # the event queue is ours
        assert [exit_.address for exit_ in exits] == [rings[1][0], 0xF4]
        assert os.eventfd_read(host.device.kicks[TX]) == 1


@pytest.mark.kvm
def test_a_pause_of_the_whole_machine_is_one_of_the_kernels_too(host: Host) -> None:
    with Machine(memory=16 << 20, cpus=2, transport="mmio") as machine:
        machine.add_virtio(host.device)
        machine.boot_real_mode(b"\xeb\xfe")
        machine.start()
        machine.pause(0)
        assert not host.device._suspended
        machine.pause()
        assert host.device._suspended
        machine.resume(1)
        assert not host.device._suspended
