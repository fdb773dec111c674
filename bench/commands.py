"""A command from shell to shell: `run -- true`, and `exec -- true` in a machine that runs.

`tinyvmm run` beside virtme-ng's `vng` with the same stock kernel, and beside `podman run`, which
starts no kernel; `tinyvmm exec` beside `podman exec`. All see this computer's root. They take
turns, after a first round that warms caches. Where this computer's KVM cannot run Linux all of it
happens in one lab, Python's start-up included. What is not here or fails is told, and left out.

`vng` is fetched from PyPI into a virtual environment of the bench's own, in .cache. It asks
modprobe which modules its initramfs needs; where depmod never was it makes none, and the kernel
cannot reach its root. So beside a link to our kernel there is what depmod makes of its modules. Its
init finds the command's streams by names that udev gives; without udevd in the root the command
runs, but vng ends with 255. The lab's root is its own, so udev is unpacked there if it is missing.
Podman's runtime is the first that runs a container here; those that cannot are told of.

ROUNDS and EXECS in the environment are how many turns of either; with 0 it is left out.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic

from bench.place import MAIN

ROOT = Path(__file__).parent.parent
RUNS, EXECS = int(os.environ.get("ROUNDS", "5")), int(os.environ.get("EXECS", "15"))
LIMIT = 240  # seconds for one command
VNG = ROOT / ".cache" / "virtme-ng"
NAME = "bench"
PROGRAMS = [
    ("podman", "podman"),
    ("runc", "runc"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("udevadm", "udev"),
]
BOUND = "/run/tinyvmm-bench"
KERNEL = ROOT / ".cache" / "vng-kernel"
UDEV = ROOT / ".cache" / "vng-udev"
RUNTIMES = [(runtime, pivot) for pivot in (True, False) for runtime in ("crun", "runc")]
CONTAINER = ["--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]


def tinyvmm(*arguments: str) -> list[str]:
    """Return the command of ours, as an installed `tinyvmm` starts it."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-c", MAIN, *arguments]


def once(command: list[str]) -> float:
    """Return the seconds that a command takes; RuntimeError with its words if it fails."""
    begin = monotonic()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=LIMIT
    )
    spent = monotonic() - begin
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"status {done.returncode}: {' / '.join(words[-3:])}")
    return spent


def in_turn(subjects: dict[str, list[str]], count: int, found: dict[str, list[float]]) -> None:
    """Run each `count` times, after once to warm up; those that fail are told and left out."""
    for turn in range(count + 1 if count else 0):
        for name, command in list(subjects.items()):
            try:
                spent = once(command)
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
                del subjects[name]
                found.pop(name, None)
                continue
            if turn:
                found.setdefault(name, []).append(spent)


def prepare_lab() -> None:
    """Have what podman and vng look for.

    cgroups, and a root that is not the one of now, to pivot from; udev.
    """
    os.makedirs(BOUND, exist_ok=True)
    subprocess.run(["mount", "--bind", "/", BOUND], check=False)
    if UDEV.exists():
        for part in ("bin", "lib"):  # which lead to /usr
            shutil.copytree(UDEV / part, f"/usr/{part}", symlinks=True, dirs_exist_ok=True)
    if not os.path.ismount("/sys/fs/cgroup"):
        subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=False)


