"""A 9P client that means harm: it may break its own session and get errors, and nothing else."""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_session import Client, connect
from tinyvmm import ninep
from tinyvmm.fileserver import hostfile, locks, session
from tinyvmm.fileserver.host import HostNode, HostTree
from tinyvmm.fileserver.hostfile import HostFile
from tinyvmm.fileserver.locks import Lock, LockTable
from tinyvmm.fileserver.removal import remove_whole
from tinyvmm.fileserver.session import Finish, Session, Waiting
from tinyvmm.fileserver.union import open_tree

RD, UN = ninep.P9_LOCK_TYPE_RDLCK, ninep.P9_LOCK_TYPE_UNLCK


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "file").write_bytes(b"hello")
    tree = HostTree(str(tmp_path))
    client = connect(tree)
    yield client
    client.session.close()
    tree.close()


# --- locks ----------------------------------------------------------------------------------


def test_unlocking_holes_into_a_lock_makes_no_more_locks_than_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(locks, "LOCKS_MAX", 10)
    table = LockTable()
    fid, owner = object(), (b"", 1)
    assert table.set(1, Lock(0, 1000, RD, owner, fid)) == ninep.P9_LOCK_SUCCESS
    answers = [table.set(1, Lock(at, at + 1, UN, owner, fid)) for at in range(10, 900, 10)]
    assert answers[:9] == [ninep.P9_LOCK_SUCCESS] * 9
    assert set(answers[9:]) == {ninep.P9_LOCK_ERROR}
    assert len(table._files[1]) == table._count == 10
    assert table.set(1, Lock(0, 1000, UN, owner, fid)) == ninep.P9_LOCK_SUCCESS
    assert not table._files


def test_a_lock_keeps_no_more_of_its_client_than_a_host_name(client: Client) -> None:
    client.walk(0, 1, b"file")
    client.open(1, os.O_RDWR)
    name = b"n" * 255
    assert client.ask(ninep.Tlock(1, RD, 0, 0, 1, 1, name), ninep.Rlock).status == 0
    client.fails(ninep.Tlock(1, RD, 0, 0, 1, 1, name + b"n"), errno.EINVAL)
    client.fails(ninep.Tgetlock(1, RD, 0, 1, 1, name + b"n"), errno.EINVAL)


# --- what a client can make us keep ---------------------------------------------------------


def test_attributes_open_at_once_are_limited_and_closing_them_makes_room(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "XATTRS_MAX", 4)
    client.walk(0, 1, b"file")
    for number in range(2, 5):
        client.ask(ninep.Txattrwalk(1, number, b""), ninep.Rxattrwalk)
    client.ask(ninep.Txattrcreate(1, b"user.x", 10, 0), ninep.Rxattrcreate)
    client.fails(ninep.Txattrwalk(0, 9, b""), errno.EMFILE)
    client.fails(ninep.Txattrcreate(0, b"user.y", 10, 0), errno.EMFILE)
    client.fails(ninep.Tclunk(1), errno.EINVAL)  # less was written than announced
    client.ask(ninep.Txattrwalk(0, 9, b""), ninep.Rxattrwalk)
    client.fails(ninep.Txattrwalk(0, 10, b""), errno.EMFILE)
    client.ask(ninep.Tversion(8192, ninep.VERSION), ninep.Rversion)
    assert client.session._xattrs == 0


@pytest.mark.parametrize("give_up", ["flush", "version"])
def test_giving_up_requests_that_hang_makes_neither_threads_nor_work_without_end(
    client: Client, monkeypatch: pytest.MonkeyPatch, give_up: str
) -> None:
    monkeypatch.setattr(session, "IN_FLIGHT_MAX", 20)
    gate = threading.Event()
    monkeypatch.setattr(HostFile, "readv_now", lambda *_: None)
    monkeypatch.setattr(HostFile, "readv", lambda *_: gate.wait(120) and 0)

    def submit(tag: int, message: ninep.Message) -> int | Waiting:
        request = memoryview(bytearray(ninep.encode(message, tag)))
        return client.session.submit([request], [memoryview(reply)])

    reply = bytearray(8192)
    lock = threading.RLock()
    finished = threading.Semaphore(0)

    def later(finish: Finish) -> None:
        with lock:
            finish()
        finished.release()

    threads = threading.active_count()
    hanging = refused = 0
    for tag in range(60):
        client.walk(0, 1, b"file")
        client.open(1)
        waiting = submit(tag, ninep.Tread(1, 0, 100))
        if isinstance(waiting, Waiting):
            waiting.start(later)
            hanging += 1
        else:
            assert ninep.decode(bytes(reply[:waiting])) == (tag, ninep.Rlerror(errno.ENOMEM))
            refused += 1
        if give_up == "flush":
            submit(0xFFF0, ninep.Tflush(tag))
            client.clunk(1)
        else:
            client.ask(ninep.Tversion(8192, ninep.VERSION), ninep.Rversion)
            client.attach()
    assert (hanging, refused) == (20, 40)
    assert threading.active_count() - threads <= 20
    gate.set()
    for _ in range(2 * hanging):  # each was retired, and then finished
        assert finished.acquire(timeout=120)
    client.walk(0, 1, b"file")
    client.open(1)
    assert client.read(1) == b""
    client.clunk(1)


