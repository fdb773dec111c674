"""From exec to the first line of userspace: ours beside QEMU's microvm and q35, under the same KVM.

The same stock kernel, the same initramfs (the modules of a run, and an init that writes a line to
the console), one processor, 512 MiB, `quiet`. QEMU boots the bzImage, which unpacks itself in the
guest; microvm also the same kernel unpacked by us beforehand (`vmlinux`, entered by PVH). Where
this computer's KVM cannot run Linux all of it happens in one lab, Python's start-up included. A
first round only warms caches.

With BEFORE, paths of other checkouts with colons between, `tinyvmm run` of each of them and of this
one is compared instead: its root over 9P, and LINE said by a command in it. That is measured from
shell to shell. All of them boot one kernel, by `--kernel`: left alone, each chooses its own.

With KERNEL, a version or a path as for `tinyvmm run`, that is the kernel of all.

Before each boot free memory is written over. An emulated processor keeps translations of the code
that a guest before had there, and forgets them page by page as the next one loads its kernel, which
then takes seconds: who came after whom would be what is measured. So the order is another in each
round, too.
"""

import mmap
import os
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING

from bench.place import ROOT, where_linux_runs

if TYPE_CHECKING:
    from tinyvmm.images.kernels import InstalledKernel

ROUNDS = 5
LINE = b"userspace is here"
LIMIT = 120  # seconds for one boot
OVERWRITTEN_MAX = 3 << 30  # bytes
COMMON = "console=ttyS0 quiet panic=-1 no_timer_check"


def init_program() -> bytes:
    """Return an init that writes LINE to the console and sleeps."""
    from tinyvmm.guest import abi
    from tinyvmm.guest.elf import Program

    p = Program()
    p.label("_start")
    p.system_call(abi.SYS_WRITE, 1, p.string(LINE.decode() + "\n"), len(LINE) + 1)
    p.label("again")
    p.system_call(abi.SYS_POLL, 0, 0, -1)
    p.jmp("again")
    return p.link()


def initramfs(installed: "InstalledKernel") -> bytes:
    """Return the archive: modules as a run has them, /dev/console, and the program above."""
    import stat

    from tinyvmm.command.options import MODULES
    from tinyvmm.guest.archive import module_archive
    from tinyvmm.guest.initramfs import Archive
    from tinyvmm.kernel_files.kernel_cache import default_dir

    if installed.modules is None:
        sys.exit(f"kernel {installed.version} has no modules")
    modules = module_archive(installed.modules, MODULES, default_dir())
    own = Archive().add_device("/dev/console", stat.S_IFCHR | 0o600, 5, 1)
    own.add_file("/init", init_program(), mode=0o755)
    return bytes(modules.archive) + own.finish()


def boot_ours(initrd: str, vmlinuz: str) -> None:
    """Be the VMM: boot, pass the console on; say on stderr when the guest was about to run."""
    from tinyvmm.boot import load_kernel
    from tinyvmm.machine import Machine

    def show(data: bytes) -> None:
        os.write(1, data)

    with open(initrd, "rb") as file:
        archive = file.read()
    with Machine(memory=512 << 20) as machine, load_kernel(vmlinuz) as kernel:
        machine.add_board(console=show)
        machine.boot_linux(kernel, initrd=[archive], cmdline=f"{COMMON} pci=noearly reboot=a")
        os.write(2, b"start\n")
        machine.start()
        machine.wait(LIMIT)


