"""Which host file systems may keep a system call waiting, and which are no files at all.

A local file system answers when its disk does. One that asks another computer or another program
may answer tomorrow, and nothing that must go on may wait for it. The mount table says which is
which without asking any of them (mountinfo.py). A device not in it (a subvolume's) is local.

What the kernel shows as regular files in proc, sysfs and their like are its own functions: to read
one may wait for ever (kmsg, trace_pipe), or be somebody's memory (kcore, PID/mem); to write one
acts on the host. A guest has its own, so ours are as special to it as a device is.

Any thread may call.
"""

import os
from contextlib import suppress
from time import monotonic

from tinyvmm.mountinfo import Mount, mounts

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
    for mount in _mounts():
        if mount.kind in STALLING:
            stalling.add(mount.dev)
        elif mount.kind in KERNELS_OWN:
            kernels.add(mount.dev)
    return frozenset(stalling), frozenset(kernels)


def waiting_places() -> frozenset[tuple[int, int]]:
    """The (st_dev, st_ino) of every directory in which to look at an entry may keep one waiting.

    Those are the directories of mount points whose file systems may stall, or that are mounted when
    somebody comes (autofs).
    """
    points = [
        mount.point for mount in _mounts() if mount.kind in STALLING or mount.kind == "autofs"
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


def _mounts() -> list[Mount]:
    with open("/proc/self/mountinfo", "rb") as table:
        return list(mounts(table))
