"""A tree whose accesses are told to a function, which may also refuse them.

    def on_access(access):
        if access.op == "write" and access.path == "/data/full":
            raise OSError(errno.ENOSPC, "no space")

    WatchedTree(tree, on_access)

The function is called before the access is done (but for reads that need not wait: before they are
answered), on whichever thread serves the client: several at once, so it must lock what it shares.
An OSError that it raises is the client's answer; any other exception is EIO for the client and a
record for the trace. What a client has cached, it does not ask for: nobody sees that.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from errno import EIO, EXDEV
from typing import NamedTuple

from tinyvmm import trace
from tinyvmm.fileserver.hostfile import os_error
from tinyvmm.fileserver.tree import NO_ID, DirEntry, Node, OpenFile, Tree
from tinyvmm.fileserver.wrapped import WrappedFile, WrappedNode

_CHANGES = {"create", "mkdir", "symlink", "mknod", "link", "rename", "unlink", "setattr", "write"}
_CHANGES |= {"setxattr", "removexattr"}


class Access(NamedTuple):
    """One access; `op` is the name of a method of tree.Node or tree.OpenFile.

    That is: walk (a look-up, also of what is not there), open, create, mkdir, symlink, mknod, link,
    readlink, rename, unlink, stat, setattr, statfs, getxattr, listxattr, setxattr, removexattr; and
    of open files read, write, readdir, fsync.
    """

    op: str
    path: str
    """Where, from the root of the tree: as the client came there, whatever was renamed since."""
    target: str = ""
    """The new path of rename and link, what symlink makes a link to, an attribute's name."""
    flags: int = 0
    """O_* of open and create."""
    offset: int = 0
    length: int = 0
    """Of read and write, in bytes."""

    @property
    def changes(self) -> bool:
        """Whether it changes something, or opens a file to do so."""
        writing = self.flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC)
        return self.op in _CHANGES or (self.op == "open" and bool(writing))


Hook = Callable[[Access], None]


class WatchedTree:
    """The files of `tree`, which stays its maker's; `hook` is told of each access."""

    def __init__(self, tree: Tree, hook: Hook) -> None:
        self._tree = tree
        self._hook = hook

    def root(self) -> "WatchedNode":
        """The root directory."""
        return WatchedNode(self.tell, self._tree.root(), b"/")

    def close(self) -> None:
        """Do nothing: the tree is its maker's."""

    def tell(self, access: Access) -> None:
        """Tell the hook; OSError if it refuses, or fails."""
        try:
            self._hook(access)
        except OSError as error:
            raise os_error(error.errno or EIO) from error
        except Exception as error:
            if trace.hook is not None:
                text = f"{access.op} {access.path}: the hook raised {error!r}"
                trace.hook(trace.Message("watched tree", text))
            raise os_error(EIO) from error


