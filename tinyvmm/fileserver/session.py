"""One client's 9P2000.L session: requests in, replies out, files of a tree in between.

Follows intro(5) and the pages after it in Plan 9's manual, and for .L what Linux's net/9p/client.c
and fs/9p send and expect. One method answers one message and has its name; read `handle`, then
`Twalk`, then what you like. `msize` limits every message of a session, `iounit` is left at 0, which
means as much as msize allows.

A fid is a number the client chose for a file: `Fid` holds the tree's node and, once opened, the
open file. An extended attribute being read or written is an open file too (`XattrReader`,
`XattrWriter`), and so the same Tread, Twrite and Tclunk serve it.

Whatever a client sends is answered: with what it asked for, or with Rlerror and a Linux errno. An
OSError from the tree is that answer. Any other exception is a bug of ours, so every number is held
to what system calls take before a tree sees it.

`handle` is called by one thread at a time.
"""

import os
import stat
from collections.abc import Callable, Sequence
from errno import (
    E2BIG,
    EBADF,
    EBUSY,
    EINVAL,
    EIO,
    EMFILE,
    EMSGSIZE,
    ENOENT,
    ENOTDIR,
    EOPNOTSUPP,
    EPROTO,
)
from typing import Any

from tinyvmm import ninep
from tinyvmm.fileserver import locks
from tinyvmm.fileserver.locks import Lock, LockTable
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    NO_ID,
    SETATTR_GID,
    SETATTR_UID,
    Node,
    OpenFile,
    Tree,
)
from tinyvmm.fileserver.xattr import XATTR_SIZE_MAX, XattrReader, XattrWriter, failure
from tinyvmm.ninep import Message, Qid

FIDS_MAX = 1 << 20  # v9fs keeps one for every name it has cached
MSIZE_MIN = 256  # room for every reply of fixed size
MSIZE_MAX = 512 * 1024

OFFSET_MAX = (1 << 63) - 1  # loff_t
U64 = (1 << 64) - 1
NSEC = 1_000_000_000
V9FS_MAGIC = 0x01021997  # <linux/magic.h>, statfs(2)'s f_type
READ_HEAD = 7 + 4  # size[4] Rread tag[2] count[4]
NO_NAMES = (b"", b".", b"..")

# The rest concerns the client (O_CLOEXEC, O_NONBLOCK, O_DIRECT, O_NOATIME...), or asks the server
# for what only Tlcreate may (O_CREAT, O_TMPFILE).
OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_APPEND | os.O_SYNC
CREATE_FLAGS = OPEN_FLAGS | os.O_CREAT | os.O_EXCL

MKNOD_TYPES = {0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}


def entry_name(name: bytes) -> bytes:
    """The name of a directory entry to make, move or remove; EINVAL if it can be none."""
    if name in NO_NAMES or b"/" in name or b"\0" in name:
        raise failure(EINVAL)
    return name


class Fid:
    """What a client's number stands for. Owns one reference to `node` and one to `parent`."""

    __slots__ = ("file", "locked", "name", "node", "parent", "uid")

    def __init__(self, node: Node, uid: int, parent: Node | None, name: bytes) -> None:
        self.node = node
        self.uid = uid  # who attached: the owner of what is created
        self.parent = parent  # the directory it was found in, as `name`; Tremove needs both
        self.name = name
        self.file: OpenFile | None = None
        self.locked = False  # may hold locks

    def close(self) -> None:
        """Give everything back; raises what closing the file has to say."""
        try:
            if self.file is not None:
                self.file.close()
        finally:
            self.node.close()
            if self.parent is not None:
                self.parent.close()


