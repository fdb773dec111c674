"""What the guest's cache is worth: v9fs's policies and message sizes, and an overlay in the guest.

One guest has the same directory mounted several times, each time with a 9P device, a session and a
private write tree of its own; a C program in it does each thing to each of them in turn. The first
round only warms caches. Times are the guest's own. Where this computer's KVM
cannot run Linux all of it happens in the lab, so only the ratios mean anything.
"""

import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from bench.place import where_linux_runs

if TYPE_CHECKING:
    from tinyvmm.devices.virtio.p9 import Virtio9P
    from tinyvmm.guest import init

ROUNDS, LARGE = 3, 8
FILES, CHANGES = 40, 20  # CHANGES as in caching.c
LIMIT = 3000  # seconds in the lab

C_PROGRAM = Path(__file__).parent / "caching.c"


class Variant(NamedTuple):
    """One way to mount the directory; with `overlay` read-only, writes going to a tmpfs."""

    name: str
    options: str
    overlay: bool = False
    large_only: bool = False


VARIANTS = (
    Variant("none", "cache=none,msize=512000"),
    Variant("mmap", "cache=mmap,msize=512000"),
    Variant("loose", "cache=loose,msize=512000"),
    Variant("overlay", "cache=loose,msize=512000", overlay=True),
    Variant("none-128k", "cache=none,msize=131072", large_only=True),
    Variant("loose-128k", "cache=loose,msize=131072", large_only=True),
)


class Entry(NamedTuple):
    """What the guest has done: `often` times `what` in `ns` altogether, for so many requests."""

    name: str
    turn: int
    what: str
    often: int
    ns: int
    requests: int