def subjects(installed: "InstalledKernel", cleanup: ExitStack) -> dict[str, list[str]]:
    """Return what is compared: name -> command whose stdout is the guest's serial line.

    Their files stay until `cleanup`.
    """
    from tempfile import TemporaryDirectory

    from tinyvmm.lab.lab import python_command
    from tinyvmm.lab.qemu import kernel_file

    vmlinuz = installed.vmlinuz
    directory = Path(cleanup.enter_context(TemporaryDirectory()))
    initrd, vmlinux = str(directory / "initrd"), str(directory / "vmlinux")
    Path(initrd).write_bytes(initramfs(installed))
    with open(kernel_file(vmlinuz), "rb") as unpacked:
        unpacked.seek(0)  # a descriptor's, which others have read
        Path(vmlinux).write_bytes(unpacked.read())
    code = (
        f"import sys; sys.path.insert(0, {ROOT!r}); "
        "from bench.boot import boot_ours; boot_ours(*sys.argv[1:])"
    )
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512", "-nodefaults"]
    qemu += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    qemu += ["-initrd", initrd]
    microvm = ["-M", "microvm", "-append", f"{COMMON} pci=off"]
    return {
        "ours": python_command(code, [initrd, vmlinuz]),
        "QEMU microvm": [*qemu, *microvm, "-kernel", vmlinuz],
        "QEMU microvm, vmlinux": [*qemu, *microvm, "-kernel", vmlinux],
        "QEMU q35": [*qemu, "-M", "q35", "-append", COMMON, "-kernel", vmlinuz],
    }


def checkouts(kernel: str, before: str) -> dict[str, list[str]]:
    """Return what is compared with BEFORE, in the same form."""
    from tinyvmm.lab.lab import python_command

    runs = {}
    for path in (ROOT, *before.split(os.pathsep)):
        main = f"import sys; sys.path.insert(0, {path!r}); from tinyvmm.cli.main import main"
        words = ["run", "--no-lab", "--kernel", kernel, "--", "echo", LINE.decode()]
        runs[f"run of {path}"] = python_command(f"{main}; main()", words)
    return runs


def overwrite_free_memory() -> None:
    """Write to most of it, as far as there is no more than a lab has."""
    with open("/proc/meminfo", encoding="ascii") as file:
        found = dict(line.split(":") for line in file)
    length = min(int(found["MemAvailable"].split()[0]) * 1024 * 3 // 4, OVERWRITTEN_MAX)
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as free:
        free.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, length, mmap.PAGESIZE):
            free[at] = 1


def boot_once(command: list[str]) -> tuple[float, float]:
    """Return seconds from exec to LINE, and to "start" on stderr (0 if there is none).

    Of a run those are to its end, and to LINE.
    """
    begin = monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if process.stdout is None or process.stderr is None:
            raise AssertionError("no pipes")
        started = 0.0
        if "boot_ours" in " ".join(command):
            process.stderr.readline()
            started = monotonic() - begin
        shown = b""
        while LINE not in shown:
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                raise RuntimeError(f"{command}: {shown[-500:]!r} {process.stderr.read()!r}")
            shown += data
        end = monotonic() - begin
        if "run" in command:
            process.wait(LIMIT)
            return monotonic() - begin, end
        process.kill()
    return end, started


def rounds(count: int, before: str, wanted: str | None) -> dict[str, list[tuple[float, float]]]:
    """Boot everything `count` times in turn, after once to warm caches."""
    from tinyvmm.images import kernels

    installed = kernels.find(wanted)
    with ExitStack() as cleanup:
        if before:
            commands = checkouts(wanted or installed.version, before)
        else:
            commands = subjects(installed, cleanup)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(count + 1):
            for name, command in random.sample(list(commands.items()), len(commands)):
                overwrite_free_memory()
                times = boot_once(command)
                if turn:
                    found[name].append(times)
    return found


def main() -> None:
    """Measure, here or in the lab, and print."""
    from tinyvmm.command.run import prepare_kernel

    wanted = os.environ.get("KERNEL")
    prepare_kernel(wanted)[0].close()
    count = int(os.environ.get("ROUNDS", ROUNDS))
    before = os.environ.get("BEFORE", "")
    found = where_linux_runs(rounds, count, before, wanted, timeout=LIMIT * 4 * (count + 1))
    first = next(iter(found))  # ours
    base = median(end for end, _ in found[first])
    for name, times in found.items():
        ends = sorted(end for end, _ in times)
        middle = median(ends)
        spread = f"{ends[0]:.1f} to {ends[-1]:.1f}"
        what = "in all" if before else "to userspace"
        print(f"{name:22} {middle:6.1f} s {what} ({spread})   {middle / base:.2f} of ours")
        if before:
            print(f"{'':22} {median(said for _, said in times):6.1f} s to its line")
    if before:
        return
    guest = median(end - start for end, start in found["ours"])
    print(f"ours, from the first KVM_RUN: {guest:.1f} s")
