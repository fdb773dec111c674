"""9P2000 and 9P2000.u sessions: version(5), open(5), read(5), remove(5), stat(5), and more of Unix.

The oracle is the host: what a message did is looked at with the system calls of this process.
"""

import errno
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py9p import py9p  # type: ignore[import-untyped] # has no types

from tests.ninep_messages import values_of
from tinyvmm import ninep
from tinyvmm.fileserver.connection import Connection
from tinyvmm.fileserver.host import HostNode, HostTree
from tinyvmm.fileserver.session import MSIZE_MIN, Session
from tinyvmm.fileserver.users import group_of, name_of_group, name_of_user, user_of
from tinyvmm.ninep import (
    DMDIR,
    NINEP2000,
    NINEP2000_L,
    NINEP2000_U,
    NOFID,
    NULLDIR,
    ORDWR,
    OREAD,
    OWRITE,
    Dialect,
    Message,
    Stat,
)

M = TypeVar("M", bound=Message)
ROOT = os.geteuid() == 0


class Client:
    """The asking side, in one dialect."""

    def __init__(self, session: Session, dialect: Dialect) -> None:
        self.session = session
        self.dialect = dialect

    def raw(self, message: Message) -> Message:
        reply = bytearray(9000)
        request = memoryview(bytearray(self.dialect.encode(message, 5)))
        size = self.session.handle([request], [memoryview(reply)])
        tag, answer = self.dialect.decode(bytes(reply[:size]))
        assert tag == 5
        return answer

    def ask(self, message: Message, kind: type[M]) -> M:
        answer = self.raw(message)
        assert isinstance(answer, kind), (message, answer)
        return answer

    def fails(self, message: Message, number: int) -> None:
        answer = self.raw(message)
        assert isinstance(answer, ninep.Rerror), (message, answer)
        assert answer.ename == os.strerror(number).encode()
        assert answer.errno == (number if self.dialect is NINEP2000_U else 0)

    def walk(self, newfid: int, *names: bytes) -> None:
        answer = self.ask(ninep.Twalk(0, newfid, names), ninep.Rwalk)
        assert len(answer.wqid) == len(names)

    def open(self, fid: int, mode: int = OREAD) -> None:
        self.ask(ninep.Topen(fid, mode), ninep.Ropen)

    def create(self, fid: int, name: bytes, perm: int, mode: int = OREAD, ext: bytes = b"") -> None:
        self.ask(ninep.Tcreate(fid, name, perm, mode, ext), ninep.Rcreate)

    def read(self, fid: int, offset: int = 0, count: int = 8000) -> bytes:
        data = self.ask(ninep.Tread(fid, offset, count), ninep.Rread).data
        assert isinstance(data, bytes)
        return data

    def write(self, fid: int, data: bytes, offset: int = 0) -> None:
        assert self.ask(ninep.Twrite(fid, offset, data), ninep.Rwrite).count == len(data)

    def stat(self, fid: int) -> Stat:
        return self.ask(ninep.Tstat(fid), ninep.Rstat).stat

    def wstat(self, fid: int, **changes: Any) -> None:
        self.ask(ninep.Twstat(fid, NULLDIR.replace(**changes)), ninep.Rwstat)

    def clunk(self, fid: int) -> None:
        self.ask(ninep.Tclunk(fid), ninep.Rclunk)

    def entries(self, fid: int, count: int = 8000) -> list[Stat]:
        """A directory as a client reads it, each read where the last one ended."""
        got, offset = [], 0
        while data := self.read(fid, offset, count):
            got += self.dialect.decode_records(Stat, data)
            offset += len(data)
        return got


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inner").write_bytes(b"inner")
    (tmp_path / "file").write_bytes(b"hello")
    os.chmod(tmp_path / "file", 0o640)
    os.utime(tmp_path / "file", (1_000_000_000, 1_100_000_000))
    os.chmod(tmp_path, 0o750)
    return tmp_path


def connect(tree: HostTree, dialect: Dialect) -> Client:
    client = Client(Session(tree), dialect)
    answer = client.ask(ninep.Tversion(8192, dialect.version), ninep.Rversion)
    assert answer == ninep.Rversion(8192, dialect.version)
    n_uname = os.getuid() if dialect is NINEP2000_U else ninep.NONUNAME
    uname = name_of_user(os.getuid())
    client.ask(ninep.Tattach(0, NOFID, uname, b"", n_uname), ninep.Rattach)
    return client


