"""What Linux's file systems do and file servers often do not; docs/semantics.md has the table.

Each on a shared directory and on a private tree, where the file lies below and where it lies in the
write tree. Where it can be, the host's own behaviour is asked for, not remembered.
"""

import errno
import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_conformance import INNER, KINDS, Kind, Served, on_disk
from tests.test_session import OWN, connect
from tinyvmm import ninep
from tinyvmm.fileserver.host import HostTree
from tinyvmm.fileserver.tree import (
    AT_REMOVEDIR,
    SETATTR_ATIME,
    SETATTR_ATIME_SET,
    SETATTR_MODE,
    SETATTR_MTIME,
    SETATTR_MTIME_SET,
    SETATTR_SIZE,
    SETATTR_UID,
    Tree,
)
from tinyvmm.fileserver.union import open_tree

ROOT = Path(__file__).parent.parent


def make_merged(at: Path) -> tuple[Tree, list[bytes]]:
    """A union whose directories are in both trees; what is in them is below."""
    on_disk(at / "files")
    (at / "writes" / "dir" / "sub").mkdir(parents=True)
    return open_tree([("/", str(at / "files"))], [("/", str(at / "writes"))]), []


TREES = {
    name: KINDS[name] for name in ("host", "union, files below", "union, files in the write tree")
} | {"union, directories in both": Kind(make_merged, writable=True)}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts for other users, which takes root")
USER = 1000
U64 = (1 << 64) - 1
HERE = 0  # the fid of the directory that the files are in


@pytest.fixture(params=TREES)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    made = Served(TREES[request.param], tmp_path)
    yield made
    made.client.session.close()
    made.tree.close()


def setattr_of(fid: int, valid: int, mode: int = 0, size: int = 0) -> ninep.Tsetattr:
    return ninep.Tsetattr(fid, valid, mode, 0, 0, size, 0, 0, 0, 0)


def set_xattr(served: Served, fid: int, name: bytes, value: bytes) -> None:
    """Set an attribute through a clone of `fid`; as v9fs does, remove it if there is no value."""
    served.client.walk(fid, 30)
    flags = 0 if value else os.XATTR_REPLACE
    served.client.ask(ninep.Txattrcreate(30, name, len(value), flags), ninep.Rxattrcreate)
    if value:
        served.client.write(30, value)
    served.client.clunk(30)


def get_xattr(served: Served, fid: int, name: bytes) -> bytes:
    size = served.client.ask(ninep.Txattrwalk(fid, 31, name), ninep.Rxattrwalk).size
    value = served.client.read(31, 0, size) if size else b""
    served.client.clunk(31)
    return value


def check_whole(served: Served, fid: int, beside: bytes) -> None:
    """Everything that can be done to an open file can be done to this one, unlinked or renamed."""
    client = served.client
    assert client.read(fid, 0, 4096) == INNER[:4096]
    assert client.write(fid, b"changed", 10) == 7
    assert client.read(fid, 8, 12) == INNER[8:10] + b"changed" + INNER[17:20]
    client.ask(setattr_of(fid, SETATTR_SIZE, size=20), ninep.Rsetattr)
    client.ask(setattr_of(fid, SETATTR_MODE, mode=0o604), ninep.Rsetattr)
    set_xattr(served, fid, b"user.one", b"value")
    assert get_xattr(served, fid, b"user.one") == b"value"
    set_xattr(served, fid, b"user.one", b"")  # takes it away
    client.fails(ninep.Txattrwalk(fid, 31, b"user.one"), errno.ENODATA)
    found = client.getattr(fid)
    assert (found.size, stat.S_IMODE(found.mode)) == (20, 0o604)
    client.ask(ninep.Tfsync(fid, 0), ninep.Rfsync)
    client.ask(ninep.Tfsync(fid, 1), ninep.Rfsync)
    assert served.content("dir/other") == beside


