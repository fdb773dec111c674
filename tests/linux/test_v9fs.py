"""What a guest's programs see of its root and of a shared directory, through Linux's own v9fs.

One guest runs v9fs_checks.c on both; on a disk's file system all of it is ok, which is tested too.
The server works on ext4, in a file, since the lab's own RAM has no extended attributes for users.
What v9fs cannot do is in docs/limits-9p.md.
"""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.linux.conftest import LONG, Runner
from tinyvmm.guest.modules import closure
from tinyvmm.images import kernels

pytestmark = pytest.mark.linux

SOURCE = Path(__file__).parent / "v9fs_checks.c"
CHECKS = SOURCE.read_text().split("CASE(name)")[1].replace("CASE", "\0").split("\0")[1:]
NAMES = [check[1 : check.index(")")] for check in CHECKS]
PRIVATE, SHARED = "/root/private", "/live"

LIMITS = {
    "times_with_nanoseconds": "v9fs leaves s_time_gran at a second",
    "rename_flags": "v9fs_vfs_rename takes no flags",
    "files_without_a_name": "v9fs has no tmpfile operation",
}
CACHED_LIMITS = {"blocks_of_holes": "v9fs_write_end counts what a file grows by as blocks"}

DISK = "/tmp/tinyvmm-test-disk"
MAKE_DISK = f"""
for module in "$@"; do insmod "$module" 2> /dev/null || true; done
mkdir -p {DISK}; truncate -s 12G {DISK}.image; mke2fs -q -F -t ext4 {DISK}.image
mount -o loop {DISK}.image {DISK}; mkdir {DISK}/writes {DISK}/live
"""


@pytest.fixture(scope="module")
def program(guest: Runner) -> str:
    path = guest.directory("v9fs-checks") / "checks"
    gcc = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(path), str(SOURCE)]
    subprocess.run(gcc, check=True)
    return str(path)


@pytest.fixture(scope="module")
def disk(guest: Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory on a disk, where the guest is."""
    if guest.lab is None:
        path = tmp_path_factory.mktemp("disk")
        for name in ("writes", "live"):
            (path / name).mkdir()
        yield str(path)
        return
    modules = kernels.find().modules
    assert modules is not None
    paths = [module.path for module in closure(modules, ("loop", "crc32c_generic", "ext4"))]
    make = f"set -- {shlex.join(paths)}\n{MAKE_DISK}"
    with guest.standing(make, f"umount {DISK} && rm {DISK}.image"):
        yield DISK


@pytest.fixture(scope="module")
def results(guest: Runner, program: str, disk: str) -> dict[str, str]:
    """By directory and check: "ok", or how it failed."""
    options = ["--write", f"{disk}/writes", "--shared", f"{SHARED}={disk}/live"]
    script = f"mkdir -p {PRIVATE} && {program} {PRIVATE} {SHARED}"
    done = guest.run(*options, "--", "sh", "-c", script, timeout=LONG)
    assert done.status == 0, done
    found = {}
    for line in done.stdout.decode().splitlines():
        head, _, why = line.partition(": ")
        word, directory, check = head.split()
        found[f"{directory} {check}"] = word if word == "ok" else why
    return found


def cases() -> list[object]:
    """Each place and check; what Linux 6.1's v9fs cannot do is expected to fail."""
    found: list[object] = []
    for where, limits in ((PRIVATE, LIMITS | CACHED_LIMITS), (SHARED, LIMITS)):
        for name in NAMES:
            reason = limits.get(name)
            marks = [] if reason is None else [pytest.mark.xfail(reason=reason)]
            found.append(pytest.param(where, name, marks=marks))
    return found


@pytest.mark.parametrize(("where", "name"), cases())
def test_it_is_as_on_a_disk(results: dict[str, str], where: str, name: str) -> None:
    assert results.get(f"{where} {name}") == "ok"


def test_on_a_disk_all_is_ok(guest: Runner, program: str, disk: str) -> None:
    done = guest.program(["sh", "-c", f"mkdir {disk}/plain && {program} {disk}/plain"])
    assert [line.split()[0] for line in done.stdout.decode().splitlines()] == ["ok"] * len(NAMES)
