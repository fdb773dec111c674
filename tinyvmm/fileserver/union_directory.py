"""Changing a directory of a union: making, linking, renaming and removing entries.

Every change goes to the upper directory, copied up first if need be, by one rename(2), link(2),
unlink(2) or the like that takes effect at once. What a change takes away from a lower layer's view
is covered by a whiteout; a directory that comes to lie where a lower layer has one is made opaque.
A lower directory is renamed by copying up all that is in it: the union has no redirects.
"""

import os
import stat
from collections.abc import Callable
from errno import (
    EBUSY,
    EEXIST,
    EINVAL,
    EISDIR,
    ENAMETOOLONG,
    ENOENT,
    ENOTDIR,
    ENOTEMPTY,
    EPERM,
    EROFS,
    EXDEV,
)

from tinyvmm.fileserver.beside import stand_in
from tinyvmm.fileserver.hostfile import (
    check_name,
    fd_path,
    inherited_mode,
    make_special,
    open_path,
    os_error,
)
from tinyvmm.fileserver.maps import UPPER, Layers
from tinyvmm.fileserver.removal import remove_whole
from tinyvmm.fileserver.tree import AT_REMOVEDIR, Node, OpenFile
from tinyvmm.fileserver.union_node import UnionFile, UnionNode
from tinyvmm.fileserver.union_view import MergedDirectory
from tinyvmm.fileserver.writetree import WriteTree

PATH_MAX = 4096  # <linux/limits.h>, with the NUL at the end


