"""Trees of Python objects: what may be in one, what becomes of it, and who waits for whom.

What they have in common with every other tree is in test_conformance.py.
"""

import errno
import io
import os
import stat
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_session import Client, connect
from tests.virtio_driver import Driver
from tinyvmm import ninep, trace
from tinyvmm.devices.virtio.p9 import Virtio9P
from tinyvmm.errors import ConfigError
from tinyvmm.fileserver.client import connect as connect_to
from tinyvmm.fileserver.entry import Entry, Symlink
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.objects import ObjectTree
from tinyvmm.fileserver.serving import FileServer
from tinyvmm.fileserver.session import Finish, Session, Waiting

HANG = 120.0


def client_of(files: object, **options: bool) -> Client:
    return connect(ObjectTree(files, **options))


def read(client: Client, *names: bytes, count: int = 4096) -> bytes:
    client.walk(0, 9, *names)
    try:
        client.open(9)
        return client.read(9, 0, count)
    finally:
        client.clunk(9)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the trace says of the tree's files."""
    found: list[str] = []

    def hook(record: trace.Record) -> None:
        if isinstance(record, trace.Message):
            found.append(record.message)

    trace.hook = hook
    yield found
    trace.hook = None


# --- what may be served ---------------------------------------------------------------------------


def test_text_bytes_and_what_looks_like_them_are_files() -> None:
    files = {"a": "text ü", "b": b"bytes", "c": bytearray(b"array"), b"\xff": memoryview(b"view")}
    client = client_of(files)
    for name, content in (("a", "text ü".encode()), ("b", b"bytes"), ("c", b"array")):
        assert read(client, name.encode()) == content
    assert read(client, b"\xff") == b"view"


