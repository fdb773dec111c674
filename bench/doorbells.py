"""Where a request runs: on the vCPU's thread, on one of the device's, or on one that looks first.

A tiny guest on this computer's KVM makes 9P requests one after another, each vCPU at a device of
its own: it advances the available ring, rings the doorbell, and watches the used ring until the
reply is there. So a figure is the whole way of one request, in microseconds, but for Linux's own
part and the interrupt. `inline`: the doorbell is an exit. `thread`: it is an ioeventfd, and a
thread of the device sleeps in poll(2). `spinning`: that looks for 200 us before it sleeps.

Then the first two with Linux in the guest, as `bench guest9p` has it, and how many exits they take.
"""

import os
import struct
import sys
import tempfile
from statistics import median
from time import perf_counter, perf_counter_ns, sleep

from bench.guest9p import Entry, measured, prepared, run_ours
from tinyvmm import eventfds, kvm, layout, ninep
from tinyvmm.devices.virtio.device import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    VIRTIO_F_VERSION_1,
)
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.devices.virtio.pci import NOTIFY
from tinyvmm.devices.virtio.queue import VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Session
from tinyvmm.machine import Machine

ROUNDS, SECONDS = 5, 0.3
SPIN_NS = 200_000
PER_VCPU = 1 << 20  # of RAM, from RAM_GPA on
RAM_GPA = 1 << 20
DESC, AVAIL, USED, REQUEST, CODE, REPLY = 0, 0x1000, 0x2000, 0x4000, 0x5000, 0x1_0000
QUEUE = 128
REQUESTS = {
    "getattr": (ninep.Tgetattr(1, ninep.P9_GETATTR_BASIC), 200),
    "read 4 KiB": (ninep.Tread(2, 0, 4096), 4096 + 11),
    "read 128 KiB": (ninep.Tread(2, 0, 128 << 10), (128 << 10) + 11),
}


class Spinning(eventfds.Doorbells):
    """Doorbells whose thread does not sleep at once."""

    def wait(self) -> list[tuple[int, int]]:
        """Look for a while, then sleep."""
        poll = self.poller.poll
        end = perf_counter_ns() + SPIN_NS
        while perf_counter_ns() < end:
            found = poll(0)
            if found:
                return found
        return poll()


def guest_code(base: int, bell: int) -> bytes:
    """For flat 32-bit mode: make a request, ring, wait for its reply, again."""
    available, used = base + AVAIL + 2, base + USED + 2
    return (
        b"\x66\xff\x05" + struct.pack("<I", available)  # again: inc word [avail.idx]
        + b"\x66\xa1" + struct.pack("<I", available)  # mov ax, [avail.idx]
        + b"\xc7\x05" + struct.pack("<II", bell, 0)  # mov dword [bell], 0
        + b"\x66\x3b\x05" + struct.pack("<I", used)  # look: cmp ax, [used.idx]
        + b"\x75\xf7"  # jne look
        + b"\xeb\xde"  # jmp again
    )  # fmt: skip


def prepare(machine: Machine, number: int, tree: HostTree, what: str) -> Virtio9P:
    """Give vCPU `number` a device, a driver that is done with its set-up, and its code."""
    session = Session(tree, name=f"bench{number}")
    device = Virtio9P(f"bench{number}", session)
    machine.add_virtio(device)
    base = RAM_GPA + number * PER_VCPU
    for message in (
        ninep.Tversion(256 << 10, b"9P2000.L"),
        ninep.Tattach(1, ninep.NOFID, b"", b"", 0),
        ninep.Twalk(1, 2, (b"file",)),
        ninep.Tlopen(2, os.O_RDONLY),
    ):
        session.submit([memoryview(ninep.encode(message, 1))], [memoryview(bytearray(4096))])
    request, room = REQUESTS[what]
    encoded = ninep.encode(request, 1)
    machine.memory.write(base + REQUEST, encoded)
    first = (base + REQUEST, len(encoded), VIRTQ_DESC_F_NEXT, 1)
    machine.memory.write(
        base + DESC, struct.pack("<QIHHQIHH", *first, base + REPLY, room, VIRTQ_DESC_F_WRITE, 0)
    )
    machine.memory.write(base + AVAIL, struct.pack("<H", 1))  # no interrupts; every slot: head 0
    device.driver_features = VIRTIO_F_VERSION_1
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    queue = device.queues[0]
    queue.desc_gpa, queue.avail_gpa, queue.used_gpa = base + DESC, base + AVAIL, base + USED
    device.enable_queue(queue)
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    bell = layout.PCI_WINDOW_GPA + (1 + number) * layout.PCI_SLOT_STRIDE + NOTIFY
    machine.memory.write(base + CODE, guest_code(base, bell))
    handle = machine.vcpus[number].handle
    sregs = handle.get_sregs()
    flat = {"limit": 0xFFFF_FFFF, "present": 1, "s": 1, "g": 1, "db": 1}
    sregs.cs = kvm.kvm_segment(selector=0x8, type=0xB, **flat)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, kvm.kvm_segment(selector=0x10, type=0x3, **flat))
    sregs.cr0 |= 1
    handle.set_sregs(sregs)
    handle.set_regs(kvm.kvm_regs(rip=base + CODE, rflags=1 << 1))
    return device


