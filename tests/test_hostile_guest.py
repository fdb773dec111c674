"""What a guest may do to the host's side of its command and of its devices, and must not gain."""

import errno
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

from tests.test_session_host import GuestPort, Host
from tests.virtio_driver import NEXT, WRITE, Driver
from tinyvmm import ninep
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.devices.virtio.queue import Virtqueue
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Session as Session9P
from tinyvmm.guest.protocol import EXEC_FAILED, EXITED, RECORD, SETUP_FAILED, STARTED
from tinyvmm.machine import Machine
from tinyvmm.session import HostFiles, Ports, Session
from tinyvmm.streams import PortInput, PortOutput
from tinyvmm.vcpu import StopCause

# --- records of PID 1 -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [STARTED, EXITED, EXEC_FAILED, SETUP_FAILED])
@pytest.mark.parametrize("value", [0, 1 << 31, (1 << 32) - 1, 0xFFFF_0000, errno.ENOENT])
def test_a_record_with_any_value_ends_in_a_status(kind: int, value: int) -> None:
    host = Host()
    try:

        def guest(g: object) -> None:
            host.guest.record(kind, value)
            host.guest.record(EXITED, 0)

        assert 0 <= host.run(guest).status <= 255
    finally:
        host.close()


class Flood(PortOutput):
    """A control port that always holds more records, until the session lets go of it."""

    LIMIT = 100_000  # so that a session that never looks up fails instead of hanging

    def __init__(self, on_read: Callable[[], None]) -> None:
        super().__init__(GuestPort())
        self.reads = 0
        self.released = False
        self._on_read = on_read

    def read(self) -> bytes:
        self.reads += 1
        self._on_read()
        if self.released or self.reads > self.LIMIT:
            return b""
        return RECORD.pack(99, 0) * 100

    def release(self) -> None:
        self.released = True


def test_a_flood_of_records_neither_outruns_the_timeout_nor_piles_up() -> None:
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, len(session._events))

    flood = Flood(watch)
    out, err = PortOutput(GuestPort()), PortOutput(GuestPort())
    ports = Ports(PortInput(GuestPort()), out, err, flood, PortInput(GuestPort()))
    files = HostFiles(None, None, None)
    session = Session(ports, command="prog", timeout=0.2, files=files)
    assert session.run().status == 124
    assert flood.reads <= Flood.LIMIT
    assert most < 1000


# --- rings ----------------------------------------------------------------------------------


def read_file_for_ever(tree: HostTree, path: Path) -> tuple[Virtio9P, Driver]:
    """A driver whose one request answers with the next available idx, and its own next offset.

    Once it is kicked, no CPU of the guest is needed to keep the device busy for ever.
    """
    count = 1 << 16
    path.write_bytes(
        b"".join(struct.pack("<HQ", (i + 2) % count, 10 * ((i + 1) % count)) for i in range(count))
    )
    device = Virtio9P("root", Session9P(tree))
    driver = Driver(device)
    queue = driver.start()[0]
    for message in (
        ninep.Tversion(8192, b"9P2000.L"),
        ninep.Tattach(0, ninep.NOFID, b"", b"", 0),
        ninep.Twalk(0, 1, (os.fsencode(path.name),)),
        ninep.Tlopen(1, os.O_RDONLY),
    ):
        queue.send([ninep.encode(message, 1)], [100])
        (reply,) = queue.collect()
        assert reply[4] == message.number + 1
    last = queue.avail_idx
    ram = driver.ram
    request_gpa, head_gpa = ram.alloc(23), ram.alloc(11)
    ram.view(request_gpa, 23)[:] = ninep.encode(ninep.Tread(1, 10 * last, 10), 1)
    queue.write_descriptor(0, request_gpa, 23, NEXT, 1)
    queue.write_descriptor(1, head_gpa, 11, NEXT | WRITE, 2)
    queue.write_descriptor(2, queue.avail_gpa + 2, 2, NEXT | WRITE, 3)
    queue.write_descriptor(3, request_gpa + 11, 8, WRITE)
    for slot in range(queue.size):
        ram.put("<H", queue.avail_gpa + 4 + 2 * slot, 0)
    ram.put("<H", queue.avail_gpa + 2, last + 1)
    return device, driver


def test_a_ring_that_fills_itself_lets_go_when_the_machine_stops(tmp_path: Path) -> None:
    tree = HostTree(str(tmp_path))
    device, driver = read_file_for_ever(tree, tmp_path / "ring")
    vcpu = threading.Thread(target=driver.write, args=(0x050, 0), daemon=True)
    vcpu.start()
    queue = device.queues[0]
    while queue.used_idx < 20 * queue.size:  # of one chain, made available once
        assert vcpu.is_alive()
        sleep(0.01)
    device.halt()
    vcpu.join(120)
    assert not vcpu.is_alive()
    device.detach()
    tree.close()


def test_a_queue_disabled_with_a_request_in_flight_gets_no_reply() -> None:
    queue = Virtqueue(0, 8, pytest.fail)
    driver = Driver(VirtioRng())
    ring = driver.start()[0]
    ring.add([], [16])
    queue.desc_gpa, queue.avail_gpa, queue.used_gpa = ring.desc_gpa, ring.avail_gpa, ring.used_gpa
    queue.enable(driver.ram, driver.features)
    chain = queue.pop()
    assert chain is not None
    queue.disable()
    queue.push(chain, 16)
    assert driver.ram.u16(ring.used_gpa + 2) == 0


def test_a_late_reply_reaches_no_machine_that_is_being_taken_apart() -> None:
    device = VirtioRng()
    driver = Driver(device)
    ring = driver.start()[0]
    ring.add([], [16])
    chain = device.queues[0].pop()
    assert chain is not None
    device.detach()
    device.queues[0].push(chain, 16)
    device.set_config(b"")
    assert not driver.line.rises


@pytest.mark.kvm
def test_a_machine_halts_its_devices_when_it_stops_and_detaches_them_when_it_closes() -> None:
    calls = []

    class Watched(VirtioRng):
        def halt(self) -> None:
            calls.append("halt")
            super().halt()

        def detach(self) -> None:
            calls.append("detach")
            super().detach()

    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(Watched())
        machine.stop(StopCause.STOPPED)
        assert calls == ["halt"]
    assert calls == ["halt", "detach"]