def test_an_unlinked_file_is_whole_for_who_has_it_open(served: Served) -> None:
    fid, directory = served.open("dir/inner", os.O_RDWR), served.walk("dir")
    served.client.ask(ninep.Tunlinkat(directory, b"inner", 0), ninep.Runlinkat)
    check_whole(served, fid, b"o")
    assert served.client.getattr(fid).nlink == 0
    assert b"inner" not in served.listing("dir")


def test_a_renamed_file_is_the_same_and_its_old_name_anothers(served: Served) -> None:
    client = served.client
    fid, directory = served.open("dir/inner", os.O_RDWR), served.walk("dir")
    client.ask(ninep.Trenameat(directory, b"inner", HERE, b"elsewhere"), ninep.Rrenameat)
    new = served.walk("dir")
    create = ninep.Tlcreate(new, b"inner", os.O_RDWR, 0o600, OWN)
    assert client.ask(create, ninep.Rlcreate).qid.path != client.getattr(fid).qid.path
    client.write(new, b"successor")
    check_whole(served, fid, b"o")
    assert served.content("dir/inner") == b"successor"
    assert served.qid("elsewhere").path == client.getattr(fid).qid.path


def test_a_replaced_file_is_whole_for_who_has_it_open(served: Served) -> None:
    fid, directory = served.open("dir/inner", os.O_RDWR), served.walk("dir")
    rename = ninep.Trenameat(HERE, b"hello", directory, b"inner")
    served.client.ask(rename, ninep.Rrenameat)
    check_whole(served, fid, b"o")
    assert served.content("dir/inner") == b"hi\n"
    assert b"hello" not in served.listing()


def test_what_is_held_below_a_renamed_directory_goes_along(served: Served) -> None:
    client = served.client
    client.ask(ninep.Tmkdir(HERE, b"new", 0o755, OWN), ninep.Rmkdir)
    file, sub = served.open("dir/inner", os.O_RDWR), served.walk("dir/sub")
    listing = served.open("dir")
    first = client.entries(listing)
    client.ask(ninep.Trenameat(HERE, b"dir", HERE, b"moved"), ninep.Rrenameat)
    assert client.write(file, b"after") == 5
    assert served.content("moved/inner") == b"after" + INNER[5:]
    client.ask(ninep.Tmkdir(sub, b"in it", 0o755, OWN), ninep.Rmkdir)
    assert b"in it" in served.listing("moved/sub")
    assert client.entries(listing, first[0].offset) == first[1:]
    client.fails(ninep.Twalk(HERE, 32, (b"dir",)), errno.ENOENT)


def test_a_file_created_read_only_can_be_written_by_its_creator(served: Served) -> None:
    fid = served.walk("dir")
    create = ninep.Tlcreate(fid, b"locked", os.O_WRONLY, 0o444, OWN)
    served.client.ask(create, ninep.Rlcreate)
    assert served.client.write(fid, b"once") == 4
    assert served.content("dir/locked") == b"once"
    assert stat.S_IMODE(served.client.getattr(fid).mode) == 0o444


def test_modes_change_on_files_of_every_kind_and_from_nothing(served: Served) -> None:
    client = served.client
    kinds = {b"fifo": stat.S_IFIFO, b"socket": stat.S_IFSOCK, b"file": stat.S_IFREG}
    for name, kind in kinds.items():
        client.ask(ninep.Tmknod(HERE, name, kind | 0o600, 0, 0, OWN), ninep.Rmknod)
        fid = served.walk(name.decode())
        for mode in (0, 0o777, 0o4755 if kind == stat.S_IFREG else 0o222):
            client.ask(setattr_of(fid, SETATTR_MODE, mode=mode), ninep.Rsetattr)
            assert client.getattr(fid).mode == kind | mode
    fid = served.walk("dir/inner")
    client.ask(setattr_of(fid, SETATTR_MODE, mode=0), ninep.Rsetattr)
    client.ask(setattr_of(fid, SETATTR_MODE, mode=0o640), ninep.Rsetattr)
    assert served.content("dir/inner") == INNER


