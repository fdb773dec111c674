"""Nodes and open files around those of another tree: they pass everything on.

What is to be different is overridden: mounted.py gives other qids, watched.py tells of each access.
"""

import os
from collections.abc import Iterator, Sequence

from tinyvmm.fileserver.tree import NO_ID, DirEntry, Node, OpenFile
from tinyvmm.ninep import Qid


class WrappedNode:
    """A file of another tree. `wrap` and what names two nodes is for the subclass to do."""

    __slots__ = ("inner",)

    def __init__(self, node: Node) -> None:
        """Take over the reference to `node`."""
        self.inner = node

    def wrap(self, node: Node, name: bytes) -> Node:
        """The node here of `node`, which is the entry `name` of this directory."""
        raise NotImplementedError

    @property
    def waits(self) -> bool:
        """As the other tree says."""
        return self.inner.waits

    def qid(self) -> Qid:
        """Its identity."""
        return self.inner.qid()

    def close(self) -> None:
        """Give back one reference."""
        self.inner.close()

    def stat(self) -> os.stat_result:
        """As the other tree says."""
        return self.inner.stat()

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> Node:
        """Create a directory."""
        return self.wrap(self.inner.mkdir(name, mode, uid, gid), name)

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> Node:
        """Create a symbolic link."""
        return self.wrap(self.inner.symlink(name, target, uid, gid), name)

    def mknod(self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int) -> Node:
        """Create a special file."""
        return self.wrap(self.inner.mknod(name, mode, major, minor, uid, gid), name)

    def readlink(self) -> bytes:
        """The content of a symbolic link."""
        return self.inner.readlink()

    def unlink(self, name: bytes, flags: int) -> None:
        """Remove an entry."""
        self.inner.unlink(name, flags)

    def setattr(
        self,
        valid: int,
        mode: int = 0,
        uid: int = NO_ID,
        gid: int = NO_ID,
        size: int = 0,
        atime_ns: int = 0,
        mtime_ns: int = 0,
    ) -> None:
        """Change attributes."""
        self.inner.setattr(valid, mode, uid, gid, size, atime_ns, mtime_ns)

    def statfs(self) -> os.statvfs_result:
        """The other tree's file system."""
        return self.inner.statfs()

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute."""
        return self.inner.getxattr(name)

    def listxattr(self) -> list[bytes]:
        """The names of its extended attributes."""
        return self.inner.listxattr()

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        self.inner.setxattr(name, value, flags)

    def removexattr(self, name: bytes) -> None:
        """Remove an extended attribute."""
        self.inner.removexattr(name)


class WrappedFile:
    """An open file of another tree."""

    def __init__(self, file: OpenFile) -> None:
        self.inner = file
        self.fd: int | None = None  # or somebody might read past what is overridden

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As the other tree's."""
        return self.inner.readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As the other tree's."""
        return self.inner.writev(buffers, offset)

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As the other tree's."""
        return self.inner.readv_now(buffers, offset)

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As the other tree's."""
        return self.inner.writev_now(buffers, offset)

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """Its entries."""
        return self.inner.readdir(cookie)

    def fsync(self, datasync: bool) -> None:
        """As the other tree's."""
        self.inner.fsync(datasync)

    def close(self) -> None:
        """As the other tree's."""
        self.inner.close()
