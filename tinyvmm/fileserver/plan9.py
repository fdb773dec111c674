"""The messages only 9P2000 and 9P2000.u have, as views of the same session and trees.

What they mean is said by open(5), stat(5), read(5) and remove(5) of Plan 9's manual; what 9P2000.u
adds for Unix, by what Linux's fs/9p/vfs_inode.c sends and expects. One function answers one message
and has its name, as in linux.py. Reading directories is in plan9_stat.py.

Where the two differ beyond the fields: in 9P2000 the permissions of what is created are masked by
the directory's (open(5)), owners cannot be changed (stat(5)), and no name can be taken from another
file by renaming; 9P2000.u does what Unix does.

Who may do what is the host's to say, for the user we run as, and not looked into here; but a file
no one may execute does not open for OEXEC.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EBADF, EEXIST, EINVAL, EISDIR, ENOENT, EOPNOTSUPP, EPERM
from typing import TYPE_CHECKING, Any

from tinyvmm import ninep
from tinyvmm.fileserver import users
from tinyvmm.fileserver.fid import (
    OFFSET_MAX,
    Answer,
    Fid,
    Slow,
    entry_name,
    failure,
    watch_set_id,
)
from tinyvmm.fileserver.plan9_stat import Directory, describe, unix_bits
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
    Node,
    OpenFile,
)
from tinyvmm.ninep import NINEP2000_U, NULLDIR, Message, Stat

if TYPE_CHECKING:
    from tinyvmm.fileserver.session import Session

_ACCESS = {
    ninep.OREAD: os.O_RDONLY,
    ninep.OWRITE: os.O_WRONLY,
    ninep.ORDWR: os.O_RDWR,
    ninep.OEXEC: os.O_RDONLY,
}
NSEC = 1_000_000_000
_SET = ninep.DMSETUID | ninep.DMSETGID | ninep.DMSETVTX  # of .u
_SPECIAL = (
    ninep.DMSYMLINK | ninep.DMLINK | ninep.DMDEVICE | ninep.DMNAMEDPIPE | ninep.DMSOCKET
)  # of .u: what `extension` describes


# --- opening and creating -------------------------------------------------------------------


def Topen(session: "Session", m: ninep.Topen) -> Answer:
    """Open what the fid stands for; a directory can only be read."""
    fid = session.unopened(m.fid)
    node = fid.node
    is_directory = node.qid().type & ninep.QTDIR
    flags = _flags(session, m.mode)
    if is_directory and (flags or m.mode & (ninep.OEXEC | ninep.ORCLOSE)):
        raise failure(EISDIR)
    if m.mode & ninep.ORCLOSE:
        session.parent_of(fid)  # which says why if it cannot be removed
    dialect = session.dialect

    def opened(file: OpenFile) -> Message:
        if fid.gone or fid.file is not None:  # clunked, or opened twice, while we waited
            file.close()
            raise failure(EBADF)
        fid.opened(Directory(node, file, dialect) if is_directory else file, flags)
        fid.doomed = bool(m.mode & ninep.ORCLOSE)
        return ninep.Ropen(node.qid(), 0)

    def do_open() -> OpenFile:
        if m.mode & 3 == ninep.OEXEC and not node.stat().st_mode & 0o111:
            raise failure(EACCES)
        return node.open(flags)

    if node.waits:
        return Slow(fid, do_open, opened, lambda file: file.close())
    return opened(do_open())


def Tcreate(session: "Session", m: ninep.Tcreate) -> Message:
    """Create in the directory the fid stands for; the fid moves to what is made, and opens it."""
    fid = session.unopened(m.fid)
    name = entry_name(m.name)
    flags = _flags(session, m.mode)
    dotu = session.dialect is NINEP2000_U
    if m.perm & ~(0o777 | ninep.DMDIR | (_SET | _SPECIAL if dotu else 0)):
        raise failure(EOPNOTSUPP)  # append-only, exclusive and such files
    above = fid.node
    st = above.stat()
    perm = unix_bits(m.perm)
    if not dotu:
        perm &= ~0o777 | st.st_mode | (0 if m.perm & ninep.DMDIR else 0o111)

    file: OpenFile | None = None
    if m.perm & _SPECIAL:
        made = _make_special(session, fid, m, perm, st.st_gid)
    elif m.perm & ninep.DMDIR:
        if flags or m.mode & (ninep.OEXEC | ninep.ORCLOSE):
            raise failure(EISDIR)
        made = above.mkdir(name, perm, fid.uid, st.st_gid)
        try:
            file = Directory(made, made.open(os.O_RDONLY), session.dialect)
        except OSError:
            made.close()
            raise
    else:
        made, file = above.create(name, flags | os.O_CREAT | os.O_EXCL, perm, fid.uid, st.st_gid)
    fid.move(made, name, file, flags)
    fid.doomed = bool(m.mode & ninep.ORCLOSE)
    return ninep.Rcreate(made.qid(), 0)


def _flags(session: "Session", mode: int) -> int:
    """What open(2) wants for a mode of open(5); EINVAL for bits there are not."""
    known = 3 | ninep.OTRUNC | ninep.OCEXEC | ninep.ORCLOSE
    if session.dialect is NINEP2000_U:
        known |= ninep.OAPPEND
    if mode & ~known or (mode & 3 == ninep.OEXEC and mode & ninep.OTRUNC):
        raise failure(EINVAL)
    flags = _ACCESS[mode & 3]
    if mode & ninep.OTRUNC:
        flags |= os.O_TRUNC
    if mode & ninep.OAPPEND:
        flags |= os.O_APPEND
    return flags


def _make_special(session: "Session", fid: Fid, m: ninep.Tcreate, perm: int, gid: int) -> Node:
    """Make what only .u can, as `extension` says; nobody opens such a thing."""
    above, kind = fid.node, m.perm & (_SPECIAL | ninep.DMDIR)
    if kind == ninep.DMSYMLINK:
        if not m.extension or b"\0" in m.extension:
            raise failure(EINVAL if m.extension else ENOENT)
        return above.symlink(m.name, m.extension, fid.uid, gid)
    if kind == ninep.DMLINK:
        (number,) = _numbers(m.extension, 1)
        above.link(m.name, session.node(number))
        return above.walk(m.name)
    if kind == ninep.DMNAMEDPIPE:
        return above.mknod(m.name, stat.S_IFIFO | perm, 0, 0, fid.uid, gid)
    if kind == ninep.DMSOCKET:
        return above.mknod(m.name, stat.S_IFSOCK | perm, 0, 0, fid.uid, gid)
    if kind != ninep.DMDEVICE or m.extension[:1] not in {b"b", b"c"}:
        raise failure(EINVAL)
    major, minor = _numbers(m.extension[1:], 2)
    if major >> 12 or minor >> 20:  # what a dev_t of the kernel holds
        raise failure(EINVAL)
    device = stat.S_IFBLK if m.extension[:1] == b"b" else stat.S_IFCHR
    return above.mknod(m.name, device | perm, major, minor, fid.uid, gid)


def _numbers(text: bytes, count: int) -> list[int]:
    """So many decimal numbers; EINVAL for anything else."""
    words = text.split()
    if len(words) != count or not all(word.isdigit() and len(word) <= 10 for word in words):
        raise failure(EINVAL)
    return [int(word) for word in words]


# --- attributes -----------------------------------------------------------------------------


def Tstat(session: "Session", m: ninep.Tstat) -> Answer:
    """All that stat(5) tells."""
    fid = session.fid(m.fid)
    name, dialect = _name(fid), session.dialect
    if fid.node.waits:
        return Slow(fid, lambda: describe(fid.node, name, dialect), ninep.Rstat)
    return ninep.Rstat(describe(fid.node, name, dialect))


def _name(fid: Fid) -> bytes:
    """What the fid's file is called; the root is `/`."""
    if fid.parent is None:
        return b"/"
    if fid.name != b"..":
        return fid.name
    above = fid.node.walk(b"..")  # it was walked to from below: ask its own directory
    try:
        path = fid.node.qid().path
        if above.qid().path == path:
            return b"/"
        directory = above.open(os.O_RDONLY)
        try:
            for qid, _, _, name in directory.readdir(0):
                if qid.path == path and name not in {b".", b".."}:
                    return name
        finally:
            directory.close()
    finally:
        above.close()
    raise failure(ENOENT)


