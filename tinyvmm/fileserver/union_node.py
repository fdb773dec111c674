"""One file of a union: what files and directories have in common, and `UnionFile`.

A union's nodes are a tree of places, as the guest sees it: each knows its parent and name, and each
directory its live children, so a walk to a node somebody holds asks the host nothing. That is right
because nobody else changes a write tree, and renames come only from the guest.

A node that is only in a read tree is *lower*. Its first change copies it up: made complete in the
work area, renamed into place, and then every descriptor that led to the lower file (the node's and
those of files open for reading) is pointed at the copy with dup2(2), under the same number. So the
guest sees one file throughout, with the qid it had.
"""

import os
import stat
from errno import EINVAL, ENODATA, ENOTDIR, EPERM, EROFS, ESTALE
from typing import TYPE_CHECKING, NoReturn

from tinyvmm.fileserver import beside
from tinyvmm.fileserver.copyup import copy_file
from tinyvmm.fileserver.hostfile import (
    HostFile,
    altered,
    check_xattr_name,
    fd_path,
    get_xattr,
    list_xattr,
    open_contents,
    open_path,
    os_error,
    set_attributes,
)
from tinyvmm.fileserver.maps import UPPER
from tinyvmm.fileserver.tree import (
    NO_ID,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_SIZE,
    SETATTR_UID,
    Node,
    OpenFile,
)
from tinyvmm.fileserver.whiteout import PRIVATE_XATTRS
from tinyvmm.fileserver.writetree import WriteTree
from tinyvmm.ninep import Qid

if TYPE_CHECKING:
    from tinyvmm.fileserver.union import UnionTree
    from tinyvmm.fileserver.union_view import MergedDirectory

    _NodeInterface = Node
else:
    _NodeInterface = object  # a Protocol at run time would cost each isinstance and each instance


_OWNER = SETATTR_MODE | SETATTR_UID | SETATTR_GID


