"""What can be done to one host file through a descriptor of it.

A node's descriptor is O_PATH: it pins the inode, reads nothing and needs no permission on it. All
else goes through /proc/self/fd/N, a link to the inode itself that no rename, replacement or symlink
can redirect (it ends *at* a symlink, without following it; see proc(5)). Only regular files and
directories are ever opened for their contents: a fifo could block us and a device could act. So
could the kernel's own files (stalling.KERNELS_OWN), which only look regular.

`HostFile` and `OpenDirectory` are the `OpenFile`s of every tree that serves host files. A HostFile
has no lock: its calls go straight to preadv/pwritev, which release the interpreter's. An
OpenDirectory runs under the tree's lock.
"""

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from errno import (
    EAGAIN,
    EDQUOT,
    EINVAL,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENODATA,
    ENOMEM,
    ENOSPC,
    ENOTDIR,
    EOPNOTSUPP,
    EPERM,
)
from itertools import islice
from types import TracebackType
from typing import Protocol, cast

from tinyvmm.fileserver.stalling import is_kernels_own, may_stall
from tinyvmm.fileserver.tree import (
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
)
from tinyvmm.ninep import Qid

_KEPT_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_SYNC | os.O_DSYNC
_OFFSET_MAX = (1 << 63) - 1
# O_NOATIME is for owners and root; to try and fail would cost every open of anybody else.
_LEAVE_NO_TRACE = os.O_CLOEXEC | (os.O_NOATIME if os.geteuid() == 0 else 0)
_NAME_MAX = 255  # <linux/limits.h>
DEFAULT_ACL = b"system.posix_acl_default"
ENTRIES_MAX = 1 << 22  # of all open directories together; each takes 300 bytes
ENTRIES_STEP = 256  # an open directory takes its share of them in steps
_remembered = 0
_remembered_lock = threading.Lock()
NO_SPACE = {ENOSPC, EDQUOT}


