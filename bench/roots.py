"""Roots beside each other: ours over 9P and as EROFS, QEMU's over virtio-9p and as an ext4 disk.

The same stock kernel boots, by turns, with the same tree as its root: some thousand files, with the
programs that are measured. Ours is `tinyvmm run --root-mode`; QEMU (q35, `-accel kvm`) has the tree
by virtio-9p-pci (`local`, cache=loose, an overlay in RAM over it, as for our EROFS), or an image
that mkfs.ext4 made of it before, which takes writes, by virtio-blk-pci; or such an image of ext4 or
EROFS, read-only, under an overlay as ours has one, which tells what is the overlay's part. One vCPU
each. In each guest one C program runs the commands and takes the time; cold is with the guest's
caches dropped, but not the host's: the tree and the images are in its RAM. What each step read of
the root's disk is counted by the guest's kernel, so it depends on no clock and no load.

The first turn only boots each, which warms the host's caches. `python -m bench roots` takes one
round, ROUNDS=3 in the environment three, and REPEAT=3 has each guest do everything three times;
SUBJECTS='erofs,QEMU ext4' takes only those, ONLY=git only what begins so. Medians are told of all.
Where this computer's KVM cannot run Linux all of it happens in one lab, where Python is slowed down
more than C is.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import median
from time import monotonic
from typing import NamedTuple

from bench.place import MAIN, where_linux_runs

C_PROGRAM = Path(__file__).with_suffix(".c")
ROUNDS = 1
LIMIT = 600  # seconds for one guest
MEMORY_MIB = 1024
SUBJECTS = ("9p", "erofs", "QEMU 9p", "QEMU ext4", "QEMU ext4+overlay", "QEMU erofs+overlay")
RATIOS = (("erofs", "QEMU ext4"), ("erofs", "QEMU ext4+overlay"), ("QEMU 9p", "erofs"))
CMDLINE = "console=ttyS0 quiet panic=-1 no_timer_check pci=noearly"
QEMU_MODULES = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_blk",
    "crc32c_generic?",
    "erofs",
)
FILES, SOURCES = 1000, 3  # of the repository, of the C project
IMPORTS = """
abc argparse array ast base64 bisect bz2 calendar cmd codecs collections configparser contextlib
copy csv ctypes dataclasses datetime decimal difflib email.message enum fractions functools getpass
glob gzip hashlib heapq html.parser http.client inspect json logging lzma mimetypes pathlib pickle
pprint queue random sched shlex shutil socket statistics string subprocess tarfile tempfile
"""
_LEFT_OUT = shutil.ignore_patterns(
    "test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip", "tkinter", "config-*"
)
_HEADERS = ("bits", "gnu", "sys", "asm")
_LINKED = (
    "crt1.o Scrt1.o crti.o crtn.o crtbegin.o crtbeginS.o crtend.o crtendS.o libgcc.a libgcc_s.so "
    "libgcc_s.so.1 libc.so libc.so.6 libc_nonshared.a liblto_plugin.so include"
)


class Entry(NamedTuple):
    """One thing done in a guest, or its start, from exec on: how long it took."""

    subject: str
    turn: int
    what: str
    seconds: float
    requests: int
    """To read the root's disk, as the guest's kernel counts them; 0 if it is none."""
    sectors: int
    """Of 512 bytes, read by those."""


# --- the tree ------------------------------------------------------------------------------------


class TreeMaker:
    """Makes a root of this computer's files: each where it is here, with what it leads to."""

    def __init__(self, top: str) -> None:
        self._top = top
        for name in ("proc", "sys", "dev", "run", "tmp", "etc", "bench"):
            os.makedirs(os.path.join(top, name))
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                os.symlink(os.readlink(f"/{name}"), os.path.join(top, name))

    def add(self, path: str) -> None:
        """Add a file, a directory with all that is in it, or a link and what it leads to."""
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        there = self._top + path
        if os.path.lexists(there):
            return
        os.makedirs(os.path.dirname(there), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), there)
            self.add(os.path.join(os.path.dirname(path), os.readlink(path)))
        elif os.path.isdir(path):
            shutil.copytree(path, there, symlinks=True, ignore=_LEFT_OUT)
        else:
            shutil.copy2(path, there)

    def add_programs(self, *paths: str) -> None:
        """Add programs or shared objects and the libraries they are linked with."""
        for path in paths:
            self.add(path)
        done = subprocess.run(["ldd", *paths], capture_output=True, text=True, check=False)
        for library in set(re.findall(r"(/\S+) \(0x", done.stdout)):
            self.add(library)


