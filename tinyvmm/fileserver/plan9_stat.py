"""Files as stat(5) tells of them, and directories as read(5) gives them: runs of such records.

9P2000 knows directories and files; 9P2000.u tells the other kinds of a Unix file system apart by
bits of the mode (DMSYMLINK, DMDEVICE...) and says in `extension` what they are: a symbolic link's
target, a device's `b 8 1`. Of a regular file with more than one name it says `HARDLINKCOUNT 2`, as
Linux expects (v9fs_stat2inode in fs/9p/vfs_inode.c). In plain 9P2000 they all look like files,
those but regular ones and directories being files nobody may open.

`muid`, who wrote last, is left empty: no host keeps it.

A `Directory` may be read on a thread of the pool; its lock keeps two reads of one fid apart.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from errno import EINVAL, EISDIR, ENOENT, ESPIPE, ESTALE
from threading import Lock

from tinyvmm import ninep
from tinyvmm.fileserver.fid import failure
from tinyvmm.fileserver.tree import DirEntry, Node, OpenFile
from tinyvmm.fileserver.users import name_of_group, name_of_user
from tinyvmm.ninep import Dialect, Stat
from tinyvmm.views import scatter

SET_BITS = {
    stat.S_ISUID: ninep.DMSETUID,
    stat.S_ISGID: ninep.DMSETGID,
    stat.S_ISVTX: ninep.DMSETVTX,
}
KINDS = {
    stat.S_IFLNK: ninep.DMSYMLINK,
    stat.S_IFBLK: ninep.DMDEVICE,
    stat.S_IFCHR: ninep.DMDEVICE,
    stat.S_IFIFO: ninep.DMNAMEDPIPE,
    stat.S_IFSOCK: ninep.DMSOCKET,
}
TIME_MAX = 0xFFFF_FFFE  # the next is "don't touch"


def mode_of(st_mode: int, dialect: Dialect) -> int:
    """The mode of stat(5) for one of stat(2)."""
    mode = st_mode & 0o777
    if stat.S_ISDIR(st_mode):
        mode |= ninep.DMDIR
    if dialect is ninep.NINEP2000_U:
        mode |= KINDS.get(stat.S_IFMT(st_mode), 0)
        mode |= sum([bit for unix, bit in SET_BITS.items() if st_mode & unix])
    return mode


def unix_bits(mode: int) -> int:
    """The permissions of a mode of 9P2000.u, and what is set beside them, as chmod(2) has them."""
    return mode & 0o777 | sum([unix for unix, bit in SET_BITS.items() if mode & bit])


def describe(node: Node, name: bytes, dialect: Dialect) -> Stat:
    """What there is to tell of a file, called `name`; makes system calls."""
    st = node.stat()
    told = Stat(
        type=0,
        dev=0,
        qid=node.qid(),
        mode=mode_of(st.st_mode, dialect),
        atime=_seconds(st.st_atime_ns),
        mtime=_seconds(st.st_mtime_ns),
        length=0 if stat.S_ISDIR(st.st_mode) else st.st_size,
        name=name,
        uid=name_of_user(st.st_uid),
        gid=name_of_group(st.st_gid),
        muid=b"",
    )
    if dialect is ninep.NINEP2000_U:
        return told.replace(extension=_extension(node, st), n_uid=st.st_uid, n_gid=st.st_gid)
    return told


def _seconds(nanoseconds: int) -> int:
    return min(max(nanoseconds // 1_000_000_000, 0), TIME_MAX)


def _extension(node: Node, st: os.stat_result) -> bytes:
    if stat.S_ISLNK(st.st_mode):
        return node.readlink()
    if stat.S_ISBLK(st.st_mode) or stat.S_ISCHR(st.st_mode):
        letter = b"b" if stat.S_ISBLK(st.st_mode) else b"c"
        return b"%b %d %d" % (letter, os.major(st.st_rdev), os.minor(st.st_rdev))
    if stat.S_ISREG(st.st_mode) and st.st_nlink > 1:
        return b"HARDLINKCOUNT %d" % st.st_nlink
    return b""


class Directory:
    """An open directory whose contents are stat records, for Tread."""

    fd: int | None = None

    def __init__(self, node: Node, file: OpenFile, dialect: Dialect) -> None:
        """Read the directory `file`, of `node`; it is closed here, the node is its fid's."""
        self._node = node
        self._file = file
        self._dialect = dialect
        self._lock = Lock()
        self._offset = 0  # where a client that goes on has to
        self._cookie = 0  # what `readdir` calls that place
        self._asked = 0  # bytes wanted by the read that started afresh

    @property
    def position(self) -> tuple[int, int, int]:
        """How far it has been read, for another that is to go on there."""
        return self._offset, self._cookie, self._asked

    @position.setter
    def position(self, position: tuple[int, int, int]) -> None:
        self._offset, self._cookie, self._asked = position

    def readv(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Whole records only, as many as fit; EINVAL if not one does.

        read(5): the offset is 0, for a fresh start, or where the last read ended.

        A reader that wants less than at its start is filling one buffer by several reads, as Linux
        does (p9_client_read in net/9p/client.c), and stops at nothing or an error, which its user
        would see: the rest of its buffer gets nothing.
        """
        room = sum([len(buffer) for buffer in buffers])
        with self._lock:
            if not offset:
                self._offset = self._cookie = 0
                self._asked = room
            elif offset != self._offset:
                raise failure(ESPIPE)
            cookie = self._cookie
            records: list[bytes] = []
            size = 0
            for _, after, _, name in self._file.readdir(cookie):
                record = self._record(name)
                if size + len(record) > room:
                    if not size and room >= self._asked:
                        raise failure(EINVAL)
                    break
                records.append(record)
                size += len(record)
                cookie = after
            scatter(buffers, b"".join(records))
            self._cookie = cookie
            self._offset += size
            return size

    def _record(self, name: bytes) -> bytes:
        """An entry's record; nothing for `.` and `..`, which Plan 9 has not, nor for one gone."""
        if name in {b".", b".."}:
            return b""
        try:
            node = self._node.walk(name)
        except OSError as error:
            if error.errno in {ENOENT, ESTALE}:
                return b""
            raise
        try:
            return self._dialect.encode_records([describe(node, name, self._dialect)])
        finally:
            node.close()

    def readv_now(self, buffers: Sequence[memoryview], offset: int) -> int | None:
        """Read, unless the files may keep us waiting."""
        return None if self._node.waits else self.readv(buffers, offset)

    def writev(self, buffers: Sequence[memoryview], offset: int) -> int:
        """EISDIR."""
        del buffers, offset
        raise failure(EISDIR)

    def writev_now(self, buffers: Sequence[memoryview], offset: int) -> int:
        """EISDIR."""
        return self.writev(buffers, offset)

    def readdir(self, cookie: int) -> Iterator[DirEntry]:
        """The entries, as the tree has them."""
        return self._file.readdir(cookie)

    def fsync(self, datasync: bool) -> None:
        """Wait for the host's disk."""
        self._file.fsync(datasync)

    def close(self) -> None:
        """Close the tree's file."""
        self._file.close()