def test_an_entry_says_more_and_at_two_places_is_one_file() -> None:
    entry = Entry(b"#!/bin/sh\n", mode=0o4755, uid=7, gid=8, mtime_ns=1_500_000_000_123_456_789)
    client = client_of({"run": entry, "dir": {"too": entry}})
    one, two = client.walk(0, 1, b"run").wqid[0], client.walk(0, 2, b"dir", b"too").wqid[1]
    assert one.path == two.path
    found = client.getattr(1)
    assert (found.mode, found.uid, found.gid, found.nlink) == (stat.S_IFREG | 0o4755, 7, 8, 2)
    assert (found.mtime_sec, found.mtime_nsec) == (1_500_000_000, 123_456_789)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (b"no directory", "the root of a tree is a directory"),
        ({"a": 5}, "/a: int cannot be served"),
        ({"dir": {"a": {1, 2}}}, "/dir/a: set cannot be served"),
        ({"a/b": b""}, "'/a/b' cannot be a name"),
        ({"..": b""}, "cannot be a name"),
        ({"": b""}, "cannot be a name"),
        ({"n" * 256: b""}, "cannot be a name"),
        ({5: b""}, "a name is str or bytes, which 5 is not"),
        ({"a": b"", b"a": b""}, "/a is there twice"),
        ({"gone": Path("/nowhere/at/all")}, "it is not there"),
        ({"\ud800": b""}, "cannot be a name"),
        ({"a": "\ud800"}, "/a: no bytes can be had of it"),
        ({"a": Symlink("x" * 4096)}, "/a: a symbolic link holds at most 4095 bytes"),
        ({"a": Symlink("x\0y")}, "and no NUL"),
        ({"a": Entry(b"", uid=1 << 32)}, "/a: there can be no owner 4294967296"),
    ],
)
def test_what_cannot_be_served_is_one_line_that_says_where(files: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ObjectTree(files)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dict_in_itself_or_at_two_places_is_refused() -> None:
    loop: dict[str, object] = {}
    loop["again"] = loop
    with pytest.raises(ConfigError, match="one dict is at two places"):
        ObjectTree(loop)


def test_no_nesting_is_too_deep() -> None:
    files: dict[str, object] = {"end": b"here"}
    for _ in range(3000):
        files = {"d": files}
    client = client_of(files)
    at = 0
    for _ in range(3000 // 10):
        client.walk(at, at + 1, *[b"d"] * 10)
        at += 1
    client.walk(at, at + 1, b"end")
    client.open(at + 1)
    assert client.read(at + 1) == b"here"


# --- functions and iterators ----------------------------------------------------------------------


def test_a_function_is_called_for_every_open_and_never_before() -> None:
    calls: list[int] = []

    def count() -> str:
        calls.append(1)
        return f"call {len(calls)}"

    client = client_of({"count": count})
    client.walk(0, 1, b"count")
    assert client.getattr(1).size == 0
    assert calls == []
    assert read(client, b"count") == b"call 1"
    client.open(1)
    assert [client.read(1), client.read(1, 5)] == [b"call 2", b"2"]


def test_with_sizes_a_function_is_asked_for_them_too() -> None:
    client = client_of({"now": lambda: "12345"}, sized=True)
    client.walk(0, 1, b"now")
    assert client.getattr(1).size == 5


def test_a_generator_is_read_as_it_goes_and_ended_with_its_reader() -> None:
    ended = threading.Event()

    def lines() -> Iterator[str]:
        try:
            number = 0
            while True:
                yield f"{number}\n"
                number += 1
        finally:
            ended.set()

    client = client_of({"lines": lines})
    client.walk(0, 1, b"lines")
    client.open(1)
    assert [client.read(1, 2 * at) for at in range(3)] == [b"0\n", b"1\n", b"2\n"]
    assert client.read(1, 4) == b"2\n"  # the latest piece can be asked for again
    client.fails(ninep.Tread(1, 0, 10), errno.ESPIPE)
    assert not ended.is_set()
    client.clunk(1)
    assert ended.wait(HANG)


def test_an_iterator_is_shared_out_among_its_readers() -> None:
    client = client_of({"queue": iter([b"one", b"", b"two"])})
    for fid in (1, 2):
        client.walk(0, fid, b"queue")
        client.open(fid)
    assert client.read(1) == b"one"
    assert client.read(2) == b"two"
    assert client.read(1, 3) == b""


def test_what_a_function_does_wrong_is_an_error_to_the_client_and_a_line_in_the_trace(
    said: list[str],
) -> None:
    def denied() -> bytes:
        raise PermissionError(errno.EACCES, "no")

    def breaks() -> Iterator[bytes]:
        yield b"begun"
        raise ValueError("broken")

    files = {
        "denied": denied,
        "zero": lambda: 1 // 0,
        "number": lambda: 5,
        "breaks": breaks,
        "leaves": lambda: sys.exit(3),
        "pieces": lambda: [b"x", 5],
        "text": lambda: "\ud800",
        "texts": lambda: ["x", "\ud800"],
    }
    client = client_of(files)

    def problem(name: bytes, expected: int, begin: bytes = b"") -> None:
        client.walk(0, 1, name)
        answer = client.raw(ninep.Tlopen(1, os.O_RDONLY))
        if isinstance(answer, ninep.Rlopen):
            assert client.read(1) == begin
            answer = client.raw(ninep.Tread(1, len(begin), 10))
        assert isinstance(answer, ninep.Rlerror)
        assert answer.ecode == expected
        client.clunk(1)

    problem(b"denied", errno.EACCES)
    assert said == []
    problem(b"zero", errno.EIO)
    problem(b"number", errno.EIO)
    problem(b"breaks", errno.EIO, b"begun")
    problem(b"leaves", errno.EIO)
    problem(b"pieces", errno.EIO, b"x")
    problem(b"text", errno.EIO)
    problem(b"texts", errno.EIO, b"x")
    for line, words in zip(
        said,
        ("/zero: ZeroDivisionError", "/number: gave int", "/breaks: ValueError: broken",
         "/leaves: SystemExit", "/pieces: gave a piece of int",
         "/text: UnicodeEncodeError", "/texts: UnicodeEncodeError"),
        strict=True,
    ):  # fmt: skip
        assert words in line
    assert client.getattr(0)


def test_a_function_that_waits_delays_nobody_else() -> None:
    go = threading.Event()

    def slow() -> Iterator[str]:
        yield "first"
        assert go.wait(HANG)
        yield "second"

    def slower() -> str:
        assert go.wait(HANG)
        return "late"

    session = Session(ObjectTree({"slow": slow, "slower": slower, "quick": b"at once"}))
    client = Client(session)
    client.ask(ninep.Tversion(8192, ninep.VERSION), ninep.Rversion)
    client.attach()
    client.walk(0, 1, b"slow")
    client.walk(0, 2, b"slower")
    client.open(1)
    assert client.read(1) == b"first"
    replies: list[bytes | None] = []
    done = threading.Semaphore(0)

    def later(finish: Finish) -> None:
        replies.append(finish())
        done.release()

    for tag, message in ((100, ninep.Tread(1, 5, 10)), (101, ninep.Tlopen(2, os.O_RDONLY))):
        request = memoryview(ninep.encode(message, tag))
        waiting = session.submit([request], [memoryview(bytearray(100))])
        assert isinstance(waiting, Waiting)
        waiting.start(later)
    assert read(client, b"quick") == b"at once"
    assert replies == []
    go.set()
    assert done.acquire(timeout=HANG)
    assert done.acquire(timeout=HANG)
    found = dict(map(ninep.decode, filter(None, replies)))
    assert found[100] == ninep.Rread(b"second")
    assert isinstance(found[101], ninep.Rlopen)
    assert client.read(2) == b"late"


# --- what clients change --------------------------------------------------------------------------


def test_what_clients_write_is_in_the_dict() -> None:
    files: dict[str, object] = {"kept": b"as it was", "dir": {"text": "old"}, "gone": b""}
    client = client_of(files, writable=True)
    client.walk(0, 1, b"dir", b"text")
    client.open(1, os.O_WRONLY | os.O_TRUNC)
    client.write(1, b"new contents")
    client.walk(0, 2)
    client.ask(ninep.Tmkdir(2, b"made", 0o755, 0), ninep.Rmkdir)
    client.walk(0, 3, b"made")
    client.ask(ninep.Tlcreate(3, b"in it", os.O_RDWR, 0o644, 0), ninep.Rlcreate)
    client.write(3, b"deep")
    client.ask(ninep.Tsymlink(2, b"link", b"kept", 0), ninep.Rsymlink)
    client.ask(ninep.Tunlinkat(2, b"gone", 0), ninep.Runlinkat)
    client.ask(ninep.Trenameat(2, b"dir", 2, b"moved"), ninep.Rrenameat)
    link = files.pop("link")
    assert isinstance(link, Symlink)
    assert link.target == b"kept"
    assert files == {
        "kept": b"as it was",
        "moved": {"text": b"new contents"},
        "made": {"in it": b"deep"},
    }


def test_memory_that_clients_may_fill_has_a_limit_and_comes_back() -> None:
    tree = ObjectTree({"a": b""}, writable=True, limit=100_000)
    client = connect(tree)
    client.walk(0, 1, b"a")
    client.open(1, os.O_RDWR)
    assert client.write(1, bytes(4096), 90_000) == 4096
    client.fails(ninep.Twrite(1, 99_000, bytes(4096)), errno.ENOSPC)
    grow = ninep.Tsetattr(1, 8, 0, 0, 0, 1 << 40, 0, 0, 0, 0)
    client.fails(grow, errno.ENOSPC)
    for number in range(20):
        answer = client.raw(ninep.Tmkdir(0, b"%d" % number, 0o755, 0))
        if isinstance(answer, ninep.Rlerror):
            assert answer.ecode == errno.ENOSPC
            break
    else:
        pytest.fail("directories cost nothing")
    client.ask(ninep.Tunlinkat(0, b"a", 0), ninep.Runlinkat)
    assert tree.used > 94_000  # still open
    client.clunk(1)
    assert tree.used < 10_000


def test_shortening_what_the_maker_gave_gives_clients_no_more_and_it_can_be_removed() -> None:
    files = {"a": bytearray(100_000)}
    tree = ObjectTree(files, writable=True, limit=50_000)
    client = connect(tree)
    client.walk(0, 1, b"a")
    client.ask(ninep.Tsetattr(1, 8, 0, 0, 0, 0, 0, 0, 0, 0), ninep.Rsetattr)
    assert files == {"a": b""}
    assert tree.used == 0
    client.walk(0, 2)
    client.ask(ninep.Tlcreate(2, b"b", os.O_RDWR, 0o644, 0), ninep.Rlcreate)
    assert client.write(2, bytes(8000), 40_000) == 8000
    client.fails(ninep.Twrite(2, 48_000, bytes(8000)), errno.ENOSPC)
    client.ask(ninep.Tunlinkat(0, b"a", 0), ninep.Runlinkat)
    client.clunk(1)
    assert tree.used < 50_000


def test_a_mapping_that_refuses_a_change_is_an_error_to_the_client_and_nothing_changes(
    said: list[str],
) -> None:
    class Kept(dict[str, object]):
        def __setitem__(self, key: str, value: object) -> None:
            raise ValueError("kept as it is")

        def __delitem__(self, key: str) -> None:
            raise PermissionError(errno.EPERM, "kept")

    kept = Kept(a=b"x")
    tree = ObjectTree(kept, writable=True)
    client = connect(tree)
    client.fails(ninep.Tmkdir(0, b"new", 0o755, 0), errno.EIO)
    client.fails(ninep.Tunlinkat(0, b"a", 0), errno.EPERM)
    assert kept == {"a": b"x"}
    assert tree.used == 0
    assert read(client, b"a") == b"x"
    client.fails(ninep.Twalk(0, 3, (b"new",)), errno.ENOENT)
    assert len(said) == 1
    assert "ValueError: kept as it is" in said[0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "truncate", "read"]),
            st.integers(0, 300),
            st.binary(max_size=100),
        )
    )
)
def test_contents_in_memory_are_as_on_a_disk(steps: list[tuple[str, int, bytes]]) -> None:
    files: dict[str, object] = {"file": b"begin"}
    client = client_of(files, writable=True)
    client.walk(0, 1, b"file")
    client.open(1, os.O_RDWR)
    model = io.BytesIO(b"begin")
    for what, at, data in steps:
        if what == "write" and data:
            model.seek(at)
            model.write(data)
            assert client.write(1, data, at) == len(data)
        elif what == "truncate":
            end = model.seek(0, 2)
            model.write(bytes(max(at - end, 0)))
            model.truncate(at)
            client.ask(ninep.Tsetattr(1, 8, 0, 0, 0, at, 0, 0, 0, 0), ninep.Rsetattr)
        else:
            model.seek(at)
            assert client.read(1, at, 50) == model.read(50)
    assert files["file"] == model.getvalue()


