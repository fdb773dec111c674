"""A session that is saved in the middle of things and loaded into another server goes on."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF, EBUSY, ESTALE
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_conformance import HERE, Served, every_tree, served  # noqa: F401 (a fixture)
from tests.test_saved import through_json
from tests.test_session import Client, connect
from tests.virtio_driver import Driver
from tinyvmm import ninep
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.hostfile import HostFile
from tinyvmm.fileserver.session import Session
from tinyvmm.ninep import P9_LOCK_BLOCKED, P9_LOCK_SUCCESS, P9_LOCK_TYPE_WRLCK, Dialect

ROOT, DIR, FILE, NEW, OTHER = range(5)


def by_path(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with paths for places, whose order means nothing."""
    paths = [""]
    for above, name in state["places"]:
        paths.append(f"{paths[above]}/{name}")
    fids = [fid | {"place": paths[fid["place"]]} for fid in state["fids"]]
    return {**state, "fids": fids, "places": sorted(paths)}


@contextmanager
def moved(client: Client, directory: Path) -> Iterator[HostTree]:
    """Have the client's session go on in another server's tree of the same directory."""
    state = through_json(client.session.save())
    client.session.close()
    tree = HostTree(str(directory))
    client.session = Session(tree)
    client.session.load(state)
    assert by_path(client.session.save()) == by_path(state)
    try:
        yield tree
    finally:
        client.session.close()
        assert set(tree.nodes.values()) == {tree._root}  # nothing is held when all is clunked
        assert tree._root.refs == 1
        tree.close()


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "dir" / "sub").mkdir(parents=True)
    (tmp_path / "dir" / "file").write_bytes(b"hello")
    return tmp_path


@pytest.fixture
def client(top: Path) -> Iterator[Client]:
    tree = HostTree(str(top))
    client = connect(tree)
    client.walk(ROOT, DIR, b"dir")
    client.walk(DIR, FILE, b"file")
    yield client
    tree.close()


def test_open_files_are_read_and_written_as_they_were_opened(top: Path, client: Client) -> None:
    client.open(FILE, os.O_RDONLY)
    client.walk(DIR, NEW)
    client.ask(ninep.Tlcreate(NEW, b"log\xff", os.O_WRONLY | os.O_APPEND, 0o600, 0), ninep.Rlcreate)
    client.write(NEW, b"one ")
    client.walk(DIR, OTHER, b"file")
    client.open(OTHER, os.O_RDWR | os.O_TRUNC)
    client.write(OTHER, b"since")
    with moved(client, top):
        assert client.read(FILE) == b"since"  # it was truncated once
        client.fails(ninep.Twrite(FILE, 0, b"x"), EBADF)
        client.fails(ninep.Tlopen(FILE, os.O_RDONLY), EBADF)  # it is open
        client.write(NEW, b"two", offset=0)
        assert (top / "dir" / os.fsdecode(b"log\xff")).read_bytes() == b"one two"
        client.write(OTHER, b"more", offset=5)
        assert client.read(FILE) == b"sincemore"
        client.fails(ninep.Twalk(ROOT, NEW, (b"dir",)), EBADF)  # the number is taken
        assert client.walk(DIR, 9, b"..", b"dir", b"sub").wqid[1] == client.getattr(DIR).qid


def test_a_directory_goes_on_with_the_entry_that_is_asked_for(top: Path, client: Client) -> None:
    for number in range(100):
        (top / "dir" / f"file{number}").touch()
    client.open(DIR)
    first = client.entries(DIR, 0, 1000)
    with moved(client, top):
        rest = first
        while more := client.entries(DIR, rest[-1].offset, 1000):
            rest = rest + more
    assert {entry.name for entry in rest} == {os.fsencode(n) for n in os.listdir(top / "dir")} | {
        b".",
        b"..",
    }
    assert len(rest) == 100 + 4