def Twstat(session: "Session", m: ninep.Twstat) -> Answer:
    """Change what differs from NULLDIR: everything, or nothing and say why.

    What can be refused beforehand is. Then each change is noted with how to take it back; the
    length comes last, since data once cut off cannot be brought back.
    """
    fid, new = session.fid(m.fid), m.stat
    node = fid.node
    if new.replace(muid=b"") == NULLDIR:  # Linux says in muid who asks
        return _sync(fid)
    st = node.stat()
    mode = st.st_mode & 0o7777
    now = describe(node, _name(fid), session.dialect)
    _check(new, now, st.st_mode, session)
    uid, gid = _owner(new, now)
    times = (SETATTR_ATIME | SETATTR_ATIME_SET) * (new.atime != NULLDIR.atime)
    times |= (SETATTR_MTIME | SETATTR_MTIME_SET) * (new.mtime != NULLDIR.mtime)

    def set_times() -> None:
        node.setattr(times, atime_ns=new.atime * NSEC, mtime_ns=new.mtime * NSEC)

    undo: list[Callable[[], None]] = []
    try:
        if new.name and new.name != now.name:
            _rename(session, fid, new.name)
            undo.append(lambda: _rename(session, fid, now.name))
        if owner := SETATTR_UID * (uid != NO_ID) | SETATTR_GID * (gid != NO_ID):
            node.setattr(owner, uid=uid, gid=gid)
            undo.append(lambda: node.setattr(owner, uid=st.st_uid, gid=st.st_gid))
        if owner or new.mode != NULLDIR.mode:  # a new owner may have cleared bits
            undo.insert(0, lambda: node.setattr(SETATTR_MODE, mode))
        if new.mode != NULLDIR.mode:
            kept = 0 if session.dialect is NINEP2000_U else mode & 0o7000  # it cannot say these
            node.setattr(SETATTR_MODE, unix_bits(new.mode) | kept)
        if times:
            set_times()
            every = SETATTR_ATIME | SETATTR_ATIME_SET | SETATTR_MTIME | SETATTR_MTIME_SET
            then = {"atime_ns": st.st_atime_ns, "mtime_ns": st.st_mtime_ns}
            undo.append(lambda: node.setattr(every, **then))
        if new.length != NULLDIR.length and not stat.S_ISDIR(st.st_mode):
            node.setattr(SETATTR_SIZE, size=new.length)
            if times:
                set_times()  # again, since cutting is writing
    except OSError:
        for take_back in reversed(undo):
            with suppress(OSError):  # the first failure is the one to tell
                take_back()
        raise
    if new.mode == NULLDIR.mode:
        if new.length != NULLDIR.length:
            fid.clear_set_id()
    elif unix_bits(new.mode) & (stat.S_ISUID | stat.S_ISGID):
        watch_set_id(session.fids.values(), node)
    return ninep.Rwstat()


