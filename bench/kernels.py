"""The kernels of the store beside each other: what they take up, and how long `run -- true` takes.

A stock kernel's modules are inserted by PID 1, at each start; one of `tinyvmm kernel build` has
none. Interleaved, in the lab where this computer's KVM cannot run Linux; a first round only warms
caches. `python -m bench kernels` takes all that serve for a root over 9P.
"""

import os
import subprocess
import sys
from statistics import median
from time import monotonic

from bench.place import MAIN, where_linux_runs

ROUNDS = 5
LIMIT = 120  # seconds for one run


def versions() -> list[str]:
    """Return the kernels to compare, the newest first."""
    from tinyvmm.images import kernels

    return [k.version for k in kernels.list_() if not kernels.missing(k, "9p")]


def sizes(version: str) -> str:
    """Say how large a kernel is: its file, what of it is loaded, the modules of a run."""
    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.images import kernels

    file_len = kernels.size(kernels.look_up(version))
    kernel, modules = prepare_kernel(version)
    with kernel:
        loaded = sum(segment.length for segment in kernel.segments)
    sizes = [f"{n / 1e6:.1f} MB" for n in (file_len, loaded, len(modules.archive))]
    return f"file {sizes[0]}, loaded {sizes[1]}, {len(modules.paths)} modules of {sizes[2]}"


def run_once(version: str) -> float:
    """Return the seconds from exec to the end of `tinyvmm run -- true`."""
    python = os.path.realpath(sys.executable)
    command = [python, "-I", "-S", "-c", MAIN, "run", "--no-lab", "--kernel", version, "--", "true"]
    begin = monotonic()
    subprocess.run(command, check=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    return monotonic() - begin


def rounds(names: list[str], count: int) -> dict[str, list[float]]:
    """Run each `count` times in turn, after once to warm caches."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(count + 1):
        for name in names:
            seconds = run_once(name)
            if turn:
                found[name].append(seconds)
    return found


def main() -> None:
    """Measure, here or in the lab, and print."""
    names = versions()
    if not names:
        sys.exit("no kernel is here: tinyvmm kernel fetch; tinyvmm kernel build")
    shown = {name: sizes(name) for name in names}  # and all is unpacked and cached, here
    limit = LIMIT * len(names) * (ROUNDS + 1)
    found = where_linux_runs(rounds, names, ROUNDS, timeout=limit)
    base = median(found[names[0]])
    for name, times in found.items():
        middle = median(times)
        spread = f"{min(times):.2f} to {max(times):.2f}"
        ratio = middle / base
        print(f"{name:24} {middle:6.2f} s ({spread})  {ratio:.2f} of {names[0]}; {shown[name]}")
