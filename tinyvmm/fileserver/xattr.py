# ruff: noqa: ARG002 - what an attribute refuses takes its arguments all the same
"""Extended attributes as open files, which is what 9P2000.L makes of them.

Txattrwalk gives a fid one reads an attribute from; Txattrcreate one it is written to, and the
attribute is set when that fid is clunked. So Tread, Twrite and Tclunk need not know.
"""

import os
from collections.abc import Iterator, Sequence
from errno import E2BIG, EBADF, EINVAL, ENOTDIR

from tinyvmm.fileserver.fid import failure
from tinyvmm.fileserver.tree import DirEntry, Node

XATTR_SIZE_MAX = 65536  # <linux/limits.h>


class XattrReader:
    """An attribute's value, or the list of names, open for reading (Txattrwalk)."""

    fd: int | None = None

    def __init__(self, value: bytes) -> None:
        self.value = value

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy out what there is from `offset` on."""
        data = self.value[offset:]
        done = 0
        for buffer in buffers:
            piece = data[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """EBADF: it is read-only."""
        raise failure(EBADF)

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        """It is all in memory."""
        return self.readv(buffers, offset)

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        """It is all in memory."""
        return self.writev(buffers, offset)

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """ENOTDIR."""
        raise failure(ENOTDIR)

    def fsync(self, datasync: bool) -> None:
        """EINVAL, as of anything that is on no disk."""
        raise failure(EINVAL)

    def close(self) -> None:
        """Nothing to release."""


class XattrWriter(XattrReader):
    """An attribute open for writing (Txattrcreate), set when closed; errors appear there."""

    def __init__(self, node: Node, name: bytes, size: int, flags: int) -> None:
        super().__init__(b"")
        self.node = node
        self.name = name
        self.size = size
        self.flags = flags
        self.written = bytearray()

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """EBADF: it is write-only."""
        raise failure(EBADF)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Take the next bytes: in order, and no more than was announced."""
        data = b"".join(buffers)
        if offset != len(self.written):
            raise failure(EINVAL)
        if offset + len(data) > self.size:
            raise failure(E2BIG)
        self.written += data
        return len(data)

    def close(self) -> None:
        """Set the attribute; EINVAL if less was written than announced.

        v9fs removes by a size of 0 with XATTR_REPLACE; it also sends size 0 for an empty value.
        """
        if len(self.written) != self.size:
            raise failure(EINVAL)
        if not self.size and self.flags & os.XATTR_REPLACE:
            self.node.removexattr(self.name)
        else:
            self.node.setxattr(self.name, bytes(self.written), self.flags)