@pytest.fixture(params=[NINEP2000, NINEP2000_U], ids=["9P2000", "9P2000.u"])
def client(top: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    yield from clients(top, request.param)


@pytest.fixture
def plain(top: Path) -> Iterator[Client]:
    yield from clients(top, NINEP2000)


@pytest.fixture
def unix(top: Path) -> Iterator[Client]:
    yield from clients(top, NINEP2000_U)


def clients(top: Path, dialect: Dialect) -> Iterator[Client]:
    tree = HostTree(str(top))
    client = connect(tree, dialect)
    yield client
    client.session.close()
    assert set(tree.nodes.values()) == {tree._root}
    tree.close()


# --- version(5), error(5) -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (b"9P2000", b"9P2000"),
        (b"9P2000.u", b"9P2000.u"),
        (b"9P2000.L", b"9P2000.L"),
        (b"9P2000.x", b"9P2000"),
        (b"9P2000.u.x", b"9P2000.u"),
        (b"9P2000.ux", b"9P2000"),
        (b"9P2000.", b"9P2000"),
        (b"9P2024", b"9P2000"),
        (b"9P2024.L", b"9P2000"),
        (b"9P1999", b"unknown"),
        (b"9P20001", b"unknown"),
        (b"9P200x", b"unknown"),
        (b"9Q2024", b"unknown"),
        (b"", b"unknown"),
        (b"." * 8000, b"unknown"),
    ],
)
def test_a_version_is_answered_with_the_nearest_we_know(
    top: Path, asked: bytes, answered: bytes
) -> None:
    tree = HostTree(str(top))
    client = Client(Session(tree), NINEP2000)
    answer = client.ask(ninep.Tversion(8192, asked), ninep.Rversion)
    assert answer == ninep.Rversion(8192, answered)
    client.session.close()
    tree.close()


def test_another_version_changes_the_dialect_and_forgets_every_fid(client: Client) -> None:
    client.fails(ninep.Tclunk(7), errno.EBADF)
    client.ask(ninep.Tversion(8192, b"9P2000.L"), ninep.Rversion)
    linux = Client(client.session, NINEP2000_L)
    assert linux.raw(ninep.Tclunk(0)) == ninep.Rlerror(errno.EBADF)
    linux.ask(ninep.Tattach(0, NOFID, b"", b"", 0), ninep.Rattach)
    linux.ask(ninep.Tgetattr(0, 1), ninep.Rgetattr)


def test_what_only_linux_says_is_not_understood(client: Client) -> None:
    request = memoryview(bytearray(NINEP2000_L.encode(ninep.Tgetattr(0, 1), 5)))
    reply = bytearray(100)
    size = client.session.handle([request], [memoryview(reply)])
    _, answer = client.dialect.decode(bytes(reply[:size]))
    assert isinstance(answer, ninep.Rerror)
    assert answer.ename == b"Operation not supported"


def test_an_error_fits_the_smallest_message_agreed_on(client: Client) -> None:
    client.ask(ninep.Tversion(MSIZE_MIN, client.dialect.version), ninep.Rversion)
    for number in errno.errorcode:
        assert len(client.dialect.encode(client.session.error(number), 1)) <= MSIZE_MIN


def test_the_texts_of_errors_are_those_linux_turns_into_numbers_again() -> None:
    # struct errormap of net/9p/error.c, as far as we send them
    assert {number: os.strerror(number) for number in (1, 2, 5, 9, 13, 16, 17, 18, 20, 21)} == {
        errno.EPERM: "Operation not permitted",
        errno.ENOENT: "No such file or directory",
        errno.EIO: "Input/output error",
        errno.EBADF: "Bad file descriptor",
        errno.EACCES: "Permission denied",
        errno.EBUSY: "Device or resource busy",
        errno.EEXIST: "File exists",
        errno.EXDEV: "Invalid cross-device link",
        errno.ENOTDIR: "Not a directory",
        errno.EISDIR: "Is a directory",
    }
    assert os.strerror(errno.EINVAL) == "Invalid argument"
    assert os.strerror(errno.ENOTEMPTY) == "Directory not empty"
    assert os.strerror(errno.EOPNOTSUPP) == "Operation not supported"


# --- open(5) --------------------------------------------------------------------------------


def test_a_file_is_opened_read_written_and_truncated(client: Client, top: Path) -> None:
    client.walk(1, b"file")
    client.open(1, ORDWR)
    assert client.read(1) == b"hello"
    client.write(1, b"J")
    assert (top / "file").read_bytes() == b"Jello"
    client.fails(ninep.Topen(1, OREAD), errno.EBADF)  # open already
    client.walk(2, b"file")
    client.open(2, OWRITE | ninep.OTRUNC)
    assert (top / "file").read_bytes() == b""
    client.fails(ninep.Tread(2, 0, 10), errno.EBADF)


def test_a_file_opened_to_be_executed_must_be_executable_and_can_be_read(
    client: Client, top: Path
) -> None:
    client.walk(1, b"file")
    client.fails(ninep.Topen(1, ninep.OEXEC), errno.EACCES)
    os.chmod(top / "file", 0o750)
    client.open(1, ninep.OEXEC)
    assert client.read(1) == b"hello"
    client.fails(ninep.Twrite(1, 0, b"x"), errno.EBADF)