# --- archives -------------------------------------------------------------------------------------


def tar_of(*members: tuple[str, bytes, dict[str, object]]) -> tarfile.TarFile:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content, attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    packed.seek(0)
    return tarfile.open(fileobj=packed)


def test_a_tar_keeps_owners_times_links_and_special_files() -> None:
    archive = tar_of(
        ("./bin/run", b"#!", {"mode": 0o755, "uid": 5, "gid": 6, "mtime": 1_000_000_000}),
        ("bin/again", b"", {"type": tarfile.LNKTYPE, "linkname": "bin/run"}),
        ("sh", b"", {"type": tarfile.SYMTYPE, "linkname": "/bin/dash"}),
        ("/null", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
        ("fifo", b"", {"type": tarfile.FIFOTYPE}),
    )
    client = client_of(archive)
    found = {}
    for fid, name in enumerate(("bin/run", "bin/again", "sh", "null", "fifo"), 1):
        client.walk(0, fid, *name.encode().split(b"/"))
        found[name] = client.getattr(fid)
    run, again = found["bin/run"], found["bin/again"]
    assert (run.mode, run.uid, run.gid, run.mtime_sec) == (0o100755, 5, 6, 1_000_000_000)
    assert (run.qid.path, run.nlink) == (again.qid.path, 2)
    assert client.ask(ninep.Treadlink(3), ninep.Rreadlink).target == b"/bin/dash"
    assert (found["null"].mode, found["null"].rdev) == (stat.S_IFCHR | 0o644, os.makedev(1, 3))
    assert stat.S_ISFIFO(found["fifo"].mode)
    client.fails(ninep.Tlopen(4, os.O_RDONLY), errno.EOPNOTSUPP)
    assert read(client, b"bin", b"again") == b"#!"


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/..", "a/.."])
def test_a_member_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="leads out of the archive"):
        ObjectTree(tar_of((name, b"x", {})))


