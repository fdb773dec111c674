"""Which host file systems may keep a system call waiting, and which are no files at all.

A local file system answers when its disk does. One that asks another computer or another program
may answer tomorrow, and nothing that must go on may wait for it. The mount table says which is
which without asking any of them: proc_pid_mountinfo(5), of which we take st_dev (`major:minor`) and
the type behind the ` - `. A device not in it (a subvolume's) is local.

What the kernel shows as regular files in proc, sysfs and their like are its own functions: to read
one may wait for ever (kmsg, trace_pipe), or be somebody's memory (kcore, PID/mem); to write one
acts on the host. A guest has its own, so ours are as special to it as a device is.

Any thread may call.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

STALLING = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "fuse",
    "fuseblk",
    "gfs2",
    "lustre",
    "nfs",
    "nfs4",
    "ocfs2",
    "smb3",
    "virtiofs",
}
KERNELS_OWN = {
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "efivarfs",
    "fusectl",
    "nfsd",
    "proc",
    "pstore",
    "resctrl",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sysfs",
    "tracefs",
}
_OCTAL = re.compile(rb"\\([0-7]{3})")
_GOOD_FOR = 2.0  # seconds; device numbers are used again

_devices: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
_good_until = 0.0


def may_stall(dev: int) -> bool:
    """Whether `dev`, a file's st_dev, is of a file system of one of the STALLING types."""
    return dev in _known()[0]


def is_kernels_own(dev: int) -> bool:
    """Whether `dev`, a file's st_dev, is of a file system of one of the KERNELS_OWN types."""
    return dev in _known()[1]


def _known() -> tuple[frozenset[int], frozenset[int]]:
    global _devices, _good_until
    now = monotonic()
    if now >= _good_until:
        _devices = devices()
        _good_until = now + _GOOD_FOR
    return _devices


def devices() -> tuple[frozenset[int], frozenset[int]]:
    """The st_dev of every mount here that may stall, and of every one that is the kernel's own."""
    stalling: set[int] = set()
    kernels: set[int] = set()
    for dev, _, kind in _mounts():
        if kind in STALLING or kind in KERNELS_OWN:
            (stalling if kind in STALLING else kernels).add(dev)
    return frozenset(stalling), frozenset(kernels)


def waiting_places() -> frozenset[tuple[int, int]]:
    """The (st_dev, st_ino) of every directory in which to look at an entry may keep one waiting.

    Those are the directories of mount points whose file systems may stall, or that are mounted when
    somebody comes (autofs).
    """
    points = [
        _OCTAL.sub(lambda found: bytes([int(found[1], 8)]), point)
        for _, point, kind in _mounts()
        if kind in STALLING or kind == "autofs"
    ]
    found = set()
    for point in points:
        above = os.path.dirname(point)
        if any(above == other or above.startswith(other + b"/") for other in points):
            continue  # not even that can be looked at, and nobody will be there unasked
        with suppress(OSError):
            st = os.stat(above)
            found.add((st.st_dev, st.st_ino))
    return frozenset(found)


def _mounts() -> Iterator[tuple[int, bytes, str]]:
    """The st_dev, mount point (with what is escaped in it) and type of every mount here."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            where, _, what = line.rpartition(b" - ")
            device, _, point = where.split(b" ", 5)[2:5]
            kind = what.split(b" ", 1)[0].partition(b".")[0]
            yield os.makedev(*map(int, device.split(b":"))), point, os.fsdecode(kind)
