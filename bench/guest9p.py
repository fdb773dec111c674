"""9P in a guest: our virtio-9p beside QEMU's, on the same files, kernel and mount options.

The same stock kernel boots, by turns, in our VMM and in QEMU's (`-accel kvm`, q35 machine,
virtio-9p-pci with a `local` file system, security model passthrough); its PID 1 is a C program that
does each thing on a mount without a cache and on one with `cache=loose`, and says how long it took
by the guest's own clock. Ours is a shared directory, which is what QEMU's is. Where this computer's
KVM cannot run Linux all of it happens in one lab, where Python is slowed down more than C is.

A first round only warms caches; in it our requests are counted, and our exits. `in VMM` is the part
of our time that was spent in Python, on exits: from the bus's look-up to the reply in the ring.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import NamedTuple

from bench.place import where_linux_runs

C_PROGRAM = Path(__file__).with_suffix(".c")
FILES, ENTRIES, MIB, ROUNDS = 100, 1000, 8, 3  # the program knows ENTRIES as well
LIMIT = 600  # seconds for one guest
MODULES = ("virtio_pci", "9pnet_virtio", "9p")
COMMON = "console=ttyS0 quiet panic=-1 no_timer_check pci=noearly"


class Entry(NamedTuple):
    """One thing done: how often, and how long it took; the rest where it is known."""

    vmm: str
    turn: int
    cache: str
    what: str
    often: int
    ns: int
    requests: int = 0
    exits: int = 0
    inside_ns: int = 0


def make_tree(where: str) -> None:
    """Make what the guests work on: small files, many entries, a large file, a repository."""
    for name, count, content in (("small", FILES, b"x" * 4096), ("many", ENTRIES, b"")):
        directory = Path(where, name)
        directory.mkdir(parents=True)
        for number in range(count):
            (directory / f"file{number}").write_bytes(content)
    Path(where, "large").write_bytes(b"x" * (MIB << 20))
    repository = Path(where, "repository")
    for number in range(40):
        path = repository / f"directory{number % 10}" / f"file{number}.c"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"int function{number}(void);\n" * 20)
    git = ["git", "-C", str(repository), "-c", "user.name=b", "-c", "user.email=b@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)


def initramfs(program: str, names: Sequence[str] = MODULES) -> tuple[bytes, list[str]]:
    """Return the archive with the modules and `program` as PID 1, and the modules' paths in it."""
    import stat

    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.guest.initramfs import Archive

    kernel, modules = prepare_kernel(None, names)
    kernel.close()
    own = Archive().add_device("/dev/console", stat.S_IFCHR | 0o600, 5, 1)
    own.add_file("/init", Path(program).read_bytes(), mode=0o755)
    return bytes(modules.archive) + own.finish(), list(modules.paths)


def run_ours(
    tree_path: str,
    archive: bytes,
    cmdline: str,
    turn: int,
    *,
    cpus: int = 1,
    ioeventfd: bool | None = None,
) -> list[Entry]:
    """Boot our VMM, and return what the program said."""
    from tinyvmm import trace
    from tinyvmm.boot import load_kernel
    from tinyvmm.devices.virtio.p9 import Virtio9P
    from tinyvmm.fileserver.host import HostTree
    from tinyvmm.fileserver.session import Session
    from tinyvmm.fileserver.union import open_tree
    from tinyvmm.images import kernels
    from tinyvmm.machine import Machine

    lines: list[tuple[str, int, int, int]] = []  # each with the requests, exits and ns so far
    shown = bytearray()
    requests = exits = inside_ns = 0

    def console(data: bytes) -> None:
        shown.extend(data)
        while b"\n" in shown:
            line, _, rest = shown.partition(b"\n")
            text = line.decode(errors="replace").strip()
            lines.append((text, requests, exits, inside_ns))
            shown[:] = rest

    def count(record: trace.Record) -> None:
        nonlocal requests, exits
        if isinstance(record, trace.NineP):
            requests += record.session == "bench" and type(record.message).__name__[0] == "T"
        elif isinstance(record, trace.Access | trace.Unclaimed):
            exits += 1

    def timed(write: Callable[[int, int, int], None]) -> Callable[[int, int, int], None]:
        def write_timed(address: int, size: int, value: int) -> None:
            nonlocal inside_ns
            begin = perf_counter_ns()
            write(address, size, value)
            inside_ns += perf_counter_ns() - begin

        return write_timed

    tree = HostTree(tree_path)
    with (
        Machine(memory=1 << 30, cpus=cpus, ioeventfd=ioeventfd) as machine,
        load_kernel(kernels.find().vmlinuz) as kernel,
    ):
        machine.add_board(console=console)
        machine.add_virtio(Virtio9P("root", Session(open_tree([("/", "/")], []), name="root")))
        machine.add_virtio(Virtio9P("bench", Session(tree, name="bench")))
        machine.boot_linux(kernel, initrd=[archive], cmdline=cmdline)
        if not turn:
            trace.hook = count
        machine.mmio.write = timed(machine.mmio.write)  # type: ignore[method-assign, assignment]
        machine.start()
        try:
            machine.wait(LIMIT)
        finally:
            trace.hook = None
    found = []
    before = [0, 0, 0]
    for line, *counts in lines:
        word, *rest = line.split() or [""]
        if word == "begin":
            before = counts
        elif word == "end":
            cache, what, often, ns = rest
            more = [now - then for now, then in zip(counts, before, strict=True)]
            found.append(Entry("ours", turn, cache, what, int(often), int(ns), *more))
    if "done" not in [line for line, *_ in lines]:
        raise RuntimeError("\n".join(line for line, *_ in lines[-10:]))
    return found