@pytest.mark.parametrize(
    "mode", [OWRITE, ORDWR, ninep.OEXEC, OREAD | ninep.OTRUNC, OREAD | ninep.ORCLOSE]
)
def test_a_directory_can_only_be_opened_for_reading(client: Client, mode: int) -> None:
    client.walk(1, b"dir")
    client.fails(ninep.Topen(1, mode), errno.EISDIR)
    client.fails(ninep.Tcreate(0, b"made", DMDIR | 0o755, mode), errno.EISDIR)


@pytest.mark.parametrize("mode", [ninep.OEXEC | ninep.OTRUNC, 0x04, 0x08, 0x24])
def test_a_mode_with_bits_there_are_not_is_refused(client: Client, mode: int) -> None:
    client.walk(1, b"file")
    client.fails(ninep.Topen(1, mode), errno.EINVAL)
    client.fails(ninep.Tcreate(0, b"new", 0o644, mode), errno.EINVAL)


def test_appending_is_for_unix(unix: Client, plain: Client, top: Path) -> None:
    plain.walk(1, b"file")
    plain.fails(ninep.Topen(1, OWRITE | ninep.OAPPEND), errno.EINVAL)
    unix.walk(1, b"file")
    unix.open(1, OWRITE | ninep.OAPPEND)
    unix.write(1, b" all", offset=0)
    assert (top / "file").read_bytes() == b"hello all"


def test_a_file_to_be_removed_on_close_is_there_until_clunked(client: Client, top: Path) -> None:
    client.walk(1, b"file")
    client.open(1, OREAD | ninep.ORCLOSE)
    assert client.read(1) == b"hello"
    client.clunk(1)
    assert not (top / "file").exists()
    client.walk(1)
    client.create(1, b"temporary", 0o600, ORDWR | ninep.ORCLOSE)
    client.write(1, b"x")
    assert (top / "temporary").exists()
    client.session.close()
    assert not (top / "temporary").exists()


def test_a_created_file_is_open_and_the_fids(client: Client, top: Path) -> None:
    client.walk(1, b"dir")
    client.create(1, b"new", 0o600, ORDWR)
    client.write(1, b"made")
    assert client.read(1) == b"made"
    assert (top / "dir" / "new").read_bytes() == b"made"
    assert client.stat(1).name == b"new"
    client.walk(2, b"dir")
    client.fails(ninep.Tcreate(2, b"new", 0o600, ORDWR), errno.EEXIST)
    for name in (b".", b"..", b"", b"a/b", b"a\0"):
        client.fails(ninep.Tcreate(2, name, 0o600, ORDWR), errno.EINVAL)
    client.walk(3, b"file")
    client.fails(ninep.Tcreate(3, b"below", 0o600, OREAD), errno.ENOTDIR)


def test_a_created_directory_is_open_for_reading(client: Client, top: Path) -> None:
    client.walk(1)
    client.create(1, b"made", DMDIR | 0o750)
    assert stat.S_IMODE((top / "made").stat().st_mode) == 0o750
    assert client.entries(1) == []
    (top / "made" / "child").touch()
    assert [entry.name for entry in client.entries(1)] == [b"child"]


def test_permissions_are_masked_by_the_directory_in_plan9_and_taken_as_given_by_unix(
    plain: Client, unix: Client, top: Path
) -> None:
    # open(5): perm & (~0666 | (dir.perm & 0666)) for files, with 0777 for directories; the root
    # here is 0750
    for number, (client, names) in enumerate([(plain, "ab"), (unix, "cd")]):
        client.walk(1)
        client.create(1, names[0].encode(), 0o777)
        client.walk(2)
        client.create(2, names[1].encode(), DMDIR | 0o777)
        modes = [stat.S_IMODE((top / name).stat().st_mode) for name in names]
        assert modes == [[0o751, 0o750], [0o777, 0o777]][number]


def test_what_is_made_belongs_to_who_attached_and_to_the_directorys_group(
    client: Client, top: Path
) -> None:
    if not ROOT:
        pytest.skip("only root gives files away")
    os.chown(top / "dir", -1, 4321)
    extra = {"n_uname": 1234} if client.dialect is NINEP2000_U else {}
    uname = b"" if extra else b"1234"
    client.ask(ninep.Tattach(9, NOFID, uname, b"dir", **extra), ninep.Rattach)
    client.create(9, b"made", 0o600)
    st = (top / "dir" / "made").stat()
    assert (st.st_uid, st.st_gid) == (1234, 4321)


