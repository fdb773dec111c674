"""Interrupts and doorbells that the kernel carries, with a tiny guest on real KVM."""

import os
import resource
import select
import socket
import struct
import threading
import time
from functools import partial
from typing import Any, cast

import pytest

from tests.waiting import wait_for
from tinyvmm import kvm, layout, trace
from tinyvmm.devices.device import Device
from tinyvmm.devices.pci import PCI_INTERRUPT_LINE
from tinyvmm.devices.virtio.mmio import VirtioMmio
from tinyvmm.devices.virtio.pci import (
    NOTIFY,
    NOTIFY_OFF_MULTIPLIER,
    VIRTIO_PCI_CAP_PCI_CFG,
)
from tinyvmm.devices.virtio.rng import VirtioRng
from tinyvmm.eventfds import Doorbells, MsiRoutes
from tinyvmm.machine import Machine
from tinyvmm.vcpu import StopCause

pytestmark = pytest.mark.kvm

VECTOR = 0x50
MESSAGE = (layout.LOCAL_APIC_GPA, VECTOR)  # to the local APIC with id 0
SVR, APIC_ENABLED = 0xF0, 1 << 8  # Spurious Interrupt Vector Register
GDT, IDT, HANDLER = 0x3000, 0x4000, 0x2000
UP_GPA = 0x6000  # where a guest that is set up says so


class Rung(VirtioRng):
    """A device that notes its doorbells and who rang."""

    def __init__(self, *, ioeventfd: bool = True) -> None:
        super().__init__()
        self.ioeventfd = ioeventfd
        self.bells: list[tuple[int, str]] = []
        self.heard = threading.Event()

    def notify(self, index: int) -> None:
        self.bells.append((index, threading.current_thread().name))
        self.heard.set()


class Ender(Device):
    """Ends the run when it is written to."""

    name = "ender"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def write(self, offset: int, size: int, value: int) -> None:
        self.machine.stop(f"{value:#x}")


class Slow(Device):
    """Returns from a write when a bell has been answered once more."""

    name = "slow"

    def __init__(self, rung: Rung) -> None:
        self.rung = rung

    def write(self, offset: int, size: int, value: int) -> None:
        assert self.rung.heard.wait(30)
        self.rung.heard.clear()


END = b"\xe6\xf4\xf4"  # out 0xF4


def store(gpa: int, value: int) -> bytes:
    """Code for flat 32-bit mode, which writes 32 bits."""
    return b"\xc7\x05" + struct.pack("<II", gpa, value)


def copy(gpa: int, to_gpa: int) -> bytes:
    """Code that reads 32 bits, and leaves them at another address."""
    return b"\xa1" + struct.pack("<I", gpa) + b"\xa3" + struct.pack("<I", to_gpa)


def writes(*stores: tuple[int, int]) -> bytes:
    """Code that stores each 32-bit value at its address, then ends."""
    return b"".join(store(gpa, value) for gpa, value in stores) + END


def protected_mode(machine: Machine, code: bytes) -> None:
    machine.memory.write(0x1000, code)
    handle = machine.vcpus[0].handle
    sregs = handle.get_sregs()
    machine.memory.write(GDT, struct.pack("<3Q", 0, 0xCF9B00_0000FFFF, 0xCF9300_0000FFFF))
    sregs.gdt = kvm.kvm_dtable(base=GDT, limit=23)
    sregs.idt = kvm.kvm_dtable(base=IDT, limit=0x7FF)
    flat = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1, "db": 1}
    sregs.cs = kvm.kvm_segment(selector=0x8, type=0xB, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, kvm.kvm_segment(selector=0x10, type=0x3, **flat))
    sregs.cr0 |= 1
    handle.set_sregs(sregs)
    handle.set_regs(kvm.kvm_regs(rip=0x1000, rsp=0x8000, rflags=1 << 1))


def run(machine: Machine, code: bytes) -> list[trace.Access]:
    """Run the code to its end; every access that reached us."""
    seen: list[trace.Record] = []
    machine.ports.add(0xF4, 4, Ender(machine))
    protected_mode(machine, code)
    trace.hook = seen.append
    try:
        machine.start()
        assert machine.wait(30)
    finally:
        trace.hook = None
    return [record for record in seen if isinstance(record, trace.Access)]


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_a_doorbell_rings_in_the_devices_thread_without_an_exit(transport: str) -> None:
    device = Rung()
    with Machine(memory=1 << 20, transport=transport) as machine:
        machine.add_virtio(device)
        if transport == "pci":
            bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY
        else:
            bell = layout.VIRTIO_MMIO_GPA + VirtioMmio.QUEUE_NOTIFY
        exits = run(machine, writes((bell, 0)))
        assert [(e.space, e.address) for e in exits] == [("port", 0xF4)]
        assert device.heard.wait(30)
    assert device.bells == [(0, "io virtio-rng")]


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_a_doorbell_may_be_an_exit(transport: str) -> None:
    device = Rung(ioeventfd=False)
    with Machine(memory=1 << 20, transport=transport) as machine:
        machine.add_virtio(device)
        if transport == "pci":
            bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY
        else:
            bell = layout.VIRTIO_MMIO_GPA + VirtioMmio.QUEUE_NOTIFY
        assert len(run(machine, writes((bell, 0)))) == 2
    assert device.bells == [(0, "vcpu0")]


