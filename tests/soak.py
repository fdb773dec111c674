"""Many machines, one after another and at once, and then nothing left of them: `make soak`.

    python -m tests.soak tiny     200 and 20 of a kernel of 60 bytes, on any /dev/kvm: by the
                                  command line, and again as many in one process
    python -m tests.soak linux    200 and 20 of Linux with names: detached, waited for, forgotten;
                                  --count and --at-once for fewer where that would take hours
    python -m tests.soak lab      pairs of guests in one lab: one of many processes, then one that
                                  gets the memory it leaves; how long each takes, and whether the
                                  lab hangs. Ten pairs, or --count of them

What is looked for: processes with our mark in their environment, files and sockets in the
directories they were given, and of this process descriptors, threads, mappings and memory. Prints
what it did and exits with 0, or says what is left.
"""

import argparse
import gc
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = "TINYVMM_SOAK_MARK"
GROWTH_MAX = 8 << 20  # bytes of memory of this process, of 200 machines: pools and caches fill
MAPPINGS_MAX = 30
LAB_COUNT, LAB_AT_ONCE = 5, 3
LAB_PAIRS = 10


def tiny_kernel(status: int) -> bytes:
    """A multiboot kernel (0.6.96, section 3.1): "hi" on COM1, then the end, with 2 * status + 1."""
    from tinyvmm import layout
    from tinyvmm.guest.asm import Assembler, al, dx, eax, edx

    at, flags = 0x10_0000, 1 << 16  # the addresses are in the header
    code = Assembler(bits=32, origin=at + 32)
    code.mov(edx, layout.COM1_PORT)
    for char in b"hi\n":
        code.mov(al, char)
        code.out(dx, al)
    code.mov(edx, layout.DEBUG_EXIT_PORT)
    code.mov(eax, status)
    code.out(dx, eax)
    body = code.assemble()
    end = at + 32 + len(body)
    magic = 0x1BAD_B002
    checksum = -(magic + flags) & 0xFFFF_FFFF
    return struct.pack("<8I", magic, flags, checksum, at, at, end, end, at + 32) + body