@pytest.mark.parametrize("bit", [ninep.DMAPPEND, ninep.DMEXCL, ninep.DMAUTH, 1 << 12])
def test_kinds_of_files_that_unix_has_not_are_refused(client: Client, top: Path, bit: int) -> None:
    client.fails(ninep.Tcreate(0, b"odd", bit | 0o644, OREAD), errno.EOPNOTSUPP)
    assert not (top / "odd").exists()


def test_special_files_are_unknown_to_plan9(plain: Client) -> None:
    plain.fails(ninep.Tcreate(0, b"l", ninep.DMSYMLINK | 0o777, OREAD), errno.EOPNOTSUPP)


# --- special files, .u ----------------------------------------------------------------------


def test_unix_makes_symbolic_links_and_reads_them(unix: Client, top: Path) -> None:
    target = b"\xff no/such\nthing"
    unix.walk(1)
    unix.create(1, b"link", ninep.DMSYMLINK | 0o777, OREAD, target)
    assert os.readlink(os.fsencode(top / "link")) == target
    told = unix.stat(1)
    assert told.mode & ~0o777 == ninep.DMSYMLINK
    assert told.qid.type == ninep.QTSYMLINK
    assert told.extension == target
    unix.fails(ninep.Topen(1, OREAD), errno.ELOOP)
    unix.fails(ninep.Tcreate(0, b"none", ninep.DMSYMLINK, OREAD), errno.ENOENT)


def test_unix_makes_hard_links_by_fid(unix: Client, top: Path) -> None:
    unix.walk(1, b"file")
    assert unix.stat(1).extension == b""
    unix.walk(2)
    unix.create(2, b"other", ninep.DMLINK, OREAD, b"1\n")  # as v9fs_vfs_link writes it
    assert (top / "other").samefile(top / "file")
    assert unix.stat(2).qid == unix.stat(1).qid
    assert unix.stat(1).extension == b"HARDLINKCOUNT 2"
    unix.fails(ninep.Tcreate(0, b"bad", ninep.DMLINK, OREAD, b"99"), errno.EBADF)


@pytest.mark.parametrize(
    ("bit", "kind", "extension"),
    [
        (ninep.DMNAMEDPIPE, stat.S_IFIFO, b""),
        (ninep.DMSOCKET, stat.S_IFSOCK, b""),
        (ninep.DMDEVICE, stat.S_IFCHR, b"c 1 3"),
        (ninep.DMDEVICE, stat.S_IFBLK, b"b 7 200"),
    ],
)
def test_unix_makes_fifos_sockets_and_devices(
    unix: Client, top: Path, bit: int, kind: int, extension: bytes
) -> None:
    if bit == ninep.DMDEVICE and not ROOT:
        pytest.skip("only root makes devices")
    unix.walk(1)
    unix.create(1, b"made", bit | 0o640, OREAD, extension)
    st = (top / "made").stat()
    assert st.st_mode == kind | 0o640
    if extension:
        assert extension.split()[1:] == [
            b"%d" % os.major(st.st_rdev), b"%d" % os.minor(st.st_rdev)
        ]  # fmt: skip
    told = unix.stat(1)
    assert (told.mode, told.extension) == (bit | 0o640, extension)
    unix.fails(ninep.Topen(1, OREAD), errno.EOPNOTSUPP)
    assert [entry for entry in unix_entries(unix) if entry.name == b"made"] == [told]


def unix_entries(client: Client) -> list[Stat]:
    client.walk(8)
    client.open(8)
    return client.entries(8)


@pytest.mark.parametrize(
    ("perm", "extension"),
    [
        (ninep.DMDEVICE, b""),
        (ninep.DMDEVICE, b"x 1 3"),
        (ninep.DMDEVICE, b"c 1"),
        (ninep.DMDEVICE, b"c 1 -3"),
        (ninep.DMDEVICE, b"c 4096 0"),
        (ninep.DMDEVICE, b"c 1 1048576"),
        (ninep.DMDEVICE, b"c 1 " + b"9" * 5000),
        (ninep.DMSYMLINK, b"a\0b"),
        (ninep.DMLINK, b""),
        (ninep.DMLINK, b"1 2"),
        (ninep.DMSYMLINK | DMDIR, b"x"),
        (ninep.DMSOCKET | ninep.DMNAMEDPIPE, b""),
    ],
)
def test_an_extension_that_makes_no_sense_makes_nothing(
    unix: Client, top: Path, perm: int, extension: bytes
) -> None:
    before = sorted(os.listdir(top))
    unix.fails(ninep.Tcreate(0, b"odd", perm | 0o600, OREAD, extension), errno.EINVAL)
    assert sorted(os.listdir(top)) == before


# --- stat(5) --------------------------------------------------------------------------------