def make_tree(where: str, large: int) -> None:
    """Make what the guest works on: small files, a large one, a repository."""
    for name, count in (("small", FILES), ("changed", CHANGES * (ROUNDS + 1))):
        directory = Path(where, name)
        directory.mkdir(parents=True)
        for number in range(count):
            (directory / f"file{number}").write_bytes(os.urandom(4096))
    with open(os.path.join(where, "large"), "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(large))
    repository = os.path.join(where, "repository")
    for number in range(FILES):
        path = Path(repository, f"directory{number % 5}", f"file{number}.c")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"int function{number}(void);\n" * 20)
    git = ["git", "-C", repository, "-c", "user.name=b", "-c", "user.email=b@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)


def serve(tree_path: str, work: str) -> "tuple[list[Virtio9P], list[init.Filesystem]]":
    """Return a 9P device for each variant, and how PID 1 mounts it at /v/NAME."""
    from tinyvmm.devices.virtio.p9 import Virtio9P
    from tinyvmm.fileserver.session import Session
    from tinyvmm.fileserver.union import open_tree
    from tinyvmm.guest import abi, init

    devices, mounts = [], [*init.STANDARD_MOUNTS, init.Mkdir("/v")]
    for variant in VARIANTS:
        tag, at = variant.name, f"/v/{variant.name}"
        scratch = os.path.join(work, f"writes-{tag}")
        os.mkdir(scratch)
        tree = open_tree([("/", tree_path)], [] if variant.overlay else [("/", scratch)])
        devices.append(Virtio9P(tag, Session(tree, name=tag)))
        options = f"trans=virtio,version=9p2000.L,{variant.options}"
        if not variant.overlay:
            mounts.append(init.Mount(tag, at, "9p", data=options))
            continue
        under, over = f"{at}-lower", f"{at}-upper"
        layers = f"lowerdir={under},upperdir={over}/upper,workdir={over}/work"
        mounts += [
            init.Mount(tag, under, "9p", abi.MS_RDONLY, options),
            init.Mount("tmpfs", over, "tmpfs"),
            init.Mkdir(f"{over}/upper"),
            init.Mkdir(f"{over}/work"),
            init.Mount("overlay", at, "overlay", data=layers),
        ]
    return devices, mounts


def measure(source: str, program: str, rounds: int, large: int) -> list[Entry]:
    """Run the guest on a copy of `source`, and return what its program says, with requests."""
    from tinyvmm.fileserver.descriptors import raise_nofile_limit

    raise_nofile_limit()
    with tempfile.TemporaryDirectory() as work:
        tree_path = os.path.join(work, "tree")
        shutil.copytree(source, tree_path, symlinks=True)
        devices, mounts = serve(tree_path, work)
        directories = [f"/v/{v.name}" + ":large" * v.large_only for v in VARIANTS]
        argv = [program, str(rounds), str(FILES), str(large), *directories]
        root = os.path.join(work, "root")
        os.mkdir(root)
        return run_guest(argv, root, devices, mounts)


def run_guest(
    argv: list[str], root: str, devices: "list[Virtio9P]", mounts: "list[init.Filesystem]"
) -> list[Entry]:
    """Boot, answer the program whenever it waits, and return what it has said."""
    from tinyvmm import trace
    from tinyvmm.command.init import CMDLINE
    from tinyvmm.command.options import OVERLAY_MODULES
    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.devices.virtio.console import ConsolePort, VirtioConsole
    from tinyvmm.devices.virtio.p9 import Virtio9P
    from tinyvmm.fileserver.session import Session as FileSession
    from tinyvmm.fileserver.union import open_tree
    from tinyvmm.guest import init
    from tinyvmm.guest.archive import init_archive
    from tinyvmm.machine import Machine
    from tinyvmm.session import HostFiles, Ports, Session
    from tinyvmm.vcpu import StopCause

    counts: dict[str, int] = {}

    def count(record: object) -> None:
        if isinstance(record, trace.NineP) and type(record.message).__name__.startswith("T"):
            counts[record.session] = counts.get(record.session, 0) + 1

    found: list[Entry] = []
    answers, from_guest = os.pipe()
    to_guest, asks = os.pipe()

    def follow() -> None:
        before = 0
        with open(answers, encoding="ascii") as lines:
            for line in lines:
                word, name, *rest = line.split()
                if word == "begin":
                    before = counts.get(name, 0)
                else:
                    turn, what, often, ns = rest
                    sent = counts.get(name, 0) - before
                    found.append(Entry(name, int(turn), what, int(often), int(ns), sent))
                os.write(asks, b"\n")

    kernel, modules = prepare_kernel(None, OVERLAY_MODULES)
    config = init.InitConfig(
        argv[:1],
        argv,
        env=("PATH=/usr/bin:/bin", "HOME=/"),
        modules=modules.paths,
        mounts=mounts,
        await_goodbye=True,
    )
    tree = open_tree([("/", "/")], [("/", root)])
    with Machine(memory=1 << 30) as machine, kernel:
        machine.add_board(console=lambda _: None)
        ports = [ConsolePort(name) for name in ("stdin", "stdout", "stderr", "control")]
        machine.add_virtio(VirtioConsole(ports))
        machine.add_virtio(Virtio9P("root", FileSession(tree)))
        for device in devices:
            machine.add_virtio(device)
        archives = [modules.archive, init_archive(config)]
        machine.boot_linux(kernel, initrd=archives, cmdline=f"{CMDLINE} pci=noearly quiet")
        session = Session(
            Ports.of(ports),
            command=argv[0],
            files=HostFiles(to_guest, from_guest, 2),
        )
        trace.hook = count
        threading.Thread(target=follow, daemon=True).start()
        machine.start()
        result = session.run()
        machine.stop(StopCause.STOPPED)
    if result.status:
        raise RuntimeError(f"the guest ended with {result}")
    return found


def show(found: list[Entry]) -> None:
    """Print one line for each thing done: medians of the time, and of the requests it took."""
    values: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        if entry.turn:
            values.setdefault((entry.what, entry.name), []).append(entry)
    names = [variant.name for variant in VARIANTS]
    for title, digits, of in (
        ("microseconds", 0, lambda entry: entry.ns / entry.often / 1000),
        ("requests", 1, lambda entry: entry.requests / entry.often),
    ):
        print(f"{title + ' for each':24}" + "".join(f"{name:>11}" for name in names))
        for what in dict.fromkeys(what for what, _ in values):
            cells = [
                f"{median(map(of, values[what, name])):11.{digits}f}"
                if (what, name) in values
                else " " * 11
                for name in names
            ]
            print(f"{what:24}" + "".join(cells))


def main() -> None:
    """Measure, here or in the lab, and print."""
    from tinyvmm.command.options import OVERLAY_MODULES
    from tinyvmm.command.run import prepare_kernel

    prepare_kernel(None, OVERLAY_MODULES)[0].close()
    with tempfile.TemporaryDirectory() as directory:
        source, program = os.path.join(directory, "source"), os.path.join(directory, "program")
        make_tree(source, LARGE)
        gcc = ["gcc", "-O2", "-static", "-o", program, str(C_PROGRAM)]
        subprocess.run(gcc, check=True)
        found = where_linux_runs(measure, source, program, ROUNDS, LARGE, timeout=LIMIT)
    show([Entry(*entry) for entry in found])
