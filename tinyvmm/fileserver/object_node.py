"""One file of an ObjectTree: its attributes, its names, and what is in it.

Attributes, entries and stored contents are in memory and nowhere else, so nothing here waits but
what `Contents` say. What the tree's maker gave and a client changes is changed for the maker too:
`mapping` is the maker's dict of a directory that can be written, `value` what lies in it.

Memory that clients fill is charged to the tree, and given back when a file has neither a name nor
anybody who holds it.

Threads: `ObjectTree.lock` guards all of it.
"""

import os
import stat
import time
from collections.abc import Iterator, MutableMapping, Sequence
from errno import (
    EACCES,
    EBADF,
    EBUSY,
    EEXIST,
    EINVAL,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENODATA,
    ENOENT,
    ENOTDIR,
    ENOTEMPTY,
    EOPNOTSUPP,
    EPERM,
    EROFS,
    EXDEV,
)
from threading import RLock
from typing import Any, Protocol

from tinyvmm.fileserver.contents import Contents, fill, guarded
from tinyvmm.fileserver.entry import TARGET_MAX, Entry, Symlink
from tinyvmm.fileserver.hostfile import (
    OpenDirectory,
    check_name,
    check_xattr_name,
    os_error,
)
from tinyvmm.fileserver.mounted import Mount
from tinyvmm.fileserver.qids import QID_TYPES, version_of
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    NO_ID,
    SETATTR_ATIME,
    SETATTR_ATIME_SET,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_MTIME,
    SETATTR_MTIME_SET,
    SETATTR_SIZE,
    SETATTR_UID,
    DirEntry,
    Node,
    OpenFile,
)
from tinyvmm.ninep import Qid

NODE_COST = 1024  # bytes that a file made by a client is charged for being there
OFFSET_MAX = (1 << 63) - 1
BLOCK = 4096


class Keeper(Protocol):
    """The tree, as its nodes see it."""

    lock: RLock
    sized: bool

    def new_path(self) -> int:
        """A qid path nobody has."""

    def charge(self, size: int) -> None:
        """Count `size` bytes more (or less) in memory; ENOSPC if that is too many."""

    def statfs(self) -> os.statvfs_result:
        """How many there may be."""


