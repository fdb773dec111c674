"""The messages only 9P2000.L has: Linux's system calls, one message each.

What they mean is what Linux's fs/9p sends them for and expects back; the layout is that of
net/9p/client.c. One function answers one message and has its name; it takes the session and the
message, and an OSError out of it is answered as Rlerror.
"""

import os
import stat
from collections.abc import Callable
from errno import E2BIG, EBADF, EINVAL, ENOENT, ENOTDIR
from typing import TYPE_CHECKING, Any

from tinyvmm import ninep
from tinyvmm.fileserver import locks
from tinyvmm.fileserver.fid import (
    OFFSET_MAX,
    Answer,
    Fid,
    Slow,
    entry_name,
    failure,
    offset_of,
    watch_set_id,
)
from tinyvmm.fileserver.locks import Lock
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    NO_ID,
    SETATTR_ATIME_SET,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_MTIME_SET,
    SETATTR_SIZE,
    SETATTR_UID,
    Node,
    OpenFile,
)
from tinyvmm.fileserver.xattr import XATTR_SIZE_MAX, XattrReader, XattrWriter
from tinyvmm.ninep import Message, Qid

if TYPE_CHECKING:
    from tinyvmm.fileserver.session import Session

U64 = (1 << 64) - 1
NSEC = 1_000_000_000
CLIENT_ID_MAX = 255  # kept with each lock; Linux sends its host name, of 64 bytes at most
V9FS_MAGIC = 0x01021997  # <linux/magic.h>, statfs(2)'s f_type

# The rest concerns the client (O_CLOEXEC, O_NONBLOCK, O_DIRECT, O_NOATIME...), or asks the server
# for what only Tlcreate may (O_CREAT, O_TMPFILE).
OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_SYNC
CREATE_FLAGS = OPEN_FLAGS | os.O_CREAT | os.O_EXCL

MKNOD_TYPES = {0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}


def Tgetattr(session: "Session", m: ninep.Tgetattr) -> Answer:
    """Everything stat(2) tells, whatever was asked; .L knows no less."""
    fid = session.fid(m.fid)
    node = fid.node
    if node.waits:
        return Slow(fid, node.stat, lambda st: _attributes(node, st))
    return _attributes(node, node.stat())


def _attributes(node: Node, st: os.stat_result) -> Message:
    atime, mtime, ctime = st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns
    return ninep.Rgetattr(
        ninep.P9_GETATTR_BASIC,
        node.qid(),
        st.st_mode,
        st.st_uid,
        st.st_gid,
        st.st_nlink,
        st.st_rdev,
        st.st_size,
        st.st_blksize,
        st.st_blocks,
        atime // NSEC & U64,
        atime % NSEC,
        mtime // NSEC & U64,
        mtime % NSEC,
        ctime // NSEC & U64,
        ctime % NSEC,
        0,
        0,
        0,
        0,
    )


def Treadlink(session: "Session", m: ninep.Treadlink) -> Answer:
    """The content of a symbolic link."""
    fid = session.fid(m.fid)
    if fid.node.waits:
        return Slow(fid, fid.node.readlink, ninep.Rreadlink)
    return ninep.Rreadlink(fid.node.readlink())


def Tstatfs(session: "Session", m: ninep.Tstatfs) -> Message:
    """The space and files left, in units of the fragment size, as statfs(2) counts."""
    st = session.node(m.fid).statfs()
    return ninep.Rstatfs(
        V9FS_MAGIC,
        st.f_frsize,
        st.f_blocks,
        st.f_bfree,
        st.f_bavail,
        st.f_files,
        st.f_ffree,
        st.f_fsid & U64,
        st.f_namemax,
    )


def Tlopen(session: "Session", m: ninep.Tlopen) -> Answer:
    """Open what the fid stands for."""
    fid = session.unopened(m.fid)
    flags = _open_flags(m.flags)
    node = fid.node
    if flags & os.O_DIRECTORY and not node.qid().type & ninep.QTDIR:
        raise failure(ENOTDIR)

    def opened(file: OpenFile) -> Message:
        if fid.gone or fid.file is not None:  # clunked, or opened twice, while we waited
            file.close()
            raise failure(EBADF)
        fid.opened(file, flags)
        return ninep.Rlopen(node.qid(), 0)

    flags &= OPEN_FLAGS
    if node.waits:
        return Slow(fid, lambda: node.open(flags), opened, lambda file: file.close())
    return opened(node.open(flags))