@pytest.mark.parametrize("seconds", [-5, -(1 << 30), 0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) + 5])
def test_times_have_nanoseconds_and_go_from_before_1970_to_past_2038(
    served: Served, seconds: int
) -> None:
    fid = served.walk("dir/inner")
    valid = SETATTR_ATIME | SETATTR_ATIME_SET | SETATTR_MTIME | SETATTR_MTIME_SET
    times = (seconds & U64, 999_999_999, seconds + 1 & U64, 1)
    served.client.ask(ninep.Tsetattr(fid, valid, 0, 0, 0, 0, *times), ninep.Rsetattr)
    found = served.client.getattr(fid)
    assert (found.atime_sec, found.atime_nsec, found.mtime_sec, found.mtime_nsec) == times


def test_a_file_past_four_gigabytes_is_mostly_a_hole(served: Served) -> None:
    client = served.client
    fid = served.open("dir/inner", os.O_RDWR)
    end = (5 << 30) + 3
    assert client.write(fid, b"end", end - 3) == 3
    found = client.getattr(fid)
    assert found.size == end
    assert found.blocks * 512 < 1 << 20
    assert client.read(fid, (1 << 32) - 5, 10) == bytes(10)
    assert client.read(fid, end - 5, 100) == b"\0\0end"
    assert client.read(fid, 0, 100) == INNER[:100]


def test_a_directory_removed_while_open_is_empty_and_takes_nothing(served: Served) -> None:
    client = served.client
    held, listing = served.walk("dir/sub"), served.open("dir/sub")
    directory = served.walk("dir")
    client.ask(ninep.Tunlinkat(directory, b"sub", AT_REMOVEDIR), ninep.Runlinkat)
    left = client.raw(ninep.Treaddir(listing, 0, 1000))
    if isinstance(left, ninep.Rreaddir):
        entries = ninep.decode_records(ninep.Dirent, bytes(left.data))  # type: ignore[arg-type] # bytes
        assert {entry.name for entry in entries} <= {b".", b".."}
    else:
        assert isinstance(left, ninep.Rlerror)
        assert left.ecode == errno.ENOENT
    client.fails(ninep.Tmkdir(held, b"late", 0o755, OWN), errno.ENOENT)
    # And a new one of the same name is another.
    before = client.getattr(held).qid.path
    client.ask(ninep.Tmkdir(directory, b"sub", 0o755, OWN), ninep.Rmkdir)
    assert served.qid("dir/sub").path != before


def test_everything_is_removed_while_it_is_listed(served: Served) -> None:
    client = served.client
    names = {b"%03d" % number for number in range(200)}
    sub = served.walk("dir/sub")
    for name in names:
        client.ask(ninep.Tmknod(sub, name, stat.S_IFREG | 0o600, 0, 0, OWN), ninep.Rmknod)
    listing = served.open("dir/sub")
    offset, gone = 0, set()
    while entries := client.entries(listing, offset, 500):
        offset = entries[-1].offset
        for entry in entries:
            if entry.name not in {b".", b".."}:
                client.ask(ninep.Tunlinkat(sub, entry.name, 0), ninep.Runlinkat)
                gone.add(entry.name)
    assert gone == names
    client.ask(ninep.Tunlinkat(served.walk("dir"), b"sub", AT_REMOVEDIR), ninep.Runlinkat)


def test_a_hundred_thousand_entries_are_listed_once_each(tmp_path: Path) -> None:
    names = {b"entry-%d" % number for number in range(100_000)}
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for name in names:
        os.mknod(name, dir_fd=directory)
    os.close(directory)
    tree = HostTree(str(tmp_path))
    client = connect(tree)
    client.walk(0, 1)
    client.open(1)
    found: list[bytes] = []
    offset = 0
    while entries := client.entries(1, offset, 8000):
        found += [entry.name for entry in entries]
        offset = entries[-1].offset
    client.session.close()
    tree.close()
    assert len(found) == len(names) + 2
    assert set(found) == names | {b".", b".."}