class Session:
    """A conversation with one client about one tree."""

    def __init__(
        self,
        tree: Tree,
        *,
        msize_max: int = MSIZE_MAX,
        fids_max: int = FIDS_MAX,
        lock_table: LockTable | None = None,
    ) -> None:
        """Serve `tree`, which stays the caller's; sessions of one server share `lock_table`.

        `observer`, if set, is called with every tag, request (None if it was no message) and reply.
        """
        self.tree = tree
        self.msize_max = msize_max
        self.fids_max = fids_max
        self.observer: Callable[[int, Message | None, Message], None] | None = None
        self._locks = lock_table or LockTable()
        self._msize = msize_max
        self._agreed = False  # on a version: nothing can be attached before
        self._fids: dict[int, Fid] = {}
        self._reply: Sequence[memoryview] = ()

    def handle(self, request: Sequence[memoryview], reply: Sequence[memoryview]) -> int:
        """Answer one request; gives the reply's size, 0 if not even Rlerror fits `reply`."""
        message = None
        tag = ninep.NOTAG
        self._reply = reply
        try:
            tag, message = ninep.decode_views(request, self._msize)
            answer = _METHODS.get(message.number, Session.unsupported)(self, message)
        except OSError as error:
            answer = ninep.Rlerror(error.errno or EIO)
        except ninep.ProtocolError:
            tag, answer = self._refuse(request)
        if self.observer is not None:
            self.observer(tag, message, answer)
        self._reply = ()  # nobody may hold on to guest memory
        try:
            return ninep.encode_views(reply, answer, tag, self._msize)
        except ninep.ProtocolError:
            return self._too_big(reply, tag)

    def close(self) -> None:
        """End the session: forget every fid, close every file."""
        fids, self._fids = self._fids, {}
        for fid in fids.values():
            try:
                self._release(fid)
            except OSError:
                continue  # nobody is left to be told

    def _refuse(self, request: Sequence[memoryview]) -> tuple[int, Message]:
        """Answer what is no message, under its tag if it got that far."""
        head = b"".join(ninep.cut(request, 0, ninep.HEADER.size))
        if len(head) < ninep.HEADER.size:
            return ninep.NOTAG, ninep.Rlerror(EPROTO)
        _, number, tag = ninep.HEADER.unpack(head)
        return tag, ninep.Rlerror(EPROTO if number in ninep.MESSAGES else EOPNOTSUPP)

    def _too_big(self, reply: Sequence[memoryview], tag: int) -> int:
        """Answer that the answer does not fit, if at least that fits."""
        try:
            return ninep.encode_views(reply, ninep.Rlerror(EMSGSIZE), tag, self._msize)
        except ninep.ProtocolError:
            return 0

    # --- fids -----------------------------------------------------------------------------------

    def _fid(self, number: int) -> Fid:
        """The fid of this number; EBADF if there is none."""
        fid = self._fids.get(number)
        if fid is None:
            raise failure(EBADF)
        return fid

    def _node(self, number: int) -> Node:
        """The file of this fid; EBADF if there is no such fid."""
        return self._fid(number).node

    def _file(self, number: int) -> OpenFile:
        """The open file of this fid; EBADF if there is no such fid or it is not open."""
        file = self._fid(number).file
        if file is None:
            raise failure(EBADF)
        return file

    def _unopened(self, number: int) -> Fid:
        """The fid of this number; EBADF if there is none, or it is open for I/O already."""
        fid = self._fid(number)
        if fid.file is not None:
            raise failure(EBADF)
        return fid

    def _check_new(self, number: int) -> None:
        """EBADF if a new fid cannot have this number, EMFILE if there are too many already."""
        if number in self._fids or number == ninep.NOFID:
            raise failure(EBADF)
        if len(self._fids) >= self.fids_max:
            raise failure(EMFILE)

    def _release(self, fid: Fid) -> None:
        if fid.locked:
            self._locks.drop(fid.node.qid().path, fid)
        fid.close()

    # --- beginning and end ----------------------------------------------------------------------

    def Tversion(self, m: ninep.Tversion) -> Message:
        """Begin anew, whatever was before."""
        self.close()
        self._agreed = m.version == ninep.VERSION
        if m.msize < MSIZE_MIN:
            self._agreed = False
            raise failure(EMSGSIZE)
        self._msize = min(m.msize, self.msize_max)
        return ninep.Rversion(self._msize, ninep.VERSION if self._agreed else b"unknown")

    def Tattach(self, m: ninep.Tattach) -> Message:
        """Give a user the root, or the directory `aname` says, as a path from there."""
        if not self._agreed:
            raise failure(EPROTO)
        if m.afid != ninep.NOFID:
            raise failure(EBADF)  # Tauth is not answered, so there is no such fid
        self._check_new(m.fid)
        node = self.tree.root()
        for name in m.aname.split(b"/"):
            if name:
                above = node
                try:
                    node = above.walk(name)
                finally:
                    above.close()
        self._fids[m.fid] = Fid(node, m.n_uname, None, b"")
        return ninep.Rattach(node.qid())

    def Tflush(self, m: ninep.Tflush) -> Message:
        """Nothing to do: whatever came before this has been answered."""
        del m
        return ninep.Rflush()

    def Tclunk(self, m: ninep.Tclunk) -> Message:
        """Forget the fid; it is gone even if closing it fails."""
        self._release(self._forget(m.fid))
        return ninep.Rclunk()

    def _forget(self, number: int) -> Fid:
        fid = self._fid(number)
        del self._fids[number]
        return fid

    # --- finding --------------------------------------------------------------------------------

    def Twalk(self, m: ninep.Twalk) -> Message:
        """Walk as far as the names lead; `newfid` changes only if that is the whole way.

        The manual wants `fid` unopened; v9fs clones and walks open ones too, for files whose name
        is gone, so only a `newfid` that is the open `fid` itself is refused.
        """
        fid = self._fid(m.fid)
        if m.newfid != m.fid:
            self._check_new(m.newfid)
        elif fid.file is not None:
            raise failure(EINVAL)
        if isinstance(fid.file, XattrReader):
            raise failure(EBADF)
        if not m.wname:
            if m.newfid != m.fid:
                parent = fid.parent and fid.parent.retain()
                self._fids[m.newfid] = Fid(fid.node.retain(), fid.uid, parent, fid.name)
            return ninep.Rwalk(())
        if len(m.wname) > ninep.MAXWELEM:
            raise failure(EINVAL)

        above, node = None, fid.node.retain()
        qids: list[Qid] = []
        try:
            for name in m.wname:
                if not name or name == b"." or b"/" in name or b"\0" in name:
                    raise failure(ENOENT)
                below = node.walk(name)
                if above is not None:
                    above.close()
                above, node = node, below
                qids.append(below.qid())
        except OSError:
            node.close()
            if above is not None:
                above.close()
            if not qids:
                raise
            return ninep.Rwalk(tuple(qids))
        walked = Fid(node, fid.uid, above, m.wname[-1])
        self._fids[m.newfid] = walked
        if m.newfid == m.fid:
            fid.close()
        return ninep.Rwalk(tuple(qids))

    def Tgetattr(self, m: ninep.Tgetattr) -> Message:
        """Everything stat(2) tells, whatever was asked; .L knows no less."""
        node = self._node(m.fid)
        st = node.stat()
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

    def Treadlink(self, m: ninep.Treadlink) -> Message:
        """The content of a symbolic link."""
        return ninep.Rreadlink(self._node(m.fid).readlink())

    def Tstatfs(self, m: ninep.Tstatfs) -> Message:
        """The space and files left, in units of the fragment size, as statfs(2) counts."""
        st = self._node(m.fid).statfs()
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

    # --- contents -------------------------------------------------------------------------------

    def Tlopen(self, m: ninep.Tlopen) -> Message:
        """Open what the fid stands for."""
        fid = self._unopened(m.fid)
        flags = _open_flags(m.flags)
        if flags & os.O_DIRECTORY and not fid.node.qid().type & ninep.QTDIR:
            raise failure(ENOTDIR)
        fid.file = fid.node.open(flags & OPEN_FLAGS)
        return ninep.Rlopen(fid.node.qid(), 0)

    def Tlcreate(self, m: ninep.Tlcreate) -> Message:
        """Create in the directory the fid stands for; the fid moves to the new file."""
        fid = self._unopened(m.fid)
        name = entry_name(m.name)
        flags = _open_flags(m.flags) & CREATE_FLAGS
        node, file = fid.node.create(name, flags, m.mode & 0o7777, fid.uid, m.gid)
        if fid.parent is not None:
            fid.parent.close()
        fid.parent, fid.node, fid.name, fid.file = fid.node, node, name, file
        return ninep.Rlcreate(node.qid(), 0)

    def Tread(self, m: ninep.Tread) -> Message:
        """Read from the file straight into the reply."""
        file = self._file(m.fid)
        buffers = self._room(ninep.Rread, m.count)
        count = file.readv(buffers, _offset(m.offset))
        return ninep.Rread(ninep.cut(buffers, 0, count))

    def Twrite(self, m: ninep.Twrite) -> Message:
        """Write from the request straight into the file."""
        data = m.data if isinstance(m.data, list) else [memoryview(m.data)]
        return ninep.Rwrite(self._file(m.fid).writev(data, _offset(m.offset)))

    def Treaddir(self, m: ninep.Treaddir) -> Message:
        """As many whole entries as fit; EINVAL if not one does."""
        buffers = self._room(ninep.Rreaddir, m.count)
        room = sum([len(buffer) for buffer in buffers])
        entries: list[bytes] = []
        size = 0
        for entry in self._file(m.fid).readdir(_offset(m.offset)):
            piece = ninep.encode_dirent(*entry)
            size += len(piece)
            if size > room:
                if not entries:
                    raise failure(EINVAL)
                break
            entries.append(piece)
        return ninep.Rreaddir(b"".join(entries))

    def Tfsync(self, m: ninep.Tfsync) -> Message:
        """Wait for the host's disk."""
        self._file(m.fid).fsync(m.datasync != 0)
        return ninep.Rfsync()

    def _room(self, kind: type[Message], count: int) -> list[memoryview]:
        """Where the data of the reply goes: no more than asked, agreed or there."""
        return ninep.room(self._reply, kind, min(count, self._msize - READ_HEAD))

    # --- making, moving, removing ---------------------------------------------------------------

    def Tmkdir(self, m: ninep.Tmkdir) -> Message:
        """Create a directory."""
        fid = self._fid(m.dfid)
        made = fid.node.mkdir(entry_name(m.name), m.mode & 0o7777, fid.uid, m.gid)
        return ninep.Rmkdir(_qid_of(made))

    def Tsymlink(self, m: ninep.Tsymlink) -> Message:
        """Create a symbolic link, whatever it says."""
        fid = self._fid(m.fid)
        if not m.symtgt or b"\0" in m.symtgt:
            raise failure(EINVAL if m.symtgt else ENOENT)
        made = fid.node.symlink(entry_name(m.name), m.symtgt, fid.uid, m.gid)
        return ninep.Rsymlink(_qid_of(made))

    def Tmknod(self, m: ninep.Tmknod) -> Message:
        """Create a fifo, socket, device or empty regular file."""
        fid = self._fid(m.dfid)
        name = entry_name(m.name)
        if stat.S_IFMT(m.mode) not in MKNOD_TYPES or m.mode >> 16:
            raise failure(EINVAL)
        if m.major >> 12 or m.minor >> 20:  # what a dev_t of the kernel holds
            raise failure(EINVAL)
        made = fid.node.mknod(name, m.mode, m.major, m.minor, fid.uid, m.gid)
        return ninep.Rmknod(_qid_of(made))

    def Tlink(self, m: ninep.Tlink) -> Message:
        """Give a file one more name."""
        directory = self._node(m.dfid)
        directory.link(entry_name(m.name), self._node(m.fid))
        return ninep.Rlink()

    def Trenameat(self, m: ninep.Trenameat) -> Message:
        """As renameat(2)."""
        old, new = self._node(m.olddirfid), self._node(m.newdirfid)
        old.rename(entry_name(m.oldname), new, entry_name(m.newname))
        return ninep.Rrenameat()

    def Tunlinkat(self, m: ninep.Tunlinkat) -> Message:
        """As unlinkat(2)."""
        if m.flags & ~AT_REMOVEDIR:
            raise failure(EINVAL)
        self._node(m.dirfid).unlink(entry_name(m.name), m.flags)
        return ninep.Runlinkat()

    def Tremove(self, m: ninep.Tremove) -> Message:
        """Remove the file by the name it was walked to, and clunk the fid in any case."""
        fid = self._forget(m.fid)
        try:
            parent = _parent_of(fid)
            is_directory = fid.node.qid().type & ninep.QTDIR
            parent.unlink(fid.name, AT_REMOVEDIR if is_directory else 0)
        finally:
            self._release(fid)
        return ninep.Rremove()

    def Trename(self, m: ninep.Trename) -> Message:
        """Move the file from the name it was walked to."""
        fid = self._fid(m.fid)
        directory = self._node(m.dfid)
        name = entry_name(m.name)
        parent = _parent_of(fid)
        parent.rename(fid.name, directory, name)
        fid.parent, fid.name = directory.retain(), name
        parent.close()
        return ninep.Rrename()

    # --- attributes -----------------------------------------------------------------------------

    def Tsetattr(self, m: ninep.Tsetattr) -> Message:
        """Change what `valid` names."""
        node = self._node(m.fid)
        valid = m.valid
        if m.uid == NO_ID:
            valid &= ~SETATTR_UID
        if m.gid == NO_ID:
            valid &= ~SETATTR_GID
        atime_ns = _nanoseconds(m.atime_sec, m.atime_nsec)
        mtime_ns = _nanoseconds(m.mtime_sec, m.mtime_nsec)
        node.setattr(valid, m.mode & 0o7777, m.uid, m.gid, _offset(m.size), atime_ns, mtime_ns)
        return ninep.Rsetattr()

    def Txattrwalk(self, m: ninep.Txattrwalk) -> Message:
        """Open an attribute for reading, or the list of names, each ended by NUL."""
        fid = self._fid(m.fid)
        self._check_new(m.newfid)
        if m.name:
            value = fid.node.getxattr(_xattr_name(m.name))
        else:
            value = b"".join([name + b"\0" for name in fid.node.listxattr()])
        walked = Fid(fid.node.retain(), fid.uid, None, b"")
        walked.file = XattrReader(value)
        self._fids[m.newfid] = walked
        return ninep.Rxattrwalk(len(value))

    def Txattrcreate(self, m: ninep.Txattrcreate) -> Message:
        """Open an attribute for writing."""
        fid = self._unopened(m.fid)
        name = _xattr_name(m.name)
        if m.attr_size > XATTR_SIZE_MAX:
            raise failure(E2BIG)
        if m.flags not in {0, os.XATTR_CREATE, os.XATTR_REPLACE}:
            raise failure(EINVAL)
        fid.file = XattrWriter(fid.node, name, m.attr_size, m.flags)
        return ninep.Rxattrcreate()

    # --- locks ----------------------------------------------------------------------------------

    def Tlock(self, m: ninep.Tlock) -> Message:
        """Set or remove a lock, or say that it cannot be had now."""
        fid, lock = self._lock(m)
        fid.locked = True
        return ninep.Rlock(self._locks.set(fid.node.qid().path, lock))

    def Tgetlock(self, m: ninep.Tgetlock) -> Message:
        """Describe the lock that stands in the way, or say there is none."""
        fid, lock = self._lock(m)
        other = self._locks.test(fid.node.qid().path, lock)
        if other is None:
            free = ninep.P9_LOCK_TYPE_UNLCK
            return ninep.Rgetlock(free, m.start, m.length, m.proc_id, m.client_id)
        length = 0 if other.end == locks.END else other.end - other.start
        client_id, proc_id = other.owner
        return ninep.Rgetlock(other.type, other.start, length, proc_id, client_id)

    def _lock(self, m: ninep.Tlock | ninep.Tgetlock) -> tuple[Fid, Lock]:
        fid = self._fid(m.fid)
        self._file(m.fid)
        end = m.start + m.length if m.length else locks.END
        if m.type > ninep.P9_LOCK_TYPE_UNLCK or (m.length and end - 1 > OFFSET_MAX):
            raise failure(EINVAL)
        if m.start > OFFSET_MAX:
            raise failure(EINVAL)
        return fid, Lock(m.start, end, m.type, (m.client_id, m.proc_id), fid)

    def unsupported(self, m: Message) -> Message:
        """Tauth, since nobody needs to authenticate, and what is no request."""
        del m
        raise failure(EOPNOTSUPP)


# --- what the numbers of messages must be for system calls ------------------------------------


def _offset(number: int) -> int:
    if number > OFFSET_MAX:
        raise failure(EINVAL)
    return number


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


def _qid_of(made: Node) -> Qid:
    """The qid of a node nobody will hold."""
    try:
        return made.qid()
    finally:
        made.close()


def _parent_of(fid: Fid) -> Node:
    """Where the fid's file is to be found by the fid's name; ENOENT if it is no longer there."""
    if fid.parent is None or fid.name == b"..":
        raise failure(EBUSY)
    if _qid_of(fid.parent.walk(fid.name)).path != fid.node.qid().path:
        raise failure(ENOENT)
    return fid.parent


_METHODS: dict[int, Callable[[Session, Any], Message]] = {
    number: getattr(Session, kind.__name__)
    for number, kind in ninep.MESSAGES.items()
    if hasattr(Session, kind.__name__)
}