def Tlcreate(session: "Session", m: ninep.Tlcreate) -> Message:
    """Create in the directory the fid stands for; the fid moves to the new file."""
    fid = session.unopened(m.fid)
    name = entry_name(m.name)
    flags = _open_flags(m.flags) & CREATE_FLAGS
    node, file = fid.node.create(name, flags, m.mode & 0o7777, fid.uid, m.gid)
    fid.move(node, name, file, flags)
    return ninep.Rlcreate(node.qid(), 0)


def Treaddir(session: "Session", m: ninep.Treaddir) -> Message:
    """As many whole entries as fit; EINVAL if not one does."""
    buffers = session.room(ninep.Rreaddir, m.count)
    room = sum([len(buffer) for buffer in buffers])
    entries: list[bytes] = []
    size = 0
    pack = ninep.pack_dirent
    for qid, cookie, dtype, name in session.file(m.fid).readdir(offset_of(m.offset)):
        piece = pack(*qid, cookie, dtype, len(name)) + name
        size += len(piece)
        if size > room:
            if not entries:
                raise failure(EINVAL)
            break
        entries.append(piece)
    return ninep.Rreaddir(b"".join(entries))


def Tfsync(session: "Session", m: ninep.Tfsync) -> Answer:
    """Wait for the host's disk."""
    file = session.file(m.fid)
    datasync = m.datasync != 0
    return Slow(session.fid(m.fid), lambda: file.fsync(datasync), lambda _: ninep.Rfsync())


def Tmkdir(session: "Session", m: ninep.Tmkdir) -> Message:
    """Create a directory."""
    fid = session.fid(m.dfid)
    made = fid.node.mkdir(entry_name(m.name), m.mode & 0o7777, fid.uid, m.gid)
    return ninep.Rmkdir(_made(made))


def Tsymlink(session: "Session", m: ninep.Tsymlink) -> Message:
    """Create a symbolic link, whatever it says."""
    fid = session.fid(m.fid)
    if not m.symtgt or b"\0" in m.symtgt:
        raise failure(EINVAL if m.symtgt else ENOENT)
    made = fid.node.symlink(entry_name(m.name), m.symtgt, fid.uid, m.gid)
    return ninep.Rsymlink(_made(made))


def Tmknod(session: "Session", m: ninep.Tmknod) -> Message:
    """Create a fifo, socket, device or empty regular file."""
    fid = session.fid(m.dfid)
    name = entry_name(m.name)
    if stat.S_IFMT(m.mode) not in MKNOD_TYPES or m.mode >> 16:
        raise failure(EINVAL)
    if m.major >> 12 or m.minor >> 20:  # what a dev_t of the kernel holds
        raise failure(EINVAL)
    made = fid.node.mknod(name, m.mode, m.major, m.minor, fid.uid, m.gid)
    return ninep.Rmknod(_made(made))


def Tlink(session: "Session", m: ninep.Tlink) -> Message:
    """Give a file one more name."""
    directory = session.node(m.dfid)
    directory.link(entry_name(m.name), session.node(m.fid))
    return ninep.Rlink()


def Trenameat(session: "Session", m: ninep.Trenameat) -> Message:
    """As renameat(2)."""
    old, new = session.node(m.olddirfid), session.node(m.newdirfid)
    old.rename(entry_name(m.oldname), new, entry_name(m.newname))
    return ninep.Rrenameat()


def Tunlinkat(session: "Session", m: ninep.Tunlinkat) -> Message:
    """As unlinkat(2)."""
    if m.flags & ~AT_REMOVEDIR:
        raise failure(EINVAL)
    session.node(m.dirfid).unlink(entry_name(m.name), m.flags)
    return ninep.Runlinkat()


def Trename(session: "Session", m: ninep.Trename) -> Message:
    """Move the file from the name it was walked to."""
    fid = session.fid(m.fid)
    directory = session.node(m.dfid)
    name = entry_name(m.name)
    parent = session.parent_of(fid)
    parent.rename(fid.name, directory, name)
    fid.parent, fid.name = directory.retain(), name
    parent.close()
    return ninep.Rrename()


