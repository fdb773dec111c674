"""Which host file systems may keep a system call waiting for somebody else.

A local file system answers when its disk does. One that asks another computer or another program
may answer tomorrow, and nothing that must go on may wait for it. The kernel tells them apart by
`f_type` of statfs(2), which Python's os.statvfs leaves out; the numbers are those of statfs(2) and
<linux/magic.h>.
"""

import ctypes
import os
from errno import EIO

STALLING = {
    0x65735546: "FUSE",
    0x6969: "NFS",
    0x01021997: "V9FS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x517B: "SMB",
    0x00C36400: "CEPH",
    0x5346414F: "AFS",
    0x6B414653: "kAFS",
    0x73757245: "CODA",
    0x0BD00BD0: "LUSTRE",
    0x19830326: "BeeGFS",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
}

_STATFS_LEN = 256  # struct statfs is 120 bytes on x86-64
_fstatfs = ctypes.CDLL(None).fstatfs
_known: dict[int, bool] = {}  # by st_dev


def may_stall(fd: int) -> bool:
    """Whether the file system behind `fd` is one of STALLING; OSError if `fd` is no descriptor."""
    dev = os.fstat(fd).st_dev
    known = _known.get(dev)
    if known is None:
        known = _known[dev] = file_system_type(fd) in STALLING
    return known


def file_system_type(fd: int) -> int:
    """The f_type of the file system behind `fd`."""
    buffer = ctypes.create_string_buffer(_STATFS_LEN)
    if _fstatfs(fd, buffer):
        raise OSError(EIO, "fstatfs failed")
    f_type = int.from_bytes(buffer.raw[:8], "little")  # long f_type; is 32 bits wide everywhere
    return f_type & 0xFFFF_FFFF
