"""A disk in a guest: our virtio-blk, by doorbell exits and by ioeventfd, beside QEMU's.

The same stock kernel boots, by turns, in our VMM and in QEMU's (`-accel kvm`, q35 machine,
virtio-blk-pci, aio=threads, cache=writeback), one vCPU and one raw image in RAM (/dev/shm); its
PID 1 is a C program that reads and writes /dev/vda around its own page cache, one request at a time
or many, and says how long it took by the guest's own clock. Where this computer's KVM cannot run
Linux all of it happens in one lab, where Python is slowed down more than C is.

A first round only warms caches; in it our exits are counted.
"""

import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.guest9p import COMMON, initramfs
from bench.place import where_linux_runs

C_PROGRAM = Path(__file__).with_suffix(".c")
COUNT, MIB, ROUNDS = 1000, 64, 3
SIZE = 256 << 20
LIMIT = 300  # seconds for one guest
MODULES = ("virtio_pci", "virtio_blk")
OURS = ("inline", "thread")


class Entry(NamedTuple):
    """One thing done: how often, and how long it took; with the exits where they are known."""

    vmm: str
    turn: int
    what: str
    often: int
    ns: int
    exits: int = 0


def run_ours(image: str, archive: bytes, cmdline: str, turn: int, vmm: str) -> list[Entry]:
    """Boot our VMM, and return what the program said."""
    from tinyvmm import trace
    from tinyvmm.boot import load_kernel
    from tinyvmm.devices.virtio.blk import VirtioBlk
    from tinyvmm.disks.raw import RawDisk
    from tinyvmm.images import kernels
    from tinyvmm.machine import Machine

    lines: list[tuple[str, int]] = []  # each with the exits so far
    shown = bytearray()
    exits = 0

    def console(data: bytes) -> None:
        shown.extend(data)
        while b"\n" in shown:
            line, _, rest = shown.partition(b"\n")
            lines.append((line.decode(errors="replace").strip(), exits))
            shown[:] = rest

    def count(record: trace.Record) -> None:
        nonlocal exits
        exits += isinstance(record, trace.Access | trace.Unclaimed) and "uart" not in str(record)

    disk = RawDisk(image)
    try:
        with (
            Machine(memory=512 << 20, ioeventfd=vmm == "thread") as machine,
            load_kernel(kernels.find().vmlinuz) as kernel,
        ):
            machine.add_board(console=console)
            machine.add_virtio(VirtioBlk(disk))
            machine.boot_linux(kernel, initrd=[archive], cmdline=cmdline)
            if not turn:
                trace.hook = count
            machine.start()
            try:
                machine.wait(LIMIT)
            finally:
                trace.hook = None
    finally:
        disk.close()
    found = []
    before = 0
    for line, exits_now in lines:
        word, *rest = line.split() or [""]
        if word == "end":
            what, often, ns = rest
            found.append(Entry(vmm, turn, what, int(often), int(ns), exits_now - before))
        before = exits_now
    if "done" not in [line for line, _ in lines]:
        raise RuntimeError("\n".join(line for line, _ in lines[-10:]))
    return found


def run_qemu(image: str, vmlinuz: str, initrd: str, cmdline: str, turn: int) -> list[Entry]:
    """Boot QEMU, and return what the program said."""
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults"]
    qemu += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-M", "q35"]
    qemu += ["-kernel", vmlinuz, "-initrd", initrd, "-append", cmdline]
    qemu += ["-drive", f"if=none,id=d,file={image},format=raw", "-device", "virtio-blk-pci,drive=d"]
    done = subprocess.run(
        qemu, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False
    )
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines()]
    if "done" not in lines:
        raise RuntimeError("\n".join(lines[-10:]) + done.stderr.decode())
    words = [line.split() for line in lines]
    return [
        Entry("QEMU", turn, what, int(often), int(ns))
        for what, often, ns in [line[1:] for line in words if line[:1] == ["end"]]
    ]


def measure(program: str, rounds: int) -> list[Entry]:
    """Run each `rounds` times in turn, after once to warm caches."""
    from tinyvmm.images import kernels

    found = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        image = os.path.join(work, "image")
        with open(image, "wb") as file:
            file.writelines(bytes(range(256)) * 4096 for _ in range(SIZE >> 20))
        archive, modules = initramfs(program, MODULES)
        initrd = os.path.join(work, "initrd")
        Path(initrd).write_bytes(archive)
        cmdline = f"{COMMON} -- {COUNT} {MIB} {' '.join(modules)}"
        for turn in range(rounds + 1):
            for vmm in OURS:
                found += run_ours(image, archive, f"reboot=a {cmdline}", turn, vmm)
            found += run_qemu(image, kernels.find().vmlinuz, initrd, cmdline, turn)
    return found


def show(found: list[Entry]) -> None:
    """Print one line for each thing done."""
    columns = *OURS, "QEMU", "ratio", "ratio", *["exits"] * len(OURS)
    print(f"{'microseconds for each':26}" + "".join(f"{name:>9}" for name in columns))
    for what in dict.fromkeys(entry.what for entry in found):
        those = [entry for entry in found if entry.what == what]
        middle = {
            vmm: median(e.ns / e.often / 1000 for e in those if e.vmm == vmm and e.turn)
            for vmm in (*OURS, "QEMU")
        }
        exits = [e.exits / e.often for e in those if e.vmm in OURS and not e.turn]
        print(
            f"{what:26}"
            + "".join(f"{middle[vmm]:9.0f}" for vmm in (*OURS, "QEMU"))
            + "".join(f"{middle[vmm] / middle['QEMU']:9.2f}" for vmm in OURS)
            + "".join(f"{count:9.2f}" for count in exits)
        )


def main() -> None:
    """Measure, here or in the lab, and print."""
    rounds = int(os.environ.get("ROUNDS", ROUNDS))
    with tempfile.TemporaryDirectory() as directory:
        program = os.path.join(directory, "program")
        subprocess.run(["gcc", "-O2", "-static", "-o", program, str(C_PROGRAM)], check=True)
        initramfs(program, MODULES)  # which fills the cache that the lab sees as well
        limit = LIMIT * 3 * (rounds + 1)
        found = where_linux_runs(measure, program, rounds, timeout=limit)
    show([Entry(*entry) for entry in found])