def Tsetattr(session: "Session", m: ninep.Tsetattr) -> Message:
    """Change what `valid` names."""
    fid = session.fid(m.fid)
    valid = m.valid
    if m.uid == NO_ID:
        valid &= ~SETATTR_UID
    if m.gid == NO_ID:
        valid &= ~SETATTR_GID
    # What is not valid may be anything: older kernels send what was on their stack.
    size = offset_of(m.size) if valid & SETATTR_SIZE else 0
    atime_ns = _nanoseconds(m.atime_sec, m.atime_nsec) if valid & SETATTR_ATIME_SET else 0
    mtime_ns = _nanoseconds(m.mtime_sec, m.mtime_nsec) if valid & SETATTR_MTIME_SET else 0
    fid.node.setattr(valid, m.mode & 0o7777, m.uid, m.gid, size, atime_ns, mtime_ns)
    if valid & SETATTR_SIZE and not valid & SETATTR_MODE:
        fid.clear_set_id()
    if valid & SETATTR_MODE and m.mode & (stat.S_ISUID | stat.S_ISGID):
        watch_set_id(session.fids.values(), fid.node)
    return ninep.Rsetattr()


def Txattrwalk(session: "Session", m: ninep.Txattrwalk) -> Message:
    """Open an attribute for reading, or the list of names, each ended by NUL."""
    fid = session.fid(m.fid)
    session.check_new(m.newfid)
    if m.name:
        value = fid.node.getxattr(_xattr_name(m.name))
    else:
        value = b"".join([name + b"\0" for name in fid.node.listxattr()])
    walked = Fid(fid.node, fid.uid, None, b"")
    session.open_xattr(walked, XattrReader(value))
    fid.node.retain()
    session.fids[m.newfid] = walked
    return ninep.Rxattrwalk(len(value))


def Txattrcreate(session: "Session", m: ninep.Txattrcreate) -> Message:
    """Open an attribute for writing."""
    fid = session.unopened(m.fid)
    name = _xattr_name(m.name)
    if m.attr_size > XATTR_SIZE_MAX:
        raise failure(E2BIG)
    if m.flags not in {0, os.XATTR_CREATE, os.XATTR_REPLACE}:
        raise failure(EINVAL)
    session.open_xattr(fid, XattrWriter(fid.node, name, m.attr_size, m.flags))
    return ninep.Rxattrcreate()


def Tlock(session: "Session", m: ninep.Tlock) -> Message:
    """Set or remove a lock, or say that it cannot be had now."""
    fid, lock = _lock(session, m)
    fid.locked = True
    return ninep.Rlock(session.locks.set(fid.node.qid().path, lock))


def Tgetlock(session: "Session", m: ninep.Tgetlock) -> Message:
    """Describe the lock that stands in the way, or say there is none."""
    fid, lock = _lock(session, m)
    other = session.locks.test(fid.node.qid().path, lock)
    if other is None:
        free = ninep.P9_LOCK_TYPE_UNLCK
        return ninep.Rgetlock(free, m.start, m.length, m.proc_id, m.client_id)
    length = 0 if other.end == locks.END else other.end - other.start
    client_id, proc_id = other.owner
    return ninep.Rgetlock(other.type, other.start, length, proc_id, client_id)


def _lock(session: "Session", m: ninep.Tlock | ninep.Tgetlock) -> tuple[Fid, Lock]:
    fid = session.fid(m.fid)
    session.file(m.fid)
    end = m.start + m.length if m.length else locks.END
    if m.type > ninep.P9_LOCK_TYPE_UNLCK or (m.length and end - 1 > OFFSET_MAX):
        raise failure(EINVAL)
    if m.start > OFFSET_MAX or len(m.client_id) > CLIENT_ID_MAX:
        raise failure(EINVAL)
    return fid, Lock(m.start, end, m.type, (m.client_id, m.proc_id), fid)


# --- what the numbers of messages must be for system calls ------------------------------------


def _open_flags(flags: int) -> int:
    if flags & os.O_ACCMODE == os.O_ACCMODE:
        raise failure(EINVAL)
    return flags


def _nanoseconds(seconds: int, nanoseconds: int) -> int:
    """A time since 1970, or before: seconds are signed, which the grammar cannot say."""
    if nanoseconds >= NSEC:
        raise failure(EINVAL)
    if seconds > OFFSET_MAX:
        seconds -= 1 << 64
    return seconds * NSEC + nanoseconds


def _xattr_name(name: bytes) -> bytes:
    if not name or b"\0" in name:
        raise failure(EINVAL)
    return name


def _made(node: Node) -> Qid:
    """The qid of a node nobody will hold."""
    try:
        return node.qid()
    finally:
        node.close()


METHODS: dict[int, Callable[["Session", Any], Answer]] = {
    number: globals()[kind.__name__]
    for number, kind in ninep.MESSAGES.items()
    if kind.__name__ in globals()
}
