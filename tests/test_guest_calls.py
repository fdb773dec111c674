"""System calls from afar: the program is a process of this computer here, over a Unix socket."""

import errno
import os
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.calls_here import ended, start, unix_address
from tinyvmm.errors import ConfigError
from tinyvmm.guest.calls import ANSWER, ARENA_LEN
from tinyvmm.inside.guest_calls import (
    PIECE,
    Guest,
    Out,
    Slot,
    call,
    close,
    connect,
    entries,
    fchmodat,
    fchownat,
    fstat,
    ftruncate,
    getdents64,
    kill,
    lgetxattr,
    linkat,
    llistxattr,
    lseek,
    lsetxattr,
    make_socket,
    mkdirat,
    mknodat,
    mount,
    newfstatat,
    openat,
    parse_entries,
    parse_stat,
    pread64,
    pwrite64,
    read,
    read_file,
    readlinkat,
    renameat2,
    symlinkat,
    umount2,
    unlinkat,
    utimensat,
    write,
)

WRITE = os.O_RDWR | os.O_CREAT | os.O_EXCL


@pytest.fixture
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    process, sock = start(tmp_path_factory.mktemp("calls"))
    with Guest(sock, timeout=60) as guest:
        yield guest
    assert ended(process)  # it ends when we hang up


def test_a_file_is_made_written_and_read_in_one_round_trip(guest: Guest, tmp_path: Path) -> None:
    path, data = str(tmp_path / "file"), os.urandom(1000)
    there = [
        openat(path, WRITE, 0o640, into=1),
        write(Slot(1), data),
        pwrite64(Slot(1), b"end", 5000),
        ftruncate(Slot(1), 6000),
        lseek(Slot(1), 10, os.SEEK_SET),
        read(Slot(1), 100),
        pread64(Slot(1), 3, 5000),
        fstat(Slot(1)),
        close(Slot(1)),
    ]
    opened, written, _, _, sought, some, end, found, closed = guest.all(there)
    assert (written.result, sought.result, closed.result) == (1000, 10, 0)
    assert (some.data, end.data) == (data[10:110], b"end")
    assert opened.result > 2
    assert Path(path).read_bytes() == data + bytes(4000) + b"end" + bytes(997)
    status, ours = parse_stat(found.data), os.stat(path)
    assert (status.ino, status.size, status.mode) == (ours.st_ino, 6000, stat.S_IFREG | 0o640)
    assert (status.mtime_ns, status.blocks) == (ours.st_mtime_ns, ours.st_blocks)


def test_names_links_modes_owners_and_times(guest: Guest, tmp_path: Path) -> None:
    at = str(tmp_path / "d")
    done = guest.all(
        [
            mkdirat(at, 0o1777),
            symlinkat("the target", f"{at}/link"),
            mknodat(f"{at}/fifo", stat.S_IFIFO | 0o600),
            linkat(f"{at}/fifo", f"{at}/other"),
            renameat2(f"{at}/other", f"{at}/third"),
            fchmodat(f"{at}/fifo", 0o4755),
            fchownat(f"{at}/link", os.getuid(), os.getgid()),
            utimensat(f"{at}/link", 1_500_000_001, -1),
            newfstatat(f"{at}/link"),
            readlinkat(f"{at}/link"),
        ]
    )
    assert [answer.check().result for answer in done[:8]] == [0] * 8
    link = parse_stat(done[8].data)
    assert stat.S_ISLNK(link.mode)
    assert (link.atime_ns, link.mtime_ns) == (1_500_000_001, -1)
    assert done[9].data == b"the target"
    assert os.lstat(at).st_mode == stat.S_IFDIR | 0o1777
    assert os.lstat(f"{at}/third").st_mode == stat.S_IFIFO | 0o4755
    assert sorted(entries(guest, at)) == ["fifo", "link", "third"]
    for name in ("fifo", "link", "third"):
        guest.do(unlinkat(f"{at}/{name}"))
    guest.do(unlinkat(at, 0x200))
    assert not os.path.exists(at)


