"""What every tree must do, whatever it is made of: one suite, over one session each.

Each tree holds the same files. Those that can be written take the second half of the suite too;
the others must refuse it, and change nothing.
"""

import errno
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_session import ME, OWN, connect
from tinyvmm import ninep
from tinyvmm.fileserver.entry import Symlink
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.objects import ObjectTree
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    SETATTR_ATIME,
    SETATTR_ATIME_SET,
    SETATTR_MODE,
    SETATTR_MTIME,
    SETATTR_MTIME_SET,
    SETATTR_SIZE,
    Tree,
)
from tinyvmm.fileserver.union import open_tree
from tinyvmm.fileserver.watched import WatchedTree
from tinyvmm.ninep import Message, Qid

INNER = bytes(range(256)) * 40
FILES = {"hello": b"hi\n", "empty": b"", "dir/inner": INNER, "dir/other": b"o"}
TARGET = "dir/inner"
TOP = {b"hello", b"empty", b"dir", b"link"}


def on_disk(at: Path) -> Path:
    (at / "dir" / "sub").mkdir(parents=True)
    for name, content in FILES.items():
        (at / name).write_bytes(content)
    (at / "link").symlink_to(TARGET)
    return at


def objects() -> dict[str, object]:
    directory: dict[str, object] = {"inner": INNER, "other": "o", "sub": {}}
    return {"hello": b"hi\n", "empty": "", "dir": directory, "link": Symlink(TARGET)}


def zipped() -> zipfile.ZipFile:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("dir/sub/", b"")
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, TARGET)
    return zipfile.ZipFile(packed)


def tarred(at: Path) -> tarfile.TarFile:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(on_disk(at / "files"), "")
    packed.seek(0)
    return tarfile.open(fileobj=packed)


def called() -> dict[str, object]:
    """Files that are made when they are opened; all at once, and in pieces."""
    given = objects()
    given["hello"] = lambda: "hi\n"
    inner = given["dir"]
    assert isinstance(inner, dict)
    inner["inner"] = lambda: (INNER[at : at + 1000] for at in range(0, len(INNER), 1000))
    return given


def make_host(at: Path) -> tuple[Tree, list[bytes]]:
    return HostTree(str(on_disk(at / "files"))), []


def make_private(at: Path) -> tuple[Tree, list[bytes]]:
    on_disk(at / "files")
    (at / "writes").mkdir()
    return open_tree([("/", str(at / "files"))], [("/", str(at / "writes"))]), []


def make_written(at: Path) -> tuple[Tree, list[bytes]]:
    (at / "nothing").mkdir()
    on_disk(at / "writes")
    return open_tree([("/", str(at / "nothing"))], [("/", str(at / "writes"))]), []


def make_readonly(at: Path) -> tuple[Tree, list[bytes]]:
    return open_tree([("/", str(on_disk(at / "files")))], []), []


def make_mounted(at: Path) -> tuple[Tree, list[bytes]]:
    return ObjectTree({"here": {"too": on_disk(at / "files")}}), [b"here", b"too"]


def make_mounted_writable(at: Path) -> tuple[Tree, list[bytes]]:
    given = {"here": {"too": on_disk(at / "files")}}
    return ObjectTree(given, writable=True), [b"here", b"too"]


def make_watched(at: Path) -> tuple[Tree, list[bytes]]:
    inner, names = make_private(at)
    watched = WatchedTree(inner, lambda _access: None)
    watched.close = inner.close  # type: ignore[method-assign]  # which is not its own to close
    return watched, names


class Kind(NamedTuple):
    """A way to make a tree: gives it, and the names that lead to the files."""

    make: Callable[[Path], tuple[Tree, list[bytes]]]
    writable: bool
    special: bool = True  # whether fifos and hard links can be made
    stream: bool = False  # whether contents come in order only


KINDS = {
    "host": Kind(make_host, writable=True),
    "union, files below": Kind(make_private, writable=True),
    "union, files in the write tree": Kind(make_written, writable=True),
    "read-only union": Kind(make_readonly, writable=False),
    "dict": Kind(lambda _: (ObjectTree(objects(), writable=True), []), True, special=False),
    "read-only dict": Kind(lambda _: (ObjectTree(objects()), []), writable=False),
    "functions": Kind(lambda _: (ObjectTree(called(), sized=True), []), False, stream=True),
    "zip": Kind(lambda _: (ObjectTree(zipped()), []), writable=False),
    "tar": Kind(lambda at: (ObjectTree(tarred(at)), []), writable=False),
    "directory in a dict": Kind(make_mounted, writable=False),
    "directory in a writable dict": Kind(make_mounted_writable, writable=True),
    "watched": Kind(make_watched, writable=True),
}
ALL = list(KINDS)
WRITABLE = [name for name, kind in KINDS.items() if kind.writable]
READONLY = [name for name, kind in KINDS.items() if not kind.writable]
HERE, AT = 0, 50  # fids: the files' directory, and the first that tests may use