def measure(where: str, what: str, cpus: int, path: str) -> float:
    """Microseconds for a request of each vCPU."""
    plain = eventfds.Doorbells
    if where == "spinning":
        eventfds.Doorbells = Spinning  # type: ignore[misc]
    tree = HostTree(path)
    try:
        with Machine(
            memory=8 << 20, cpus=cpus, irqchip=False, ioeventfd=where != "inline"
        ) as machine:
            devices = [prepare(machine, number, tree, what) for number in range(cpus)]
            machine.start()
            sleep(0.1)
            queues = [device.queues[0] for device in devices]
            begin, before = perf_counter(), [queue.used_idx for queue in queues]
            sleep(SECONDS)
            done = sum((q.used_idx - b) % (1 << 16) for q, b in zip(queues, before, strict=True))
            return 1e6 * cpus * (perf_counter() - begin) / done
    finally:
        tree.close()
        eventfds.Doorbells = plain  # type: ignore[misc]


def in_linux(source: str, program: str, count: int) -> list[Entry]:
    """Do what guest9p does with each kind of doorbell, `count` times, with one vCPU and two."""
    found = []
    with prepared(source, program) as (tree_path, archive, cmdline):
        for turn in range(count):
            for cpus in (1, 2):
                for way in ("inline", "thread"):
                    ioeventfd = way == "thread"
                    found += [
                        entry._replace(vmm=f"{way} {cpus}")
                        for entry in run_ours(
                            tree_path,
                            archive,
                            f"reboot=a {cmdline}",
                            turn,
                            cpus=cpus,
                            ioeventfd=ioeventfd,
                        )
                    ]
    return found


def show_linux(found: list[Entry]) -> None:
    """Print times as ratios to inline, and exits."""
    ways = [(way, cpus) for cpus in (1, 2) for way in ("inline", "thread")]
    print(f"{'microseconds each (exits)':28}" + "".join(f"{way:>14} {cpus}" for way, cpus in ways))
    for cache, what in dict.fromkeys((entry.cache, entry.what) for entry in found):
        line = f"{cache:6}{what:22}"
        for way, cpus in ways:
            those = [e for e in found if (e.vmm, e.cache, e.what) == (f"{way} {cpus}", cache, what)]
            (first,) = (entry for entry in those if not entry.turn)
            middle = median(e.ns / e.often / 1000 for e in those if e.turn)
            line += f"{middle:9.0f} ({first.exits / first.often:.1f})"
        print(line)


def main() -> None:
    """Measure, interleaved, and print medians."""
    ways = ("inline", "thread", "spinning")
    print(f"{'microseconds a request':30}" + "".join(f"{way:>10}" for way in ways))
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "file"), "wb") as file:
            file.write(os.urandom(128 << 10))
        for cpus in (1, 2):
            for what in REQUESTS:
                found: dict[str, list[float]] = {way: [] for way in ways}
                for _ in range(ROUNDS):
                    for way in ways:
                        found[way].append(measure(way, what, cpus, directory))
                figures = "".join(f"{median(found[way]):10.1f}" for way in ways)
                print(f"{what:20} {cpus} vCPU{'s' * (cpus > 1):4}{figures}")
                sys.stdout.flush()
    show_linux(measured(in_linux))
