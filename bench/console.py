"""A console port led to a Unix socket: ours beside QEMU's. bench/links.py says what is measured.

All guests are up at once, each in a process of its own, and what serves the sockets lets one of
them go on at a time: so each round has a turn of everybody within seconds. ROUNDS says how many;
BEFORE, paths of other checkouts with colons between, has these take part as well.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from bench import links
from bench.guest9p import COMMON
from bench.links import Bench, Entry
from bench.place import ROOT

COUNT, MIB, ROUNDS = 200, 16, 7
QEMU = "QEMU"


def ways() -> dict[str, tuple[str, str]]:
    """The ways of ours by name: the checkout, and how doorbells ring."""
    others = [path for path in os.environ.get("BEFORE", "").split(os.pathsep) if path]
    before = {f"before{number or ''}": path for number, path in enumerate(others)}
    return {name: (ROOT, name) for name in links.OURS} | {
        name: (os.path.abspath(path), links.OURS[0]) for name, path in before.items()
    }


def run_ours(bench: Bench, root: str, doorbells: str) -> list[str]:
    """Boot the VMM of a checkout."""
    from tinyvmm.lab.lab import python_command

    code = (
        "import sys, json; where, root, doorbells, *rest = sys.argv[1:]; sys.path.insert(0, root); "
        "from bench.links import Bench, run_ours; archive = open(where + '/archive', 'rb').read(); "
        "bench = Bench(('console',), where, rest[0], archive, rest[1]); "
        "print(json.dumps(run_ours(bench, doorbells)))"
    )
    arguments = [bench.where, root, doorbells, bench.vmlinuz, bench.cmdline]
    command = python_command(code, arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=links.LIMIT)
    lines: list[str] = json.loads(done.stdout)
    return lines


def measure(
    program: str, what: Sequence[str], rounds: int, run: dict[str, tuple[str, str]]
) -> list[Entry]:
    """Have everybody take `rounds` turns, after one to warm caches."""
    from tinyvmm.images import kernels

    turns = str(len(run) + 1), str(rounds + 1)
    with (
        tempfile.TemporaryDirectory() as where,
        links.hosting(what, program, where, turns),
        ThreadPoolExecutor() as pool,
    ):
        archive, modules = links.initramfs(program, what)
        Path(where, "archive").write_bytes(archive)
        cmdline = f"{COMMON} -- {','.join(what)} {COUNT} {MIB} {' '.join(modules)}"
        bench = Bench(what, where, kernels.find().vmlinuz, archive, cmdline)
        ends = {name: pool.submit(run_ours, bench, *how) for name, how in run.items()}
        ends[QEMU] = pool.submit(links.run_qemu, bench)
        return [entry for name, end in ends.items() for entry in numbered(end.result(), name)]


def numbered(lines: Sequence[str], name: str) -> list[Entry]:
    """Return what a guest measured, with the number of the turn."""
    found: list[Entry] = []
    for entry in links.entries(lines, name, 0):
        turn = sum(known.what == entry.what for known in found)
        found.append(entry._replace(turn=turn))
    return found


def show(found: list[Entry]) -> None:
    """Print medians, and those of each round's ratio to QEMU's with the least and the greatest."""
    names = list(dict.fromkeys(entry.vmm for entry in found))
    each = {(e.vmm, e.what, e.turn): e.ns / e.often / 1000 for e in found if e.turn}
    turns = range(1, max(entry.turn for entry in found) + 1)
    columns = "".join(f"{name:>11}" for name in names)
    print(f"{'microseconds for each':26}{columns}   ratios (of each round)")
    for what in dict.fromkeys(entry.what for entry in found):
        row = "".join(f"{median(each[name, what, t] for t in turns):11.1f}" for name in names)
        for name in names:
            ratios = [each[name, what, t] / each[QEMU, what, t] for t in turns]
            if name != QEMU:
                row += f"   {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{what:26}{row}")


def main() -> None:
    """Measure and print."""
    rounds = int(os.environ.get("ROUNDS", ROUNDS))
    show(links.run("console", ("console",), rounds, ways()))