def test_stat_tells_what_the_host_does(client: Client, top: Path) -> None:
    client.walk(1, b"file")
    st = (top / "file").stat()
    unix = client.dialect is NINEP2000_U
    told = client.stat(1)
    assert told.qid.type == ninep.QTFILE
    assert told == Stat(
        type=0,
        dev=0,
        qid=told.qid,
        mode=0o640,
        atime=1_000_000_000,
        mtime=1_100_000_000,
        length=5,
        name=b"file",
        uid=name_of_user(st.st_uid),
        gid=name_of_group(st.st_gid),
        muid=b"",
        n_uid=st.st_uid if unix else ninep.NONUNAME,
        n_gid=st.st_gid if unix else ninep.NONUNAME,
    )
    assert (user_of(told.uid), group_of(told.gid)) == (st.st_uid, st.st_gid)
    assert client.stat(0).mode == DMDIR | 0o750
    assert client.stat(0).qid.type == ninep.QTDIR
    assert client.stat(0).length == 0


def test_a_file_is_called_what_its_directory_calls_it(client: Client) -> None:
    assert client.stat(0).name == b"/"
    client.walk(1, b"dir", b"inner")
    assert client.stat(1).name == b"inner"
    client.walk(2, b"dir", b"..")
    assert client.stat(2).name == b"/"
    client.ask(ninep.Twalk(1, 3, ()), ninep.Rwalk)
    assert client.stat(3).name == b"inner"


def test_a_directory_walked_to_from_below_is_found_in_its_own(client: Client, top: Path) -> None:
    (top / "dir" / "deep").mkdir()
    client.walk(1, b"dir", b"deep", b"..")
    assert client.stat(1).name == b"dir"


def test_setuid_and_sticky_bits_are_unixs(unix: Client, plain: Client, top: Path) -> None:
    os.chmod(top / "file", 0o7711)
    unix.walk(1, b"file")
    bits = ninep.DMSETUID | ninep.DMSETGID | ninep.DMSETVTX
    assert unix.stat(1).mode == bits | 0o711
    plain.walk(1, b"file")
    assert plain.stat(1).mode == 0o711
    plain.wstat(1, mode=0o700)
    assert stat.S_IMODE((top / "file").stat().st_mode) == 0o7700  # it has no words for the rest
    unix.wstat(1, mode=0o755 | ninep.DMSETUID)
    assert stat.S_IMODE((top / "file").stat().st_mode) == 0o4755


@pytest.mark.skipif(not ROOT, reason="acts for another user, which takes root")
def test_a_users_write_or_truncation_clears_set_id_bits(unix: Client, top: Path) -> None:
    """As tests/test_semantics.py has it for 9P2000.L, whose clients are not the only ones."""
    attach = ninep.Tattach(20, NOFID, b"", b"", 1000)
    unix.ask(attach, ninep.Rattach)

    def mode_after(how: str) -> int:
        os.chmod(top / "file", 0o4755)
        unix.ask(ninep.Twalk(20, 21, (b"file",)), ninep.Rwalk)
        if how == "length":
            unix.wstat(21, length=1)
        else:
            unix.ask(ninep.Topen(21, ORDWR | ninep.OTRUNC * (how == "truncate")), ninep.Ropen)
        if how == "again":  # what the client sets while the file is open
            unix.write(21, b"x")
            unix.wstat(21, mode=0o755 | ninep.DMSETUID)
        if how in {"write", "again"}:
            unix.write(21, b"x")
        unix.clunk(21)
        return stat.S_IMODE((top / "file").stat().st_mode)

    assert {mode_after(how) for how in ("write", "again", "truncate", "length")} == {0o755}


def test_times_before_1970_and_after_2106_are_the_nearest_there_are(
    client: Client, top: Path
) -> None:
    os.utime(top / "file", (-5, 1 << 33))
    client.walk(1, b"file")
    told = client.stat(1)
    assert told.atime == 0
    assert told.mtime == 0xFFFF_FFFE


def test_wstat_changes_mode_length_times_and_name(client: Client, top: Path) -> None:
    client.walk(1, b"file")
    client.wstat(1, mode=0o600, length=2, mtime=1_234_567, name=b"renamed")
    st = (top / "renamed").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_size, st.st_mtime_ns) == (0o600, 2, 1_234_567 * 10**9)
    assert st.st_atime == 1_000_000_000
    assert not (top / "file").exists()
    assert client.stat(1).name == b"renamed"
    client.wstat(1, atime=99)
    assert (top / "renamed").stat().st_atime == 99
    client.ask(ninep.Tremove(1), ninep.Rremove)
    assert not (top / "renamed").exists()