def test_the_machine_may_overrule_the_device() -> None:
    device = Rung(ioeventfd=True)
    with Machine(memory=1 << 20, ioeventfd=False) as machine:
        machine.add_virtio(device)
        bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY
        assert len(run(machine, writes((bell, 0)))) == 2


def test_a_bell_of_a_queue_there_is_none_of_is_an_exit_and_harmless() -> None:
    device = Rung()
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(device)
        bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY + NOTIFY_OFF_MULTIPLIER
        assert len(run(machine, writes((bell, 0)))) == 2
    assert device.bells == [(1, "vcpu0")]


def test_doorbells_move_with_the_bar() -> None:
    device = Rung()
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(device)
        assert machine.pci is not None
        config = layout.PCI_ECAM_GPA + (1 << 15)
        old = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE
        new = old + 0x100_0000
        code = writes((config + 0x10, new), (old + NOTIFY, 0), (new + NOTIFY, 0))
        exits = run(machine, code)
        # the BAR's register, and 0xF4; what is at the old place is nobody's
        assert [e.address for e in exits] == [config + 0x10, 0xF4]
        assert device.heard.wait(30)
    assert device.bells == [(0, "io virtio-rng")]


def test_configuration_space_is_read_without_exits_until_reading_leads_elsewhere() -> None:
    config = layout.PCI_ECAM_GPA + (1 << 15)
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(VirtioRng())
        assert machine.pci is not None
        ours = machine.pci.slots[1]
        window = bytes(ours.config).index(bytes((20, VIRTIO_PCI_CAP_PCI_CFG))) - 2
        code = copy(config, 0x6000) + copy(config + (1 << 12), 0x6004)
        code += store(config + PCI_INTERRUPT_LINE, 0x11) + copy(config + PCI_INTERRUPT_LINE, 0x6008)
        code += store(config + window + 12, 4) + copy(config, 0x600C)
        exits = run(machine, code + END)
        found = struct.unpack("<4I", machine.memory.read(0x6000, 16))
    assert found == (0x1044_1AF4, 0xFFFF_FFFF, 0x11, 0x1044_1AF4)
    assert [(exit_.direction, exit_.address) for exit_ in exits] == [
        ("write", config + PCI_INTERRUPT_LINE),
        ("write", config + window + 12),
        ("read", config),
        ("write", 0xF4),
    ]


def test_what_rang_before_the_end_is_answered_before_the_wait_for_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Rung()
    with Machine(memory=1 << 20) as machine:
        listen = Doorbells.wait

        def late(doorbells: Doorbells) -> list[tuple[int, int]]:
            wait_for(lambda: machine.cause is not None)
            time.sleep(0.2)  # a thread that had no processor
            return listen(doorbells)

        monkeypatch.setattr(Doorbells, "wait", late)
        machine.add_virtio(device)
        bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY
        run(machine, writes((bell, 0)))
        assert device.bells == [(0, "io virtio-rng")]
        assert machine.wait(0) == machine.cause


def test_a_devices_thread_hears_of_a_descriptor_until_it_is_to_no_more() -> None:
    heard: list[bytes] = []
    errors: list[BaseException] = []
    doorbells = Doorbells(cast("Any", None), Rung(), 0, errors.append)
    doorbells.start()
    source, target = os.pipe()
    assert doorbells.watch(source, lambda: heard.append(os.read(source, 1)))
    for count in range(1, 5):
        os.write(target, b"x")
        wait_for(partial(lambda count: len(heard) == count, count))
    doorbells.unwatch(source)
    doorbells.unwatch(source)
    os.write(target, b"y")
    time.sleep(0.1)
    assert heard == [b"x"] * 4
    with open(__file__, "rb") as file:  # epoll has nothing to say of files
        assert not doorbells.watch(file.fileno(), lambda: None)
    assert doorbells.watch(source, lambda: heard.append(os.read(source, 1)))
    wait_for(lambda: heard[-1] == b"y")
    doorbells.close()
    doorbells.unwatch(source)  # harmless
    os.close(source)
    os.close(target)
    assert errors == []


