"""Exits for 1,000 requests of a disk and over 9P, before MSI-X and eventfds and with them.

One Linux guest for each way reads blocks of 4 KiB past its cache, one after another, then opens,
reads and closes files over 9P without a cache. All of its exits to us are counted, with the
requests, from `--trace`: so these are no times, and no load on the computer changes them. Before
means virtio-mmio, where a doorbell is one exit and an interrupt two.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.place import MAIN

BLOCKS, FILES = 1000, 250
MARK = ("port", 0x80)
WAYS = {
    "mmio, before": ("--transport", "mmio", "--ioeventfd", "off"),
    "pci, exits": ("--ioeventfd", "off"),
    "pci, default": (),
    "pci, threads": ("--ioeventfd", "on"),
}
_GUEST = """
mark() {{ printf x | dd of=/dev/port bs=1 seek=128 conv=notrunc 2> /dev/null; }}
disk() {{ dd if=/dev/vda of=/dev/null bs=4k count=$1 iflag=direct 2> /dev/null; }}
files() {{ n=0; while [ $n -lt $1 ]; do read -r line < /live/file$n; n=$((n + 1)); done; }}
mark; disk 1; files 1
mark; disk {blocks}
mark; files {files}
mark
"""
LIMIT = 300  # seconds for one guest


def guest(blocks: int, files: int) -> str:
    """Return what a guest's shell runs: so many requests of its disk and opened files, at MARKs."""
    return _GUEST.format(blocks=blocks, files=files)


def arguments(way: str, live: str, trace: str) -> list[str]:
    """Return the command line of a guest."""
    options = ["--disk", f"{live}/image,ro", "--shared", f"/live={live},ro,cache=none"]
    options += ["--trace", "9p,port,mmio", "--trace-file", trace, *WAYS[way]]
    return ["run", "--no-lab", *options, "--", "sh", "-c", guest(BLOCKS, FILES)]


def counted(lines: Sequence[bytes]) -> tuple[float, float]:
    """Return the exits for 1,000 requests of the disk, and for 1,000 over 9P."""
    exits, messages = [0], [0]
    for record in map(json.loads, lines):
        if record["record"] == "NineP":
            messages[-1] += record["message"].startswith("T")
        elif (record["space"], record["address"]) == MARK:
            exits.append(0)
            messages.append(0)
        else:
            exits[-1] += 1
    _, _, disk, files, _ = exits
    return 1000 * disk / BLOCKS, 1000 * files / messages[3]


@contextmanager
def served() -> Iterator[str]:
    """Make a directory of files, and a disk."""
    with tempfile.TemporaryDirectory() as live:
        for number in range(FILES):
            with open(f"{live}/file{number}", "w", encoding="ascii") as file:
                file.write(f"{number}\n")
        with open(f"{live}/image", "wb") as image:
            image.truncate(4096 * BLOCKS)
        yield live


def main() -> None:
    """Count, here or in the lab, and print."""
    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.lab.lab import Lab, python_command
    from tinyvmm.lab.probe import missing_for_linux

    prepare_kernel(None)[0].close()  # fetched and unpacked here, where it is quick
    trace = f"/dev/shm/tinyvmm-requests-{os.getpid()}.json"
    with served() as live, ExitStack() as cleanup:
        lab = None if missing_for_linux() is None else cleanup.enter_context(Lab())

        def run(argv: list[str]) -> bytes:
            if lab is None:
                return subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout
            done = lab.run(argv, timeout=LIMIT)
            if done.status:
                sys.exit(done.stderr.decode())
            return done.stdout

        print(f"{'exits for 1,000 requests':28}{'disk, 4 KiB':>12}{'9P':>12}")
        for way in WAYS:
            run(python_command(MAIN, arguments(way, live, trace)))
            disk, files = counted(run(["sh", "-c", f"cat {trace}; rm {trace}"]).splitlines())
            print(f"{way:28}{disk:12.0f}{files:12.0f}")
            sys.stdout.flush()
