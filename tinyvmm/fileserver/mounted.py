"""Trees in a tree: an entry of an object tree behind which another tree lies.

The nodes of the other tree are wrapped, for two reasons: their qid paths must not collide with
those of any other tree, and `..` of its root leads out into the directory it is mounted in. All
else goes to the other tree as it is: what can be done there, and who waits for whom, is its
business.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from errno import EXDEV
from typing import Protocol

from tinyvmm.fileserver.hostfile import os_error
from tinyvmm.fileserver.tree import NO_ID, DirEntry, Node, OpenFile, Tree
from tinyvmm.ninep import QTDIR, Qid


class Outer(Protocol):
    """The tree that others are mounted in."""

    def inner_qid(self, space: int, qid: Qid) -> Qid:
        """The qid that stands for `qid` of the mounted tree numbered `space`."""


class Mount:
    """A tree, or one entry of its root, as an entry of the directory `parent`."""

    def __init__(self, outer: Outer, parent: Node, tree: Tree, name: bytes, space: int) -> None:
        """Mount `tree`, or its entry `name` if that is not empty; OSError if it is not there.

        `space` tells its qid paths from those of the other trees in `outer`.
        """
        self.outer = outer
        self.parent = parent
        self.tree = tree
        self.name = name
        self.space = space
        node = self.node()
        self.kind = stat.S_IFMT(node.stat().st_mode)
        self.qid = node.qid()  # as of now, for the list of entries
        node.close()

    def node(self) -> "MountedNode":
        """What appears here now, with one reference."""
        root = self.tree.root()
        if not self.name:
            return MountedNode(self, root)
        try:
            return MountedNode(self, root.walk(self.name))
        finally:
            root.close()

    def is_root(self, node: Node) -> bool:
        """Whether `node`, a directory of the mounted tree, is its root."""
        root = self.tree.root()
        try:
            return root.qid().path == node.qid().path
        finally:
            root.close()

    def wrap(self, entries: Iterator[DirEntry]) -> Iterator[DirEntry]:
        """Entries with the qids they have here."""
        for qid, cookie, kind, name in entries:
            yield self.outer.inner_qid(self.space, qid), cookie, kind, name


class MountedNode:
    """A file of a mounted tree."""

    __slots__ = ("inner", "mount")

    def __init__(self, mount: Mount, node: Node) -> None:
        """Take over the reference to `node`."""
        self.mount = mount
        self.inner = node

    @property
    def waits(self) -> bool:
        """As the mounted tree says."""
        return self.inner.waits

    def _same_tree(self, node: Node) -> Node:
        """The other tree's node, of one that must be of the same tree as this."""
        if not isinstance(node, MountedNode) or node.mount is not self.mount:
            raise os_error(EXDEV)
        return node.inner

    def _wrap(self, node: Node) -> "MountedNode":
        return MountedNode(self.mount, node)

    def wrap_file(self, file: OpenFile) -> OpenFile:
        """As it is, but for a directory, which lists qids."""
        if self.inner.qid().type & QTDIR:
            return MountedDirectory(self.mount, file)
        return file

    # --- what is not the same here ----------------------------------------------------------------

    def qid(self) -> Qid:
        """Its identity in the outer tree."""
        return self.mount.outer.inner_qid(self.mount.space, self.inner.qid())

    def retain(self) -> "MountedNode":
        """One more reference: to the other tree's node."""
        self.inner.retain()
        return self

    def close(self) -> None:
        """Give back one reference."""
        self.inner.close()

    def walk(self, name: bytes) -> Node:
        """The entry `name`; `..` of the root is the directory it is mounted in."""
        if name == b".." and self.inner.qid().type & QTDIR and self.mount.is_root(self.inner):
            return self.mount.parent.retain()
        return self._wrap(self.inner.walk(name))

    def open(self, flags: int) -> OpenFile:
        """Open it."""
        return self.wrap_file(self.inner.open(flags))

    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> tuple["MountedNode", OpenFile]:
        """Create and open a regular file."""
        node, file = self.inner.create(name, flags, mode, uid, gid)
        wrapped = self._wrap(node)
        return wrapped, wrapped.wrap_file(file)

    def link(self, name: bytes, target: Node) -> None:
        """Link within the mounted tree."""
        self.inner.link(name, self._same_tree(target))

    def rename(self, name: bytes, newdir: Node, newname: bytes) -> None:
        """Rename within the mounted tree."""
        self.inner.rename(name, self._same_tree(newdir), newname)

    # --- what is ----------------------------------------------------------------------------------

    def stat(self) -> os.stat_result:
        """As the mounted tree says."""
        return self.inner.stat()

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> "MountedNode":
        """Create a directory."""
        return self._wrap(self.inner.mkdir(name, mode, uid, gid))

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> "MountedNode":
        """Create a symbolic link."""
        return self._wrap(self.inner.symlink(name, target, uid, gid))

    def mknod(
        self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> "MountedNode":
        """Create a special file."""
        return self._wrap(self.inner.mknod(name, mode, major, minor, uid, gid))

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
        """The mounted tree's file system."""
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


class MountedDirectory:
    """An open directory of a mounted tree: the same, with other qids."""

    def __init__(self, mount: Mount, file: OpenFile) -> None:
        self._mount = mount
        self._file = file
        self.fd = file.fd

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As the mounted tree's."""
        return self._file.readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """As the mounted tree's."""
        return self._file.writev(buffers, offset)

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As the mounted tree's."""
        return self._file.readv_now(buffers, offset)

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As the mounted tree's."""
        return self._file.writev_now(buffers, offset)

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """Its entries, by the qids they have here."""
        return self._mount.wrap(self._file.readdir(cookie))

    def fsync(self, datasync: bool) -> None:
        """As the mounted tree's."""
        self._file.fsync(datasync)

    def close(self) -> None:
        """As the mounted tree's."""
        self._file.close()
