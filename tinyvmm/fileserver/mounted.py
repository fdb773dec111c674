"""Trees in a tree: an entry of an object tree behind which another tree lies.

The nodes of the other tree are wrapped, for two reasons: their qid paths must not collide with
those of any other tree, and `..` of its root leads out into the directory it is mounted in. All
else goes to the other tree as it is: what can be done there, and who waits for whom, is its
business.
"""

import stat
from collections.abc import Iterator
from errno import EXDEV
from typing import Protocol

from tinyvmm.fileserver.hostfile import os_error
from tinyvmm.fileserver.tree import DirEntry, Node, OpenFile, Tree
from tinyvmm.fileserver.wrapped import WrappedFile, WrappedNode
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


class MountedNode(WrappedNode):
    """A file of a mounted tree."""

    __slots__ = ("mount",)

    def __init__(self, mount: Mount, node: Node) -> None:
        """Take over the reference to `node`."""
        super().__init__(node)
        self.mount = mount

    def _same_tree(self, node: Node) -> Node:
        """The other tree's node, of one that must be of the same tree as this."""
        if not isinstance(node, MountedNode) or node.mount is not self.mount:
            raise os_error(EXDEV)
        return node.inner

    def wrap(self, node: Node, name: bytes) -> "MountedNode":  # noqa: ARG002 (all are alike)
        """The node here of another of the mounted tree."""
        return MountedNode(self.mount, node)

    def wrap_file(self, file: OpenFile) -> OpenFile:
        """As it is, but for a directory, which lists qids."""
        if self.inner.qid().type & QTDIR:
            return MountedDirectory(self.mount, file)
        return file

    def qid(self) -> Qid:
        """Its identity in the outer tree."""
        return self.mount.outer.inner_qid(self.mount.space, self.inner.qid())

    def retain(self) -> "MountedNode":
        """One more reference: to the other tree's node."""
        self.inner.retain()
        return self

    def walk(self, name: bytes) -> Node:
        """The entry `name`; `..` of the root is the directory it is mounted in."""
        if name == b".." and self.inner.qid().type & QTDIR and self.mount.is_root(self.inner):
            return self.mount.parent.retain()
        return self.wrap(self.inner.walk(name), name)

    def open(self, flags: int) -> OpenFile:
        """Open it."""
        return self.wrap_file(self.inner.open(flags))

    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> tuple["MountedNode", OpenFile]:
        """Create and open a regular file."""
        node, file = self.inner.create(name, flags, mode, uid, gid)
        wrapped = self.wrap(node, name)
        return wrapped, wrapped.wrap_file(file)

    def link(self, name: bytes, target: Node) -> None:
        """Link within the mounted tree."""
        self.inner.link(name, self._same_tree(target))

    def rename(self, name: bytes, newdir: Node, newname: bytes) -> None:
        """Rename within the mounted tree."""
        self.inner.rename(name, self._same_tree(newdir), newname)


class MountedDirectory(WrappedFile):
    """An open directory of a mounted tree: the same, with other qids."""

    def __init__(self, mount: Mount, file: OpenFile) -> None:
        super().__init__(file)
        self.fd = file.fd
        self._mount = mount

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """Its entries, by the qids they have here."""
        return self._mount.wrap(self.inner.readdir(cookie))