def make_tree(top: str) -> None:
    """Make the tree: programs, Python, a compiler, a repository and what is done with them."""
    tree = TreeMaker(top)
    for name in ("sh", "find", "wc", "git", "make", "gcc", "rm"):
        path = shutil.which(name)
        if path is None:
            sys.exit(f"{name} is not installed: make packages")
        tree.add_programs(path)
    python = os.path.realpath(sys.executable)
    library = sysconfig.get_path("stdlib")
    tree.add(library)
    tree.add_programs(python, *map(str, Path(library, "lib-dynload").glob("*.so")))
    if not os.path.lexists(top + "/usr/bin/python3"):
        os.symlink(python, top + "/usr/bin/python3")
    for name in ("cc1", "collect2", "as", "ld"):
        found = shutil.which(_gcc(f"-print-prog-name={name}"))
        tree.add_programs(found or sys.exit(f"gcc has no {name}: make packages"))
    for name in _LINKED.split():
        path = _gcc(f"-print-file-name={name}")
        if os.path.isabs(path):
            tree.add(path)
    tree.add_programs(_gcc("-print-file-name=libc.so.6"), _gcc("-print-file-name=libm.so.6"))
    for header in Path("/usr/include").glob("*.h"):
        tree.add(str(header))
    for directory in Path("/usr/include").glob("*-linux-gnu"):
        for name in _HEADERS:
            tree.add(str(directory / name))
    for name in ("linux", "asm-generic"):
        tree.add(f"/usr/include/{name}")
    _make_work(Path(top, "bench"))
    Path(top, "etc/gitconfig").write_text("[safe]\n\tdirectory = *\n")
    Path(top, "etc/passwd").write_text("root:x:0:0:root:/tmp:/bin/sh\n")


def _gcc(question: str) -> str:
    done = subprocess.run(["gcc", question], capture_output=True, text=True, check=True)
    path = done.stdout.strip()
    return os.path.normpath(path) if "/" in path else path


