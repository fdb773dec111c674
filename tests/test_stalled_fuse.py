"""A host file system that stalls: a real FUSE mount whose server does not answer reads.

The smallest FUSE server there can be (<linux/fuse.h>, protocol 7.31): a root directory with one
file. It answers everything but FUSE_READ, which it leaves until it is told to answer.
"""

import ctypes
import os
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from errno import ENOENT, ENOSYS
from pathlib import Path

import pytest

from tinyvmm import ninep
from tinyvmm.fileserver import stalling
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.session import Finish, Session, Waiting
from tinyvmm.fileserver.stalling import may_stall
from tinyvmm.ninep import NOFID, Message

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, INIT, OPENDIR, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 15, 17, 18, 26, 27, 36, 42
)  # fmt: skip
IN_HEADER = struct.Struct("<IIQQIIII")  # len opcode unique nodeid uid gid pid padding
OUT_HEADER = struct.Struct("<IiQ")
CONTENTS = b"late, but here"
HANG = 120.0


class StallingFuse:
    """A mount of one file, `file`; `let_go` answers its reads."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.reads = threading.Semaphore(0)
        self.let_go = threading.Event()
        options = f"fd={self.fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"stalling", os.fsencode(where), b"fuse", 0, options.encode()):
            number = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(number, os.strerror(number))
        self.threads = [threading.Thread(target=self.serve, daemon=True) for _ in range(4)]
        for thread in self.threads:
            thread.start()

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.fd, 1 << 20)
            except OSError:
                return  # unmounted
            _, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(request)
            body = request[IN_HEADER.size :]
            if opcode in {FORGET, BATCH_FORGET, INTERRUPT}:
                continue
            error, reply = self.answer(opcode, nodeid, body)
            size = OUT_HEADER.size + len(reply)
            os.write(self.fd, OUT_HEADER.pack(size, -error, unique) + reply)

    def answer(self, opcode: int, nodeid: int, body: bytes) -> tuple[int, bytes]:
        attributes = self.attributes(nodeid)
        if opcode == INIT:
            return 0, struct.pack("<IIIIHHIIHH28x", 7, 31, 1 << 16, 0, 8, 8, 1 << 16, 1, 0, 0)
        if opcode == LOOKUP:
            if body != b"file\0":
                return ENOENT, b""
            return 0, struct.pack("<QQQQII", 2, 1, 0, 0, 0, 0) + self.attributes(2)
        if opcode == GETATTR:
            return 0, struct.pack("<QII", 0, 0, 0) + attributes
        if opcode in {OPEN, OPENDIR}:
            return 0, struct.pack("<QII", 0, 0, 0)
        if opcode == READ:
            self.reads.release()
            assert self.let_go.wait(HANG)
            return 0, CONTENTS
        return (0, b"") if opcode == RELEASE else (ENOSYS, b"")

    def attributes(self, nodeid: int) -> bytes:
        kind = stat.S_IFDIR | 0o755 if nodeid == 1 else stat.S_IFREG | 0o644
        size = 0 if nodeid == 1 else len(CONTENTS)
        numbers = (nodeid, size, 1, 0, 0, 0)  # ino size blocks atime mtime ctime
        rest = (0, 0, 0, kind, 1, os.getuid(), os.getgid(), 0, 4096, 0)
        return struct.pack("<6Q10I", *numbers, *rest)

    def close(self) -> None:
        self.let_go.set()
        subprocess.run(["umount", "-f", "-l", self.where], check=True)  # aborts what hangs
        for thread in self.threads:
            thread.join(HANG)
        os.close(self.fd)


@pytest.fixture
def fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StallingFuse]:
    where = tmp_path / "tree" / "mount"
    where.mkdir(parents=True)
    (tmp_path / "tree" / "local").write_bytes(b"quick")
    try:
        mounted = StallingFuse(where)
    except OSError as error:
        pytest.skip(f"cannot mount a FUSE file system here: {error.strerror}")
    monkeypatch.setattr(stalling, "_good_until", 0.0)  # it has looked before this mount was there
    yield mounted
    mounted.close()


def ask(session: Session, message: Message) -> Message:
    reply = bytearray(8192)
    size = session.submit([memoryview(ninep.encode(message, 1))], [memoryview(reply)])
    assert isinstance(size, int)
    return ninep.decode(bytes(reply[:size]))[1]


def test_a_stalled_fuse_mount_delays_nobody_but_its_own_reader(
    fuse: StallingFuse, tmp_path: Path
) -> None:
    tree = HostTree(str(tmp_path / "tree"))
    session = Session(tree)
    for message in (
        ninep.Tversion(8192, ninep.VERSION),
        ninep.Tattach(0, NOFID, b"", b"", os.getuid()),
        ninep.Twalk(0, 1, (b"mount", b"file")),
        ninep.Tlopen(1, os.O_RDONLY),
        ninep.Twalk(0, 2, (b"local",)),
        ninep.Tlopen(2, os.O_RDONLY),
    ):
        assert not isinstance(ask(session, message), ninep.Rlerror), message

    finishes: list[Finish] = []
    ready = threading.Semaphore(0)

    def later(finish: Finish) -> None:
        finishes.append(finish)
        ready.release()

    request = ninep.encode(ninep.Tread(1, 0, 100), 7)
    waiting = session.submit([memoryview(request)], [memoryview(bytearray(200))])
    assert isinstance(waiting, Waiting)
    waiting.start(later)
    assert fuse.reads.acquire(timeout=HANG)  # it hangs now, in the mount's server

    assert ask(session, ninep.Tread(2, 0, 100)) == ninep.Rread(b"quick")
    assert ask(session, ninep.Twalk(0, 3, (b"local",)))
    fuse.let_go.set()
    assert ready.acquire(timeout=HANG)
    assert ninep.decode(finishes[0]() or b"") == (7, ninep.Rread(CONTENTS))
    session.close()
    tree.close()


def test_file_systems_that_may_stall_are_told_from_local_ones(
    fuse: StallingFuse, tmp_path: Path
) -> None:
    assert may_stall(fuse.where.stat().st_dev)
    assert not may_stall(tmp_path.stat().st_dev)
    for mount in ("/proc", "/sys", "/dev"):
        assert not may_stall(Path(mount).stat().st_dev)
