"""What a file server serves: a `Tree` of `Node`s, and the `OpenFile`s made from them.

The session turns each 9P message into one call of these and each fid into a `Node` (and, once
opened, an `OpenFile`). A node is one file of the tree, not a path: it stays good while its file is
renamed, replaced or unlinked. Names are single components and always bytes; a name that is empty,
`.`, or holds a slash or NUL is refused with EINVAL by every method but `walk`.

Every failure is an `OSError` whose `errno` goes to the guest as it is. Nothing else is raised for
anything a guest can ask.

Lifetime: `root`, `walk`, `create`, `mkdir`, `symlink`, `mknod` and `retain` each give the caller
one reference, to be returned by exactly one `close`. Nodes may be shared: two walks to one file may
give the same object.

Threads: every method of every tree may be called from any thread at once. The trees here guard
their names, descriptors and metadata with one lock per tree, never held while file contents move
(`OpenFile.readv`, `writev`, `fsync`). What might wait for a disk, a network or another program is
asked with `readv_now` and `writev_now` first, on a thread that has others to serve; where those
decline, `readv` and `writev` are called on a thread that may wait.

The setattr bits are those of Tsetattr (P9_SETATTR_* in the kernel's include/net/9p/9p.h).
"""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from tinyvmm.ninep import Qid

SETATTR_MODE = 1 << 0
SETATTR_UID = 1 << 1
SETATTR_GID = 1 << 2
SETATTR_SIZE = 1 << 3
SETATTR_ATIME = 1 << 4
SETATTR_MTIME = 1 << 5
SETATTR_CTIME = 1 << 6
SETATTR_ATIME_SET = 1 << 7  # the time given, else the server's clock
SETATTR_MTIME_SET = 1 << 8

NO_ID = 0xFFFF_FFFF  # P9_NONUNAME: leave the owner or group as the host made it
AT_REMOVEDIR = 0x200  # <linux/fcntl.h>: the only flag of unlink

DirEntry = tuple[Qid, int, int, bytes]
"""A directory entry: qid, the cookie that continues after it, its DT_* type, its name."""


class OpenFile(Protocol):
    """A file opened by `Node.open` or `Node.create`; it needs its node no more."""

    fd: int | None
    """The host descriptor the contents are in, if there is one; never kept across calls."""

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` from `offset` on; gives the bytes read, 0 at the end of the file."""

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write all `buffers` at `offset` (at the end if opened with O_APPEND); gives the count."""

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As `readv`, if that need not wait; None if it would have to, or might."""

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """As `writev`, if that need not wait; None, and nothing written, if it might have to."""

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """Entries after `cookie`, `.` and `..` among them; 0 starts over with a fresh look.

        Cookies stay good for this OpenFile until the next start from 0: entries that come and go
        meanwhile make no other entry skip or repeat.
        """

    def fsync(self, datasync: bool) -> None:
        """Wait until the contents are on the host's disk."""

    def close(self) -> None:
        """Release the descriptor; the OpenFile is of no use after it."""


class Node(Protocol):
    """One file of a tree."""

    @property
    def waits(self) -> bool:
        """Whether `stat`, `open` and `readlink` may have to wait for somebody else."""

    def qid(self) -> Qid:
        """Its identity, with the version as of the latest `stat`; costs no system call.

        `path` is unique in the tree, across host devices, for as long as anybody can tell; the
        version is never 0, which v9fs would take for "do not cache".
        """

    def stat(self) -> os.stat_result:
        """What the guest shall see, fresh; `st_ino` and `st_dev` are the host's, use `qid`."""

    def retain(self) -> "Node":
        """One more reference to this node, for a fid cloned by a walk of no names."""

    def close(self) -> None:
        """Give back one reference."""

    def walk(self, name: bytes) -> "Node":
        """The entry `name` of this directory; `..` is the parent and stops at the root."""

    def open(self, flags: int) -> OpenFile:
        """Open with Linux O_* `flags`; regular files and directories only, else EOPNOTSUPP.

        O_CREAT, O_EXCL and flags that concern only the client (O_NONBLOCK, O_DIRECT...) are
        ignored; a directory takes O_RDONLY only.
        """

    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> "tuple[Node, OpenFile]":
        """Create and open a regular file; an existing one is opened unless `flags` has O_EXCL.

        `mode` is used as it is (no umask); `uid` and `gid` own the file, as far as the host lets
        us, and may each be NO_ID.
        """

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> "Node":
        """Create a directory."""

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> "Node":
        """Create a symbolic link; `target` is any content, which the server never follows."""

    def mknod(self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int) -> "Node":
        """Create a fifo, socket, device or (empty) regular file, as the type in `mode` says."""

    def link(self, name: bytes, target: "Node") -> None:
        """Give `target`, of this tree, one more name: `name` in this directory."""

    def readlink(self) -> bytes:
        """The content of a symbolic link."""

    def rename(self, name: bytes, newdir: "Node", newname: bytes) -> None:
        """As renameat(2): `name` here becomes `newname` in `newdir`, replacing what may go."""

    def unlink(self, name: bytes, flags: int) -> None:
        """As unlinkat(2): remove `name` here; a directory if `flags` has AT_REMOVEDIR."""

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
        """Change the attributes named by the SETATTR_* bits in `valid`."""

    def statfs(self) -> os.statvfs_result:
        """The file system the writes go to (the reads, where nothing can be written)."""

    def getxattr(self, name: bytes) -> bytes:
        """The value of an extended attribute; ENODATA if there is none."""

    def listxattr(self) -> list[bytes]:
        """The names of its extended attributes."""

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute; `flags` are XATTR_CREATE and XATTR_REPLACE."""

    def removexattr(self, name: bytes) -> None:
        """Remove an extended attribute."""


class Tree(Protocol):
    """A root directory, and whatever is kept to serve what is below it."""

    def root(self) -> Node:
        """The root directory, with one reference for the caller."""

    def close(self) -> None:
        """Release everything, whatever nodes and files are still held."""