class Lock(Protocol):
    """What is asked of threading.RLock, whose type has no public name."""

    def acquire(self) -> bool:
        """Wait for it."""

    def release(self) -> None:
        """Let the next have it."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def os_error(number: int) -> OSError:
    """An OSError with `number` as its errno (the class Python picks for it)."""
    return OSError(number, os.strerror(number))


def fd_path(fd: int) -> bytes:
    """A path that leads to what descriptor `fd` refers to, whatever happens to its name."""
    return b"/proc/self/fd/%d" % fd


def open_path(name: bytes, dir_fd: int) -> int:
    """An O_PATH descriptor of the entry `name`, never of what a symlink there points to."""
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def check_name(name: bytes) -> None:
    """Refuse what cannot be the name of one directory entry."""
    if not name or name in {b".", b".."} or b"/" in name or b"\0" in name:
        raise os_error(EINVAL)
    if len(name) > _NAME_MAX:
        raise os_error(ENAMETOOLONG)


def open_contents(fd: int, kind: int, flags: int, *, ours: bool) -> int:
    """Open the file behind O_PATH descriptor `fd`, of S_IFMT `kind`, for its contents.

    In a tree that is `ours` to change, a file of our own whose mode keeps us out is opened all the
    same, as the guest's root expects (a Git object is 0444, and v9fs opens what it creates once
    more). In one that is not, we leave no trace in the access times, if we may.
    """
    if kind == stat.S_IFREG:
        if is_kernels_own(os.fstat(fd).st_dev):
            raise os_error(EOPNOTSUPP)
        flags &= _KEPT_FLAGS
    elif kind == stat.S_IFDIR:
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            raise os_error(EISDIR)
        flags = os.O_RDONLY | os.O_DIRECTORY
    else:
        raise os_error(ELOOP if kind == stat.S_IFLNK else EOPNOTSUPP)
    path = fd_path(fd)
    if not ours:
        return os.open(path, flags | _LEAVE_NO_TRACE)
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except PermissionError:
        mode = _mode_to_override(fd)
        if mode is None:
            raise
    os.chmod(path, mode | stat.S_IRWXU)
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    finally:
        os.chmod(path, mode)


def _mode_to_override(fd: int) -> int | None:
    """The mode of our own file `fd`, or None if it is not ours to override."""
    st = os.fstat(fd)
    return stat.S_IMODE(st.st_mode) if st.st_uid == os.geteuid() else None


def default_acl(dir_fd: int) -> bytes | None:
    """What new entries of a directory inherit, as acl(5) says; None if it has nothing to leave."""
    try:
        return os.getxattr(fd_path(dir_fd), DEFAULT_ACL)
    except OSError as error:
        if error.errno not in {ENODATA, EOPNOTSUPP}:
            raise
        return None


def inherited_mode(dir_fd: int, st: os.stat_result, mode: int) -> int:
    """The mode for what was just made in `dir_fd` as `mode`, and now has the stat `st`.

    The permissions it lacks were taken by our umask, which is nobody else's business, or by the
    directory's default ACL, which stands in the umask's place and means it.
    """
    lost = mode & 0o777 & ~st.st_mode
    return mode & ~lost if lost and default_acl(dir_fd) is not None else mode


def set_owner_and_mode(fd: int, st: os.stat_result, mode: int, uid: int, gid: int) -> None:
    """Give a file just created (`st` is its stat) the owner and mode asked for, umask or not.

    Without the privilege to give files away they stay ours: that is all an ordinary user can have.
    """
    path = fd_path(fd)
    chown = (uid not in {NO_ID, st.st_uid}) or (gid not in {NO_ID, st.st_gid})
    if chown:
        try:
            os.chown(path, -1 if uid == NO_ID else uid, -1 if gid == NO_ID else gid)
        except PermissionError:
            if os.geteuid() == 0:
                raise
    if stat.S_ISLNK(st.st_mode):
        return
    mode &= 0o7777
    if stat.S_IMODE(st.st_mode) != mode or (chown and mode & 0o6000):  # chown clears set-id bits
        os.chmod(path, mode)


def set_attributes(
    fd: int,
    kind: int,
    valid: int,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    atime_ns: int,
    mtime_ns: int,
) -> None:
    """Tsetattr on the file behind O_PATH descriptor `fd`: size, owner, mode, times in this order.

    Each may undo a later one otherwise: truncation sets times, and chown clears set-id bits.
    """
    path = fd_path(fd)
    try:
        if valid & SETATTR_SIZE:
            _truncate(fd, kind, size)
        if valid & (SETATTR_UID | SETATTR_GID):
            os.chown(
                path,
                uid if valid & SETATTR_UID and uid != NO_ID else -1,
                gid if valid & SETATTR_GID and gid != NO_ID else -1,
            )
        if valid & SETATTR_MODE:
            os.chmod(path, mode & 0o7777)
        if valid & (SETATTR_ATIME | SETATTR_MTIME):
            _set_times(fd, valid, atime_ns, mtime_ns)
    except OverflowError:
        raise os_error(EINVAL) from None


def _truncate(fd: int, kind: int, size: int) -> None:
    if kind != stat.S_IFREG:
        raise os_error(EISDIR if kind == stat.S_IFDIR else EINVAL)
    try:
        os.truncate(fd_path(fd), size)
    except PermissionError:
        contents = open_contents(fd, kind, os.O_WRONLY, ours=True)
        try:
            os.ftruncate(contents, size)
        finally:
            os.close(contents)


def _set_times(fd: int, valid: int, atime_ns: int, mtime_ns: int) -> None:
    path = fd_path(fd)
    both = SETATTR_ATIME | SETATTR_MTIME
    if valid & both == both and not valid & (SETATTR_ATIME_SET | SETATTR_MTIME_SET):
        os.utime(path)  # "now" needs less permission than a time given
        return
    st = os.fstat(fd)
    now = time.time_ns()
    if not valid & SETATTR_ATIME:
        atime_ns = st.st_atime_ns
    elif not valid & SETATTR_ATIME_SET:
        atime_ns = now
    if not valid & SETATTR_MTIME:
        mtime_ns = st.st_mtime_ns
    elif not valid & SETATTR_MTIME_SET:
        mtime_ns = now
    os.utime(path, ns=(atime_ns, mtime_ns))


def altered(
    st: os.stat_result,
    *,
    mode: int | None = None,
    nlink: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    rdev: int | None = None,
) -> os.stat_result:
    """A copy of `st` with some of its fields different."""
    # The only way to all fields of a structseq.
    fields, rest = cast("tuple[tuple[int, ...], dict[str, object]]", st.__reduce__()[1])
    changed = list(fields)
    for index, value in ((0, mode), (3, nlink), (4, uid), (5, gid)):
        if value is not None:
            changed[index] = value
    if rdev is not None:
        rest = {**rest, "st_rdev": rdev}
    return os.stat_result(changed, rest)


def get_xattr(fd: int, name: bytes) -> bytes:
    """The value of extended attribute `name` of the file behind O_PATH descriptor `fd`."""
    check_xattr_name(name)
    return os.getxattr(fd_path(fd), name)


def list_xattr(fd: int) -> list[bytes]:
    """The names of the extended attributes of the file behind O_PATH descriptor `fd`."""
    return [os.fsencode(name) for name in os.listxattr(fd_path(fd))]


def check_xattr_name(name: bytes) -> None:
    """Refuse a name no system call can be given."""
    if not name or b"\0" in name:
        raise os_error(EINVAL)


def make_special(name: bytes, mode: int, major: int, minor: int, dir_fd: int) -> None:
    """Mknod: a fifo, socket, device or empty regular file."""
    kind = stat.S_IFMT(mode) or stat.S_IFREG
    if kind in {stat.S_IFDIR, stat.S_IFLNK}:
        raise os_error(EPERM if kind == stat.S_IFDIR else EINVAL)
    try:
        device = os.makedev(major, minor)
        os.mknod(name, kind | (mode & 0o7777), device, dir_fd=dir_fd)
    except (OverflowError, ValueError):
        raise os_error(EINVAL) from None


class Mutation:
    """A `with` block that changes a tree: its lock, and a word to the host if the disk is full."""

    __slots__ = ("_lock", "_no_space")

    def __init__(self, lock: Lock, no_space: Callable[[], None]) -> None:
        """Guard with `lock`; call `no_space` for each ENOSPC or EDQUOT that passes."""
        self._lock = lock
        self._no_space = no_space

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            self._no_space()


class HostFile:
    """A regular file open on the host."""

    __slots__ = ("_dev", "_no_space", "_nowait", "fd")

    def __init__(self, fd: int, dev: int, no_space: Callable[[], None]) -> None:
        """Take over `fd`, of a file on `dev`; `no_space` is called if a write finds it full."""
        self.fd: int | None = fd
        self._dev = dev
        self._no_space = no_space
        self._nowait = True  # until the file system says it knows no RWF_NOWAIT

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` from `offset` on."""
        if offset > _OFFSET_MAX:
            raise os_error(EINVAL)
        return os.preadv(_opened(self.fd), buffers, offset)

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Fill `buffers` with what is in the host's page cache; None if some of it is not there."""
        if not self._nowait:
            return None if may_stall(self._dev) else self.readv(buffers, offset)
        if offset > _OFFSET_MAX:
            raise os_error(EINVAL)
        fd = _opened(self.fd)
        try:
            count = os.preadv(fd, buffers, offset, os.RWF_NOWAIT)
            if count and count < sum([len(buffer) for buffer in buffers]):
                # The end of the file, or of what is cached: then this fails.
                os.preadv(fd, [bytearray(1)], offset + count, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == EAGAIN:
                return None
            if error.errno != EOPNOTSUPP:
                raise
            self._nowait = False
            return self.readv_now(buffers, offset)
        return count

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Write into the host's page cache; None where the file system may stall."""
        return None if may_stall(self._dev) else self.writev(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write `buffers` at `offset`."""
        if offset > _OFFSET_MAX:
            raise os_error(EINVAL)
        try:
            return os.pwritev(_opened(self.fd), buffers, offset)
        except OSError as error:
            if error.errno in NO_SPACE:
                self._no_space()
            raise

    def readdir(self, cookie: int) -> Iterator[DirEntry]:  # noqa: ARG002
        """Refuse: this is no directory."""
        raise os_error(ENOTDIR)

    def fsync(self, datasync: bool) -> None:
        """Wait for the host's disk."""
        (os.fdatasync if datasync else os.fsync)(_opened(self.fd))

    def close(self) -> None:
        """Close the descriptor, once."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def _opened(fd: int | None) -> int:
    """The descriptor, or -1 (EBADF from any system call) once it is closed."""
    return -1 if fd is None else fd


def _take_share(count: int) -> None:
    """Let a directory remember `count` more entries, fewer if negative; ENOMEM if it may not."""
    global _remembered
    with _remembered_lock:
        if count > 0 and _remembered + count > ENTRIES_MAX:
            raise os_error(ENOMEM)
        _remembered += count


class OpenDirectory:
    """An open directory: entries are taken from `scan` as they are asked for, and remembered."""

    __slots__ = ("_entries", "_lock", "_scan", "_share", "_source", "fd")

    def __init__(
        self, fd: int | None, lock: Lock, scan: Callable[[], Iterator[tuple[Qid, int, bytes]]]
    ) -> None:
        """Take over `fd`; `scan` gives (qid, DT_* type, name) of every entry, afresh each time."""
        self.fd = fd
        self._lock = lock
        self._scan = scan
        self._source: Iterator[tuple[Qid, int, bytes]] | None = None
        self._entries: list[DirEntry] = []
        self._share = 0  # how many it may remember so far

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:  # noqa: ARG002
        """Refuse: directories are read by entries."""
        raise os_error(EISDIR)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:  # noqa: ARG002
        """Refuse."""
        raise os_error(EISDIR)

    readv_now = readv
    writev_now = writev

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """Entries after `cookie`, a count of entries since the last start from 0."""
        if cookie == 0:
            self._stop()
        while some := self._some(cookie):
            yield from some
            cookie += len(some)

    def _some(self, index: int) -> list[DirEntry]:
        """The entries from `index` on, a step of them at most; none at the end."""
        entries = self._entries
        with self._lock:
            if self._source is None:
                self._source = self._scan()
            while len(entries) <= index:
                if len(entries) + ENTRIES_STEP > self._share:
                    _take_share(ENTRIES_STEP)
                    self._share += ENTRIES_STEP
                found = list(islice(self._source, ENTRIES_STEP))
                if not found:
                    break
                numbered = enumerate(found, len(entries) + 1)
                entries += [(qid, cookie, dtype, name) for cookie, (qid, dtype, name) in numbered]
            return entries[index : index + ENTRIES_STEP]

    def _stop(self) -> None:
        with self._lock:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()  # a generator: lets go of its scandir now
            self._source = None
            self._entries = []
            _take_share(-self._share)
            self._share = 0

    def fsync(self, datasync: bool) -> None:
        """Wait for the host's disk."""
        if self.fd is not None:
            (os.fdatasync if datasync else os.fsync)(self.fd)

    def close(self) -> None:
        """Close the descriptor, once."""
        self._stop()
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def dtype_of(entry: os.DirEntry[bytes]) -> int:
    """The DT_* type of an entry: from the directory where it says, else (DT_UNKNOWN) by lstat."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG >> 12
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR >> 12
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    try:
        return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
    except OSError:
        return 0  # gone meanwhile: DT_UNKNOWN