def _make_work(bench: Path) -> None:
    """Make the repository, the C project and the program of 50 imports; and what measures."""
    project, sources = bench / "project", bench / "c"
    for number in range(FILES):
        path = project / f"directory{number % 40}" / f"file{number}.c"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"int function{number}(void);\n" * 20)
        os.utime(path, (1_500_000_000, 1_500_000_000))
    git = ["git", "-C", str(project), "-c", "user.name=b", "-c", "user.email=b@b"]
    # Inode numbers and ctimes are other ones in each guest: by them git would read all files.
    stat = ["config", "core.checkStat", "minimal"]
    for command in (["init", "-q"], stat, ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    sources.mkdir()
    names = [f"part{number}" for number in range(SOURCES)]
    for name in names:
        (sources / f"{name}.c").write_text(
            "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n"
            f'int {name}(void) {{ return printf("%zu\\n", strlen("{name}")); }}\n'
        )
    calls = " ".join(f"{name}();" for name in names)
    declared = " ".join(f"int {name}(void);" for name in names)
    (sources / "main.c").write_text(f"{declared}\nint main(void) {{ {calls} return 0; }}\n")
    objects = " ".join(f"{name}.o" for name in ("main", *names))
    (sources / "Makefile").write_text(
        f"CC = gcc\nall: program\nprogram: {objects}\n\t$(CC) -o $@ $^\n"
        f"clean:\n\trm -f program {objects}\n"
    )
    (bench / "imports.py").write_text(f"import {', '.join(IMPORTS.split())}\n")
    command = ["gcc", "-O2", "-static", "-o", str(bench / "roots"), str(C_PROGRAM)]
    subprocess.run(command, check=True)


def make_ext4(tree: str, image: str) -> None:
    """Make an image of the tree, with room for what is written."""
    size = sum(path.lstat().st_size for path in Path(tree).rglob("*"))
    with open(image, "wb") as file:
        file.truncate((size // (1 << 20) * 3 // 2 + 128) << 20)
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    program = shutil.which("mkfs.ext4", path=path) or sys.exit("mkfs.ext4 is not installed")
    subprocess.run([program, "-q", "-F", "-d", tree, image], check=True)


# --- the guests ----------------------------------------------------------------------------------


def qemu_initrd(init: str) -> tuple[bytes, list[str]]:
    """Return the initramfs of QEMU's guests, and the paths of the modules in it."""
    from bench.guest9p import initramfs

    return initramfs(init, (*QEMU_MODULES, "ext4"))


def command_of(subject: str, work: str, modules: list[str], env: list[str]) -> list[str]:
    """Return the command that boots a subject and prints what its guest does.

    In `work` there are tree, initrd, and an image by the name of its file system.
    """
    from tinyvmm.images import kernels

    kernel = kernels.find()
    if not subject.startswith("QEMU"):
        python = os.path.realpath(sys.executable)
        ours = [python, "-I", "-S", "-c", MAIN, "run", "--no-lab", "--kernel", kernel.version]
        ours += ["--root-mode", subject, "--read", f"/={work}/tree", "--memory", f"{MEMORY_MIB}M"]
        for variable in env:
            ours += ["--env", variable]
        return [*ours, "--workdir", "/", "--", "/bench/roots"]
    qemu = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", str(MEMORY_MIB)]
    qemu += ["-M", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    qemu += ["-serial", "stdio", "-kernel", kernel.vmlinuz, "-initrd", f"{work}/initrd"]
    kind = subject.removeprefix("QEMU ")
    if kind == "9p":
        root = f"9p+overlay root {' '.join(modules)}"
        fs = (
            f"local,id=root,path={work}/tree,security_model=passthrough,multidevs=remap,readonly=on"
        )
        qemu += ["-fsdev", fs, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]
    else:
        root = f"{kind} /dev/vda {' '.join(modules)}"
        image = os.path.join(work, kind.partition("+")[0])
        drive = f"if=none,id=d,file={image},format=raw,snapshot=on"
        qemu += ["-drive", drive, "-device", "virtio-blk-pci,drive=d"]
    return [*qemu, "-append", f"{CMDLINE} {' '.join(env)} -- {root}"]


def run_guest(subject: str, turn: int, command: list[str], work: str) -> list[Entry]:
    """Boot it once, and return what its program said; in turn 0 only until it says something."""
    found = []
    begin = monotonic()
    deadline = begin + LIMIT
    environment = {**os.environ, "TMPDIR": work}
    lines: list[str] = []
    with subprocess.Popen(
        ["timeout", "-s", "KILL", str(LIMIT), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            lines.append(line.strip())
            word, *rest = lines[-1].split() or [""]
            if word == "begin":
                took, seconds = monotonic() - begin, float(rest[0])
                counts = [int(number) for number in rest[1:]]
                found.append(Entry(subject, turn, "userspace, from exec", took, *counts))
                found.append(Entry(subject, turn, "userspace, from boot", seconds, *counts))
                if not turn:
                    process.terminate()
            elif word == "end":
                what, ns, status, *read = rest
                if status != "0":
                    raise RuntimeError(f"{subject}: {what} failed in the guest: {status}")
                counts = [int(number) for number in read]
                what = what.replace("-", ", ")
                found.append(Entry(subject, turn, what, int(ns) / 1e9, *counts))
    if not found or (turn and "done" not in lines):
        shown = "\n".join(lines[-10:])
        raise RuntimeError(f"{subject}, {deadline - monotonic():.0f} s left: {shown}")
    return found


def measure(archive: str, rounds: int, env: list[str], subjects: list[str]) -> list[Entry]:
    """Run each `rounds` times in turn, after once to warm caches; `archive` holds the tree.

    `env` is what the program in the guests goes by, `NAME=VALUE` each.
    """
    from tinyvmm.fileserver.descriptors import raise_nofile_limit
    from tinyvmm.images.erofs.writer import write_image

    raise_nofile_limit()
    found = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        tree = os.path.join(work, "tree")
        os.mkdir(tree)
        subprocess.run(["tar", "-C", tree, "-xpf", archive], check=True)
        make_ext4(tree, os.path.join(work, "ext4"))
        write_image([("/", tree)], os.path.join(work, "erofs"))
        data, modules = qemu_initrd(os.path.join(tree, "bench/roots"))
        Path(work, "initrd").write_bytes(data)
        for turn in range(rounds + 1):
            for subject in subjects:
                command = command_of(subject, work, modules, env)
                found += run_guest(subject, turn, command, work)
    return found


def show(found: list[Entry], subjects: list[str]) -> None:
    """Print one line for each thing done, with what the goals compare; then what was read."""
    ratios = [(a, b) for a, b in RATIOS if a in subjects and b in subjects]
    shown = [f"{a} / {b}".replace("QEMU ", "Q") for a, b in ratios]
    print(f"{'seconds':22}" + "".join(f"{name:>20}" for name in (*subjects, *shown)))
    measured = [entry for entry in found if entry.turn]
    steps = list(dict.fromkeys(entry.what for entry in measured))
    for what in steps:
        of = {
            subject: median(e.seconds for e in measured if e[:3:2] == (subject, what))
            for subject in subjects
        }
        print(
            f"{what:22}"
            + "".join(f"{seconds:20.3f}" for seconds in of.values())
            + "".join(f"{of[a] / of[b]:20.2f}" for a, b in ratios)
        )
    on_disks = [name for name in subjects if not name.endswith("9p")]
    print(f"{'requests, KiB':22}" + "".join(f"{name:>20}" for name in on_disks))
    for what in steps:
        line = f"{what:22}"
        for subject in on_disks:
            read = [e for e in measured if e[:3:2] == (subject, what)]
            requests = median(e.requests for e in read)
            kib = median(e.sectors for e in read) / 2
            line += f"{f'{requests:.0f}, {kib:.0f}':>20}"
        print(line)


def main() -> None:
    """Measure, here or in the lab, and print."""
    from tinyvmm.command.checks import settle
    from tinyvmm.command.options import RunOptions, modules_for
    from tinyvmm.command.run import prepare_kernel

    rounds = int(os.environ.get("ROUNDS", ROUNDS))
    env = [f"{name}={os.environ[name]}" for name in ("REPEAT", "ONLY") if name in os.environ]
    wanted = os.environ.get("SUBJECTS", ",".join(SUBJECTS)).split(",")
    if unknown := set(wanted) - set(SUBJECTS):
        sys.exit(f"SUBJECTS: {', '.join(sorted(unknown))}: give some of {','.join(SUBJECTS)}")
    with tempfile.TemporaryDirectory() as directory:
        tree, archive = os.path.join(directory, "tree"), os.path.join(directory, "tree.tar")
        make_tree(tree)
        count = sum(len(files) for _, _, files in os.walk(tree))
        subprocess.run(["tar", "-C", tree, "-cf", archive, "."], check=True)
        size = os.stat(archive).st_size >> 20
        for mode in ("9p", "erofs"):  # fills the cache that the lab sees as well
            options = settle(RunOptions(("true",), root_mode=mode))
            prepare_kernel(None, modules_for(options), mode)[0].close()
        qemu_initrd(os.path.join(tree, "bench/roots"))
        limit = LIMIT * len(wanted) * (rounds + 1)
        found = where_linux_runs(measure, archive, rounds, env, wanted, timeout=limit)
    print(f"a tree of {count} files, {size} MiB")
    show([Entry(*entry) for entry in found], wanted)