class WatchedNode(WrappedNode):
    """A file of a watched tree."""

    __slots__ = ("_path", "_tell")

    def __init__(self, tell: Hook, node: Node, path: bytes) -> None:
        """Take over the reference to `node`, which the client found at `path`."""
        super().__init__(node)
        self._tell = tell
        self._path = path

    def wrap(self, node: Node, name: bytes) -> "WatchedNode":
        """The node of the entry `name`."""
        return WatchedNode(self._tell, node, self._entry(name))

    def _entry(self, name: bytes) -> bytes:
        if name == b"..":
            return os.path.dirname(self._path)
        return self._path + (b"" if self._path == b"/" else b"/") + name

    def _at(self, op: str, name: bytes = b"", target: bytes = b"", flags: int = 0) -> None:
        path = self._entry(name) if name else self._path
        self._tell(Access(op, os.fsdecode(path), os.fsdecode(target), flags))

    def retain(self) -> "WatchedNode":
        """One more reference."""
        return WatchedNode(self._tell, self.inner.retain(), self._path)

    def walk(self, name: bytes) -> "WatchedNode":
        """Look an entry up."""
        self._at("walk", name)
        return self.wrap(self.inner.walk(name), name)

    def open(self, flags: int) -> OpenFile:
        """Open it."""
        self._at("open", flags=flags)
        return WatchedFile(self._tell, self.inner.open(flags), os.fsdecode(self._path))

    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> tuple["WatchedNode", OpenFile]:
        """Create and open a regular file."""
        self._at("create", name, flags=flags)
        node, file = self.inner.create(name, flags, mode, uid, gid)
        path = os.fsdecode(self._entry(name))
        return self.wrap(node, name), WatchedFile(self._tell, file, path)

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> Node:
        """Create a directory."""
        self._at("mkdir", name)
        return super().mkdir(name, mode, uid, gid)

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> Node:
        """Create a symbolic link."""
        self._at("symlink", name, target)
        return super().symlink(name, target, uid, gid)

    def mknod(self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int) -> Node:
        """Create a special file."""
        self._at("mknod", name)
        return super().mknod(name, mode, major, minor, uid, gid)

    def link(self, name: bytes, target: Node) -> None:
        """Give `target` one more name."""
        other = self._watched(target)
        other._at("link", target=self._entry(name))  # noqa: SLF001 (of this class)
        self.inner.link(name, other.inner)

    def rename(self, name: bytes, newdir: Node, newname: bytes) -> None:
        """Rename an entry."""
        other = self._watched(newdir)
        self._at("rename", name, other._entry(newname))  # noqa: SLF001 (of this class)
        self.inner.rename(name, other.inner, newname)

    @staticmethod
    def _watched(node: Node) -> "WatchedNode":
        if not isinstance(node, WatchedNode):
            raise os_error(EXDEV)
        return node

    def stat(self) -> os.stat_result:
        """Its attributes."""
        self._at("stat")
        return self.inner.stat()

    def readlink(self) -> bytes:
        """The content of a symbolic link."""
        self._at("readlink")
        return self.inner.readlink()

    def unlink(self, name: bytes, flags: int) -> None:
        """Remove an entry."""
        self._at("unlink", name)
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
        self._at("setattr")
        self.inner.setattr(valid, mode, uid, gid, size, atime_ns, mtime_ns)

    def statfs(self) -> os.statvfs_result:
        """The file system."""
        self._at("statfs")
        return self.inner.statfs()

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute."""
        self._at("getxattr", target=name)
        return self.inner.getxattr(name)

    def listxattr(self) -> list[bytes]:
        """The names of its extended attributes."""
        self._at("listxattr")
        return self.inner.listxattr()

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        self._at("setxattr", target=name)
        self.inner.setxattr(name, value, flags)

    def removexattr(self, name: bytes) -> None:
        """Remove an extended attribute."""
        self._at("removexattr", target=name)
        self.inner.removexattr(name)


class WatchedFile(WrappedFile):
    """An open file of a watched tree."""

    def __init__(self, tell: Hook, file: OpenFile, path: str) -> None:
        super().__init__(file)
        self._tell = tell
        self._path = path

    def _at(self, op: str, offset: int = 0, buffers: Sequence[memoryview] = ()) -> None:
        length = sum(buffer.nbytes for buffer in buffers)
        self._tell(Access(op, self._path, offset=offset, length=length))

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Read."""
        self._at("read", offset, buffers)
        return self.inner.readv(buffers, offset)

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read, and tell it unless `readv` is to do it."""
        count = self.inner.readv_now(buffers, offset)
        if count is not None:
            self._at("read", offset, buffers)
        return count

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write."""
        self._at("write", offset, buffers)
        return self.inner.writev(buffers, offset)

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:  # noqa: ARG002
        """Leave it to `writev`: the hook is asked before anything is written."""
        return None

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """List."""
        self._at("readdir")
        return self.inner.readdir(cookie)

    def fsync(self, datasync: bool) -> None:
        """Wait for the disk."""
        self._at("fsync")
        self.inner.fsync(datasync)