class UnionNode(_NodeInterface):
    """One place in a union; its methods are those of `tree.Node`."""

    waits = False

    __slots__ = ("dead", "identity", "kind", "name", "parent", "refs", "tree")

    def __init__(
        self,
        tree: "UnionTree",
        parent: "MergedDirectory | None",
        name: bytes,
        kind: int,
        identity: Qid,
    ) -> None:
        """Be the child `name` of `parent`, of S_IFMT `kind`, with one reference."""
        self.tree = tree
        self.parent = parent
        self.name = name
        self.kind = kind
        self.identity = identity
        self.refs = 1
        self.dead = False  # its name has been removed
        if parent is not None:
            parent.refs += 1
            parent.children[name] = self
        tree.descriptors.hold(self)

    # --- for files and directories to say ---------------------------------------------------------
    def path_fd(self) -> int:
        """An O_PATH descriptor of what holds the attributes now; -1 if nothing does."""
        raise NotImplementedError

    def copy_up(self, *, data: bool = True) -> None:
        """Be in the write tree from now on; without `data`, as an empty file."""
        raise NotImplementedError

    def write_tree(self) -> WriteTree | None:
        """The write tree that takes changes here."""
        raise NotImplementedError

    def notes(self) -> beside.Notes | None:
        """Whether what holds the attributes keeps things beside its files (see beside)."""
        raise NotImplementedError

    def make_ownable(self, valid: int, uid: int, gid: int) -> None:
        """Be in a form that can have that owner, as `valid` says, beside it."""

    def copy_up_whole(self) -> None:
        """Be in the write tree with everything below."""
        self.copy_up()

    def close_descriptors(self) -> None:
        """Close what is open."""
        raise NotImplementedError

    def give_up(self) -> bool:
        """Close what is open, if the place still leads to it."""
        raise NotImplementedError

    # --- references -------------------------------------------------------------------------------
    def retain(self) -> "UnionNode":
        """One more reference."""
        with self.tree.lock:
            self.refs += 1
        return self

    def close(self) -> None:
        """Give back one reference; the last one closes the node, and so up its parents."""
        with self.tree.lock:
            node: UnionNode | None = self
            while node is not None:
                node.refs -= 1
                if node.refs:
                    return
                node.close_descriptors()
                node.tree.descriptors.release(node)
                node.tree.release_path(node)
                node.leave_parent()
                node = node.parent

    def leave_parent(self) -> None:
        """Be no child of the parent any more (which is still referred to)."""
        parent = self.parent
        if parent is not None and parent.children.get(self.name) is self:
            del parent.children[self.name]

    def die(self) -> None:
        """Its name is gone; keep what is open for those who still hold it."""
        self.dead = True
        self.leave_parent()

    # --- what needs no copy -----------------------------------------------------------------------
    def qid(self) -> Qid:
        """Its identity, the same for as long as it lives."""
        return self.identity

    def statfs(self) -> os.statvfs_result:
        """The file system of the write tree, or of the file where there is none."""
        with self.tree.lock:
            write = self.write_tree()
            fd = self.path_fd() if write is None else write.fd
            return os.fstatvfs(fd if fd >= 0 else self.tree.any_fd())

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute."""
        with self.tree.lock:
            fd = self.path_fd()
            if fd < 0 or name.startswith(PRIVATE_XATTRS):
                raise os_error(ENODATA)
            if self.notes() is not None:
                value = beside.get_xattr(fd, name)
                if value is not None:
                    return value
            return get_xattr(fd, name)

    def listxattr(self) -> list[bytes]:
        """The names of its extended attributes, without our own."""
        with self.tree.lock:
            fd = self.path_fd()
            if fd < 0:
                return []
            names = list_xattr(fd)
            if self.notes() is not None:
                prefix = beside.XATTR_PREFIX
                names += [n[len(prefix) :] for n in names if n.startswith(prefix)]
            return [name for name in dict.fromkeys(names) if not name.startswith(PRIVATE_XATTRS)]

    def readlink(self) -> bytes:
        """The content of a symbolic link."""
        with self.tree.lock:
            if self.kind != stat.S_IFLNK:
                raise os_error(EINVAL)
            fd = self.path_fd()
            return os.readlink(b"", dir_fd=fd) if self.notes() is None else beside.read_link(fd)

    def with_owner(self, st: os.stat_result, fd: int) -> os.stat_result:
        """The stat of upper file `fd`, with the owner it would have if we might give it away."""
        write = self.write_tree()
        return st if write is None else write.owners.presented(fd, st)

    # --- what does --------------------------------------------------------------------------------
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
            self.copy_up(data=not (valid & SETATTR_SIZE and size == 0))
            fd = self.path_fd()
            write = self.write_tree()
            if valid & _OWNER and write is not None and write.owners.pretends:
                self.make_ownable(valid, uid, gid)
                write.owners.change(fd, valid, mode, uid, gid)
                valid &= ~_OWNER
            set_attributes(fd, self.kind, valid, mode, uid, gid, size, atime_ns, mtime_ns)

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        check_xattr_name(name)
        special = self.kind not in {stat.S_IFREG, stat.S_IFDIR}
        if name.startswith(PRIVATE_XATTRS) or (special and name.startswith(b"user.")):
            raise os_error(EPERM)  # the latter as xattr(7) has it, whatever stands for it here
        with self.tree.mutation:
            self.copy_up()
            if self.notes() is None:
                os.setxattr(fd_path(self.path_fd()), name, value, flags)
            else:
                beside.set_xattr(self.path_fd(), name, value, flags)

    def removexattr(self, name: bytes) -> None:
        """Remove an extended attribute."""
        with self.tree.mutation:
            if self.kind in {stat.S_IFREG, stat.S_IFDIR}:
                self.getxattr(name)  # ENODATA is no reason to copy
            elif name.startswith(b"user."):
                raise os_error(EPERM)  # xattr(7): not on these
            self.copy_up()
            if self.notes() is None:
                os.removexattr(fd_path(self.path_fd()), name)
            else:
                beside.remove_xattr(self.path_fd(), name)


class UnionFile(UnionNode):
    """Anything but a directory, in exactly one layer."""

    __slots__ = ("_readers", "dev", "fd", "ino", "layer")

    def __init__(
        self,
        parent: "MergedDirectory",
        name: bytes,
        identity: Qid,
        fd: int,
        st: os.stat_result,
        layer: int,
    ) -> None:
        """Take over O_PATH descriptor `fd`, found in the parent's `layer` (or UPPER)."""
        super().__init__(parent.tree, parent, name, stat.S_IFMT(st.st_mode), identity)
        self.fd = fd
        self.layer = layer
        self.dev = st.st_dev
        self.ino = st.st_ino
        self._readers: list[_LowerReader] | None = None

    def close_descriptors(self) -> None:
        """Close the descriptor, if it is open."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def give_up(self) -> bool:
        """Close the descriptor, unless only it leads to the file."""
        if self.dead:
            return False
        self.close_descriptors()
        return True

    def path_fd(self) -> int:
        """The descriptor, opened again if it was given up."""
        if self.fd >= 0:
            return self.fd
        parent = self.parent
        if parent is None or self.refs <= 0:
            raise os_error(ESTALE)  # the tree is closed
        fd = open_path(self.name, parent.layer_fd(self.layer))
        st = os.fstat(fd)
        if st.st_ino != self.ino or st.st_dev != self.dev:
            os.close(fd)
            raise os_error(ESTALE)  # the host replaced it
        self.fd = fd
        self.tree.descriptors.hold(self)
        return fd

    def notes(self) -> beside.Notes | None:
        """Those of its layer."""
        if self.parent is None:
            return None
        if self.layer == UPPER:
            write = self.parent.write
            return None if write is None else write.owners.notes
        return self.parent.layer_notes(self.layer)

    def _lower_stat(self) -> os.stat_result:
        """What the read tree says of it."""
        fd, notes = self.path_fd(), self.notes()
        st = os.fstat(fd)
        return st if notes is None else beside.presented(fd, st, notes)

    def stat(self) -> os.stat_result:
        """Its stat; a lower file has one name here, whatever names the host has for it."""
        with self.tree.lock:
            if self.layer != UPPER:
                st = self._lower_stat()
                if st.st_nlink != (not self.dead):
                    st = altered(st, nlink=0 if self.dead else 1)
                return st
            fd = self.path_fd()
            return self.with_owner(os.fstat(fd), fd)

    def not_directory(self, *_args: object, **_named: object) -> NoReturn:
        """Refuse what only a directory can do."""
        raise os_error(ENOTDIR)

    walk = create = mkdir = symlink = mknod = link = rename = unlink = not_directory

    def write_tree(self) -> WriteTree | None:
        """The write tree that takes changes of this file."""
        return None if self.parent is None else self.parent.write

    def open(self, flags: int) -> OpenFile:
        """Open the contents, copying up first if they may change."""
        tree = self.tree
        with tree.mutation:
            tree.descriptors.make_room()
            if flags & (os.O_ACCMODE | os.O_TRUNC) and self.kind == stat.S_IFREG:
                self.copy_up(data=not flags & os.O_TRUNC)
            upper = self.layer == UPPER
            fd = open_contents(self.path_fd(), self.kind, flags, ours=upper)
            if upper:
                return HostFile(fd, self.dev, tree.no_space)
            reader = _LowerReader(fd, self)
            if self._readers is None:
                self._readers = []
            self._readers.append(reader)
            return reader

    def copy_up(self, *, data: bool = True) -> None:
        """Be in the write tree."""
        if self.layer == UPPER:
            return
        parent = self.parent
        if parent is None or parent.write is None:
            raise os_error(EROFS)
        write = parent.write
        if not self.dead:
            parent.copy_up()
        fd = self.path_fd()
        with write.copying() as copying:
            copy = copying.keep(
                copy_file(
                    fd,
                    self._lower_stat(),
                    copying.name,
                    write.work(),
                    write.owners,
                    data=data,
                    noted=self.notes() is not None,
                )
            )
            readers = [
                (reader, copying.keep(open_contents(copy, self.kind, os.O_RDONLY, ours=True)))
                for reader in self._readers or ()
            ]
            if self.dead:
                write.discard(copying.name)  # nameless like what it is a copy of
            else:
                if self.stands_in(copy):
                    write.note_special(parent.layers().upper)
                parent.place_copy(copying.name, self.name)
        st = self._become(fd, copy)
        if not self.dead:
            self.tree.remember(write, st, self.identity)
        for reader, contents in readers:
            if reader.fd is not None:
                os.dup2(contents, reader.fd, inheritable=False)
            os.close(contents)
        self._readers = None

    def stands_in(self, fd: int) -> bool:
        """Whether the upper file behind `fd`, this one, stands on the host for what it is."""
        return self.kind != stat.S_IFREG and stat.S_ISREG(os.fstat(fd).st_mode)

    def make_ownable(self, valid: int, uid: int, gid: int) -> None:
        """Put a file that stands for a symlink in its place, if it cannot have that owner.

        One with several names, or none, stays what it is: its owner is remembered for a while.
        """
        fd, parent, write = self.path_fd(), self.parent, self.write_tree()
        before = os.fstat(fd)
        if not stat.S_ISLNK(before.st_mode) or parent is None or write is None:
            return
        now = write.owners.presented(fd, before)
        wanted = (
            uid if valid & SETATTR_UID and uid != NO_ID else now.st_uid,
            gid if valid & SETATTR_GID and gid != NO_ID else now.st_gid,
        )
        if self.dead or before.st_nlink != 1 or not write.owners.stands_in(self.kind, *wanted):
            return
        owned = altered(before, uid=wanted[0], gid=wanted[1])
        with write.copying() as copying:
            name, work = copying.name, write.work()
            copy = copy_file(fd, owned, name, work, write.owners, data=True, noted=False)
            copying.keep(copy)
            write.note_special(parent.layers().upper)
            parent.place_copy(name, self.name)
        self.tree.forget(write, before)
        self.tree.remember(write, self._become(fd, copy), self.identity)

    def _become(self, fd: int, copy: int) -> os.stat_result:
        """Have `fd`, this file's, be the upper file behind `copy`, which it closes; its stat."""
        st = os.fstat(copy)
        os.dup2(copy, fd, inheritable=False)
        os.close(copy)
        self.layer = UPPER
        self.dev, self.ino = st.st_dev, st.st_ino
        return st

    def forget_reader(self, reader: "_LowerReader") -> None:
        """Note that a file open for reading is being closed."""
        if self._readers is not None:
            self._readers.remove(reader)


class _LowerReader(HostFile):
    """A lower file open for reading; its descriptor is swapped when the file is copied up."""

    __slots__ = ("_node",)

    def __init__(self, fd: int, node: UnionFile) -> None:
        """Take over `fd` and keep `node`, which finds us through its list of readers."""
        super().__init__(fd, node.dev, node.tree.no_space)
        node.refs += 1
        self._node = node

    def close(self) -> None:
        """Close the descriptor, once."""
        with self._node.tree.lock:
            if self.fd is not None:
                self._node.forget_reader(self)
                super().close()
                self._node.close()