def test_a_late_reply_is_within_msize_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("x" * 1000)
    monkeypatch.setattr(HostNode, "waits", True)
    tree = HostTree(str(tmp_path))
    client = Client(Session(tree))
    client.ask(ninep.Tversion(300, ninep.VERSION), ninep.Rversion)
    client.attach()
    client.walk(0, 1, b"link")
    client.fails(ninep.Treadlink(1), errno.EMSGSIZE)
    client.session.close()
    tree.close()


def test_what_a_setattr_does_not_mean_may_hold_anything(client: Client, tmp_path: Path) -> None:
    client.walk(0, 1, b"file")
    most = (1 << 64) - 1
    garbage = {
        "uid": 5,
        "gid": 5,
        "size": most,
        "atime_sec": most,
        "atime_nsec": most,
        "mtime_sec": most,
        "mtime_nsec": most,
    }
    client.ask(ninep.Tsetattr(fid=1, valid=1, mode=0o640, **garbage), ninep.Rsetattr)
    st = (tmp_path / "file").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_size, st.st_uid) == (0o640, 5, os.getuid())


def test_directories_read_again_and_again_are_not_remembered_without_end(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hostfile._remembered
    monkeypatch.setattr(hostfile, "ENTRIES_MAX", before + 100)
    monkeypatch.setattr(hostfile, "ENTRIES_STEP", 1)
    for number in range(50):
        client.ask(ninep.Tmkdir(0, b"%d" % number, 0o755, 0), ninep.Rmkdir)
    for fid in (1, 2):
        client.walk(0, fid)
        client.open(fid)
    assert len(client.entries(1)) == 53
    first = client.entries(2, count=1000)
    client.fails(ninep.Treaddir(2, first[-1].offset, 4096), errno.ENOMEM)
    client.clunk(1)
    assert len(first) + len(client.entries(2, first[-1].offset)) == 53
    assert len(client.entries(2)) == 53
    client.clunk(2)
    assert hostfile._remembered == before


# --- what is no file ------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(b"version",), (b"self", b"mem"), (b"kmsg",)])
def test_the_hosts_kernel_is_not_read_through_its_files(
    names: tuple[bytes, ...], tmp_path: Path
) -> None:
    pid = str(os.getpid()).encode()
    names = tuple(pid if name == b"self" else name for name in names)
    for tree in (HostTree("/proc"), open_tree([("/", "/proc")], [("/", str(tmp_path))])):
        client = connect(tree)
        client.walk(0, 1, *names)
        assert stat.S_ISREG(client.getattr(1).mode)
        client.fails(ninep.Tlopen(1, os.O_RDONLY), errno.EOPNOTSUPP)
        client.session.close()
        tree.close()


def test_a_kernels_file_is_not_copied_into_a_write_tree(tmp_path: Path) -> None:
    assert os.stat("/sys/kernel/uevent_seqnum").st_size  # else there is nothing to copy
    tree = open_tree([("/", "/sys")], [("/", str(tmp_path))])
    client = connect(tree)
    client.walk(0, 1, b"kernel", b"uevent_seqnum")
    client.fails(ninep.Tlopen(1, os.O_RDWR), errno.EOPNOTSUPP)
    client.fails(ninep.Tsetattr(1, 1, 0o644, 0, 0, 0, 0, 0, 0, 0), errno.EOPNOTSUPP)
    client.session.close()
    tree.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# --- depth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["host", "union"])
def test_a_directory_deeper_than_our_stack_is_found_again(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path)
    tree = HostTree(path) if kind == "host" else open_tree([], [("/", path)])
    tree.descriptors.limit = 64
    client = connect(tree)
    client.walk(0, 1)
    for _ in range(2000):
        client.ask(ninep.Tmkdir(1, b"d", 0o755, 0), ninep.Rmkdir)
        client.walk(1, 2, b"d")
        client.clunk(1)
        client.walk(2, 1)
        client.clunk(2)
    for number in range(100):  # so that those above lose their descriptors
        client.ask(ninep.Tmkdir(0, b"%d" % number, 0o755, 0), ninep.Rmkdir)
        client.walk(0, 10 + number, b"%d" % number)
    assert len(tree.descriptors) <= 64
    assert stat.S_ISDIR(client.getattr(1).mode)
    assert len(client.walk(1, 2, *[b".."] * 16).wqid) == 16
    client.session.close()
    tree.close()
    descriptor = os.open(path, os.O_PATH)
    for name in os.listdir(path):  # pytest would follow it down
        remove_whole(os.fsencode(name), descriptor)
    os.close(descriptor)


def test_directories_that_the_host_has_put_into_each_other_are_stale(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tree = HostTree(str(tmp_path))
    client = connect(tree)
    client.walk(0, 1, b"a")
    client.walk(0, 2, b"b")
    os.rename(tmp_path / "a", tmp_path / "b" / "a")
    client.walk(2, 3, b"a")
    os.rename(tmp_path / "b" / "a", tmp_path / "a")
    os.rename(tmp_path / "b", tmp_path / "a" / "b")
    client.walk(1, 4, b"b")
    for node in tree.nodes.values():
        node.give_up()
    client.fails(ninep.Tgetattr(1, 0), errno.ESTALE)
    client.fails(ninep.Tgetattr(2, 0), errno.ESTALE)
    client.walk(0, 5, b"a", b"b")
    assert stat.S_ISDIR(client.getattr(2).mode)
    client.session.close()
    tree.close()