def test_what_says_the_same_again_changes_nothing(client: Client, top: Path) -> None:
    client.walk(1, b"file")
    before = (top / "file").stat()
    client.ask(ninep.Twstat(1, client.stat(1)), ninep.Rwstat)
    after = (top / "file").stat()
    assert after.st_mode == before.st_mode
    assert (after.st_mtime, after.st_size, after.st_ino) == (before.st_mtime, 5, before.st_ino)


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"type": 1}, errno.EPERM),
        ({"dev": 1}, errno.EPERM),
        ({"qid": ninep.Qid(0, 0, 5)}, errno.EPERM),
        ({"mode": DMDIR | 0o755}, errno.EPERM),
        ({"mode": ninep.DMAPPEND | 0o644}, errno.EPERM),
        ({"length": 1 << 63}, errno.EINVAL),
        ({"gid": b"no such group"}, errno.EINVAL),
        ({"name": b"a/b"}, errno.EINVAL),
        ({"name": b".."}, errno.EINVAL),
        ({"name": b"n" * 256}, errno.ENAMETOOLONG),
    ],
    ids=str,
)
def test_what_wstat_refuses_leaves_everything_as_it_was(
    client: Client, top: Path, changes: dict[str, Any], number: int
) -> None:
    before = (top / "file").stat()
    client.walk(1, b"file")
    good = {"name": b"other", "mtime": 5, "mode": 0o777, "length": 1}
    client.fails(ninep.Twstat(1, NULLDIR.replace(**(good | changes))), number)
    after = (top / "file").stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_size, after.st_ino) == (
        before.st_mode, before.st_mtime_ns, before.st_size, before.st_ino
    )  # fmt: skip
    assert sorted(os.listdir(top)) == ["dir", "file"]