@pytest.mark.parametrize("dialect", [ninep.NINEP2000, ninep.NINEP2000_U])
def test_so_does_one_of_plan_9s(top: Path, dialect: Dialect) -> None:
    def ask(message: ninep.Message, kind: type[ninep.Message]) -> Any:
        request = dialect.encode(message, 1)
        reply = bytearray(8192)
        size = session.handle([memoryview(request)], [memoryview(reply)])
        answer = dialect.decode(bytes(reply[:size]))[1]
        assert isinstance(answer, kind), answer
        return answer

    def names(offset: int, count: int) -> tuple[list[bytes], int]:
        data = ask(ninep.Tread(0, offset, count), ninep.Rread).data
        records = dialect.decode_records(ninep.Stat, data)
        return [record.name for record in records], offset + len(data)

    for number in range(20):
        (top / f"file{number}").touch()
    tree = HostTree(str(top))
    session = Session(tree)
    ask(ninep.Tversion(8192, dialect.version), ninep.Rversion)
    ask(ninep.Tattach(0, ninep.NOFID, b"", b""), ninep.Rattach)
    ask(ninep.Topen(0, ninep.OREAD), ninep.Ropen)
    begun, offset = names(0, 600)
    state = through_json(session.save())
    session.close()
    session = Session(tree)
    session.load(state)
    rest, _ = names(offset, 8000)
    assert sorted(begun + rest) == sorted(os.fsencode(name) for name in os.listdir(top))
    session.close()
    tree.close()


def test_locks_are_held_as_before(top: Path, client: Client) -> None:
    client.open(FILE, os.O_RDWR)
    client.walk(DIR, OTHER, b"file")
    client.open(OTHER, os.O_RDWR)
    assert client.lock(FILE, P9_LOCK_TYPE_WRLCK, 10, 0, proc=1) == P9_LOCK_SUCCESS
    with moved(client, top):
        assert client.lock(OTHER, P9_LOCK_TYPE_WRLCK, 20, 5, proc=2) == P9_LOCK_BLOCKED
        assert client.lock(OTHER, P9_LOCK_TYPE_WRLCK, 0, 10, proc=2) == P9_LOCK_SUCCESS
        client.clunk(FILE)
        assert client.lock(OTHER, P9_LOCK_TYPE_WRLCK, 20, 5, proc=2) == P9_LOCK_SUCCESS


def test_attributes_are_read_and_written_to_their_end(top: Path, client: Client) -> None:
    try:
        os.setxattr(top / "dir" / "file", "user.old", b"value")
    except OSError:
        pytest.skip("this file system has no extended attributes of users")
    client.ask(ninep.Txattrwalk(FILE, OTHER, b"user.old"), ninep.Rxattrwalk)
    client.ask(ninep.Txattrcreate(FILE, b"user.new", 6, 0), ninep.Rxattrcreate)
    client.write(FILE, b"abc")
    with moved(client, top):
        assert client.read(OTHER, 2) == b"lue"
        client.write(FILE, b"def", offset=3)
        client.clunk(FILE)
        assert os.getxattr(top / "dir" / "file", "user.new") == b"abcdef"


def test_a_fid_without_a_file_is_stale_until_it_is_clunked(top: Path, client: Client) -> None:
    client.open(FILE, os.O_RDWR)
    client.ask(ninep.Tunlinkat(DIR, b"file", 0), ninep.Runlinkat)
    assert client.read(FILE) == b"hello"
    (top / "dir" / "file").write_bytes(b"another")
    with moved(client, top):
        client.fails(ninep.Tread(FILE, 0, 10), ESTALE)
        client.fails(ninep.Tgetattr(FILE, 0x7FF), ESTALE)
        client.fails(ninep.Twalk(FILE, NEW, ()), ESTALE)
        client.fails(ninep.Twalk(DIR, FILE, ()), EBADF)  # the client has it still
        client.fails(ninep.Tclunk(FILE), ESTALE)
        client.fails(ninep.Tclunk(FILE), EBADF)
        client.walk(DIR, FILE, b"file")
        client.open(FILE)
        assert client.read(FILE) == b"another"


def test_a_file_that_has_another_name_now_is_removed_by_none(top: Path, client: Client) -> None:
    client.ask(ninep.Trenameat(DIR, b"file", ROOT, b"moved"), ninep.Rrenameat)
    (top / "dir" / "file").write_bytes(b"another")
    client.open(FILE)
    client.walk(DIR, OTHER, b"sub")
    with moved(client, top):
        assert client.read(FILE) == b"hello"
        client.fails(ninep.Tremove(FILE), EBUSY)
        client.ask(ninep.Tremove(OTHER), ninep.Rremove)
    assert (top / "moved").exists()
    assert sorted(os.listdir(top / "dir")) == ["file"]


def test_a_file_that_became_another_meanwhile_is_not_taken_for_it(
    top: Path, client: Client
) -> None:
    state = client.session.save()
    (top / "new").write_bytes(b"another")
    (top / "new").rename(top / "dir" / "file")
    client.session.load(state)
    client.fails(ninep.Tlopen(FILE, os.O_RDONLY), ESTALE)
    assert client.entries(_opened(client, DIR))