class Served:
    """A tree in a session, and the client; fid HERE is where the files are."""

    def __init__(self, kind: Kind, at: Path) -> None:
        self.kind = kind
        self.tree, names = kind.make(at)
        self.client = connect(self.tree)
        if names:
            self.client.walk(0, 1, *names)
            self.client.clunk(0)
            self.client.walk(1, 0)
            self.client.clunk(1)
        self.next = AT

    def walk(self, path: str, start: int = HERE) -> int:
        """A new fid of `path`."""
        self.next += 1
        names = [os.fsencode(name) for name in path.split("/") if name]
        answer = self.client.walk(start, self.next, *names)
        assert len(answer.wqid) == len(names)
        return self.next

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        fid = self.walk(path)
        self.client.open(fid, flags)
        return fid

    def qid(self, path: str) -> Qid:
        fid = self.walk(path)
        try:
            return self.client.getattr(fid).qid
        finally:
            self.client.clunk(fid)

    def content(self, path: str) -> bytes:
        fid = self.open(path)
        found = b""
        while data := self.client.read(fid, len(found), 4000):
            found += data
        self.client.clunk(fid)
        return found

    def listing(self, path: str = "") -> dict[bytes, ninep.Dirent]:
        fid = self.open(path)
        found: list[ninep.Dirent] = []
        while more := self.client.entries(fid, found[-1].offset if found else 0, 300):
            found += more
        self.client.clunk(fid)
        assert len({entry.name for entry in found}) == len(found)
        return {entry.name: entry for entry in found}

    def fails(self, path: str, message: Callable[[int], Message], *numbers: int) -> None:
        """What `message` makes of a fid of `path` fails so."""
        fid = self.walk(path)
        self.client.fails(message(fid), *numbers)
        self.client.clunk(fid)


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    before = set(os.listdir("/proc/self/fd"))
    made = Served(KINDS[request.param], tmp_path)
    yield made
    made.client.session.close()
    made.tree.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


every_tree = pytest.mark.parametrize("served", ALL, indirect=True)
every_writable_tree = pytest.mark.parametrize("served", WRITABLE, indirect=True)
every_readonly_tree = pytest.mark.parametrize("served", READONLY, indirect=True)


# --- looking --------------------------------------------------------------------------------------


@every_tree
def test_a_file_is_what_it_is_however_it_is_asked(served: Served) -> None:
    listing = served.listing()
    assert set(listing) == TOP | {b".", b".."}
    qids = set()
    for name, kind in (("hello", 0), ("empty", 0), ("dir", ninep.QTDIR), ("link", 2)):
        fid = served.walk(name)
        attributes = served.client.getattr(fid)
        walked = served.client.walk(HERE, 40, name.encode()).wqid[0]
        served.client.clunk(40)
        served.client.clunk(fid)
        entry = listing[name.encode()]
        assert attributes.qid.type == walked.type == entry.qid.type == kind
        assert attributes.qid.path == walked.path == entry.qid.path
        assert entry.type == stat.S_IFMT(attributes.mode) >> 12
        assert attributes.nlink >= 1
        assert attributes.blksize > 0
        qids.add(entry.qid.path)
    assert len(qids) == 4
    assert listing[b"."].qid.path == served.qid("").path


@every_tree
def test_sizes_are_those_of_the_contents(served: Served) -> None:
    for name, content in (FILES | {"link": TARGET.encode()}).items():
        fid = served.walk(name)
        size = served.client.getattr(fid).size
        served.client.clunk(fid)
        if served.kind.stream and name == "dir/inner":
            assert size == 0  # nobody knows what a generator will give
        else:
            assert size == len(content), name


@every_tree
def test_contents_are_read_in_pieces_of_any_size_and_not_past_the_end(served: Served) -> None:
    for name, content in FILES.items():
        assert served.content(name) == content
        for count in (1, 7, 999, 4096):
            fid = served.open(name)
            offset = 0
            while data := served.client.read(fid, offset, count):
                assert data == content[offset : offset + len(data)]
                offset += max(len(data), 1) if count > 900 else len(data)
                if count < 900 and offset > 3 * count:
                    break
            served.client.clunk(fid)
        fid = served.open(name)
        assert served.client.read(fid, len(content) + 1) == b""
        assert served.client.read(fid, 1 << 62) == b""
        served.client.clunk(fid)


