"""`tinyvmm doctor`: what this computer offers and lacks, with the remedy for each line."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

from tinyvmm.errors import ConfigError


class Finding(NamedTuple):
    """One line: `state` is "ok", "note" (works, but) or "lacks"; `remedy` says what to do."""

    state: str
    what: str
    detail: str
    remedy: str = ""


def check_python() -> Finding:
    """What this Python's standard library can unpack."""
    version = ".".join(map(str, sys.version_info[:3]))
    if find_spec("lzma") is None or find_spec("_lzma") is None:
        return Finding("note", "python", f"{version} without lzma", "install liblzma, rebuild it")
    return Finding("ok", "python", version)


def check_kvm() -> Finding:
    """/dev/kvm opens and speaks the API."""
    from tinyvmm import kvm

    try:
        with kvm.System() as system:
            vcpus = system.check_extension(kvm.KVM_CAP_MAX_VCPUS)
            return Finding("ok", "kvm", f"API {kvm.KVM_API_VERSION}, up to {vcpus} vCPUs a machine")
    except ConfigError as error:
        detail, _, remedy = str(error).partition(": ")
        return Finding("lacks", "kvm", detail, remedy)


def check_linux() -> Finding:
    """This KVM executes what Linux needs."""
    from tinyvmm.lab.probe import missing_for_linux

    try:
        missing = missing_for_linux()
    except ConfigError as error:
        return Finding("lacks", "linux on kvm", str(error).partition(": ")[0], "see kvm above")
    if missing is None:
        return Finding("ok", "linux on kvm", "guests run directly")
    return Finding(
        "note",
        "linux on kvm",
        f"{missing}: runs go through the lab",
        "use a hardware KVM for speed",
    )


def check_lab() -> Finding:
    """QEMU is there to emulate a computer with KVM."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        return Finding("note", "lab", "no qemu-system-x86_64", "apt-get install qemu-system-x86")
    return Finding("ok", "lab", qemu)


def check_kernel() -> Finding:
    """There is a kernel to boot, or a way to one."""
    from tinyvmm.images import kernels

    try:
        installed = kernels.default()
    except ConfigError as error:
        return Finding("note", "kernel", str(error), "tinyvmm kernel fetch")
    if installed is not None:
        return Finding("ok", "kernel", f"{installed.version} ({installed.source})")
    if shutil.which("apt-get") is None:
        return Finding("lacks", "kernel", "none, and no apt-get", "tinyvmm kernel import PATH")
    return Finding("note", "kernel", "none yet: the first run fetches one", "tinyvmm kernel fetch")


def check_memory() -> Finding:
    """Enough memory for a guest of the default size."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) >> 10
    if available < 1024:
        return Finding("note", "memory", f"{available} MiB available", "give run a small --memory")
    return Finding("ok", "memory", f"{available} MiB available")


def check_descriptors() -> Finding:
    """The file server holds a descriptor for each file that a guest knows."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        return Finding("note", "open files", f"at most {hard}", "raise the limit: ulimit -Hn 65536")
    return Finding("ok", "open files", f"up to {hard}")


def check_directories() -> Finding:
    """The places for kernels, caches and the guests' private writes can be written."""
    from tinyvmm.images import kernels
    from tinyvmm.kernel_files.kernel_cache import default_dir

    for path in (kernels.store_dir(), default_dir(), os.environ.get("TMPDIR") or "/tmp"):
        existing = path
        while not os.path.exists(existing):
            existing = os.path.dirname(existing)
        if not os.access(existing, os.W_OK | os.X_OK):
            return Finding(
                "lacks",
                "directories",
                f"{existing} is not writable",
                "set XDG_DATA_HOME, XDG_CACHE_HOME and TMPDIR to places that are",
            )
    return Finding("ok", "directories", "data, cache and temporary ones are writable")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_kvm,
    check_linux,
    check_lab,
    check_kernel,
    check_memory,
    check_descriptors,
    check_directories,
)


def findings() -> Iterator[Finding]:
    """Yield every check's finding, in order."""
    for check in CHECKS:
        yield check()


def can_run(found: list[Finding]) -> bool:
    """Whether `tinyvmm run` can work: directly or through the lab, with some kernel."""
    state = {finding.what: finding.state for finding in found}
    if any(state[what] == "lacks" for what in ("python", "kernel", "directories")):
        return False
    return state["linux on kvm"] == "ok" or state["lab"] == "ok"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, which has no options."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what this computer offers and lacks",
        epilog="example: tinyvmm doctor (exit status: 0 if `tinyvmm run` can work here, else 1)",
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print one line a finding; 0 if runs can work."""
    del args
    found = []
    for finding in findings():
        found.append(finding)
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.state:5}  {finding.what:13} {finding.detail}{remedy}")
    works = can_run(found)
    print("tinyvmm run works here" if works else "tinyvmm run cannot work here yet")
    return 0 if works else 1