def _opened(client: Client, fid: int) -> int:
    client.open(fid)
    return fid


@every_tree
def test_every_tree_finds_its_files_again(served: Served) -> None:  # noqa: F811
    content = served.content("dir/inner")
    fids = [served.walk(path) for path in ("", "dir", "dir/sub", "hello", "link", "dir/inner")]
    inner = fids[-1]
    served.client.open(inner)
    start = served.client.read(inner, 0, 100)
    qids = [served.client.getattr(fid).qid.path for fid in fids]
    session = Session(served.tree)
    state = through_json(served.client.session.save())
    served.client.session.close()
    served.client.session = session
    session.load(state)
    assert [served.client.getattr(fid).qid.path for fid in fids] == qids
    rest = served.client.read(inner, 100 if not served.kind.stream else 0, 100)
    assert (rest if served.kind.stream else start + rest) == content[
        : 100 if served.kind.stream else 200
    ]
    assert served.content("hello") == b"hi\n"
    assert served.client.getattr(HERE).qid == served.qid("")


doings = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 99)), max_size=30)


@given(doings)
@settings(deadline=None, max_examples=60)
def test_whatever_was_made_moved_and_removed_each_fid_is_found_or_stale(
    tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[int, int, int]]
) -> None:
    top = tmp_path_factory.mktemp("top")
    tree = HostTree(str(top))
    client = connect(tree)
    where = {0: (-1, b"")}  # of each fid, the directory's fid and its name; None once removed
    directories = [0]
    for number, (what, one, two) in enumerate(todo, 1):
        above = directories[one % len(directories)]
        name = b"%d" % number
        if what == 0:
            client.ask(ninep.Tmkdir(above, name, 0o755, 0), ninep.Rmkdir)
            client.walk(above, number, name)
            directories.append(number)
        elif what == 1 or len(where) == 1:
            client.walk(above, number)
            client.ask(ninep.Tlcreate(number, name, os.O_RDWR, 0o644, 0), ninep.Rlcreate)
        else:
            victim = list(where)[1:][two % (len(where) - 1)]
            old, old_name = where[victim]
            if old < 0:
                continue
            if what == 2 and victim not in directories:
                client.ask(ninep.Tunlinkat(old, old_name, 0), ninep.Runlinkat)
                where[victim] = (-1, b"")
                continue
            rename = ninep.Trenameat(old, old_name, above, name)
            if isinstance(client.raw(rename), ninep.Rrenameat):  # not into itself
                where[victim] = (above, name)
            continue
        where[number] = (above, name)
    qids = {fid: client.getattr(fid).qid.path for fid in where}
    with moved(client, top):
        for fid, (above, _) in where.items():
            if fid and above < 0:
                client.fails(ninep.Tgetattr(fid, 0x7FF), ESTALE)
            else:
                assert client.getattr(fid).qid.path == qids[fid]
    tree.close()


def test_the_device_waits_for_replies_and_takes_its_session_along(
    top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(_file: HostFile, datasync: bool) -> None:
        del datasync
        assert go_on.wait(30)

    monkeypatch.setattr(HostFile, "fsync", slow)
    tree = HostTree(str(top))
    device = Virtio9P("root", Session(tree))
    driver = Driver(device)
    (queue,) = driver.start()

    def ask(message: ninep.Message, tag: int = 1) -> ninep.Message:
        queue.send([ninep.encode(message, tag)], [4096])
        (data,) = queue.collect()
        return ninep.decode(data[: int.from_bytes(data[:4], "little")])[1]

    ask(ninep.Tversion(8192, b"9P2000.L"), ninep.NOTAG)
    ask(ninep.Tattach(ROOT, ninep.NOFID, b"", b"", 0))
    ask(ninep.Twalk(ROOT, FILE, (b"dir", b"file")))
    ask(ninep.Tlopen(FILE, os.O_RDWR))
    queue.send([ninep.encode(ninep.Tfsync(FILE, 0), 1)], [4096])
    states: list[dict[str, Any]] = []
    saver = threading.Thread(target=lambda: states.append(device.save()))
    saver.start()
    saver.join(0.1)
    assert not states
    go_on.set()
    saver.join(30)
    assert [ninep.decode(data)[1] for data in queue.collect()] == [ninep.Rfsync()]

    device.load(json.loads(json.dumps(states[0])))
    assert ask(ninep.Tread(FILE, 0, 100)) == ninep.Rread(b"hello")
    device.detach()
    tree.close()