@every_tree
def test_contents_are_read_from_anywhere(served: Served) -> None:
    if served.kind.stream:
        fid = served.open("dir/inner")
        assert served.client.read(fid, 5000, 100) == INNER[5000:5100]
        served.client.fails(ninep.Tread(fid, 0, 100), errno.ESPIPE)
        served.client.clunk(fid)
        return
    fid = served.open("dir/inner")
    for offset in (9000, 17, 10_239, 0, 4095):
        assert served.client.read(fid, offset, 500) == INNER[offset : offset + 500]
    served.client.clunk(fid)


@every_tree
def test_a_listing_goes_on_from_every_cookie(served: Served) -> None:
    fid = served.open("")
    found = served.client.entries(fid)
    assert served.client.entries(fid, found[-1].offset) == []
    for index, entry in enumerate(found):
        assert served.client.entries(fid, entry.offset) == found[index + 1 :]
    assert served.client.entries(fid) == found
    served.client.clunk(fid)


@every_tree
def test_walks_go_as_far_as_there_are_files(served: Served) -> None:
    client = served.client
    assert len(client.walk(HERE, 41, b"dir", b"inner", b"further").wqid) == 2
    assert len(client.walk(HERE, 41, b"dir", b"nothing", b"further").wqid) == 1
    client.fails(ninep.Tgetattr(41, 0x7FF), errno.EBADF)
    client.fails(ninep.Twalk(HERE, 41, (b"nothing",)), errno.ENOENT)
    client.fails(ninep.Twalk(HERE, 41, (b"n" * 300,)), errno.ENAMETOOLONG, errno.ENOENT)
    fid = served.walk("hello")
    client.fails(ninep.Twalk(fid, 41, (b"further",)), errno.ENOTDIR)
    # A link is a file like any other: the client follows it.
    link = served.walk("link")
    client.fails(ninep.Twalk(link, 41, (b"further",)), errno.ENOTDIR)
    for left in (fid, link):
        client.clunk(left)


@every_tree
def test_dot_dot_leads_back(served: Served) -> None:
    back = served.walk("dir/sub/../..")
    assert served.client.getattr(back).qid.path == served.qid("").path
    served.client.clunk(back)
    root = served.client.attach(42).qid
    assert served.client.walk(42, 43, b"..", b"..").wqid[-1].path == root.path
    for fid in (42, 43):
        served.client.clunk(fid)


@every_tree
def test_what_is_asked_of_the_wrong_kind_of_file_fails(served: Served) -> None:
    directory, file = served.open("dir"), served.open("hello")
    served.client.fails(ninep.Tread(directory, 0, 10), errno.EISDIR)
    served.client.fails(ninep.Treaddir(file, 0, 1000), errno.ENOTDIR)
    served.client.clunk(directory)
    served.client.clunk(file)
    served.fails("hello", ninep.Treadlink, errno.EINVAL)
    served.fails("dir", ninep.Treadlink, errno.EINVAL)
    served.fails("link", lambda fid: ninep.Tlopen(fid, os.O_RDONLY), errno.ELOOP, errno.EOPNOTSUPP)
    served.fails("dir", lambda fid: ninep.Tlopen(fid, os.O_WRONLY), errno.EISDIR, errno.EROFS)
    served.fails("hello", lambda fid: ninep.Tread(fid, 0, 10), errno.EBADF)


@every_tree
def test_a_link_says_where_it_points(served: Served) -> None:
    fid = served.walk("link")
    assert served.client.ask(ninep.Treadlink(fid), ninep.Rreadlink).target == TARGET.encode()
    served.client.clunk(fid)


@every_tree
def test_fids_are_independent_and_gone_when_clunked(served: Served) -> None:
    one, two = served.open("hello"), served.open("hello")
    served.client.clunk(one)
    served.client.fails(ninep.Tread(one, 0, 10), errno.EBADF)
    assert served.client.read(two) == b"hi\n"
    clone = served.walk("", served.walk("dir"))
    assert served.client.walk(clone, 45, b"inner").wqid[0].path == served.qid("dir/inner").path


@every_tree
def test_the_file_system_and_attributes_that_are_not_there_can_be_asked_for(served: Served) -> None:
    about = served.client.ask(ninep.Tstatfs(HERE), ninep.Rstatfs)
    assert about.bsize > 0
    assert about.namelen == 255
    assert about.bavail <= about.bfree <= about.blocks
    fid = served.walk("hello")
    missing = ninep.Txattrwalk(fid, 46, b"user.missing")
    served.client.fails(missing, errno.ENODATA, errno.EOPNOTSUPP)
    served.client.clunk(fid)