class ObjectNode:
    """A file of any kind: a directory has `entries`, a regular file `data` or `given` contents."""

    __slots__ = (
        "atime_ns",
        "charged",
        "ctime_ns",
        "data",
        "entries",
        "gid",
        "given",
        "key",
        "kind",
        "mapping",
        "mode",
        "mtime_ns",
        "nlink",
        "parent",
        "path",
        "rdev",
        "readonly",
        "refs",
        "target",
        "tree",
        "uid",
        "value",
    )

    def __init__(
        self, tree: Keeper, kind: int, mode: int, uid: int, gid: int, *, readonly: bool
    ) -> None:
        """A file of S_IFMT `kind` without a name, without contents, and with no reference to it."""
        self.tree = tree
        self.path = tree.new_path()
        self.kind = kind
        self.mode = mode & 0o7777
        self.uid = uid
        self.gid = gid
        self.atime_ns = self.mtime_ns = self.ctime_ns = time.time_ns()
        self.rdev = 0
        self.readonly = readonly
        self.nlink = 0
        self.refs = 0
        self.charged = 0
        self.parent: ObjectNode | None = None
        self.key: str | bytes = b""  # what the maker's dict calls it
        self.value: object = None
        self.entries: dict[bytes, ObjectNode | Mount] | None = None
        self.mapping: MutableMapping[Any, object] | None = None
        self.data: bytes | bytearray = b""
        self.given: Contents | None = None
        self.target = b""

    # --- being held -------------------------------------------------------------------------------

    def retain(self) -> "ObjectNode":
        """One more reference."""
        with self.tree.lock:
            self.refs += 1
        return self

    def close(self) -> None:
        """Give back one reference."""
        with self.tree.lock:
            self.refs -= 1
            self._let_go()

    def _let_go(self) -> None:
        """Give the memory back if this was the last that held it."""
        if not self.refs and not self.nlink and self.charged:
            self.tree.charge(-self.charged)
            self.charged = 0

    # --- looking ----------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether the maker's code is asked."""
        return self.given is not None and self.given.waits

    def qid(self) -> Qid:
        """Its identity: a running number."""
        version = version_of(self.mtime_ns, self.ctime_ns, len(self.data))
        return Qid(QID_TYPES.get(self.kind, 0), version, self.path)

    def stat(self) -> os.stat_result:
        """Its attributes; what is made when it is asked for is always new."""
        size = len(self.target if self.kind == stat.S_IFLNK else self.data)
        if self.given is not None:
            size = self.given.size(ask=self.tree.sized)
        with self.tree.lock:
            if self.given is not None and self.given.fresh:
                self.atime_ns = self.mtime_ns = self.ctime_ns = time.time_ns()
            times = {"a": self.atime_ns, "m": self.mtime_ns, "c": self.ctime_ns}
            seconds = (ns // 10**9 for ns in times.values())
            return os.stat_result(
                (
                    self.kind | self.mode,
                    self.path,
                    0,
                    self.nlink,
                    self.uid,
                    self.gid,
                    size,
                    *seconds,
                ),
                {f"st_{which}time_ns": ns for which, ns in times.items()}
                | {"st_blksize": BLOCK, "st_blocks": -(-size // 512), "st_rdev": self.rdev},
            )

    def _directory(self) -> "dict[bytes, ObjectNode | Mount]":
        if self.entries is None:
            raise os_error(ENOTDIR)
        return self.entries

    def walk(self, name: bytes) -> Node:
        """The entry `name`, or the parent; the root is its own."""
        with self.tree.lock:
            entries = self._directory()
            if name == b"..":
                return (self.parent or self).retain()
            check_name(name)
            found = entries.get(name)
            if found is None:
                raise os_error(ENOENT)
            if isinstance(found, ObjectNode):
                return found.retain()
        return found.node()

    def open(self, flags: int) -> OpenFile:
        """Open it; what is called is called now."""
        return self.open_waiting(flags, wait=True)

    def open_waiting(self, flags: int, *, wait: bool) -> OpenFile:
        """Open it; unless it may `wait`, what is called is called at first read."""
        writing = flags & (os.O_ACCMODE | os.O_TRUNC)
        if self.kind == stat.S_IFDIR:
            if writing:
                raise os_error(EISDIR)
            return OpenDirectory(None, self.tree.lock, self._scan)
        if self.kind != stat.S_IFREG:
            raise os_error(ELOOP if self.kind == stat.S_IFLNK else EOPNOTSUPP)
        if writing and self.readonly:
            raise os_error(EROFS)
        if self.given is not None:
            if writing:
                raise os_error(EACCES)
            return self.given.open(wait=wait)
        with self.tree.lock:
            if flags & os.O_TRUNC:
                self._resize(0)
                self.modified()
            return MemoryFile(self, flags)

    def _scan(self) -> Iterator[tuple[Qid, int, bytes]]:
        yield self.qid(), stat.S_IFDIR >> 12, b"."
        yield (self.parent or self).qid(), stat.S_IFDIR >> 12, b".."
        for name, entry in list(self._directory().items()):
            qid = entry.qid() if isinstance(entry, ObjectNode) else entry.qid
            yield qid, entry.kind >> 12, name

    def readlink(self) -> bytes:
        """The content of a symbolic link."""
        if self.kind != stat.S_IFLNK:
            raise os_error(EINVAL)
        return self.target

    def statfs(self) -> os.statvfs_result:
        """How much clients may store, and how much of that is left."""
        return self.tree.statfs()

    # --- making entries ---------------------------------------------------------------------------

    def create(
        self, name: bytes, flags: int, mode: int, uid: int, gid: int
    ) -> tuple[Node, OpenFile]:
        """Create and open a regular file, or open the one that is there."""
        with self.tree.lock:
            check_name(name)
            node: Node
            if name not in self._directory():
                node = self.mknod(name, stat.S_IFREG | mode & 0o7777, 0, 0, uid, gid)
            elif flags & os.O_EXCL:
                raise os_error(EEXIST)
            else:
                node = self.walk(name)
            try:
                if isinstance(node, ObjectNode):
                    return node, node.open_waiting(flags, wait=False)
                return node, node.open(flags)
            except OSError:
                node.close()
                raise

    def mkdir(self, name: bytes, mode: int, uid: int, gid: int) -> "ObjectNode":
        """Create a directory: for the tree's maker, a dict."""
        with self.tree.lock:
            node = self._new(name, stat.S_IFDIR, mode, uid, gid)
            node.entries = {}
            node.mapping = {}
            return self._add(name, node, node.mapping)

    def symlink(self, name: bytes, target: bytes, uid: int, gid: int) -> "ObjectNode":
        """Create a symbolic link."""
        if not target or b"\0" in target:
            raise os_error(EINVAL if target else ENOENT)
        if len(target) > TARGET_MAX:
            raise os_error(ENAMETOOLONG)
        with self.tree.lock:
            node = self._new(name, stat.S_IFLNK, 0o777, uid, gid, len(target))
            node.target = target
            return self._add(name, node, Symlink(target))

    def mknod(
        self, name: bytes, mode: int, major: int, minor: int, uid: int, gid: int
    ) -> "ObjectNode":
        """Create an empty regular file; there can be no special ones (EPERM)."""
        del major, minor
        with self.tree.lock:
            kind = stat.S_IFMT(mode) or stat.S_IFREG
            if kind == stat.S_IFLNK:
                raise os_error(EINVAL)
            node = self._new(name, kind, mode, uid, gid)
            node.data = bytearray()
            return self._add(name, node, node.data)

    def changeable(self) -> "dict[bytes, ObjectNode | Mount]":
        """The entries, if they can be changed and the directory is not removed."""
        entries = self._directory()
        if self.readonly:
            raise os_error(EROFS)
        if not self.nlink:
            raise os_error(ENOENT)
        return entries

    def _new(
        self, name: bytes, kind: int, mode: int, uid: int, gid: int, size: int = 0
    ) -> "ObjectNode":
        """A node to be added as `name`, for which there is memory; with one reference."""
        check_name(name)
        if name in self._directory():
            raise os_error(EEXIST)
        self.changeable()
        if kind not in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK} or (self.mapping is None):
            raise os_error(EPERM)
        cost = NODE_COST + len(name) + size
        self.tree.charge(cost)
        uid = self.uid if uid == NO_ID else uid
        gid = self.gid if gid == NO_ID else gid
        node = ObjectNode(self.tree, kind, mode, uid, gid, readonly=False)
        node.charged = cost
        node.refs = 1
        return node

    def _add(self, name: bytes, node: "ObjectNode", value: object) -> "ObjectNode":
        node.value = value
        try:
            self.put(name, node)
        except OSError:
            node.close()  # its memory too
            raise
        node.nlink = 1
        self.modified()
        return node

    def put(self, name: bytes, node: "ObjectNode", key: str | bytes | None = None) -> None:
        """Have `node` as the entry `name`, in the maker's dict too, if there is one."""
        called = os.fsdecode(name) if key is None else key
        if self.mapping is not None and key is None:
            _tell(self.mapping, called, node.value)
        node.parent = self
        node.key = called
        self._directory()[name] = node

    def link(self, name: bytes, target: Node) -> None:
        """Refuse (EPERM): a dict holds no hard links."""
        with self.tree.lock:
            check_name(name)
            if not isinstance(target, ObjectNode) or target.tree is not self.tree:
                raise os_error(EXDEV)
            if name in self._directory():
                raise os_error(EEXIST)
            self.changeable()
            raise os_error(EPERM)

    # --- removing and renaming --------------------------------------------------------------------

    def unlink(self, name: bytes, flags: int) -> None:
        """Remove an entry; the file stays for who holds it."""
        with self.tree.lock:
            check_name(name)
            entries = self.changeable()
            found = entries.get(name)
            if found is None:
                raise os_error(ENOENT)
            if isinstance(found, Mount):
                raise os_error(EBUSY)
            if flags & AT_REMOVEDIR:
                if found.entries is None:
                    raise os_error(ENOTDIR)
                if found.entries:
                    raise os_error(ENOTEMPTY)
            elif found.entries is not None:
                raise os_error(EISDIR)
            self.take(name, found)
            found.lose_name()
            self.modified()

    def rename(self, name: bytes, newdir: Node, newname: bytes) -> None:
        """As renameat(2)."""
        check_name(name)
        check_name(newname)
        with self.tree.lock:
            if not isinstance(newdir, ObjectNode) or newdir.tree is not self.tree:
                raise os_error(EXDEV)
            entries, there = self.changeable(), newdir.changeable()
            moving, replaced = entries.get(name), there.get(newname)
            if moving is None:
                raise os_error(ENOENT)
            if isinstance(moving, Mount) or isinstance(replaced, Mount):
                raise os_error(EBUSY)
            if moving is replaced:
                return
            if moving.entries is not None:
                above: ObjectNode | None = newdir
                while above is not None:
                    if above is moving:
                        raise os_error(EINVAL)
                    above = above.parent
            if replaced is not None:
                if (replaced.entries is None) != (moving.entries is None):
                    raise os_error(ENOTDIR if replaced.entries is None else EISDIR)
                if replaced.entries:
                    raise os_error(ENOTEMPTY)
                newdir.take(newname, replaced)
                replaced.lose_name()
            self.take(name, moving)
            newdir.put(newname, moving)
            moving.ctime_ns = time.time_ns()
            self.modified()
            newdir.modified()

    def take(self, name: bytes, node: "ObjectNode") -> None:
        """Have an entry no more, in the maker's dict neither."""
        if self.mapping is not None:
            # The first key it is, unless the file has two names.
            _forget(self.mapping, (node.key, os.fsdecode(name), name))
        del self._directory()[name]

    def lose_name(self) -> None:
        """Have one name less."""
        self.nlink -= 1
        self.ctime_ns = time.time_ns()
        self._let_go()

    # --- contents and attributes ------------------------------------------------------------------

    def write(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write `buffers` at `offset`; the caller has the lock."""
        total = sum([len(buffer) for buffer in buffers])
        if offset + total > OFFSET_MAX:
            raise os_error(EINVAL)
        if not total:
            return 0
        self._resize(max(len(self.data), offset + total))
        data = self.data
        assert isinstance(data, bytearray)  # noqa: S101 - _resize makes it one
        for buffer in buffers:
            data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
        self.modified()
        return total

    def _resize(self, size: int) -> None:
        """Have `size` bytes, in a bytearray, charged to the tree and known to its maker."""
        before = len(self.data) if isinstance(self.data, bytearray) else 0
        # Never below 0: shortening what its maker gave frees nothing that clients were charged.
        charged = max(self.charged + size - before, 0)
        self.tree.charge(charged - self.charged)
        self.charged = charged
        data = self.data if isinstance(self.data, bytearray) else bytearray(self.data)
        try:
            _set_length(data, size)
        except BufferError:  # the maker looks at it through a memoryview
            data = bytearray(data)
            _set_length(data, size)
        if data is not self.data:
            self.data = data
            self._store(data)

    def _store(self, value: object) -> None:
        """Let the tree's maker know of new contents."""
        if isinstance(self.value, Entry):
            self.value.content = value
            return
        self.value = value
        if self.nlink and self.parent is not None and self.parent.mapping is not None:
            _tell(self.parent.mapping, self.key, value)

    def modified(self) -> None:
        """Note the time of a change."""
        self.mtime_ns = self.ctime_ns = time.time_ns()

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
        with self.tree.lock:
            if self.readonly:
                raise os_error(EROFS)
            if valid & SETATTR_MODE and self.kind == stat.S_IFLNK:
                raise os_error(EOPNOTSUPP)
            if valid & SETATTR_SIZE:
                self._truncate(size)
            if valid & SETATTR_UID and uid != NO_ID:
                self.uid = uid
            if valid & SETATTR_GID and gid != NO_ID:
                self.gid = gid
            if valid & (SETATTR_UID | SETATTR_GID) and self.kind == stat.S_IFREG:
                # As chown(2): what can be executed loses its set-id bits.
                self.mode &= ~(stat.S_ISUID | (stat.S_ISGID if self.mode & stat.S_IXGRP else 0))
            if valid & SETATTR_MODE:
                self.mode = mode & 0o7777
            now = self.ctime_ns = time.time_ns()
            if valid & SETATTR_ATIME:
                self.atime_ns = atime_ns if valid & SETATTR_ATIME_SET else now
            if valid & SETATTR_MTIME:
                self.mtime_ns = mtime_ns if valid & SETATTR_MTIME_SET else now

    def _truncate(self, size: int) -> None:
        if self.kind != stat.S_IFREG:
            raise os_error(EISDIR if self.kind == stat.S_IFDIR else EINVAL)
        if self.given is not None:
            raise os_error(EACCES)
        if not 0 <= size <= OFFSET_MAX:
            raise os_error(EINVAL)
        self._resize(size)
        self.modified()

    def getxattr(self, name: bytes) -> bytes:
        """ENODATA: there is none."""
        check_xattr_name(name)
        raise os_error(ENODATA)

    def listxattr(self) -> list[bytes]:
        """There are none."""
        return []

    def setxattr(self, name: bytes, value: bytes, flags: int) -> None:  # noqa: ARG002
        """EOPNOTSUPP: there can be none."""
        check_xattr_name(name)
        raise os_error(EROFS if self.readonly else EOPNOTSUPP)

    def removexattr(self, name: bytes) -> None:
        """EOPNOTSUPP."""
        self.setxattr(name, b"", 0)


def _tell(mapping: MutableMapping[Any, object], key: str | bytes, value: object) -> None:
    """Change the maker's mapping, which may be of a class of its own and raise what it likes."""
    guarded(f"entry {key!r}", lambda: mapping.__setitem__(key, value))


def _forget(mapping: MutableMapping[Any, object], keys: Sequence[str | bytes]) -> None:
    """Remove the first of `keys` that is in the maker's mapping."""

    def remove() -> None:
        for key in keys:
            if key in mapping:
                del mapping[key]
                return

    guarded(f"entry {keys[0]!r}", remove)


def _set_length(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


class MemoryFile:
    """Contents in memory, open; holds the node."""

    fd: int | None = None

    def __init__(self, node: ObjectNode, flags: int) -> None:
        """Open as O_* `flags` say."""
        self._node = node.retain()
        self._lock = node.tree.lock
        self._access = flags & os.O_ACCMODE
        self._append = flags & os.O_APPEND
        self._closed = False

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Copy out what there is from `offset` on."""
        with self._lock:
            if self._access == os.O_WRONLY or self._closed:
                raise os_error(EBADF)
            return fill(buffers, self._node.data, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write at `offset`, or at the end."""
        with self._lock:
            if self._access == os.O_RDONLY or self._closed:
                raise os_error(EBADF)
            return self._node.write(buffers, len(self._node.data) if self._append else offset)

    readv_now = readv
    writev_now = writev

    def readdir(self, cookie: int) -> Iterator[DirEntry]:  # noqa: ARG002
        """ENOTDIR."""
        raise os_error(ENOTDIR)

    def fsync(self, datasync: bool) -> None:
        """It is in memory, which is all that was promised."""

    def close(self) -> None:
        """Let go of the node, once."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._node.close()