def test_a_devices_thread_hears_of_room_in_a_socket_in_place_of_bytes() -> None:
    heard: list[str] = []
    errors: list[BaseException] = []
    doorbells = Doorbells(cast("Any", None), Rung(), 0, errors.append)
    doorbells.start()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        said = threading.Event()

        def room() -> None:
            heard.append("room")
            doorbells.unwatch(ours.fileno())
            said.set()

        def data() -> None:
            heard.append(ours.recv(1).decode())
            assert doorbells.watch(ours.fileno(), room, select.EPOLLOUT)

        assert doorbells.watch(ours.fileno(), data)
        assert said.wait(10)
        theirs.send(b"y")
        time.sleep(0.05)
        assert heard == ["x", "room"]
        doorbells.close()
    assert errors == []


def test_a_bell_is_heard_each_time_it_rings_though_nobody_reads_it() -> None:
    device = Rung()
    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(device)
        bell = layout.PCI_WINDOW_GPA + layout.PCI_SLOT_STRIDE + NOTIFY
        machine.ports.add(0xF8, 1, Slow(device))
        rings = [writes((bell, 0))[:-3] + b"\xe6\xf8"] * 20  # out 0xF8, which waits for the answer
        exits = run(machine, b"".join(rings) + b"\xe6\xf4\xf4")
        assert [e.address for e in exits] == [0xF8] * 20 + [0xF4]
    assert device.bells == [(0, "io virtio-rng")] * 20


def test_an_error_on_a_devices_thread_ends_the_run_and_is_raised() -> None:
    class Broken(Rung):
        def notify(self, index: int) -> None:
            raise RuntimeError("a bug of ours")

    with Machine(memory=1 << 20) as machine:
        machine.add_virtio(Broken())
        protected_mode(
            machine, writes((layout.PCI_WINDOW_GPA + 0x1_0000 + NOTIFY, 0))[:-3] + b"\xeb\xfe"
        )
        machine.start()
        with pytest.raises(RuntimeError, match="a bug of ours"):
            machine.wait(30)
        assert machine.cause == StopCause.ERROR


def test_a_message_interrupts_through_its_eventfd() -> None:
    with Machine(memory=1 << 20) as machine:
        machine.ports.add(0xF4, 4, Ender(machine))
        enable = writes((layout.LOCAL_APIC_GPA + SVR, APIC_ENABLED | 0xFF), (UP_GPA, 1))[:-3]
        protected_mode(machine, enable + b"\xfb\xf4\xeb\xfd")  # sti; hlt for ever
        machine.memory.write(HANDLER, b"\xb0\x42\xe6\xf4\xf4")  # mov al, 0x42; out 0xF4, al
        machine.memory.write(IDT + 8 * VECTOR, struct.pack("<HHHH", HANDLER, 0x8, 0x8E00, 0))
        routes = MsiRoutes(machine.open_vm())
        line = routes.line()
        line.fire()  # leads nowhere: nothing happens
        line.route(*MESSAGE)
        machine.start()
        wait_for(lambda: machine.memory.read(UP_GPA, 1) == b"\1")
        assert machine.wait(0.1) is None
        line.fire()
        assert machine.wait(30) == "0x42"
        routes.close()


def test_the_controllers_pins_still_lead_where_they_did() -> None:
    """The PIC, as the BIOS leaves it to real mode: pin 4 is vector 0x0C."""
    with Machine(memory=1 << 20) as machine:
        machine.ports.add(0xF4, 4, Ender(machine))
        machine.memory.write(0x0C * 4, struct.pack("<HH", 0x2000, 0))
        machine.memory.write(0x2000, b"\xb0\x43\xe6\xf4\xf4")
        init = b"".join(
            bytes((0xB0, value, 0xE6, port))
            for port, value in ((0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0x21, 0))
        )
        machine.boot_real_mode(init + b"\xfb\xf4\xeb\xfd")
        routes = MsiRoutes(machine.open_vm())
        routes.line().route(*MESSAGE)  # which replaces the whole table
        machine.start()
        line = machine.irq_line(4)
        for _ in range(300):  # the PIC forgets what came before it was set up
            line.set(True)
            line.set(False)
            if machine.wait(0.1):
                break
        assert machine.cause == "0x43"
        routes.close()


def test_a_thousand_vectors_cost_descriptors_only_once_routed() -> None:
    with Machine(memory=1 << 20) as machine:
        before = len(os.listdir("/proc/self/fd"))
        routes = MsiRoutes(machine.open_vm())
        lines = [routes.line() for _ in range(1000)]
        assert len(os.listdir("/proc/self/fd")) == before
        lines[-1].route(*MESSAGE)
        assert len(os.listdir("/proc/self/fd")) == before + 1
        routes.close()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_vector_for_which_there_is_no_descriptor_is_silent_and_told_of() -> None:
    seen: list[trace.Record] = []
    with Machine(memory=1 << 20) as machine:
        routes = MsiRoutes(machine.open_vm())
        line = routes.line()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        trace.hook = seen.append
        try:
            line.route(*MESSAGE)
        finally:
            trace.hook = None
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        line.fire()
        assert "Too many open files" in trace.text(seen[0])
        line.route(*MESSAGE)  # once there is one again, it is there
        line.fire()
        routes.close()