# --- changing -------------------------------------------------------------------------------------


@every_writable_tree
def test_what_is_written_is_read_by_everybody(served: Served) -> None:
    client = served.client
    file, reader = served.open("dir/inner", os.O_RDWR), served.open("dir/inner")
    assert client.write(file, b"WRITTEN", 100) == 7
    assert client.write(file, b"beyond", len(INNER) + 10) == 6
    expected = INNER[:100] + b"WRITTEN" + INNER[107:] + bytes(10) + b"beyond"
    for fid in (file, reader):
        assert client.read(fid, 90, 30) == expected[90:120]
        assert client.read(fid, len(INNER) - 5, 100) == expected[len(INNER) - 5 :]
    size = ninep.Tsetattr(file, SETATTR_SIZE, 0, 0, 0, 105, 0, 0, 0, 0)
    client.ask(size, ninep.Rsetattr)
    assert client.getattr(reader).size == 105
    assert served.content("dir/inner") == expected[:105]
    client.ask(ninep.Tfsync(file, 0), ninep.Rfsync)


@every_writable_tree
def test_files_are_created_renamed_replaced_and_removed(served: Served) -> None:
    client = served.client
    fid = served.walk("dir")
    create = ninep.Tlcreate(fid, b"new", os.O_RDWR | os.O_EXCL, 0o444, OWN)
    made = client.ask(create, ninep.Rlcreate).qid
    assert client.write(fid, b"as new") == 6  # whatever its mode
    assert served.qid("dir/new").path == made.path
    assert b"new" in served.listing("dir")
    directory = served.walk("dir")
    again = ninep.Tlcreate(directory, b"new", os.O_RDWR | os.O_EXCL, 0o444, OWN)
    client.fails(again, errno.EEXIST)

    replaced = served.open("dir/other")
    rename = ninep.Trenameat(directory, b"new", directory, b"other")
    client.ask(rename, ninep.Rrenameat)
    assert set(served.listing("dir")) == {b".", b"..", b"inner", b"other", b"sub"}
    assert client.read(replaced) == b"o"  # open as it was
    assert client.read(fid) == b"as new"  # and so is what took its place
    assert served.qid("dir/other").path == made.path
    assert served.content("dir/other") == b"as new"

    client.ask(ninep.Tunlinkat(directory, b"other", 0), ninep.Runlinkat)
    client.fails(ninep.Tunlinkat(directory, b"other", 0), errno.ENOENT)
    assert client.read(fid) == b"as new"
    assert client.write(fid, b"still", 1) == 5
    assert client.read(fid) == b"astill"
    assert client.getattr(fid).nlink == 0
    assert set(served.listing("dir")) == {b".", b"..", b"inner", b"sub"}


@every_writable_tree
def test_directories_are_made_moved_with_what_is_in_them_and_removed_when_empty(
    served: Served,
) -> None:
    client = served.client
    made = client.ask(ninep.Tmkdir(HERE, b"made", 0o750, OWN), ninep.Rmkdir).qid
    assert made.type == ninep.QTDIR
    assert served.qid("made").path == made.path
    inside, held = served.walk("dir/sub"), served.walk("dir/inner")
    made_fid = served.walk("made")
    client.ask(ninep.Trenameat(HERE, b"dir", made_fid, b"moved"), ninep.Rrenameat)
    assert served.content("made/moved/inner") == INNER
    assert client.walk(inside, 47, b"..", b"other").wqid[1].type == 0  # by its new place
    client.open(held)
    assert client.read(held, 0, 10) == INNER[:10]
    client.fails(ninep.Trenameat(HERE, b"made", inside, b"x"), errno.EINVAL)
    client.fails(ninep.Tunlinkat(HERE, b"made", AT_REMOVEDIR), errno.ENOTEMPTY, errno.EEXIST)
    client.fails(ninep.Tunlinkat(HERE, b"made", 0), errno.EISDIR)
    client.fails(ninep.Tunlinkat(HERE, b"hello", AT_REMOVEDIR), errno.ENOTDIR)
    client.fails(ninep.Trenameat(HERE, b"hello", HERE, b"made"), errno.EISDIR)
    client.fails(ninep.Trenameat(HERE, b"made", HERE, b"hello"), errno.ENOTDIR)
    moved = served.walk("made/moved")
    client.ask(ninep.Tunlinkat(moved, b"sub", AT_REMOVEDIR), ninep.Runlinkat)
    client.fails(ninep.Tlcreate(inside, b"late", os.O_RDWR, 0o600, OWN), errno.ENOENT)