@contextmanager
def podman(root: str) -> Iterator[list[str]]:
    """Give podman with a runtime that can run a container of `root`; nothing if none can."""
    with TemporaryDirectory() as state:
        config = Path(state, "containers.conf")
        config.write_text("[engine]\nno_pivot_root = true\n", encoding="ascii")
        for runtime, pivot in RUNTIMES:
            command = ["podman", "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]
            for option in ("root", "runroot", "tmpdir"):
                command += [f"--{option}", os.path.join(state, option)]
            command += ["--runtime", runtime]
            if not pivot:
                command = ["env", f"CONTAINERS_CONF={config}", *command]
            how = f"podman with {runtime}{'' if pivot else ' and no pivot_root'}"
            try:
                once([*command, "run", "--rm", *CONTAINER, "--rootfs", root, "true"])
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                print(f"{how}: {error}", file=sys.stderr, flush=True)
                continue
            print(how, file=sys.stderr, flush=True)
            yield command
            return
        yield []


def measure(runs: int, execs: int, root: str = "/") -> dict[str, list[float]]:
    """Measure here: name -> seconds."""
    found: dict[str, list[float]] = {}
    path = f"PATH={VNG}/bin:{os.environ.get('PATH', '/usr/bin:/bin')}"
    vng = ["env", path, str(VNG / "bin" / "python"), str(VNG / "bin" / "vng")]
    kernel = str(KERNEL / "vmlinuz")
    with podman(root) as container:
        subjects = {
            "tinyvmm run": tinyvmm("run", "--no-lab", "--", "true"),
            "vng": [*vng, "--run", kernel, "--force-9p", "--exec", "true"],
        }
        rootfs = [*CONTAINER, "--rootfs", root]
        if container:
            subjects["podman run"] = [*container, "run", "--rm", *rootfs, "true"]
        in_turn(subjects, runs, found)
        if execs:
            measure_execs(execs, container, rootfs, found)
    return found


def measure_execs(
    execs: int, container: list[str], rootfs: list[str], found: dict[str, list[float]]
) -> None:
    """Measure commands in a machine, and in a container if there is a podman."""
    subjects = {"tinyvmm exec": tinyvmm("exec", NAME, "--", "true")}
    once(tinyvmm("run", "--no-lab", "-d", "--name", NAME, "--", "sleep", "100000"))
    try:
        if container:
            once([*container, "run", "-d", "--name", NAME, *rootfs, "sleep", "100000"])
            subjects["podman exec"] = [*container, "exec", NAME, "true"]
        subjects["tinyvmm --version"] = tinyvmm("--version")
        in_turn(subjects, execs, found)
    finally:
        once(tinyvmm("rm", "-f", NAME))
        if container:
            once([*container, "rm", "--ignore", "-f", "-t", "0", NAME])


def prepare() -> None:
    """Fetch what is compared with, where there is a network."""
    import venv

    if not (VNG / "bin" / "vng").exists():
        venv.create(VNG, with_pip=True)
        once([str(VNG / "bin" / "pip"), "install", "--disable-pip-version-check", "virtme-ng"])
    for program, package in PROGRAMS:
        if shutil.which(program) is None:
            print(f"no {program}: apt-get install {package} for the comparison", file=sys.stderr)


def fetch_udev() -> None:
    """Make UDEV, for a lab: what is in Debian's package, if this computer has none."""
    if os.path.exists("/lib/systemd/systemd-udevd") or UDEV.exists():
        return
    UDEV.parent.mkdir(exist_ok=True)
    with TemporaryDirectory() as place:
        script = f"apt-get -q download udev && dpkg -x udev_*.deb {UDEV}"
        done = subprocess.run(
            ["sh", "-c", script], cwd=place, capture_output=True, text=True, check=False
        )
    if done.returncode:
        print(f"no udev for vng: {done.stderr.strip()}", file=sys.stderr)


def link_kernel() -> None:
    """Make KERNEL: our kernel where vng looks for one with its modules, and what depmod makes."""
    from tinyvmm.images import kernels

    installed = kernels.find()
    modules = KERNEL / "lib" / "modules" / installed.version
    if installed.modules is None or shutil.which("depmod") is None or modules.exists():
        return
    shutil.rmtree(KERNEL, ignore_errors=True)  # of another kernel
    modules.mkdir(parents=True)
    for name in ("kernel", "modules.order", "modules.builtin", "modules.builtin.modinfo"):
        (modules / name).symlink_to(Path(installed.modules, name))
    once(["depmod", "-b", str(KERNEL), installed.version])
    (KERNEL / "vmlinuz").symlink_to(installed.vmlinuz)


def main() -> None:
    """Measure, here or in the lab, and print."""
    from tinyvmm.command.run import prepare_kernel
    from tinyvmm.lab.lab import Lab, python_command
    from tinyvmm.lab.probe import missing_for_linux

    prepare()
    prepare_kernel(None)[0].close()
    link_kernel()
    if missing_for_linux() is None:
        found = measure(RUNS, EXECS)
    else:
        code = (
            f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); from bench import commands; "
            "commands.prepare_lab(); "
            f"print(json.dumps(commands.measure({RUNS}, {EXECS}, {BOUND!r})))"
        )
        fetch_udev()
        with Lab() as lab:
            done = lab.run(python_command(code, []), timeout=LIMIT * 4 * (RUNS + 1))
        sys.stderr.write(done.stderr.decode(errors="replace"))
        if done.status:
            sys.exit("the lab's part failed")
        found = json.loads(done.stdout)
    for base, others in (
        ("tinyvmm run", ("vng", "podman run")),
        ("tinyvmm exec", ("podman exec",)),
    ):
        if base not in found:
            continue  # not asked for, or told of above
        own = median(found[base])
        for name in (base, *others):
            if name in found:
                spread = f"{min(found[name]):.2f} to {max(found[name]):.2f}"
                middle = median(found[name])
                ratio = f"{own / middle:.2f} of its time for ours"
                print(f"{name:14} {middle:6.2f} s ({spread})   {ratio}")
    if "tinyvmm --version" in found:
        start = median(found["tinyvmm --version"])
        print(f"of which to start Python and print a version: {start:.2f} s")