def test_extended_attributes(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    guest.do(lsetxattr(str(path), "user.word", b"a\0b"))
    assert os.getxattr(path, "user.word") == b"a\0b"
    assert guest.do(lgetxattr(str(path), "user.word")).data == b"a\0b"
    assert b"user.word\0" in guest.do(llistxattr(str(path))).data


def test_what_fails_is_an_os_error_and_the_rest_goes_on(guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        guest.do(openat(str(tmp_path / "nothing"), os.O_RDONLY))
    failed, unread, made = guest.all(
        [openat(str(tmp_path / "nothing"), os.O_RDONLY, into=5), read(Slot(5), 10),
         mkdirat(str(tmp_path / "made"), 0o755)]
    )  # fmt: skip
    assert (failed.result, unread.result, made.result) == (-errno.ENOENT, -errno.EBADF, 0)
    assert unread.data == b""
    with pytest.raises(ProcessLookupError):
        guest.do(kill(1 << 22, 0))
    with pytest.raises(OSError, match="none"):
        guest.do(mount("x", str(tmp_path / "none"), "9p"))
    with pytest.raises(OSError, match="none"):
        guest.do(umount2(str(tmp_path / "none")))


def test_large_files_flow_through_a_bounded_window(guest: Guest, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    path = str(tmp_path / "large")
    pieces = [data[n : n + PIECE] for n in range(0, len(data), PIECE)]
    wanted = [openat(path, WRITE, 0o600, into=1), *(write(Slot(1), piece) for piece in pieces)]
    for answer in guest.each(wanted):
        answer.check()
    assert read_file(guest, path, len(data) + 10) == data


def test_a_directory_of_many(guest: Guest, tmp_path: Path) -> None:
    names = {f"{number:0200}" for number in range(2000)}
    for name in names:
        (tmp_path / name).touch()
    assert set(entries(guest, str(tmp_path))) == names
    with pytest.raises(NotADirectoryError):
        list(entries(guest, str(tmp_path / min(names))))


def test_any_call_can_be_made(guest: Guest, tmp_path: Path) -> None:
    assert guest.do(call(39)).result > 1  # getpid
    name = guest.do(call(63, Out(390))).data  # uname
    assert name.split(b"\0")[0] == b"Linux"
    path = str(tmp_path / "listening")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        made, connected = guest.all(
            [
                make_socket(socket.AF_UNIX, socket.SOCK_STREAM, into=9),
                connect(Slot(9), unix_address(path)),
            ]
        )
        assert connected.result == 0
        accepted, _ = listener.accept()
        guest.do(write(made.result, b"hello"))
        assert accepted.recv(10) == b"hello"
        accepted.close()


def test_whoever_leaves_early_closes_it(tmp_path: Path) -> None:
    process, sock = start(tmp_path)
    guest = Guest(sock, timeout=60)
    for _ in guest.each(call(39) for _ in range(1000)):
        break
    with pytest.raises(ConfigError, match="closed"):
        guest.do(call(39))
    assert ended(process)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        write(1, bytes(ARENA_LEN + 1))
    with pytest.raises(ValueError, match="at most"):
        read(1, ARENA_LEN + 1)
    with pytest.raises(ValueError, match="NUL"):
        openat("a\0b", 0)
    with pytest.raises(ValueError, match="slot"):
        openat("a", 0, into=64)


def hostile(answer: Callable[[socket.socket], None], timeout: float = 60) -> Guest:
    ours, theirs = socket.socketpair()

    def main() -> None:
        with theirs:
            theirs.recv(1 << 16)
            answer(theirs)

    threading.Thread(target=main).start()
    return Guest(ours, timeout=timeout)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (ANSWER.pack(200, 200) + bytes(200), "not asked"),
        (ANSWER.pack(0, 1 << 63) + bytes(200), "not asked"),
        (ANSWER.pack(-5000, 0), "not asked"),
        (ANSWER.pack(5, 100) + bytes(99), "hung up"),
        (b"", "hung up"),
        (None, "did not answer"),
    ],
)
def test_a_guests_answers_are_not_believed(answer: bytes | None, says: str) -> None:
    done = threading.Event()

    def play(sock: socket.socket) -> None:
        if answer is None:
            done.wait(60)
        else:
            sock.sendall(answer)

    patience = 0.5 if answer is None else 60
    with hostile(play, patience) as guest, pytest.raises(ConfigError, match=says):
        guest.do(read(3, 100))
    done.set()


def test_a_byte_now_and_then_is_no_answer() -> None:
    def play(sock: socket.socket) -> None:
        with suppress(OSError):
            for byte in ANSWER.pack(0, 100) + bytes(100):
                sock.sendall(bytes([byte]))
                sleep(0.1)

    with hostile(play, 0.5) as guest, pytest.raises(ConfigError, match="did not answer"):
        guest.do(read(3, 100))


def test_whoever_waits_for_an_answer_can_be_told_to_give_it_up() -> None:
    asked, done = threading.Event(), threading.Event()

    def play(_: socket.socket) -> None:
        asked.set()
        done.wait(30)

    with hostile(play) as guest:

        def give_up() -> None:
            assert asked.wait(30)
            guest.give_up()

        other = threading.Thread(target=give_up)
        other.start()
        with pytest.raises(ConfigError, match="hung up"):
            guest.do(read(3, 100))
        other.join(30)
    done.set()
    guest.give_up()  # harmless


def test_what_is_said_unasked_does_not_pile_up() -> None:
    """Answers to questions yet to come, far more of them than are taken."""
    done = threading.Event()

    def play(sock: socket.socket) -> None:
        with suppress(OSError):
            sock.sendall(ANSWER.pack(0, 0) * 1_000_000)
        done.wait(60)

    with hostile(play) as guest, pytest.raises(ConfigError, match="not asked"):
        deque((guest.do(close(3)) for _ in range(1000)), maxlen=0)
    done.set()


def entry(name: bytes, length: int | None = None) -> bytes:
    record = struct.pack("<QqHB", 1, 1, 20 + len(name) if length is None else length, 4) + name
    return record + b"\0"


def test_entries_that_are_no_names_are_refused() -> None:
    assert parse_entries(entry(b".") + entry(b"..") + entry(b"a") + entry(b"b\xff")) == [
        "a",
        "b\udcff",
    ]
    for bad in (
        entry(b"../x"),
        entry(b"/etc/passwd"),
        entry(b""),
        entry(b"x" * 256),
        entry(b"abc", 0),
        entry(b"abc", 19),
        entry(b"abc", 22),
        entry(b"abc", 2000),
        entry(b"abc")[:-1],
        b"abc",
    ):
        with pytest.raises(ConfigError):
            parse_entries(bad)
    with pytest.raises(ConfigError):
        parse_stat(bytes(143))


@given(st.binary(max_size=300))
def test_no_bytes_are_a_name_with_a_slash(data: bytes) -> None:
    try:
        names = parse_entries(data)
    except ConfigError:
        return
    assert all(name and "/" not in name and name not in {".", ".."} for name in names)


def test_getdents_of_what_is_there(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    fd = guest.do(openat(str(tmp_path), os.O_RDONLY)).result
    assert parse_entries(guest.do(getdents64(fd)).data) == ["one"]