@every_writable_tree
def test_links_hold_any_text_and_names_any_bytes_but_two(served: Served) -> None:
    client = served.client
    client.ask(ninep.Tsymlink(HERE, b"odd", b"../\xff\n/x//", OWN), ninep.Rsymlink)
    fid = served.walk("odd")
    assert client.ask(ninep.Treadlink(fid), ninep.Rreadlink).target == b"../\xff\n/x//"
    client.fails(ninep.Tsymlink(HERE, b"odd", b"again", OWN), errno.EEXIST)
    for name in (b"\xff\xfe\n", b"n" * 255):
        client.ask(ninep.Tmkdir(HERE, name, 0o755, OWN), ninep.Rmkdir)
        assert name in served.listing()
    client.fails(ninep.Tmkdir(HERE, b"n" * 256, 0o755, OWN), errno.ENAMETOOLONG)
    for name in (b"", b".", b"..", b"a/b", b"a\0b"):
        client.fails(ninep.Tmkdir(HERE, name, 0o755, OWN), errno.EINVAL, errno.EEXIST)


@every_writable_tree
def test_attributes_stay_as_they_are_set(served: Served) -> None:
    client = served.client
    fid = served.walk("dir/inner")
    valid = SETATTR_MODE | SETATTR_ATIME | SETATTR_ATIME_SET | SETATTR_MTIME | SETATTR_MTIME_SET
    atime, mtime = (5, 123_456_789), (1 << 33, 999_999_999)
    change = ninep.Tsetattr(fid, valid, 0o4751, ME, OWN, 0, *atime, *mtime)
    client.ask(change, ninep.Rsetattr)
    found = client.getattr(fid)
    assert stat.S_IMODE(found.mode) == 0o4751
    assert (found.atime_sec, found.atime_nsec) == atime
    assert (found.mtime_sec, found.mtime_nsec) == mtime
    assert served.content("dir/inner") == INNER


@every_writable_tree
def test_special_files_and_hard_links_are_made_or_refused_as_linux_does(served: Served) -> None:
    client = served.client
    fifo = ninep.Tmknod(HERE, b"fifo", stat.S_IFIFO | 0o600, 0, 0, OWN)
    file = served.walk("hello")
    link = ninep.Tlink(HERE, file, b"again")
    if not served.kind.special:
        client.fails(fifo, errno.EPERM)
        client.fails(link, errno.EPERM)
        assert set(served.listing()) == TOP | {b".", b".."}
        return
    client.ask(fifo, ninep.Rmknod)
    assert served.listing()[b"fifo"].type == stat.S_IFIFO >> 12
    served.fails("fifo", lambda fid: ninep.Tlopen(fid, os.O_RDONLY), errno.EOPNOTSUPP)
    client.ask(link, ninep.Rlink)
    assert served.qid("again").path == served.qid("hello").path
    writer = served.open("again", os.O_WRONLY)
    client.write(writer, b"HI")
    assert served.content("hello") == b"HI\n"


@every_readonly_tree
def test_what_cannot_be_written_says_so_and_stays_as_it_is(served: Served) -> None:
    client = served.client
    before = {path: set(served.listing(path)) for path in ("", "dir")}
    file, directory = served.walk("hello"), served.walk("dir")
    for message in (
        ninep.Tmkdir(HERE, b"new", 0o755, OWN),
        ninep.Tsymlink(HERE, b"new", b"x", OWN),
        ninep.Tmknod(HERE, b"new", stat.S_IFIFO | 0o600, 0, 0, OWN),
        ninep.Tlink(HERE, file, b"new"),
        ninep.Tunlinkat(HERE, b"hello", 0),
        ninep.Tunlinkat(directory, b"sub", AT_REMOVEDIR),
        ninep.Trenameat(HERE, b"hello", directory, b"new"),
        ninep.Tsetattr(file, 1, 0o600, 0, 0, 0, 0, 0, 0, 0),
        ninep.Tsetattr(file, SETATTR_SIZE, 0, 0, 0, 1, 0, 0, 0, 0),
        ninep.Tlopen(file, os.O_RDWR),
        ninep.Tlopen(file, os.O_RDONLY | os.O_TRUNC),
        ninep.Tlcreate(directory, b"new", os.O_RDWR, 0o600, OWN),
    ):
        client.fails(message, errno.EROFS)
    assert {path: set(served.listing(path)) for path in ("", "dir")} == before
    assert served.content("hello") == b"hi\n"
    reader = served.open("hello")
    client.fails(ninep.Twrite(reader, 0, b"x"), errno.EBADF)