@pytest.mark.parametrize("step", ["setattr", "rename"])
def test_a_change_that_fails_half_way_is_taken_back(
    client: Client, top: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Each call of the tree in turn fails; then it works, and nothing may have changed before."""
    before = (top / "file").stat()
    client.walk(1, b"file")
    changes: dict[str, Any] = {"name": b"other", "mtime": 5, "mode": 0o777, "length": 1}
    if ROOT:
        changes["gid"] = b"4321"
    original: Callable[..., None] = getattr(HostNode, step)
    for failing in range(10):
        calls = [0]

        def call(self: HostNode, *args: Any, **named: Any) -> None:
            calls[0] += 1  # noqa: B023 - called before the next round only
            if calls[0] == failing + 1:  # noqa: B023
                raise OSError(errno.EIO, "")
            original(self, *args, **named)

        monkeypatch.setattr(HostNode, step, call)
        answer = client.raw(ninep.Twstat(1, NULLDIR.replace(**changes)))
        monkeypatch.undo()
        if isinstance(answer, ninep.Rwstat):
            break
        if step == "setattr" and calls[0] > 5 and (top / "file").stat().st_size == 1:
            # the very last: the times once more, after the length is gone
            assert stat.S_IMODE((top / "file").stat().st_mode) == 0o640
            (top / "file").write_bytes(b"hello")
            os.utime(top / "file", (1_000_000_000, 1_100_000_000))
            continue
        after = (top / "file").stat()
        assert (after.st_mode, after.st_mtime_ns, after.st_size, after.st_gid) == (
            before.st_mode, before.st_mtime_ns, before.st_size, before.st_gid
        )  # fmt: skip
        assert sorted(os.listdir(top)) == ["dir", "file"]
    assert failing >= 1
    assert isinstance(answer, ninep.Rwstat)
    assert (top / "other").stat().st_size == 1


def test_the_length_of_a_directory_is_nothing_and_stays_it(client: Client) -> None:
    client.walk(1, b"dir")
    client.wstat(1, length=0)
    client.fails(ninep.Twstat(1, NULLDIR.replace(length=5)), errno.EISDIR)


def test_a_name_somebody_has_is_taken_by_unix_only(plain: Client, unix: Client, top: Path) -> None:
    (top / "new").write_bytes(b"new")
    plain.walk(1, b"new")
    plain.fails(ninep.Twstat(1, NULLDIR.replace(name=b"file")), errno.EEXIST)
    assert (top / "file").read_bytes() == b"hello"
    unix.walk(1, b"new")
    unix.wstat(1, name=b"file", muid=b"root")  # as v9fs_vfs_rename asks
    assert (top / "file").read_bytes() == b"new"


def test_only_unix_gives_files_away(plain: Client, unix: Client, top: Path) -> None:
    if not ROOT:
        pytest.skip("only root gives files away")
    plain.walk(1, b"file")
    plain.fails(ninep.Twstat(1, NULLDIR.replace(uid=b"1234")), errno.EPERM)
    plain.wstat(1, gid=b"4321")
    unix.walk(1, b"file")
    unix.wstat(1, n_uid=1234)
    st = (top / "file").stat()
    assert (st.st_uid, st.st_gid) == (1234, 4321)
    unix.wstat(1, uid=b"daemon", n_gid=77)
    st = (top / "file").stat()
    assert (st.st_uid, st.st_gid) == (user_of(b"daemon"), 77)
    unix.fails(ninep.Twstat(1, NULLDIR.replace(uid=b"no such user")), errno.EINVAL)


def test_a_wstat_that_changes_nothing_waits_for_the_disk(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    client.walk(1, b"file")
    client.wstat(1)
    client.open(1, ORDWR)
    client.wstat(1)
    client.walk(2, b"dir")
    client.wstat(2)
    assert len(synced) == 3


def test_removing_clunks_even_if_it_fails(client: Client, top: Path) -> None:
    client.walk(1, b"dir")
    client.fails(ninep.Tremove(1), errno.ENOTEMPTY)
    client.fails(ninep.Tstat(1), errno.EBADF)
    client.walk(1, b"dir", b"inner")
    client.ask(ninep.Tremove(1), ninep.Rremove)
    client.walk(1, b"dir")
    client.ask(ninep.Tremove(1), ninep.Rremove)
    assert os.listdir(top) == ["file"]
    client.fails(ninep.Tremove(0), errno.EBUSY)


# --- read(5) of directories -----------------------------------------------------------------


@given(st.sampled_from([NINEP2000, NINEP2000_U]), st.integers(0, 40), st.integers(150, 900))
@settings(max_examples=30, deadline=None)
def test_a_directory_read_on_where_it_ended_gives_every_entry_once(
    dialect: Dialect, count: int, size: int
) -> None:
    with tempfile.TemporaryDirectory() as path:
        for number in range(count):
            Path(path, f"{number}" * (number % 4 + 1)).touch()
        tree = HostTree(path)
        client = connect(tree, dialect)
        client.walk(1)
        client.open(1)
        entries = client.entries(1, size)
        assert sorted(entry.name for entry in entries) == sorted(map(os.fsencode, os.listdir(path)))
        for entry in entries:
            client.walk(2, entry.name)
            assert client.stat(2) == entry
            client.clunk(2)
        client.session.close()
        tree.close()


def test_a_directory_is_read_from_its_start_or_where_the_last_read_ended(client: Client) -> None:
    client.walk(1)
    client.open(1)
    first = client.read(1, 0, 100)
    assert len(client.dialect.decode_records(Stat, first)) == 1
    client.fails(ninep.Tread(1, 1, 100), errno.ESPIPE)
    client.fails(ninep.Tread(1, len(first) + 1, 100), errno.ESPIPE)
    second = client.read(1, len(first), 100)
    assert client.read(1, len(first) + len(second), 100) == b""
    assert client.read(1, 0, 100) == first
    client.fails(ninep.Tread(1, 0, 10), errno.EINVAL)  # less than an entry
    client.fails(ninep.Twrite(1, 0, b"x"), errno.EISDIR)


def test_the_rest_of_a_buffer_filled_by_several_reads_gets_nothing(
    client: Client, top: Path
) -> None:
    for number in range(20):
        (top / f"f{number:02}").touch()
    client.walk(1)
    client.open(1)
    seen: list[bytes] = []
    offset = 0
    while True:  # as p9_client_read in net/9p/client.c of Linux 6.1
        buffer = b""
        while piece := client.read(1, offset, 400 - len(buffer)):
            buffer += piece
            offset += len(piece)
        if not buffer:
            break
        seen += [entry.name for entry in client.dialect.decode_records(Stat, buffer)]
    assert sorted(seen) == sorted(map(os.fsencode, os.listdir(top)))


def test_entries_that_go_while_a_directory_is_read_are_left_out(client: Client, top: Path) -> None:
    for number in range(20):
        (top / f"f{number:02}").touch()
    client.walk(1)
    client.open(1)
    first = client.read(1, 0, 200)
    seen = [entry.name for entry in client.dialect.decode_records(Stat, first)]
    gone = [name for name in os.listdir(os.fsencode(top)) if name not in seen and name[:1] == b"f"]
    for name in gone:
        os.unlink(os.fsencode(top) + b"/" + name)
    rest = client.dialect.decode_records(Stat, client.read(1, len(first)))
    left = {os.fsencode(name) for name in os.listdir(top)} - set(seen)
    assert {entry.name for entry in rest} == left


# --- anything at all ------------------------------------------------------------------------

fids = st.sampled_from([0, 0, 1, 2, 3, NOFID])
names = st.sampled_from([b"dir", b"file", b"new", b"link", b"..", b".", b"", b"a/b", b"n" * 300])


def hostile(kind: type[Message], dialect: Dialect) -> st.SearchStrategy[Message]:
    """Messages of few fids and names, so that they meet; the rest is anything."""

    def tame(message: Message) -> st.SearchStrategy[Message]:
        fields: dict[str, st.SearchStrategy[Any]] = {}
        for name in kind.fields:
            if name.endswith("fid"):
                fields[name] = st.just(NOFID) if name == "afid" else fids
            elif name in {"name", "aname"}:
                fields[name] = names
            elif name == "wname":
                fields[name] = st.lists(names, max_size=3).map(tuple)
            elif name == "mode":
                fields[name] = st.sampled_from([0, 1, 2, 3, 16, 17, 64, 65, 128, 255])
            elif name == "perm":
                kinds = [0, 0, DMDIR, *[1 << bit for bit in (16, 18, 19, 20, 21, 24, 25, 30)]]
                fields[name] = st.sampled_from(kinds).map(lambda bits: bits | 0o755)
            elif name == "extension" and dialect is NINEP2000_U:
                fields[name] = st.sampled_from([b"", b"target", b"1", b"0\n", b"b 1 2", b"c"])
            elif name == "stat":
                fields[name] = changes
            elif name in {"offset", "count"}:
                fields[name] = st.sampled_from([0, 1, 60, 200, 1 << 31, (1 << 32) - 1])
        return st.fixed_dictionaries(fields).map(lambda named: message.replace(**named))

    return values_of(kind, dialect, st.binary(max_size=9)).flatmap(tame)


changes = st.fixed_dictionaries(
    {},
    optional={
        "name": names,
        "mode": st.sampled_from([0o755, 0o600, DMDIR | 0o755, 1 << 25]),
        "length": st.sampled_from([0, 3, 1 << 62, 1 << 63]),
        "mtime": st.integers(0, 1 << 31),
        "atime": st.integers(0, 1 << 31),
        "uid": st.sampled_from([b"", b"root", b"nobody at all"]),
        "type": st.sampled_from([0, 5]),
    },
).map(lambda named: NULLDIR.replace(**named))

scripts = st.sampled_from([NINEP2000, NINEP2000_U]).flatmap(
    lambda dialect: st.tuples(
        st.just(dialect),
        st.lists(
            st.one_of(
                [
                    hostile(kind, dialect)
                    for kind in dialect.messages.values()
                    if kind.__name__[0] == "T" and kind is not ninep.Tversion
                ]
            ),
            max_size=25,
        ),
    )
)


@given(scripts)
@settings(max_examples=150, deadline=None)
def test_no_sequence_of_requests_raises_leaks_or_escapes(
    script: tuple[Dialect, list[Message]],
) -> None:
    dialect, requests = script
    with tempfile.TemporaryDirectory() as outer:
        path = f"{outer}/top"
        os.makedirs(f"{path}/dir/sub")
        Path(f"{outer}/file").write_bytes(b"outside")
        Path(f"{path}/file").write_bytes(b"inside")
        os.symlink("../file", f"{path}/link")
        before = len(os.listdir("/proc/self/fd"))
        tree = HostTree(path)
        client = connect(tree, dialect)
        for message in requests:
            answer = client.raw(message)
            assert answer.number in {message.number + 1, ninep.Rerror.number}
        client.session.close()
        assert set(tree.nodes.values()) == {tree._root}
        tree.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert sorted(os.listdir(outer)) == ["file", "top"]
        assert Path(f"{outer}/file").read_bytes() == b"outside"


# --- a client of other people ---------------------------------------------------------------


@pytest.mark.parametrize("version", [py9p.Version.v9P2000, py9p.Version.v9P2000u], ids=str)
def test_py9ps_client_makes_lists_reads_renames_and_removes(
    top: Path, version: py9p.Version
) -> None:
    tree = HostTree(str(top))
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=Connection(ours, Session(tree)).serve)
    thread.start()
    theirs.settimeout(30)
    user = py9p.Credentials(user=name_of_user(os.getuid()))
    client = py9p.Client(theirs, credentials=user, ver=version)

    client.create("dir/made", 0o640)
    client.write(b"by py9p")
    client.close()
    assert (top / "dir" / "made").read_bytes() == b"by py9p"
    client.open("dir/made", py9p.OREAD)
    assert client.read(100) == b"by py9p"
    client.close()
    (told,) = client.stat("dir/made")
    assert (told.name, told.length, told.mode) == (b"made", 7, 0o640)
    assert told.mtime == int((top / "dir" / "made").stat().st_mtime)
    client.open("dir")
    marshal = py9p.Marshal9P(dotu=client.dotu)
    marshal.setBuffer(client.read(8000))
    marshal.buf.seek(0)
    entries: list[Any] = []
    marshal.decstat(entries)
    client.close()
    assert sorted(entry.name for entry in entries) == [b"inner", b"made"]
    with pytest.raises(py9p.RpcError, match="No such file"):
        client.stat("nowhere")
    client.rm("dir/made")
    assert not (top / "dir" / "made").exists()
    theirs.close()
    thread.join(30)
    assert not thread.is_alive()
    tree.close()
