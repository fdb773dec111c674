"""HostTree: one host directory, shared live: what either side does, the other sees.

Nodes are interned by (st_dev, st_ino): one object and one O_PATH descriptor per inode however many
fids, names and walks lead to it. The host may rename, replace and remove anything at any time, so
nothing about names is remembered: each walk asks the host. A node's place (parent and name) is kept
only to open its descriptor again after it was given up, and as the answer to `..`, which therefore
cannot lead above the root even when the host moves a directory out of the tree.
"""

import os
import stat
from collections.abc import Callable, Iterator
from errno import EEXIST, EINVAL, EMFILE, ENOTDIR, ESTALE, EXDEV
from threading import RLock

from tinyvmm.fileserver.descriptors import Descriptors
from tinyvmm.fileserver.hostfile import (
    HostFile,
    Mutation,
    OpenDirectory,
    check_name,
    check_xattr_name,
    dtype_of,
    fd_path,
    get_xattr,
    inherited_mode,
    list_xattr,
    make_special,
    open_contents,
    open_path,
    os_error,
    set_attributes,
    set_owner_and_mode,
)
from tinyvmm.fileserver.qids import BY_PLACE, INO_MASK, QID_TYPES, QidPaths, version_of
from tinyvmm.fileserver.tree import AT_REMOVEDIR, NO_ID, Node, OpenFile
from tinyvmm.ninep import Qid

DT_REG = stat.S_IFREG >> 12  # of readdir(3)


class HostTree:
    """The host directory `path`, read and written in place."""

    def __init__(self, path: str | bytes) -> None:
        """Open `path`; raises OSError if it is not a directory we may search."""
        self.lock = RLock()
        self.descriptors = Descriptors()
        self.qid_paths = QidPaths()
        self.nodes: dict[tuple[int, int], HostNode] = {}
        self.path = os.fsencode(path)
        self.on_no_space: Callable[[bytes], None] | None = None
        self.mutation = Mutation(self.lock, self.no_space)
        fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = self.adopt(fd, None, b"")

    def root(self) -> "HostNode":
        """The root directory."""
        return self._root.retain()

    def close(self) -> None:
        """Close every descriptor still held."""
        with self.lock:
            self.descriptors.close_all()
            self.nodes.clear()

    def adopt(self, fd: int, parent: "HostNode | None", name: bytes) -> "HostNode":
        """The node of the file `fd` (taken over) was opened for, at its latest place."""
        st = os.fstat(fd)
        key = (st.st_dev, st.st_ino)
        node = self.nodes.get(key)
        if node is None:
            node = HostNode(self, key, fd, st)
            self.nodes[key] = node
            self.descriptors.hold(node)
        else:
            node.refs += 1
            node.st = st
            node.nameless = False
            if node.fd < 0:
                node.fd = fd
                self.descriptors.hold(node)
            else:
                os.close(fd)
        if parent is not None and node is not parent:
            node.move_to(parent, name)
        return node

    def find(self, name: bytes, dir_fd: int) -> "HostNode | None":
        """The node somebody holds of the entry `name`, if anybody does."""
        try:
            st = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return self.nodes.get((st.st_dev, st.st_ino))

    def no_space(self) -> None:
        """Tell the host's side, once, that the file system is full."""
        hook, self.on_no_space = self.on_no_space, None
        if hook is not None:
            hook(self.path)