class Left:
    """What there is now of processes, files and sockets."""

    def __init__(self, mark: str, directory: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._directory = directory

    def processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if self._mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(f"process {entry.name}: {(entry / 'cmdline').read_bytes()!r}")
                except OSError:
                    continue  # it has ended, or is somebody else's
        return found

    def files(self) -> list[str]:
        empty = {Path(self._directory) / "tinyvmm"}  # where machines are; it stays
        return [f"file {path}" for path in Path(self._directory).rglob("*") if path not in empty]

    def sockets(self) -> list[str]:
        lines = Path("/proc/net/unix").read_text().splitlines()
        return [f"socket {line}" for line in lines if self._directory in line]

    def everything(self) -> list[str]:
        return [*self.processes(), *self.files(), *self.sockets()]


@contextmanager
def nothing_left(what: str) -> Iterator[dict[str, str]]:
    """Give an environment, and look afterwards what is left of all that was started in it."""
    with tempfile.TemporaryDirectory(prefix="tinyvmm-soak-") as directory:
        mark = os.path.basename(directory)
        given = {"TMPDIR": directory, "XDG_RUNTIME_DIR": directory, MARK: mark}
        begin = time.monotonic()
        yield {**os.environ, **given, "PYTHONPATH": str(ROOT)}
        left = Left(mark, directory)
        end = time.monotonic() + 10  # for processes that are just ending
        while left.everything() and time.monotonic() < end:
            time.sleep(0.1)
        found = left.everything()
    if found:
        sys.exit(f"soak: {what}: left behind:\n" + "\n".join(found))
    say(f"{what}: nothing left ({time.monotonic() - begin:.0f} s)")


class Self:
    """Descriptors, threads, mappings and memory of this process."""

    def __init__(self) -> None:
        gc.collect()
        self.descriptors = set(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()
        self.mappings = len(Path("/proc/self/maps").read_text().splitlines())
        self.memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def check(self, what: str) -> None:
        """Compare with now."""
        now = Self()
        if len(now.descriptors) > len(self.descriptors) or now.threads > self.threads:
            sys.exit(f"soak: {what}: {now.descriptors - self.descriptors}, {now.threads} threads")
        if now.memory > self.memory + GROWTH_MAX or now.mappings > self.mappings + MAPPINGS_MAX:
            sys.exit(f"soak: {what}: {self.memory} bytes became {now.memory}, {now.mappings} maps")
        grown = (now.memory - self.memory) >> 10
        say(f"{what}: no descriptor, thread or mapping more; memory {grown:+} KiB")


def say(line: str) -> None:
    """Tell what has been seen."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def repeat(count: int, at_once: int, work: Callable[[int], None]) -> None:
    """Do it `count` times one after another, then `at_once` times at once."""
    for number in range(count):
        work(number)
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, range(at_once)))


def command(argv: list[str], environment: dict[str, str], status: int, output: bytes) -> None:
    """Run tinyvmm; say what went wrong and give up, if it did."""
    done = subprocess.run(
        [sys.executable, "-m", "tinyvmm", *argv],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=600,
    )
    if (done.returncode, done.stdout) != (status, output):
        sys.exit(f"soak: tinyvmm {argv}: {done}")


def tiny(count: int, at_once: int) -> None:
    """Of a kernel of 60 bytes."""
    with tempfile.NamedTemporaryFile(prefix="tinyvmm-kernel-") as file:
        file.write(tiny_kernel(7))
        file.flush()
        argv = ["run", "--no-root", "--memory", "32M", "--kernel", file.name]
        with nothing_left(f"{count} and {at_once} tiny machines by the command line") as environ:
            repeat(count, at_once, lambda _: command(argv, environ, 15, b"hi\n"))

    machines_here(at_once)  # what is made once is made
    before = Self()
    for _ in range(count):
        machines_here(1)
    machines_here(at_once)
    before.check(f"{count} and {at_once} machines in one process")


def machines_here(count: int) -> None:
    """So many at once in this process, each with two vCPUs and a board."""
    from tinyvmm.devices.virtio.rng import VirtioRng
    from tinyvmm.machine import Machine
    from tinyvmm.vcpu import StopCause

    with ExitStack() as cleanup:
        made = []
        for _ in range(count):
            machine = cleanup.enter_context(Machine(memory=32 << 20, cpus=2))
            machine.add_board(console=lambda _data: None)
            machine.add_virtio(VirtioRng())
            machine.boot_real_mode(b"\xeb\xfe")  # jmp to itself
            machine.start()
            made.append(machine)
        time.sleep(0.005)
        for machine in made:
            machine.stop(StopCause.STOPPED)
            if machine.wait(timeout=60) != StopCause.STOPPED:
                sys.exit("soak: a machine did not end")


def linux(count: int, at_once: int) -> None:
    """Of Linux, with names: each is a run, a wait and an rm."""
    with nothing_left(f"{count} and {at_once} machines of Linux") as environ:

        def one(number: int) -> None:
            name = f"soak-{number}"
            status = number % 7
            own = ["--no-lab", "--detach", "--name", name, "--memory", "128M"]
            code = f"echo {number}; exit {status}"
            command(["run", *own, "--", "sh", "-c", code], environ, 0, f"{name}\n".encode())
            command(["wait", name], environ, 0, f"{status}\n".encode())
            command(["logs", name], environ, 0, f"{number}\n".encode())
            command(["rm", name], environ, 0, f"{name}\n".encode())

        repeat(count, at_once, one)


def linux_runs_here() -> bool:
    """Whether this KVM can run Linux."""
    from tinyvmm.lab.probe import missing_for_linux

    return missing_for_linux() is None


def in_the_lab(count: int, at_once: int) -> None:
    """Of Linux in the lab, where a boot takes half a minute: fewer."""
    say(f"this KVM cannot run Linux: {count} and {at_once} machines in the lab")
    python = os.path.realpath(sys.executable)
    own = ["-m", "tests.soak", "linux", "--count", str(count), "--at-once", str(at_once)]
    lab = [sys.executable, "-m", "tinyvmm", "lab", "--", python, *own]
    sys.exit(subprocess.run(lab, cwd=ROOT, check=False).returncode)


def the_lab(pairs: int) -> None:
    """Of the lab itself: LabHungError if it hangs."""
    from tests.linux.conftest import MAIN
    from tinyvmm.lab.lab import Lab, python_command

    many = "i=0; while [ $i -lt 300 ]; do /bin/true; i=$((i+1)); done"
    with Lab() as lab:
        for pair in range(1, pairs + 1):
            times = []
            for script in (many, ":"):
                begin = time.monotonic()
                argv = python_command(MAIN, ["run", "--no-lab", "--", "sh", "-c", script])
                done = lab.run(argv, timeout=300, cwd=str(ROOT))
                times.append(time.monotonic() - begin)
                if done.status:
                    sys.exit(f"soak: pair {pair}: {done}")
            say(f"pair {pair}: {times[0]:.1f} s, {times[1]:.1f} s")


def main() -> None:
    """Do as the arguments say."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("what", choices=("tiny", "linux", "lab"))
    parser.add_argument("--count", type=int)
    parser.add_argument("--at-once", type=int, default=20)
    args = parser.parse_args()
    count = args.count or 200
    if args.what == "lab":
        the_lab(args.count or LAB_PAIRS)
    elif args.what == "tiny":
        tiny(count, args.at_once)
    elif linux_runs_here():
        linux(count, args.at_once)
    else:
        in_the_lab(min(count, LAB_COUNT), min(args.at_once, LAB_AT_ONCE))


if __name__ == "__main__":
    main()
