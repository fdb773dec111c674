"""A watched tree tells of each access, and lets it be refused."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_session import Client, connect
from tinyvmm import trace
from tinyvmm.fileserver.tree import AT_REMOVEDIR, SETATTR_MODE
from tinyvmm.fileserver.union import UnionTree, open_tree
from tinyvmm.fileserver.watched import Access, Hook, WatchedTree


class Watch:
    """What was told, and what to raise for it."""

    def __init__(self) -> None:
        self.told: list[Access] = []
        self.refuse: Callable[[Access], None] = lambda _access: None

    def __call__(self, access: Access) -> None:
        self.told.append(access)
        self.refuse(access)

    def take(self) -> list[tuple[str, str]]:
        told = [(access.op, access.path) for access in self.told]
        self.told.clear()
        return told


@pytest.fixture
def inner(tmp_path: Path) -> Iterator[UnionTree]:
    (tmp_path / "read" / "dir").mkdir(parents=True)
    (tmp_path / "read" / "dir" / "file").write_bytes(b"words")
    (tmp_path / "write").mkdir()
    tree = open_tree([("/", str(tmp_path / "read"))], [("/", str(tmp_path / "write"))])
    yield tree
    tree.close()


def test_each_access_is_told_with_its_path(inner: UnionTree) -> None:
    watch = Watch()
    root = WatchedTree(inner, watch).root()
    directory = root.walk(b"dir")
    node = directory.walk(b"file")
    file = node.open(os.O_RDWR)
    assert file.readv([memoryview(bytearray(3))], 1) == 3
    file.writev([memoryview(b"xy")], 0)
    file.fsync(False)
    node.stat()
    node.setattr(SETATTR_MODE, mode=0o600)
    assert watch.take() == [
        ("walk", "/dir"),
        ("walk", "/dir/file"),
        ("open", "/dir/file"),
        ("read", "/dir/file"),
        ("write", "/dir/file"),
        ("fsync", "/dir/file"),
        ("stat", "/dir/file"),
        ("setattr", "/dir/file"),
    ]
    with pytest.raises(FileNotFoundError):
        directory.walk(b"missing")
    new, made = directory.create(b"new", os.O_WRONLY, 0o644, 0, 0)
    directory.mkdir(b"sub", 0o755, 0, 0).close()
    directory.symlink(b"link", b"there", 0, 0).close()
    directory.link(b"other", new)
    directory.rename(b"new", root, b"moved")
    root.unlink(b"moved", 0)
    directory.unlink(b"sub", AT_REMOVEDIR)
    directory.walk(b"..").walk(b"dir").close()
    entries = root.open(os.O_RDONLY)
    assert [name for *_, name in entries.readdir(0)] == [b".", b"..", b"dir"]
    targets = [(access.op, access.path, access.target) for access in watch.told]
    assert targets == [
        ("walk", "/dir/missing", ""),
        ("create", "/dir/new", ""),
        ("mkdir", "/dir/sub", ""),
        ("symlink", "/dir/link", "there"),
        ("link", "/dir/new", "/dir/other"),
        ("rename", "/dir/new", "/moved"),
        ("unlink", "/moved", ""),
        ("unlink", "/dir/sub", ""),
        ("walk", "/", ""),
        ("walk", "/dir", ""),
        ("open", "/", ""),
        ("readdir", "/", ""),
    ]
    for held in (file, made, entries, node, new, directory, root):
        held.close()


def test_what_changes_something_is_known() -> None:
    assert Access("open", "/f", flags=os.O_WRONLY).changes
    assert Access("open", "/f", flags=os.O_RDONLY | os.O_TRUNC).changes
    assert not Access("open", "/f", flags=os.O_RDONLY).changes
    assert Access("unlink", "/f").changes
    assert not Access("read", "/f").changes


def serve(inner: UnionTree, hook: Hook) -> Client:
    return connect(WatchedTree(inner, hook))


def test_what_the_hook_raises_is_the_clients_answer(inner: UnionTree, tmp_path: Path) -> None:
    def refuse(access: Access) -> None:
        if access.op == "write":
            raise OSError(errno.ENOSPC, "full")
        if access.op == "read":
            raise OSError("no number")
        if access.op == "walk" and access.path == "/dir/missing":
            raise RuntimeError("a bug")

    client = serve(inner, refuse)
    client.walk(0, 1, b"dir", b"file")
    client.open(1, os.O_RDWR)
    from tinyvmm import ninep

    client.fails(ninep.Twrite(1, 0, b"x"), errno.ENOSPC)
    client.fails(ninep.Tread(1, 0, 5), errno.EIO)
    assert (tmp_path / "read" / "dir" / "file").read_bytes() == b"words"
    seen: list[trace.Record] = []
    trace.hook = seen.append
    try:
        client.walk(0, 2, b"dir")
        client.fails(ninep.Twalk(2, 3, (b"missing",)), errno.EIO)
    finally:
        trace.hook = None
    assert "the hook raised RuntimeError('a bug')" in "\n".join(map(trace.text, seen))
    client.session.close()


def test_the_hook_may_wait_without_delaying_others(inner: UnionTree) -> None:
    goes_on, waits = threading.Event(), threading.Event()

    def slow(access: Access) -> None:
        if access.op == "write":
            waits.set()
            goes_on.wait(30)

    root = WatchedTree(inner, slow).root()
    node = root.walk(b"dir").walk(b"file")
    file = node.open(os.O_RDWR)
    assert file.writev_now([memoryview(b"x")], 0) is None  # left to a thread that may wait
    writer = threading.Thread(target=file.writev, args=([memoryview(b"x")], 0))
    writer.start()
    waits.wait(30)
    assert node.stat().st_size == 5
    goes_on.set()
    writer.join()
    for held in (file, node, root):
        held.close()