def _check(new: Stat, now: Stat, st_mode: int, session: "Session") -> None:
    """Refuse what stat(5) does not let a client change, and what cannot be."""
    dotu = session.dialect is NINEP2000_U
    fixed = new.type, new.dev, new.qid.path
    if any(
        value not in {untouched, is_now}
        for value, untouched, is_now in zip(
            fixed,
            (NULLDIR.type, NULLDIR.dev, NULLDIR.qid.path),
            (now.type, now.dev, now.qid.path),
            strict=True,
        )
    ):
        raise failure(EPERM)
    bits = 0o777 | (_SET if dotu else 0)
    if new.mode not in {NULLDIR.mode, new.mode & bits | now.mode & ~bits}:
        raise failure(EPERM)  # another kind of file
    if new.extension not in {b"", now.extension}:
        raise failure(EPERM)
    if not dotu and new.uid not in {b"", now.uid}:
        raise failure(EPERM)
    if new.length not in {NULLDIR.length, now.length}:
        if stat.S_ISDIR(st_mode):
            raise failure(EISDIR)
        if not stat.S_ISREG(st_mode) or new.length > OFFSET_MAX:
            raise failure(EINVAL)
    if new.name not in {b"", now.name}:
        entry_name(new.name)


def _owner(new: Stat, now: Stat) -> tuple[int, int]:
    """The new owner and group by number, NO_ID to leave one; EINVAL for a name nobody has."""
    uid, gid = new.n_uid, new.n_gid
    if uid == NO_ID and new.uid not in {b"", now.uid}:
        uid = users.user_of(new.uid)
        if uid == NO_ID:
            raise failure(EINVAL)
    if gid == NO_ID and new.gid not in {b"", now.gid}:
        gid = users.group_of(new.gid)
        if gid == NO_ID:
            raise failure(EINVAL)
    return uid, gid


def _rename(session: "Session", fid: Fid, name: bytes) -> None:
    """Give the file another name in its directory; in 9P2000 one that nobody has."""
    parent = session.parent_of(fid)
    if session.dialect is not NINEP2000_U and _has(parent, name):
        raise failure(EEXIST)
    parent.rename(fid.name, parent, name)
    fid.name = name


def _has(directory: Node, name: bytes) -> bool:
    try:
        directory.walk(name).close()
    except OSError as error:
        if error.errno == ENOENT:
            return False
        raise
    return True


def _sync(fid: Fid) -> Answer:
    """Wait until the contents are on disk: what a Twstat that changes nothing asks for."""
    node, opened = fid.node, fid.file

    def work() -> None:
        if opened is not None:
            opened.fsync(datasync=False)
        elif stat.S_IFMT(node.stat().st_mode) in {stat.S_IFREG, stat.S_IFDIR}:
            file = node.open(os.O_RDONLY)
            try:
                file.fsync(datasync=False)
            finally:
                file.close()

    return Slow(fid, work, lambda _: ninep.Rwstat())


METHODS: dict[int, Callable[["Session", Any], Answer]] = {
    kind.number: globals()[kind.__name__]
    for kind in ninep.NINEP2000_U.messages.values()
    if kind.__name__ in globals()
}