@pytest.mark.parametrize("when", ["nan", "inf", "-inf", "1e400"])
def test_a_time_that_is_none_is_now(when: str) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a")
        member.pax_headers = {"mtime": when}
        archive.addfile(member)
    packed.seek(0)
    before = time.time()
    with tarfile.open(fileobj=packed) as archive:
        client = client_of(archive)
        client.walk(0, 1, b"a")
        assert client.getattr(1).mtime_sec >= int(before)


def test_of_members_with_one_name_the_last_counts() -> None:
    archive = tar_of(
        ("a", b"first", {}),
        ("a", b"last", {}),
        ("b", b"a file", {}),
        ("b/c", b"under a directory", {}),
        ("d/e", b"gone", {}),
        ("d", b"a file again", {}),
    )
    client = client_of({"tar": archive})
    assert read(client, b"tar", b"a") == b"last"
    assert read(client, b"tar", b"b", b"c") == b"under a directory"
    assert read(client, b"tar", b"d") == b"a file again"


def test_a_tar_cut_short_and_a_zip_with_a_wrong_sum_are_errors_of_the_files_alone() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as made:
        made.writestr("bad", b"contents of it")
        made.writestr("good", b"as ever")
    data = packed.getvalue().replace(b"contents of it", b"c0ntents of it")
    client = client_of(zipfile.ZipFile(io.BytesIO(data)))
    client.walk(0, 1, b"bad")
    client.fails(ninep.Tlopen(1, os.O_RDONLY), errno.EIO)
    assert read(client, b"good") == b"as ever"