class UnionDirectory(MergedDirectory):
    """One directory of a union."""

    __slots__ = ()

    # --- making entries ---------------------------------------------------------------------------
    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> tuple[UnionNode, OpenFile]:
        """Create and open a regular file, or open the one that is there."""
        with self.tree.mutation:
            node: UnionNode
            try:
                node = self.mknod(name, stat.S_IFREG | (mode & 0o7777), 0, 0, uid, gid)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                node = self.walk(name)
            try:
                return node, node.open(flags)
            except BaseException:
                node.close()
                raise

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> UnionNode:
        """Create a directory."""

        def make(at: bytes, dir_fd: int) -> None:
            os.mkdir(at, mode & 0o7777, dir_fd=dir_fd)

        return self._make(name, mode, uid, gid, make)

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> UnionNode:
        """Create a symbolic link."""
        if b"\0" in target:
            raise os_error(EINVAL)

        def make(at: bytes, dir_fd: int) -> None:
            os.symlink(target, at, dir_fd=dir_fd)

        def make_stand_in(at: bytes, dir_fd: int) -> None:
            stand_in(at, dir_fd, 0o600, target)

        if not self._stands_in(stat.S_IFLNK, uid, gid):
            return self._make(name, 0o777, uid, gid, make)
        if not 0 < len(target) < PATH_MAX:
            raise os_error(ENAMETOOLONG if target else ENOENT)
        return self._make(name, 0o777, uid, gid, make_stand_in, (stat.S_IFLNK, 0))

    def mknod(
        self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> UnionNode:
        """Create a fifo, socket, device or empty file; a device 0:0 would be a whiteout."""
        if stat.S_ISCHR(mode) and major == minor == 0:
            raise os_error(EPERM)

        def make(at: bytes, dir_fd: int) -> None:
            make_special(at, mode, major, minor, dir_fd)

        def make_stand_in(at: bytes, dir_fd: int) -> None:
            stand_in(at, dir_fd, mode & 0o777)

        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFLNK or not self._stands_in(kind, uid, gid):
            return self._make(name, mode, uid, gid, make)
        try:
            device = os.makedev(major, minor) if kind in {stat.S_IFBLK, stat.S_IFCHR} else 0
        except (OverflowError, ValueError):
            raise os_error(EINVAL) from None
        return self._make(name, mode, uid, gid, make_stand_in, (kind, device))

    def _stands_in(self, kind: int, uid: int, gid: int) -> bool:
        return self.write is not None and self.write.owners.stands_in(kind, uid, gid)

    def _make(
        self,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        make: Callable[[bytes, int], None],
        stands_for: tuple[int, int] | None = None,
    ) -> UnionNode:
        """Make an entry by `make(name, dir_fd)`, in the work area if it replaces a whiteout.

        `stands_for` is as for `Owners.give`.
        """
        check_name(name)
        tree = self.tree
        with tree.mutation:
            tree.descriptors.make_room()
            self._check_free(name)
            write = self.writable(name)
            gone = self.index()[1]
            covered = name in gone
            upper = self.layers().upper
            at = write.make(make, upper) if covered else name
            dir_fd = write.work() if covered else upper
            if not covered:
                make(at, dir_fd)
            fd = -1
            try:
                fd = open_path(at, dir_fd)
                st = os.fstat(fd)
                write.owners.give(fd, st, inherited_mode(upper, st, mode), uid, gid, stands_for)
                if stands_for is not None:
                    write.note_special(upper)
                    st = write.owners.presented(fd, st)
                if covered:
                    if stat.S_ISDIR(st.st_mode):
                        write.make_opaque(fd)
                    write.place(at, name, upper, covered=True)
            except BaseException:
                if fd >= 0:
                    os.close(fd)
                remove_whole(at, dir_fd)
                raise
            self.note_made(name)
            if not stat.S_ISDIR(st.st_mode):
                return UnionFile(self, name, tree.upper_qid(write, st), fd, st, UPPER)
            layers = Layers()
            layers.add_upper(fd, st)
            identity = tree.upper_qid(write, st)
            return UnionDirectory(tree, self, name, identity, layers, self.space, write, None)

    def link(self, name: bytes, target: Node) -> None:
        """Give `target` the name `name` here too."""
        check_name(name)
        with self.tree.mutation:
            source = self._of_this_tree(target)
            self._check_free(name)
            if not isinstance(source, UnionFile):
                raise os_error(EPERM)
            if source.parent is None or source.parent.write is not self.write:
                raise os_error(EXDEV)
            if source.dead and source.layer != UPPER:
                raise os_error(ENOENT)
            write = self.writable(name)
            source.copy_up()
            covered = name in self.index()[1]
            path, upper = fd_path(source.path_fd()), self.layers().upper
            if source.stands_in(source.path_fd()):
                write.note_special(upper)
            # linkat(2) with AT_SYMLINK_FOLLOW, which ends at the inode /proc/self/fd leads to.
            if covered:
                temporary = write.temporary()
                os.link(path, temporary, dst_dir_fd=write.work())
                write.place(temporary, name, upper, covered=True)
            else:
                os.link(path, name, dst_dir_fd=upper)
            self.note_made(name)

    def _check_free(self, name: bytes) -> None:
        if self.dead:
            raise os_error(ENOENT)
        node = self.find(name)
        if node is not None:
            node.close()
            raise os_error(EEXIST)

    def writable(self, name: bytes) -> WriteTree:
        """The write tree, with this directory in it, ready to have an entry `name`."""
        write = self.write
        if self.dead:
            raise os_error(ENOENT)
        if write is None:
            raise os_error(EROFS)
        if write.hides(name):
            raise os_error(EPERM)
        self.copy_up()
        return write

    def note_made(self, name: bytes) -> None:
        """Note that the upper directory has an entry `name` now."""
        names, gone = self.index()
        names.add(name)
        gone.discard(name)

    def _of_this_tree(self, node: Node) -> UnionNode:
        if not isinstance(node, UnionNode) or node.tree is not self.tree:
            raise os_error(EXDEV)
        return node

    # --- removing entries -------------------------------------------------------------------------
    def unlink(self, name: bytes, flags: int) -> None:
        """Remove a name; the file stays as long as somebody holds its node."""
        check_name(name)
        with self.tree.mutation:
            node = self._held(name)
            try:
                if isinstance(node, UnionDirectory):
                    if not flags & AT_REMOVEDIR:
                        raise os_error(EISDIR)
                    node.check_removable()
                elif flags & AT_REMOVEDIR:
                    raise os_error(ENOTDIR)
                write = self.writable(b"")
                node.path_fd()  # what it leads to stays open from here on
                self._remove(name, node, write)
                self.buried(node, write)
            finally:
                node.close()

    def _held(self, name: bytes) -> UnionNode:
        if self.dead:
            raise os_error(ENOENT)
        node = self.find(name)
        if node is None:
            raise os_error(ENOENT)
        return node

    def check_removable(self) -> None:
        """Refuse to lose a directory that is not empty, or that maps need."""
        if self.point is not None or self.parent is None:
            raise os_error(EBUSY)
        if not self.is_empty():
            raise os_error(ENOTEMPTY)

    def _remove(self, name: bytes, node: UnionNode, write: WriteTree) -> None:
        upper = self.layers().upper
        names, gone = self.index()
        below = self.has_below(name)
        if name in names and isinstance(node, UnionDirectory):
            temporary = write.temporary()  # with the whiteouts that are in it
            os.rename(name, temporary, src_dir_fd=upper, dst_dir_fd=write.work())
            if below:
                write.whiteout(name, upper)
            write.discard(temporary)
        elif below:
            write.whiteout(name, upper)
        else:
            os.unlink(name, dir_fd=upper)
        names.discard(name)
        if below:
            gone.add(name)

    @staticmethod
    def buried(node: UnionNode, write: WriteTree) -> None:
        """The name of `node` is gone from the layers: let the tree know."""
        node.die()
        if isinstance(node, UnionDirectory):
            layers = node.layers()
            if layers.upper >= 0:
                node.tree.forget(write, os.fstat(layers.upper))
        elif isinstance(node, UnionFile) and node.layer == UPPER:
            st = os.fstat(node.path_fd())
            if st.st_nlink == 0:
                node.tree.forget(write, st)

    # --- renaming ---------------------------------------------------------------------------------
    def rename(self, name: bytes, newdir: Node, newname: bytes) -> None:
        """Rename, replacing a file by a file or an empty directory by a directory."""
        check_name(name)
        check_name(newname)
        with self.tree.mutation:
            there = self._of_this_tree(newdir)
            if not isinstance(there, UnionDirectory):
                raise os_error(ENOTDIR)
            node = self._held(name)
            target: UnionNode | None = None
            try:
                if there.dead:
                    raise os_error(ENOENT)
                target = there.find(newname)
                if target is node or _same_inode(node, target):
                    return
                write = self._check_rename(node, there, target)
                node.copy_up_whole()
                there.writable(newname)
                self._move(node, there, newname, target, write)
            finally:
                node.close()
                if target is not None:
                    target.close()

    def is_within(self, node: UnionNode) -> bool:
        """Whether `node` is this directory or one on the way to it."""
        place: MergedDirectory | None = self
        while place is not None and place is not node:
            place = place.parent
        return place is not None

    def _check_rename(
        self, node: UnionNode, there: "UnionDirectory", target: UnionNode | None
    ) -> WriteTree:
        if there.is_within(node):
            raise os_error(EINVAL)
        if target is not None and self.is_within(target):
            raise os_error(ENOTEMPTY)
        if isinstance(node, UnionDirectory):
            if node.point is not None:
                raise os_error(EBUSY)
            if target is not None:
                if not isinstance(target, UnionDirectory):
                    raise os_error(ENOTDIR)
                target.check_removable()
        elif isinstance(target, UnionDirectory):
            raise os_error(EISDIR)
        if self.write is None or there.write is None:
            raise os_error(EROFS)
        if self.write is not there.write:
            raise os_error(EXDEV)
        return self.write

    def _move(
        self,
        node: UnionNode,
        there: "UnionDirectory",
        newname: bytes,
        target: UnionNode | None,
        write: WriteTree,
    ) -> None:
        """Rename in the write tree, cover what lower layers have, and move the nodes.

        What can fail for want of space is made before the rename, which cannot be undone.
        """
        name = node.name
        src, dst = self.layers().upper, there.layers().upper
        if target is not None:
            target.path_fd()
        if isinstance(node, UnionFile) and node.stands_in(node.path_fd()):
            write.note_special(dst)
        below = self.has_below(name)
        cover = write.prepare_whiteout(src) if below else None
        try:
            if isinstance(node, UnionDirectory):
                if there.has_below(newname):
                    write.make_opaque(node.layers().upper)
                there.replace_directory(newname, name, src, write)
            else:
                os.rename(name, newname, src_dir_fd=src, dst_dir_fd=dst)
        except BaseException:
            if cover is not None:
                write.discard(cover)
            raise
        if newname in there.index()[1] and write.by_name:
            write.remove_whiteout(newname, dst)
        there.note_made(newname)
        if target is not None:
            self.buried(target, write)
        names, gone = self.index()
        names.discard(name)
        node.leave_parent()
        node.name = newname
        there.children[newname] = node
        if there is not self:
            there.refs += 1
            node.parent = there
            self.close()
        if below:
            gone.add(name)
            if cover is None:
                write.whiteout(name, src)
            else:
                os.rename(cover, name, src_dir_fd=write.work(), dst_dir_fd=src)

    def replace_directory(self, newname: bytes, name: bytes, src: int, write: WriteTree) -> None:
        """Rename directory `name` of `src` to here, where an empty directory or whiteout may be."""
        dst = self.layers().upper
        names, gone = self.index()
        if newname in names:
            aside = write.temporary()  # with the whiteouts that are in it
            os.rename(newname, aside, src_dir_fd=dst, dst_dir_fd=write.work())
            try:
                os.rename(name, newname, src_dir_fd=src, dst_dir_fd=dst)
            except BaseException:
                os.rename(aside, newname, src_dir_fd=write.work(), dst_dir_fd=dst)
                raise
            write.discard(aside)
            return
        if newname in gone and not write.by_name:
            write.remove_whiteout(newname, dst)  # rename(2) puts no directory over another file
            gone.discard(newname)
        os.rename(name, newname, src_dir_fd=src, dst_dir_fd=dst)


def _same_inode(node: UnionNode, other: UnionNode | None) -> bool:
    """Whether both are names of one upper file: then rename(2) does nothing."""
    return (
        isinstance(node, UnionFile)
        and isinstance(other, UnionFile)
        and node.layer == other.layer == UPPER
        and (node.dev, node.ino) == (other.dev, other.ino)
    )
