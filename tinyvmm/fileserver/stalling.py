"""Which host file systems may keep a system call waiting for somebody else.

A local file system answers when its disk does. One that asks another computer or another program
may answer tomorrow, and nothing that must go on may wait for it. The mount table says which is
which without asking any of them: proc_pid_mountinfo(5), of which we take st_dev (`major:minor`) and
the type behind the ` - `. A device not in it (a subvolume's) is local.

Any thread may call.
"""

import os
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
_GOOD_FOR = 2.0  # seconds; device numbers are used again

_devices: frozenset[int] = frozenset()
_good_until = 0.0


def may_stall(dev: int) -> bool:
    """Whether `dev`, a file's st_dev, is of a file system of one of the STALLING types."""
    global _devices, _good_until
    now = monotonic()
    if now >= _good_until:
        _devices = stalling_devices()
        _good_until = now + _GOOD_FOR
    return dev in _devices


def stalling_devices() -> frozenset[int]:
    """The st_dev of every mount here that may stall."""
    with open("/proc/self/mountinfo") as table:
        return frozenset(
            [
                os.makedev(*map(int, line.split(" ", 3)[2].split(":")))
                for line in table
                if line.rpartition(" - ")[2].split(" ", 1)[0].partition(".")[0] in STALLING
            ]
        )
