"""A root without 9P: the read trees as an EROFS disk, under an overlay that takes the writes.

The disk is made while it is read (images/erofs); what is written goes to the guest's RAM, or to a
sparse ext4 disk: one that is thrown away, or the file `upper.ext4` in a directory that keeps it.
The disks come behind the user's own, whose names stay what they are.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from tinyvmm.disks.raw import RawDisk
from tinyvmm.errors import ConfigError
from tinyvmm.guest import abi
from tinyvmm.guest.init import (
    SCRATCH,
    SCRATCH_IN_RAM,
    Filesystem,
    Mount,
    disk_name,
    overlay_root,
)
from tinyvmm.images import kernels
from tinyvmm.images.erofs.image import ErofsImage
from tinyvmm.scratch import ScratchDirectory

# What EROFS computes checksums with does not start without the algorithm, which it asks a modprobe
# for that our guests do not have yet; newer kernels have it built in.
MODULES = ("virtio_blk", "crc32c_generic?", "erofs", "overlay")
UPPER_FILE = "upper.ext4"
UPPER_SIZE = 64 << 30  # of which only what is written takes space here
SERIAL, UPPER_SERIAL = "root", "writes"
OPT_IO_SIZE = 256 << 10  # as a request costs us more than to read a little too much
# No inode tables are zeroed in the background: the file would grow by them.
_UPPER_OPTIONS = "noinit_itable,discard"
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"


class RootDisks(NamedTuple):
    """What a root consists of: the image, the disk for what is written if there is one."""

    image: ErofsImage
    upper: RawDisk | None
    number: int
    """Of the image, among all disks."""

    def mounts(self, over: Sequence[str] = ()) -> Sequence[Filesystem]:
        """Return how PID 1 mounts it, with the directories `over` above what is read."""
        lower = Mount(f"/dev/{disk_name(self.number)}", "/lower", "erofs", abi.MS_RDONLY)
        scratch = SCRATCH_IN_RAM
        if self.upper is not None:
            scratch = Mount(
                f"/dev/{disk_name(self.number + 1)}", SCRATCH, "ext4", data=_UPPER_OPTIONS
            )
        return overlay_root(lower, scratch, over)


def check_shared(kernel: kernels.InstalledKernel) -> None:
    """Raise ConfigError if a kernel is known to have no 9P, which shared directories need."""
    if kernels.able(kernel)["9p"] is False:
        raise ConfigError(
            f"--shared needs 9P, which kernel {kernel.version} does not have; leave it out, or "
            f"{kernels.FETCH}"
        )


def open_root(
    reads: Sequence[tuple[str, str]],
    writes: Sequence[tuple[str, str]],
    *,
    private_writes: str,
    number: int,
    warn: Callable[[str], None],
    cleanup: ExitStack,
) -> RootDisks:
    """Open the root's disks, the first being disk `number`, until `cleanup`.

    ConfigError for what cannot be had.
    """
    where = upper_directory(writes)
    upper = None
    if where is None and private_writes == "server":
        scratch = ScratchDirectory()
        cleanup.callback(scratch.close)
        where = scratch.path
    if where is not None:
        upper = open_upper(where)
        cleanup.callback(upper.close)
    veiled = frozenset[tuple[int, int]]()
    if where is not None:
        st = os.stat(where)
        veiled = frozenset({(st.st_dev, st.st_ino)})
    image = ErofsImage(reads, warn, veiled=veiled)
    cleanup.callback(image.close)
    return RootDisks(image, upper, number)


def upper_directory(writes: Sequence[tuple[str, str]]) -> str | None:
    """Return the directory that keeps what is written, if one does; ConfigError for a part of /."""
    if not writes:
        return None
    if len(writes) > 1 or writes[0][0] != "/":
        raise ConfigError(
            "with --root-mode erofs one --write DIR keeps all that is written, as a disk: give no "
            "place in the guest, or use --root-mode 9p"
        )
    return writes[0][1]


def open_upper(directory: str) -> RawDisk:
    """Open and lock the disk in `directory`, made if there is none; ConfigError if it cannot be."""
    path = os.path.join(directory, UPPER_FILE)
    if not os.path.exists(path):
        _make_upper(directory, path)
    return RawDisk(path)


def _make_upper(directory: str, path: str) -> None:
    import shutil

    program = shutil.which("mkfs.ext4", path=os.environ.get("PATH", os.defpath) + _SBIN)
    if program is None:
        raise ConfigError(
            "a disk for what the guest writes needs mkfs.ext4: install e2fsprogs, or use "
            "--private-writes guest"
        )
    draft = f"{path}.{os.getpid()}"
    try:
        with open(draft, "xb") as file:
            file.truncate(UPPER_SIZE)
    except OSError as error:
        raise ConfigError(
            f"cannot make a disk for what the guest writes in {directory}: {error.strerror}; name "
            "a directory you can write to"
        ) from None
    try:
        _make_ext4(program, draft)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _make_ext4(program: str, path: str) -> None:
    more = ["-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"]
    import subprocess

    argv = [program, "-q", "-F", "-J", "size=64", *more, path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ConfigError(f"{program} did not make the disk {path}: {lines[-1]}")