def run_qemu(tree_path: str, vmlinuz: str, initrd: str, cmdline: str, turn: int) -> list[Entry]:
    """Boot QEMU, and return what the program said."""
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "1024", "-nodefaults"]
    qemu += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-M", "q35"]
    qemu += ["-kernel", vmlinuz, "-initrd", initrd, "-append", cmdline]
    for tag, path, more in (("root", "/", ",readonly=on"), ("bench", tree_path, "")):
        fs = f"local,id={tag},path={path},security_model=passthrough,multidevs=remap{more}"
        qemu += ["-fsdev", fs, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    done = subprocess.run(
        qemu, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False
    )
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines()]
    if "done" not in lines:
        raise RuntimeError("\n".join(lines[-10:]) + done.stderr.decode())
    words = [line.split() for line in lines]
    return [
        Entry("QEMU", turn, cache, what, int(often), int(ns))
        for cache, what, often, ns in [line[1:] for line in words if line[:1] == ["end"]]
    ]


def measure(source: str, program: str, count: int) -> list[Entry]:
    """Run both `count` times in turn on a copy of `source`, after once to warm caches."""
    from tinyvmm.images import kernels

    found = []
    with prepared(source, program) as (tree_path, archive, cmdline):
        initrd = tree_path + ".initrd"
        Path(initrd).write_bytes(archive)
        for turn in range(count + 1):
            found += run_ours(tree_path, archive, f"reboot=a {cmdline}", turn)
            found += run_qemu(tree_path, kernels.find().vmlinuz, initrd, cmdline, turn)
    return found


@contextmanager
def prepared(source: str, program: str) -> Iterator[tuple[str, bytes, str]]:
    """Give a copy of `source`, an initramfs with `program`, and its kernel's command line."""
    from tinyvmm.fileserver.descriptors import raise_nofile_limit

    raise_nofile_limit()
    with tempfile.TemporaryDirectory() as work:
        tree_path = os.path.join(work, "tree")
        shutil.copytree(source, tree_path, symlinks=True)
        archive, modules = initramfs(program)
        yield tree_path, archive, f"{COMMON} -- {FILES} {MIB} {' '.join(modules)}"


def show(found: list[Entry]) -> None:
    """Print one line for each thing done."""
    columns = "ours", "QEMU", "ratio", "requests", "exits", "in VMM"
    print(f"{'microseconds for each':28}" + "".join(f"{name:>9}" for name in columns))
    for cache, what in dict.fromkeys((entry.cache, entry.what) for entry in found):
        those = [entry for entry in found if (entry.cache, entry.what) == (cache, what)]
        middle = {
            vmm: median(e.ns / e.often / 1000 for e in those if e.vmm == vmm and e.turn)
            for vmm in ("ours", "QEMU")
        }
        inside = median(e.inside_ns / e.ns for e in those if e.vmm == "ours" and e.turn)
        (first,) = (entry for entry in those if entry.vmm == "ours" and not entry.turn)
        print(
            f"{cache:6}{what:22}{middle['ours']:9.0f}{middle['QEMU']:9.0f}"
            f"{middle['ours'] / middle['QEMU']:9.2f}"
            f"{first.requests / first.often:9.1f}{first.exits / first.often:9.1f}{inside:9.0%}"
        )


def measured(function: Callable[[str, str, int], list[Entry]]) -> list[Entry]:
    """Return what `function` finds with a tree, the program and ROUNDS, here or in the lab."""
    with tempfile.TemporaryDirectory() as directory:
        source, program = os.path.join(directory, "source"), os.path.join(directory, "program")
        make_tree(source)
        subprocess.run(["gcc", "-O2", "-static", "-o", program, str(C_PROGRAM)], check=True)
        initramfs(program)  # which fills the cache that the lab sees as well
        limit = LIMIT * 2 * (ROUNDS + 1)
        found = where_linux_runs(function, source, program, ROUNDS, timeout=limit)
    return [Entry(*entry) for entry in found]


def main() -> None:
    """Measure, here or in the lab, and print."""
    show(measured(measure))
