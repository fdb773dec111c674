"""What a run costs before its guest's first instruction, and how large the VMM is.

`tinyvmm run` is executed as it is, up to the first KVM_RUN: there the process reports its CPU time
and its size, and leaves. The kernel is cached, and so is our bytecode.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import monotonic

ROUNDS = 9
ROOT = str(Path(__file__).parent.parent)
BARE = "import json, resource; r = resource.getrusage(0); print(json.dumps({'cpu': r[0] + r[1]}))"
PACKAGE = f"import sys; sys.path.insert(0, {ROOT!r}); import tinyvmm; " + BARE
RUN = f"""
import sys
sys.path.insert(0, {ROOT!r})
from tinyvmm import machine

def report(self):
    import json, os, resource
    usage = resource.getrusage(0)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    size = {{name: int(status[name].split()[0]) for name in ("VmRSS", "RssShmem")}}
    print(json.dumps({{"cpu": usage[0] + usage[1], **size}}), flush=True)
    self.close()
    os._exit(0)

machine.Machine.start = report
from tinyvmm.lab import probe
checked = probe.missing_for_linux
probe.missing_for_linux = lambda: checked() and None  # go on where Linux could not run
from tinyvmm.cli.main import main
sys.exit(main(["run", "--", "true"]))
"""


def run(code: str) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if "BYTECODE" not in name}
    begin = monotonic()
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", code],
        check=True,
        capture_output=True,
        env=environment,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return {**found, "wall": monotonic() - begin}


def main() -> None:
    from tinyvmm.command.run import prepare_kernel

    prepare_kernel(None)[0].close()
    subjects = {"bare Python": BARE, "import tinyvmm": PACKAGE, "to the first KVM_RUN": RUN}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
    for turn in range(ROUNDS + 1):
        for name, code in subjects.items():
            figures = run(code)
            if turn:  # the first round only warms caches
                found[name].append(figures)
    for name, rounds in found.items():
        cpu, wall = (median(figures[what] for figures in rounds) for what in ("cpu", "wall"))
        print(f"{name:22} {cpu * 1000:6.1f} ms CPU   {wall * 1000:6.1f} ms wall")
    rounds = found["to the first KVM_RUN"]
    own = median(figures["VmRSS"] - figures["RssShmem"] for figures in rounds)
    guest = median(figures["RssShmem"] for figures in rounds)
    print(f"resident: {own / 1024:.1f} MiB of our own, {guest / 1024:.1f} MiB of guest RAM")