class HostNode:
    """One inode of a HostTree."""

    waits = False

    __slots__ = ("fd", "key", "kind", "name", "nameless", "parent", "refs", "st", "tree")

    def __init__(self, tree: HostTree, key: tuple[int, int], fd: int, st: os.stat_result) -> None:
        """Take over `fd`, an O_PATH descriptor; `st` is its fstat, one reference is the maker's."""
        self.tree = tree
        self.key = key
        self.fd = fd  # -1 when given up
        self.st = st
        self.kind = stat.S_IFMT(st.st_mode)
        self.refs = 1
        self.parent: HostNode | None = None
        self.name = b""
        self.nameless = False

    # --- being one node of the tree: references, place, descriptor -----------------------------
    def retain(self) -> "HostNode":
        """One more reference."""
        with self.tree.lock:
            self.refs += 1
        return self

    def close(self) -> None:
        """Give back one reference; the last one closes the descriptor, and so up the parents."""
        with self.tree.lock:
            node: HostNode | None = self
            while node is not None:
                node.refs -= 1
                if node.refs:
                    return
                self.tree.nodes.pop(node.key, None)
                node.close_descriptors()
                self.tree.descriptors.release(node)
                parent, node.parent = node.parent, None
                node = parent

    def close_descriptors(self) -> None:
        """Close the descriptor, if it is open."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def move_to(self, parent: "HostNode", name: bytes) -> None:
        """Note where the file was seen last."""
        if self.parent is not parent:
            old, self.parent = self.parent, parent.retain()
            if old is not None:
                old.close()
        self.name = name

    def give_up(self) -> bool:
        """Close the descriptor, unless there is no name to open it again by."""
        if self.nameless or self.parent is None:
            return False
        self.close_descriptors()
        return True

    def path_fd(self) -> int:
        """The O_PATH descriptor, opened again if it was given up."""
        if self.fd < 0:
            closed = [self]  # and those above: a guest may dig deeper than our stack is
            while (above := closed[-1].parent) is not None and above.fd < 0:
                closed.append(above)
                if len(closed) > len(self.tree.nodes):  # the host has put one into the other
                    raise os_error(ESTALE)
            for node in reversed(closed):
                node.reopen()
        return self.fd

    def reopen(self) -> None:
        """Open the descriptor again; the parent's is open."""
        if self.parent is None:
            raise os_error(ESTALE)  # the tree is closed
        fd = open_path(self.name, self.parent.fd)
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) != self.key:
            os.close(fd)
            raise os_error(ESTALE)  # the host moved it where we cannot know
        self.fd = fd
        self.tree.descriptors.hold(self)

    def keep_descriptor(self) -> None:
        """Pin: its name is about to go: hold on to the inode itself."""
        self.path_fd()
        self.nameless = True

    def dir_fd(self) -> int:
        """The descriptor to find entries by."""
        if self.kind != stat.S_IFDIR:
            raise os_error(ENOTDIR)
        return self.path_fd()

    # --- looking --------------------------------------------------------------------------------
    def qid(self) -> Qid:
        """Its identity; the version is a hash of times and size."""
        st = self.st
        path = self.tree.qid_paths.path(0, *self.key)
        version = version_of(st.st_mtime_ns, st.st_ctime_ns, st.st_size)
        return Qid(QID_TYPES.get(self.kind, 0), version, path)

    def stat(self) -> os.stat_result:
        """The host's stat of it."""
        with self.tree.lock:
            self.st = os.fstat(self.path_fd())
            return self.st

    def walk(self, name: bytes) -> "HostNode":
        """The entry `name`, or the parent; never above the root."""
        tree = self.tree
        with tree.lock:
            tree.descriptors.make_room()
            dir_fd = self.dir_fd()
            if name == b"..":
                return (self.parent or self).retain()
            check_name(name)
            try:
                fd = open_path(name, dir_fd)
            except OSError as error:
                if error.errno != EMFILE:
                    raise
                tree.descriptors.give_up_half()
                fd = open_path(name, self.dir_fd())
            return tree.adopt(fd, self, name)

    def open(self, flags: int) -> OpenFile:
        """Open the contents of a regular file or the entries of a directory."""
        with self.tree.lock:
            self.tree.descriptors.make_room()
            fd = open_contents(self.path_fd(), self.kind, flags, ours=True)
        if self.kind == stat.S_IFDIR:
            return OpenDirectory(fd, self.tree.lock, lambda: self._scan(fd))
        return HostFile(fd, self.key[0], self.tree.no_space)

    def _scan(self, fd: int) -> Iterator[tuple[Qid, int, bytes]]:
        dev, path = self.key[0], self.tree.qid_paths.path
        base = path(0, dev, 0)
        plain = INO_MASK if base < BY_PLACE else -1  # the last inode number that is simply added
        make = tuple.__new__  # a Qid, at half of what its constructor costs
        yield self.qid(), stat.S_IFDIR >> 12, b"."
        yield (self.parent or self).qid(), stat.S_IFDIR >> 12, b".."
        with os.scandir(fd_path(fd)) as entries:
            for entry in entries:  # thousands, most of them regular files
                ino = entry.inode()
                number = base | ino if ino <= plain else path(0, dev, ino)
                if entry.is_file(follow_symlinks=False):
                    yield make(Qid, (0, 1, number)), DT_REG, entry.name
                else:
                    dtype = dtype_of(entry)
                    yield Qid(QID_TYPES.get(dtype << 12, 0), 1, number), dtype, entry.name

    def readlink(self) -> bytes:
        """The content of a symbolic link."""
        with self.tree.lock:
            if self.kind != stat.S_IFLNK:
                raise os_error(EINVAL)
            # An empty path and an O_PATH descriptor: readlinkat(2), which Python passes through.
            return os.readlink(b"", dir_fd=self.path_fd())

    def statfs(self) -> os.statvfs_result:
        """The host file system it is on."""
        with self.tree.lock:
            return os.fstatvfs(self.path_fd())

    # --- making, removing and naming entries ------------------------------------------------------
    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> tuple["HostNode", OpenFile]:
        """Create and open a regular file, or open the one that is there."""
        check_name(name)
        with self.tree.mutation:
            self.tree.descriptors.make_room()
            try:
                node = self.walk(name)
            except FileNotFoundError:
                make_special(name, stat.S_IFREG | (mode & 0o7777), 0, 0, self.dir_fd())
                node = self._made(name, stat.S_IFREG, mode, uid, gid)
            else:
                if flags & os.O_EXCL:
                    node.close()
                    raise os_error(EEXIST)
            try:
                return node, node.open(flags)
            except OSError:
                node.close()
                raise

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> "HostNode":
        """Create a directory."""
        check_name(name)
        with self.tree.mutation:
            os.mkdir(name, mode & 0o7777, dir_fd=self.dir_fd())
            return self._made(name, stat.S_IFDIR, mode, uid, gid)

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> "HostNode":
        """Create a symbolic link."""
        check_name(name)
        if b"\0" in target:
            raise os_error(EINVAL)
        with self.tree.mutation:
            os.symlink(target, name, dir_fd=self.dir_fd())
            return self._made(name, stat.S_IFLNK, 0o777, uid, gid)

    def mknod(
        self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> "HostNode":
        """Create a fifo, socket, device or empty file."""
        check_name(name)
        with self.tree.mutation:
            make_special(name, mode, major, minor, self.dir_fd())
            return self._made(name, stat.S_IFMT(mode) or stat.S_IFREG, mode, uid, gid)

    def _made(self, name: bytes, kind: int, mode: int, uid: int, gid: int) -> "HostNode":
        """The node of the entry just made, with its owner and mode set.

        The host may have put something else in its place already: what is not of the kind we made,
        or has other names, is not given an owner or a mode.
        """
        fd = open_path(name, self.dir_fd())
        st = os.fstat(fd)
        if stat.S_IFMT(st.st_mode) != kind or (kind != stat.S_IFDIR and st.st_nlink != 1):
            os.close(fd)
            raise os_error(ESTALE)
        try:
            mode = inherited_mode(self.dir_fd(), st, mode)
            set_owner_and_mode(fd, st, mode, uid, gid)
        except OSError:
            os.close(fd)
            (os.rmdir if kind == stat.S_IFDIR else os.unlink)(name, dir_fd=self.dir_fd())
            raise
        return self.tree.adopt(fd, self, name)

    def link(self, name: bytes, target: Node) -> None:
        """Give `target` the name `name` here."""
        check_name(name)
        with self.tree.mutation:
            source = self._of_this_tree(target)
            # linkat(2) with AT_SYMLINK_FOLLOW, which ends at the inode /proc/self/fd leads to.
            os.link(fd_path(source.path_fd()), name, dst_dir_fd=self.dir_fd())
            source.nameless = False
            source.move_to(self, name)

    def rename(self, name: bytes, newdir: Node, newname: bytes) -> None:
        """Rename, keeping the nodes of what moves and of what is replaced."""
        check_name(name)
        check_name(newname)
        with self.tree.mutation:
            there = self._of_this_tree(newdir)
            src, dst = self.dir_fd(), there.dir_fd()
            moving, replaced = self.tree.find(name, src), self.tree.find(newname, dst)
            if replaced is not None and replaced is not moving:
                replaced.keep_descriptor()
            os.rename(name, newname, src_dir_fd=src, dst_dir_fd=dst)
            if moving is not None:
                moving.move_to(there, newname)

    def unlink(self, name: bytes, flags: int) -> None:
        """Remove a name; the file stays as long as somebody holds its node."""
        check_name(name)
        with self.tree.mutation:
            dir_fd = self.dir_fd()
            node = self.tree.find(name, dir_fd)
            if node is not None:
                node.keep_descriptor()
            (os.rmdir if flags & AT_REMOVEDIR else os.unlink)(name, dir_fd=dir_fd)

    def _of_this_tree(self, node: Node) -> "HostNode":
        if not isinstance(node, HostNode) or node.tree is not self.tree:
            raise os_error(EXDEV)
        return node

    # --- attributes -----------------------------------------------------------------------------
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
        """Change size, owner, mode and times."""
        with self.tree.mutation:
            fd = self.path_fd()
            set_attributes(fd, self.kind, valid, mode, uid, gid, size, atime_ns, mtime_ns)

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute."""
        with self.tree.lock:
            return get_xattr(self.path_fd(), name)

    def listxattr(self) -> list[bytes]:
        """The names of its extended attributes."""
        with self.tree.lock:
            return list_xattr(self.path_fd())

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        check_xattr_name(name)
        with self.tree.mutation:
            os.setxattr(fd_path(self.path_fd()), name, value, flags)

    def removexattr(self, name: bytes) -> None:
        """Remove an extended attribute."""
        check_xattr_name(name)
        with self.tree.lock:
            os.removexattr(fd_path(self.path_fd()), name)