def test_a_large_member_is_read_from_anywhere() -> None:
    content = os.urandom(400_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("large", content)
    client = client_of(zipfile.ZipFile(packed))
    client.walk(0, 1, b"large")
    client.open(1)
    for offset in (300_000, 0, 399_999, 17):
        assert client.read(1, offset, 4000) == content[offset : offset + 4000]


# --- in a server, and in a guest ------------------------------------------------------------------


def test_a_file_server_serves_while_it_lasts() -> None:
    files: dict[str, object] = {"hello": b"hi", "now": lambda: "then"}
    with FileServer(files, writable=True) as server:
        path = server.address.removeprefix("unix:")
        with connect_to(server.address) as client, client.attach() as root:
            assert root.walk(b"hello").open().read() == b"hi"
            assert root.walk(b"now").open().read() == b"then"
            root.walk().create(b"new", os.O_RDWR).write(b"written")
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert files["new"] == b"written"
    assert not os.path.exists(os.path.dirname(path))
    with pytest.raises(ConfigError, match="start a server"):
        connect_to(server.address)


def test_a_file_server_may_serve_on_the_thread_that_made_it() -> None:
    server = FileServer({"hello": b"hi"})
    found = []

    def visit() -> None:
        try:
            with connect_to(server.address) as client, client.attach() as root:
                found.append(root.walk(b"hello").open().read())
        finally:
            server.stop()

    visitor = threading.Thread(target=visit)
    visitor.start()
    server.serve()
    visitor.join(HANG)
    assert found == [b"hi"]
    assert not os.path.exists(os.path.dirname(server.address.removeprefix("unix:")))


def test_a_file_server_that_cannot_be_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ConfigError, match="cannot be served"):
        FileServer({"a": 5})
    with pytest.raises(ConfigError, match="cannot listen"):
        FileServer({}, f"unix:{tmp_path}/nowhere/socket")
    assert os.listdir(tmp_path) == []


def test_trees_and_host_directories_appear_in_a_tree(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"of the host")
    other = HostTree(str(tmp_path))
    tree = ObjectTree({"path": tmp_path, "one": tmp_path / "file", "tree": other})
    client = connect(tree)
    assert read(client, b"path", b"file") == b"of the host"
    assert read(client, b"one") == b"of the host"
    assert read(client, b"tree", b"file") == b"of the host"
    client.fails(ninep.Tunlinkat(0, b"path", 0x200), errno.EROFS)
    back = client.walk(0, 1, b"tree", b"..").wqid[-1]
    assert back.path == client.getattr(0).qid.path
    client.session.close()
    tree.close()
    assert other.root().stat().st_ino == tmp_path.stat().st_ino  # it is its maker's to close
    other.close()


def test_a_guest_sees_such_a_tree_through_virtio() -> None:
    driver = Driver(Virtio9P("objects", Session(ObjectTree({"hello": b"hi"}))))
    (queue,) = driver.start()
    said = []
    for tag, message in enumerate(
        (
            ninep.Tversion(8192, ninep.VERSION),
            ninep.Tattach(0, ninep.NOFID, b"", b"", 0),
            ninep.Twalk(0, 1, (b"hello",)),
            ninep.Tlopen(1, os.O_RDONLY),
            ninep.Tread(1, 0, 100),
        )
    ):
        queue.add([ninep.encode(message, tag)], [200])
        queue.kick()
        (reply,) = queue.collect()
        said.append(ninep.decode(reply)[1])
    assert said[-1] == ninep.Rread(b"hi")