@needs_root
def test_files_of_two_file_systems_in_one_tree_do_not_collide(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "test", place], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.decode()}")
    try:
        for place in places:
            (place / "file").write_bytes(b"")
        assert len({(place / "file").stat().st_ino for place in places}) == 1
        tree = HostTree(str(tmp_path))
        client = connect(tree)
        paths = {
            client.walk(0, fid, name, b"file").wqid[1].path
            for fid, name in enumerate((b"one", b"two"), 1)
        }
        client.session.close()
        tree.close()
        assert len(paths) == 2
    finally:
        for place in places:
            subprocess.run(["umount", "-l", place], check=True)


ACL = struct.pack("<I" + "HHI" * 5, 2,  # POSIX_ACL_XATTR_VERSION, <linux/posix_acl_xattr.h>
                  1, 6, 0xFFFF_FFFF, 2, 7, USER, 4, 4, 0xFFFF_FFFF, 16, 7, 0xFFFF_FFFF,
                  32, 0, 0xFFFF_FFFF)  # fmt: skip


def test_posix_acls_are_attributes_that_change_the_mode(served: Served, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(b"")
    probe.chmod(0o640)
    try:
        os.setxattr(probe, "system.posix_acl_access", ACL)
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no ACLs: {error.strerror}")
    fid = served.walk("dir/inner")
    served.client.ask(setattr_of(fid, SETATTR_MODE, mode=0o640), ninep.Rsetattr)
    set_xattr(served, fid, b"system.posix_acl_access", ACL)
    assert get_xattr(served, fid, b"system.posix_acl_access") == ACL
    mode = served.client.getattr(fid).mode
    assert stat.S_IMODE(mode) == stat.S_IMODE(probe.stat().st_mode) == 0o670


@needs_root
def test_a_users_write_or_truncation_clears_set_id_bits_and_roots_does_not(
    served: Served,
) -> None:
    client = served.client
    client.attach(33, USER)
    names = [b"dir", b"inner"]
    walker = HERE

    def prepare(mode: int) -> int:
        owner = served.walk("dir/inner")
        client.ask(setattr_of(owner, SETATTR_MODE, mode=mode), ninep.Rsetattr)
        return owner

    def mode_after(root: int, how: str) -> int:
        client.walk(root, 34, *names)
        flags = os.O_RDONLY if how == "setattr" else os.O_RDWR
        client.open(34, flags | (os.O_TRUNC if how == "open" else 0))
        if how == "write":
            client.write(34, b"x")
        elif how == "setattr":
            client.ask(setattr_of(34, SETATTR_SIZE, size=3), ninep.Rsetattr)
        found = client.getattr(34).mode
        client.clunk(34)
        return stat.S_IMODE(found)

    for how in ("write", "setattr", "open"):
        prepare(0o6755)
        assert mode_after(33, how) == 0o755
        prepare(0o6745)  # not executable by the group: mandatory locking, once
        assert mode_after(33, how) == 0o2745
        prepare(0o6755)
        assert mode_after(walker, how) == 0o6755


AS_A_USER = """
import os, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[1])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
fd = os.open("made", os.O_CREAT | os.O_RDWR, 0o600)
os.fchmod(fd, 0o4755)
os.write(fd, b"x")
print(oct(os.fstat(fd).st_mode))
os.fchmod(fd, 0o6755)
os.write(fd, b"x")
print(oct(os.fstat(fd).st_mode))
"""


@needs_root
def test_set_id_bits_do_not_outlive_a_write_by_who_set_them(served: Served, tmp_path: Path) -> None:
    there = tmp_path / "plain"
    there.mkdir()
    os.chown(there, USER, USER)
    ran = subprocess.run(
        [sys.executable, "-c", AS_A_USER, str(USER)],
        cwd=there,
        capture_output=True,
        check=True,
        text=True,
    )
    client = served.client
    client.attach(33, USER)
    found = []
    create = ninep.Tlcreate(33, b"made", os.O_RDWR, 0o4755, USER)
    client.ask(create, ninep.Rlcreate)
    for mode in (0o4755, 0o6755):
        if mode == 0o6755:  # the first was the mode it was made with
            other = served.walk("made")
            client.ask(setattr_of(other, SETATTR_MODE, mode=mode), ninep.Rsetattr)
            assert stat.S_IMODE(client.getattr(33).mode) == mode
        client.write(33, b"x")
        found.append(oct(client.getattr(33).mode))
    assert found == ran.stdout.split() == ["0o100755"] * 2


def default_acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY_ELSE = default_acl((1, 7, 0xFFFF_FFFF), (4, 5, 0xFFFF_FFFF), (32, 0, 0xFFFF_FFFF))
ONE_MORE_USER = default_acl(
    (1, 7, 0xFFFF_FFFF),
    (2, 7, USER),
    (4, 5, 0xFFFF_FFFF),
    (16, 7, 0xFFFF_FFFF),
    (32, 0, 0xFFFF_FFFF),
)


@pytest.mark.parametrize("acl", [NOBODY_ELSE, ONE_MORE_USER], ids=["three", "extended"])
@pytest.mark.parametrize("again", [False, True], ids=["new name", "a removed file's name"])
def test_what_is_made_inherits_the_default_acl_of_its_directory_as_on_the_host(
    served: Served, tmp_path: Path, acl: bytes, again: bool
) -> None:
    """Whatever our umask is; and names below a whiteout are no exception."""
    client, plain = served.client, tmp_path / "plain"
    plain.mkdir()
    try:
        os.setxattr(plain, "system.posix_acl_default", acl)
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no ACLs: {error.strerror}")
    set_xattr(served, served.walk("dir"), b"system.posix_acl_default", acl)
    file, directory = ("inner", "sub") if again else ("file", "directory")
    if again:
        client.ask(ninep.Tunlinkat(served.walk("dir"), b"inner", 0), ninep.Runlinkat)
        client.ask(ninep.Tunlinkat(served.walk("dir"), b"sub", AT_REMOVEDIR), ninep.Runlinkat)
    os.close(os.open(plain / file, os.O_CREAT | os.O_WRONLY, 0o666))
    (plain / directory).mkdir(0o777)
    create = ninep.Tlcreate(served.walk("dir"), os.fsencode(file), os.O_RDWR, 0o666, OWN)
    client.ask(create, ninep.Rlcreate)
    made = ninep.Tmkdir(served.walk("dir"), os.fsencode(directory), 0o777, OWN)
    client.ask(made, ninep.Rmkdir)
    for name in (file, directory):
        fid = served.walk(f"dir/{name}")
        assert oct(client.getattr(fid).mode) == oct((plain / name).stat().st_mode)
        for kind in ("system.posix_acl_access", "system.posix_acl_default"):
            if kind in os.listxattr(plain / name):
                assert get_xattr(served, fid, kind.encode()) == os.getxattr(plain / name, kind)
            else:
                client.fails(ninep.Txattrwalk(fid, 31, kind.encode()), errno.ENODATA)


def test_the_attributes_of_a_symbolic_link_are_its_own(served: Served) -> None:
    client = served.client
    link, target = served.walk("link"), served.walk("dir/inner")
    before = client.getattr(target)
    times = SETATTR_MTIME | SETATTR_MTIME_SET
    client.ask(ninep.Tsetattr(link, times, 0, 0, 0, 0, 0, 0, 5, 6), ninep.Rsetattr)
    if os.geteuid() == 0:
        client.ask(ninep.Tsetattr(link, SETATTR_UID, 0, 7, 0, 0, 0, 0, 0, 0), ninep.Rsetattr)
        assert client.getattr(link).uid == 7
    client.fails(setattr_of(link, SETATTR_SIZE, size=1), errno.EINVAL)
    client.raw(setattr_of(link, SETATTR_MODE, mode=0o700))  # kernels differ in what they say
    assert (client.getattr(link).mtime_sec, client.getattr(link).mtime_nsec) == (5, 6)
    after = client.getattr(target)
    for field in ("mode", "uid", "mtime_sec", "mtime_nsec", "size", "ctime_sec", "ctime_nsec"):
        assert getattr(after, field) == getattr(before, field)


def test_two_names_are_one_file_until_the_last_is_gone(served: Served) -> None:
    client = served.client
    client.ask(ninep.Tlink(HERE, served.walk("dir/inner"), b"second"), ninep.Rlink)
    first, second = served.open("dir/inner", os.O_RDWR), served.open("second", os.O_RDWR)
    assert client.getattr(first) == client.getattr(second)
    assert client.getattr(first).nlink == 2
    client.write(first, b"by the first")
    assert client.read(second, 0, 12) == b"by the first"
    client.ask(ninep.Tunlinkat(served.walk("dir"), b"inner", 0), ninep.Runlinkat)
    assert client.getattr(first).nlink == client.getattr(second).nlink == 1
    client.write(first, b"once more")
    assert served.content("second")[:9] == b"once more"


def test_what_stays_is_listed_once_while_others_come_and_go(served: Served) -> None:
    """Those that stay began below, were copied up, or are new, as the tree has it."""
    client, sub = served.client, served.walk("dir/sub")
    make: Callable[[bytes], object] = lambda name: client.ask(  # noqa: E731 - a sentence of its own
        ninep.Tmknod(sub, name, stat.S_IFREG | 0o600, 0, 0, OWN), ninep.Rmknod
    )
    stay, go = [{b"%s%03d" % (word, at) for at in range(100)} for word in (b"stay", b"go")]
    for name in stay | go:
        make(name)
    listing = served.open("dir/sub")
    found: list[bytes] = []
    while entries := client.entries(listing, len(found), 400):
        found += [entry.name for entry in entries]
        if go:
            client.ask(ninep.Tunlinkat(sub, go.pop(), 0), ninep.Runlinkat)
        make(b"new%d" % len(found))
        name = found[-1]
        if name in stay:  # touched, which would copy it up
            fid = served.walk(f"dir/sub/{name.decode()}")
            client.ask(setattr_of(fid, SETATTR_MODE, mode=0o640), ninep.Rsetattr)
    assert stay <= set(found)
    assert len(set(found)) == len(found)


def errors_of(act: Callable[[str, tuple[str, ...]], None]) -> list[tuple[object, ...]]:
    """What `act` says to what cannot be done, and to some that can; each on what the last left."""
    script = [
        ("mkdir", "dir"), ("mkdir", "hello/x"), ("mkdir", "none/x"), ("mkdir", "dir/sub/x"),
        ("rmdir", "dir"), ("rmdir", "hello"), ("rmdir", "link"), ("rmdir", "none"),
        ("unlink", "dir"), ("unlink", "none"), ("unlink", "hello/x"),
        ("rename", "hello", "dir"), ("rename", "dir", "hello"), ("rename", "dir", "dir/sub/y"),
        ("rename", "dir/sub", "dir"), ("rename", "none", "other"), ("rename", "hello", "none/x"),
        ("rename", "dir/sub/x", "dir/sub"), ("rename", "dir", "dir"), ("rename", "hello", "hello"),
        ("link", "hello", "dir"), ("link", "dir", "dir2"), ("link", "hello", "hello"),
        ("link", "hello", "dir/sub/hello"), ("rename", "hello", "dir/sub/hello"),
        ("link", "none", "x"), ("rmdir", "dir/sub"), ("symlink", "dir"), ("symlink", "link"),
        ("rename", "link", "empty"), ("unlink", "dir/sub/hello"), ("unlink", "hello"),
        ("rmdir", "dir/sub/x"), ("mkdir", "dir3"), ("rename", "dir", "dir3"),
        ("rename", "dir3/sub", "dir3/inner"), ("unlink", "dir3/inner"),
        ("rename", "dir3/sub", "dir3/inner"), ("mkdir", "n" * 256), ("rename", "dir3", "n" * 256),
    ]  # fmt: skip
    said: list[tuple[object, ...]] = []
    for kind, *paths in script:
        try:
            act(kind, tuple(paths))
        except OSError as error:
            said.append((kind, *paths, errno.errorcode[error.errno or 0]))
        else:
            said.append((kind, *paths, "done"))
    return said


def test_what_cannot_be_done_fails_as_on_the_host(served: Served, tmp_path: Path) -> None:
    client, plain = served.client, on_disk(tmp_path / "plain")

    def on_the_host(kind: str, paths: tuple[str, ...]) -> None:
        where = [plain / path for path in paths]
        if kind == "symlink":
            where[0].symlink_to("anything")
        elif kind == "link":
            os.link(*where, follow_symlinks=False)
        else:
            getattr(os, kind)(*where)

    def ask(message: ninep.Message) -> ninep.Message:
        answer = client.raw(message)
        if isinstance(answer, ninep.Rlerror):
            raise OSError(answer.ecode, os.strerror(answer.ecode))
        return answer

    def fid_of(path: str) -> int:
        served.next += 1
        names = tuple(os.fsencode(name) for name in path.split("/") if name)
        answer = ask(ninep.Twalk(HERE, served.next, names))
        assert isinstance(answer, ninep.Rwalk)
        if len(answer.wqid) < len(names):
            is_file = answer.wqid and not answer.wqid[-1].type & ninep.QTDIR
            raise OSError(errno.ENOTDIR if is_file else errno.ENOENT, "walked part of the way")
        return served.next

    def by_message(kind: str, paths: tuple[str, ...]) -> None:
        target = fid_of(paths[0]) if kind == "link" else -1
        split = [os.path.split(path) for path in paths]
        (fid, name), *more = [(fid_of(above), os.fsencode(name)) for above, name in split]
        if kind == "mkdir":
            ask(ninep.Tmkdir(fid, name, 0o777, OWN))
        elif kind == "symlink":
            ask(ninep.Tsymlink(fid, name, b"anything", OWN))
        elif kind == "link":
            ask(ninep.Tlink(more[0][0], target, more[0][1]))
        elif kind == "rename":
            ask(ninep.Trenameat(fid, name, *more[0]))
        else:
            ask(ninep.Tunlinkat(fid, name, AT_REMOVEDIR if kind == "rmdir" else 0))

    assert errors_of(by_message) == errors_of(on_the_host)


@needs_root
def test_several_users_of_one_mount_own_what_they_create(served: Served) -> None:
    client = served.client
    for fid, uid in ((33, USER), (34, USER + 1)):
        client.attach(fid, uid)
        create = ninep.Tlcreate(fid, b"of %d" % uid, os.O_RDWR, 0o600, uid)
        client.ask(create, ninep.Rlcreate)
        found = client.getattr(fid)
        assert (found.uid, found.gid) == (uid, uid)


def test_a_number_used_again_by_the_host_is_another_version(tmp_path: Path) -> None:
    tree = HostTree(str(tmp_path))
    client = connect(tree)
    seen: dict[int, ninep.Qid] = {}  # by inode number
    pairs = []
    for _ in range(100):
        (tmp_path / "file").write_bytes(b"")
        inode = (tmp_path / "file").stat().st_ino
        client.walk(0, 1, b"file")
        qid = client.getattr(1).qid
        if inode in seen:
            pairs.append((seen[inode], qid))
        seen[inode] = qid
        client.clunk(1)
        (tmp_path / "file").unlink()
    client.session.close()
    tree.close()
    if not pairs:
        pytest.skip("this file system does not use inode numbers again soon")
    assert all(old != new for old, new in pairs)


def test_the_table_names_tests_that_there_are() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/semantics.md").read_text())
    assert len(named) > 30
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)
