"""A console port or vsock: ours beside QEMU's. bench/links.py says what is measured.

All guests are up at once, each in a process of its own, and what serves the sockets lets one of
them go on at a time: so each round has a turn of everybody within seconds. They boot one after the
other, as a lab is the likelier to die the more of them do at once. ROUNDS says how many;
BEFORE, paths of other checkouts with colons between, has these take part as well, with doorbells
that ring as BEFORE_WAY says; WAYS, which of ours do. When a guest dies, what was measured until
then is shown.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from tempfile import TemporaryDirectory

from bench import links
from bench.guest9p import COMMON
from bench.links import Bench, Entry
from bench.place import ROOT

COUNT, MIB, ROUNDS = 200, 16, 7
BOOT = 60  # seconds that a guest has alone; an older checkout does not say when it is up
QEMU = "QEMU"


def ways(usual: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The ways of ours by name: the checkout, and how doorbells ring."""
    wanted = os.environ.get("WAYS", ",".join(usual)).split(",")
    way = os.environ.get("BEFORE_WAY", links.THREAD)
    others = [path for path in os.environ.get("BEFORE", "").split(os.pathsep) if path]
    before = {f"before{number or ''}": path for number, path in enumerate(others)}
    return {name: (ROOT, name) for name in wanted} | {
        name: (os.path.abspath(path), way) for name, path in before.items()
    }


def run_ours(bench: Bench, root: str, doorbells: str) -> Iterator[str]:
    """Boot the VMM of a checkout, and yield the lines that the program says."""
    from tinyvmm.lab.lab import python_command

    code = (
        "import os, sys; where, root, doorbells, *rest = sys.argv[1:]; sys.path.insert(0, root)\n"
        "from bench import links; archive = open(where + '/../archive', 'rb').read()\n"
        "bench = links.Bench((rest[2],), where, rest[0], archive, rest[1])\n"
        "if hasattr(links, 'boot_ours'):\n"
        "    links.boot_ours(bench, doorbells, lambda said: os.write(1, said))\n"
        "else:\n"  # an older checkout says all of it at the end
        "    print('\\n'.join(links.run_ours(bench, doorbells)))\n"
    )
    arguments = [bench.where, root, doorbells, bench.vmlinuz, bench.cmdline, *bench.what]
    return links.said(python_command(code, arguments))


def measure(
    program: str, what: Sequence[str], rounds: int, run: dict[str, tuple[str, str]]
) -> Iterator[Entry]:
    """Have everybody take `rounds` turns, after one to warm caches.

    RuntimeError, after all that was measured, if a guest died.
    """
    from tinyvmm.images import kernels

    turns = str(len(run) + 1), str(rounds + 1)
    with TemporaryDirectory() as where, links.hosting(what, program, where, turns):
        archive, modules = links.initramfs(program, what)
        Path(where, "archive").write_bytes(archive)
        cmdline = f"{COMMON} -- {','.join(what)} {COUNT} {MIB} {' '.join(modules)}"
        bench = Bench(what, where, kernels.find().vmlinuz, archive, cmdline)
        guests = {}
        for name, how in run.items():
            guests[name] = run_ours(bench._replace(where=own(where, name)), *how)
        guests[QEMU] = links.run_qemu(bench)
        yield from together(guests)


def own(where: str, name: str) -> str:
    """Make a directory for one guest's sockets, in which those that are served are, too."""
    path = Path(where, name)
    path.mkdir()
    for served in ("console", links.VSOCK_SERVED):
        (path / served).symlink_to(f"../{served}")
    return str(path)


def together(guests: dict[str, Iterator[str]]) -> Iterator[Entry]:
    """Yield what any of the guests measures, each read by a thread of its own once one is up."""
    found: SimpleQueue[Entry | Exception | None] = SimpleQueue()

    def read(name: str, lines: Iterator[str], up: threading.Event) -> None:
        end = None
        try:
            for entry in numbered(noticed(lines, up), name):
                found.put(entry)
        except Exception as error:  # noqa: BLE001 (raised where they come together)
            end = error
        found.put(end)

    for name, lines in guests.items():
        up = threading.Event()
        threading.Thread(target=read, args=[name, lines, up], daemon=True).start()
        up.wait(BOOT)
    failed, running = [], len(guests)
    while running:
        entry = found.get()
        if isinstance(entry, Entry):
            yield entry
        else:
            running -= 1
            failed += [str(entry)] if entry is not None else []
    if failed:
        raise RuntimeError("\n".join(failed))


def noticed(lines: Iterator[str], up: threading.Event) -> Iterator[str]:
    """Yield the lines, and set `up` when the guest says that it is, or is no more."""
    try:
        for line in lines:
            if line == "up":
                up.set()
            yield line
    finally:
        up.set()


def numbered(lines: Iterator[str], name: str) -> Iterator[Entry]:
    """Yield what a guest measures, with the number of the turn."""
    turns: Counter[str] = Counter()
    for entry in links.entries(lines, name, 0):
        yield entry._replace(turn=turns[entry.what])
        turns[entry.what] += 1


def show(found: list[Entry], names: Sequence[str]) -> None:
    """Print medians, and those of each round's ratio to QEMU's with the least and the greatest.

    Of the rounds that all of `names` came to the end of.
    """
    each = {(e.vmm, e.what, e.turn): e.ns / e.often / 1000 for e in found if e.turn}
    whats = list(dict.fromkeys(entry.what for entry in found))
    done = Counter(e.vmm for e in found if e.turn and e.what in whats[-1:])
    turns = range(1, min(done[name] for name in names) + 1)
    print(f"{len(turns)} rounds")
    if not turns:
        return
    columns = "".join(f"{name:>11}" for name in names)
    print(f"{'microseconds for each':26}{columns}   ratios (of each round)")
    for what in whats:
        row = "".join(f"{median(each[name, what, t] for t in turns):11.1f}" for name in names)
        for name in names:
            ratios = [each[name, what, t] / each[QEMU, what, t] for t in turns]
            if name != QEMU:
                row += f"   {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{what:26}{row}")


def main(what: str, usual: Sequence[str] = links.OURS) -> None:
    """Measure and print."""
    rounds, run = int(os.environ.get("ROUNDS", ROUNDS)), ways(usual)
    cpus = int(os.environ.get("CPUS", "0")) or None
    show(links.run("turns", (what,), rounds, run, cpus=cpus), [*run, QEMU])
